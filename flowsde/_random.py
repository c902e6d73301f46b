"""Counter-based random numbers: the same draw for the same key and counter, wherever it is made.

A draw is a pure function of a key, a step and a place, so that it does not depend on the batch it
stands in, on the order of the queries, on the number of steps or processes, or on the device. Keys
and steps go through SplitMix64 (Steele et al. 2014), whose 64 bits then key a 32-bit hash of the
place ("lowbias32", Wellons 2018): processors multiply 32-bit integers several times faster than
64-bit ones. Normals are made of two such words by Box-Muller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "BASE", "BROWNIAN", "CHOICE", "EXTRA", "LEVY", "PROBE", "SPLIT", "TREE", "Draw", "draw_seed",
    "keys", "keys_of", "normal", "rademacher", "roots", "uniform", "widest", "word",
]  # fmt: skip

_GOLDEN = 0x9E3779B97F4A7C15
Word = TypeVar("Word", int, Tensor)  # 64 bits, signed
Draw = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]  # ``normal``, or the same compiled
# streams of one seed that never meet
BROWNIAN, PROBE, BASE, LEVY, SPLIT, EXTRA, TREE, CHOICE = range(8)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _word(x: int) -> int:
    """The signed number with these 32 bits."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def _shift(x: Word, bits: int) -> Word:
    """Logical right shift of signed words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(x: Word) -> Word:
    """What is left of x in 64 bits."""
    return x if isinstance(x, Tensor) else _signed(x % 2**64)


def _mix(x: Word) -> Word:
    """SplitMix64's finaliser."""
    x = _wrap(x + _signed(_GOLDEN))
    x = _wrap((x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9))
    x = _wrap((x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB))
    return x ^ _shift(x, 31)


def draw_seed(generator: torch.Generator) -> int:
    """One 63-bit seed, consumed from the caller's generator."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return int(seed)


def word(seed: int) -> int:
    """A seed of 64 bits, as torch's signed numbers hold it."""
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed has 64 bits, -2^63 to 2^64 - 1; got {seed}")
    return _wrap(seed)


def roots(seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """``(rows,)`` words that tell rows apart: from one seed, or from one seed a row."""
    if isinstance(seed, Tensor):
        if seed.shape not in ((), (rows,)) or seed.is_floating_point():
            raise ValueError(
                f"per-sample seeds have shape ({rows},) and an integer dtype, a seed for all is a "
                f"number or 0-d; got {tuple(seed.shape)} {seed.dtype}"
            )
        seed = seed.to(device=device, dtype=torch.int64)
        if seed.ndim:
            return seed
        start: int | Tensor = _mix(seed)
    else:
        start = _mix(word(seed))
    return torch.arange(rows, dtype=torch.int64, device=device) + start


def keys_of(root: Tensor, stream: int | Tensor) -> Tensor:
    """Keys of the rows with these roots; streams are independent."""
    return _mix(_mix(root) + stream)


def keys(seed: int | Tensor, rows: int, device: torch.device, stream: int) -> Tensor:
    """``(rows,)`` keys: from one seed, or from one seed a row; streams are independent."""
    return keys_of(roots(seed, rows, device), stream)


def widest(device: torch.device) -> torch.dtype:
    """The most precise floats of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _fold(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits), in place; the shift is that of unsigned words."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _words(key: Tensor, steps: Tensor, places: Tensor) -> Tensor:
    """32 random bits for each place, ``(*places.shape, len(steps), rows)``.

    Args:
        key: ``(rows,)`` keys.
        steps: int64 counters, ``(n,)``, or ``(n, rows)`` where every row has its own.
        places: int32 counters.
    """
    point = _mix(key + steps.reshape(len(steps), -1) * _signed(_GOLDEN))
    low, high = (point << 32 >> 32).to(torch.int32), (point >> 32).to(torch.int32)
    x = (places * _word(_GOLDEN >> 32))[..., None, None] + low
    x = _fold(_fold(x, 16).mul_(_word(0x7FEB352D)), 15).bitwise_xor_(high)
    return _fold(x.mul_(_word(0x846CA68B)), 16)


def normal(key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Standard normals of shape ``(len(steps), rows, size)``, none beyond 6.7.

    Args:
        key: ``(rows,)`` keys.
        steps: int64 counters, ``(n,)``, or ``(n, rows)`` where every row has its own.
        size: numbers per row and step.
        dtype: of the result, and of the arithmetic, but for float32 where the result is narrower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    places = torch.arange(size + size % 2, dtype=torch.int32, device=key.device)
    radius, angle = _words(key, steps, places.reshape(-1, 2).mT).to(wide)
    radius = radius.add_(0.5).abs_().mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle = angle.mul_(math.pi * 2.0**-31)
    pair = [x.mul_(radius).permute(1, 2, 0) for x in (angle.cos(), angle.sin_())]
    return torch.stack(pair, -1).flatten(-2)[..., :size].to(dtype)


def rademacher(key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Signs of shape ``(len(steps), rows, size)``, +1 and -1 with equal probability."""
    places = torch.arange(size, dtype=torch.int32, device=key.device)
    signs = (_words(key, steps, places) >> 31).to(dtype) * 2.0 + 1.0
    return signs.permute(1, 2, 0).contiguous()


def uniform(key: Tensor, steps: Tensor, size: int) -> Tensor:
    """Uniform numbers of shape ``(len(steps), rows, size)``, in the device's most precise floats:
    none of them is 0 or 1.
    """
    wide = widest(key.device)
    digits = 52 if wide is torch.float64 else 23
    places = torch.arange(2 * size, dtype=torch.int32, device=key.device).reshape(2, size)
    high, low = _words(key, steps, places).long()
    bits = (high << 32).bitwise_or_(low.bitwise_and_(0xFFFFFFFF))
    numbers = (_shift(bits, 64 - digits).to(wide) + 0.5) * 2.0**-digits
    return numbers.permute(1, 2, 0).contiguous()
