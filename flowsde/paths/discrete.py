"""Noise schedules given step by step."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import _random
from .._scalar import Scalar, atan, exp, sin, sqrt
from .schedule import Cosine, Schedule, ratio

__all__ = ["Discrete"]


@dataclass(frozen=True, repr=False)
class Discrete(Schedule):
    """A table of alpha^2 for T steps, as DDPMs are trained with: step i stands at t = (i + 1) / T.

    With alpha = cos a, sigma = sin a the square of the angle a is interpolated, from data at t = 0
    on, by a rational quadratic spline: it rises as the table does, has a continuous rate and an
    inverse in closed form, and reaches both ends, whether the last step keeps signal or not.

    Args:
        alphas_cumprod: alpha^2 of each step, falling, below 1; the last may be 0.

    Raises:
        ValueError: on any other table.

    Source: Ho et al. 2020, arXiv 2006.11239; Gregory and Delbourgo 1982.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        table = self._from_data
        falls = all(b < a for a, b in itertools.pairwise(table))
        if len(table) < 2 or not falls or not table[-1] >= 0.0:
            raise ValueError(
                "alphas_cumprod falls from below 1 to 0 or above, an entry a step; from betas it "
                "is had by Discrete.from_betas(betas)"
            )

    def __repr__(self) -> str:
        return f"Discrete({len(self.alphas_cumprod)} steps to {self.alphas_cumprod[-1]:.3g})"

    @classmethod
    def from_alphas_cumprod(cls, table: Tensor | Sequence[float]) -> Discrete:
        """From ``(T,)`` numbers, such as a diffusers scheduler's ``alphas_cumprod``."""
        return cls(tuple(float(a) for a in table))

    @classmethod
    def from_betas(cls, betas: Tensor) -> Discrete:
        """alpha^2 of a step is the product of 1 - beta up to it; ``(T,)``."""
        return cls.from_alphas_cumprod((1.0 - betas.double()).cumprod(0))

    @classmethod
    def linear(cls, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> Discrete:
        """beta rises linearly, DDPM's."""
        return cls.from_betas(torch.linspace(beta_min, beta_max, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> Discrete:
        """The root of beta rises linearly. Source: Rombach et al. 2022, arXiv 2112.10752."""
        ends = math.sqrt(beta_min), math.sqrt(beta_max)
        return cls.from_betas(torch.linspace(*ends, steps, dtype=torch.float64).square())

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Discrete:
        """``Cosine(offset)`` with beta cut off. Source: Nichol and Dhariwal 2021."""
        alpha = Cosine(offset).alpha(torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64))
        kept = (alpha[1:] / alpha[:-1]).square()  # type: ignore[index]
        return cls.from_betas((1.0 - kept).clamp(max=beta_max))

    def step(self, t: Scalar) -> Scalar:
        """T t - 1: what networks that were trained on step numbers are shown."""
        return len(self.alphas_cumprod) * t - 1.0

    def holds(self, t: float) -> bool:
        """Whether t lies in [0, 1]: a table says nothing beyond."""
        return 0.0 <= t <= 1.0 + 1e-9

    @property
    def _from_data(self) -> tuple[float, ...]:
        return (1.0, *self.alphas_cumprod)

    @cached_property
    def _table(self) -> tuple[list[float], list[float], list[float]]:
        """At 0, 1 / T, ..., 1: a^2, what it lacks to (pi / 2)^2, and its rate for a step."""
        parts = [(math.sqrt(1.0 - a), math.sqrt(a)) for a in self._from_data]
        square = [math.atan2(s, a) ** 2 for s, a in parts]
        lacking = [math.atan2(a, s) * (math.pi - math.atan2(a, s)) for s, a in parts]
        gaps = [b - a for a, b in itertools.pairwise(square)]
        inner = [0.5 * (a + b) for a, b in itertools.pairwise(gaps)]
        ends = ((gaps[0], gaps[:2][-1]), (gaps[-1], gaps[-2:][0]))
        # kept off 0, where the rate of sigma at t = 0 would be 0 / 0
        first, last = (max(1.5 * a - 0.5 * b, 1e-3 * a) for a, b in ends)
        return square, lacking, [first, *inner, last]

    def __getstate__(self) -> dict[str, Any]:
        return {"alphas_cumprod": self.alphas_cumprod}  # the rest is made of it, on each device

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _rows(self, like: Scalar) -> Any:
        """The table, as a tensor where a tensor asks."""
        if not isinstance(like, Tensor):
            return self._table
        if (kept := self._copies.get(like.device)) is not None:
            return kept
        made = torch.tensor(self._table, dtype=_random.widest(like.device), device=like.device)
        if type(made) is Tensor:  # no fake one, of a trace
            self._copies[like.device] = made
        return made

    def _angle(self, t: Scalar) -> tuple[Any, Any, Any]:
        """a, pi / 2 - a and the rate of a^2."""
        (square, lacking, rates), steps = self._rows(t), len(self.alphas_cumprod)
        i: Any
        if isinstance(t, Tensor):
            place: Any = t.to(square.dtype) * steps
            i = place.detach().long().clamp(0, steps - 1)
        else:
            place = t * steps
            i = min(max(int(place), 0), steps - 1)
        start, gap, r0, r1 = _piece(square, rates, i)
        x = place - i
        y = 1.0 - x
        z = x * y
        below = gap + (r0 + r1 - 2.0 * gap) * z
        angle: Any = sqrt(start + gap * (gap * x * x + r0 * z) / below)
        left = (_entry(lacking, i + 1) + gap * (gap * y * y + r1 * z) / below) / (
            0.5 * math.pi + angle
        )
        slope = (gap / below) ** 2 * (r1 * x * x + 2.0 * gap * z + r0 * y * y) * steps
        if isinstance(t, Tensor):
            return angle.to(t.dtype), left.to(t.dtype), slope.to(t.dtype)
        return angle, left, slope

    def alpha(self, t: Scalar) -> Scalar:
        return sin(self._angle(t)[1])

    def sigma(self, t: Scalar) -> Scalar:
        return sin(self._angle(t)[0])

    def dalpha(self, t: Scalar) -> Scalar:
        angle, _, slope = self._angle(t)
        return -0.5 * slope * _sinc(angle)

    def dsigma(self, t: Scalar) -> Scalar:
        angle, left, slope = self._angle(t)
        return ratio(0.5 * slope * sin(left), angle)

    def diffusion(self, t: Scalar) -> Scalar:
        angle, left, slope = self._angle(t)
        return sqrt(ratio(slope * _sinc(angle), sin(left)))

    def time(self, lam: Scalar) -> Scalar:
        wanted: Any = atan(exp(-lam))
        (square, _, rates), steps = self._rows(lam), len(self.alphas_cumprod)
        i: Any
        if isinstance(wanted, Tensor):
            wanted = wanted.to(square.dtype) ** 2
            i = torch.bucketize(wanted.detach(), square, right=True).clamp(1, steps) - 1
        else:
            wanted = wanted**2
            i = min(max(bisect_right(square, wanted), 1), steps) - 1
        start, gap, r0, r1 = _piece(square, rates, i)
        part = (wanted - start) / gap
        linear = r0 - part * (r0 + r1 - 2.0 * gap)
        root = sqrt(linear * linear + 4.0 * (gap - linear) * part * gap)
        t = (i + 2.0 * part * gap / (linear + root)) / steps
        return t.to(lam.dtype) if isinstance(lam, Tensor) else t


def _piece(square: Any, rates: Any, i: Any) -> tuple[Any, Any, Any, Any]:
    """Where the i-th piece starts, how far it rises, and its rates at both ends."""
    start = _entry(square, i)
    return start, _entry(square, i + 1) - start, _entry(rates, i), _entry(rates, i + 1)


def _entry(row: Any, i: Any) -> Any:
    """row[i]; of a tensor without reading i on the host, as an index of no dimensions would."""
    if not isinstance(row, Tensor):
        return row[i]
    return row.index_select(0, i.reshape(-1)).reshape(i.shape)


def _sinc(angle: Scalar) -> Scalar:
    """sin(a) / a, 1 at 0."""
    if isinstance(angle, Tensor):
        return torch.sinc(angle / math.pi)
    return sin(angle) / angle if angle else 1.0
