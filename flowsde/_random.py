"""Counter-based random numbers: the same draw for the same key and counter, wherever it is made.

Element (key, counter) is a pure function of two 64-bit integers, so that a draw does not depend on
the batch it stands in, on the order of the queries, on the number of steps or processes, or on the
device. The generator is Squares (Widynski 2020, arXiv 2004.06278) on torch's wrapping int64, keyed
through SplitMix64 (Steele et al. 2014), with Box-Muller on top.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "BASE", "BROWNIAN", "CHOICE", "EXTRA", "LEVY", "PROBE", "SPLIT", "TREE", "draw_seed", "keys",
    "keys_of", "normal", "rademacher", "roots", "uniform", "widest",
]  # fmt: skip

_LOW = 0xFFFFFFFF
# streams of one seed that never meet
BROWNIAN, PROBE, BASE, LEVY, SPLIT, EXTRA, TREE, CHOICE = range(8)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed tensor."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _squares(counter: Tensor, key: Tensor) -> Tensor:
    """Five rounds of squaring: 64 random bits for each counter."""

    def turned(x: Tensor) -> Tensor:
        return (x << 32).bitwise_or_((x >> 32).bitwise_and_(_LOW))

    y = counter * key
    z = y + key
    x = turned((y * y).add_(y))
    x = turned(x.mul_(x).add_(z))
    x = turned(x.mul_(x).add_(y))
    last = x.mul_(x).add_(z)
    x = turned(last)
    x = x.mul_(x).add_(y)
    return last.bitwise_xor_((x >> 32).bitwise_and_(_LOW))


def draw_seed(generator: torch.Generator) -> int:
    """One 63-bit seed, consumed from the caller's generator."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return int(seed)


def roots(seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """``(rows,)`` words that tell rows apart: from one seed, or from one seed a row."""
    if isinstance(seed, Tensor):
        if seed.shape != (rows,) or seed.is_floating_point():
            raise ValueError(
                f"per-sample seeds have shape ({rows},) and an integer dtype; got "
                f"{tuple(seed.shape)} {seed.dtype}"
            )
        return seed.to(device=device, dtype=torch.int64)
    start = torch.full((), _signed(seed % 2**64), dtype=torch.int64, device=device)
    return _mix(start) + torch.arange(rows, dtype=torch.int64, device=device)


def keys_of(root: Tensor, stream: int | Tensor) -> Tensor:
    """Keys of the rows with these roots; streams are independent."""
    return _mix(_mix(root) + stream) | 1


def keys(seed: int | Tensor, rows: int, device: torch.device, stream: int) -> Tensor:
    """``(rows,)`` keys: from one seed, or from one seed a row; streams are independent."""
    return keys_of(roots(seed, rows, device), stream)


def widest(device: torch.device) -> torch.dtype:
    """The most precise floats of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _bits(key: Tensor, steps: Tensor, width: int) -> Tensor:
    """``(len(steps), rows, width)`` words."""
    offsets = torch.arange(width, dtype=torch.int64, device=key.device)
    counter = (steps << 32).reshape(len(steps), -1, 1) + offsets
    return _squares(counter, key[:, None])


def normal(key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Standard normals of shape ``(len(steps), rows, size)``.

    Args:
        key: ``(rows,)`` keys.
        steps: int64 counters below 2^31, ``(n,)``, or ``(n, rows)`` where every row has its own.
        size: numbers per row and step.
        dtype: of the result; the arithmetic is float64 where the device has it.
    """
    wide = widest(key.device)
    bits = _bits(key, steps, (size + 1) // 2)
    radius = (bits & _LOW).to(wide).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = _shift(bits, 32).to(wide).mul_(2.0**-32).mul_(2.0 * math.pi)
    pair = torch.stack((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=-1)
    return pair.flatten(-2)[..., :size].to(dtype)


def rademacher(key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Signs of shape ``(len(steps), rows, size)``, +1 and -1 with equal probability."""
    return (_bits(key, steps, size) >> 63).to(dtype) * 2.0 + 1.0


def uniform(key: Tensor, steps: Tensor, size: int) -> Tensor:
    """Uniform numbers of shape ``(len(steps), rows, size)``, in the device's most precise floats:
    none of them is 0 or 1.
    """
    wide = widest(key.device)
    digits = 52 if wide is torch.float64 else 23
    return (_shift(_bits(key, steps, size), 64 - digits).to(wide) + 0.5) * 2.0**-digits
