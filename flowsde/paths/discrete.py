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
from .._scalar import Scalar
from .schedule import Circular, Cosine

__all__ = ["Discrete"]


@dataclass(frozen=True, repr=False)
class Discrete(Circular):
    """A table of alpha^2 for T steps, as DDPMs are trained with: step i stands at t = (i + 1) / T.

    Data stands at t = 0. From one entry to the next (alpha, sigma) goes along the unit circle at
    constant speed: both ends are reached, with no signal in the last step, too. The speed jumps
    at the entries, which Runge-Kutta methods in t feel; steps in lambda or sigma / alpha do not.

    Args:
        alphas_cumprod: alpha^2 of each step, falling, below 1; the last may be 0.

    Raises:
        ValueError: on any other table.

    Source: Ho et al. 2020, arXiv 2006.11239.
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

    @property
    def _from_data(self) -> tuple[float, ...]:
        return (1.0, *self.alphas_cumprod)

    @cached_property
    def _table(self) -> tuple[list[float], list[float]]:
        """The angles at 0, 1 / T, ..., 1, and what they lack to pi / 2."""
        parts = [(math.sqrt(1.0 - a), math.sqrt(a)) for a in self._from_data]
        return [math.atan2(s, a) for s, a in parts], [math.atan2(a, s) for s, a in parts]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _rows(self, like: Scalar) -> Any:
        """The table, as a tensor where a tensor asks."""
        if not isinstance(like, Tensor):
            return self._table
        if like.device not in self._copies:
            self._copies[like.device] = torch.tensor(
                self._table, dtype=_random.widest(like.device), device=like.device
            )
        return self._copies[like.device]

    def _angles(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        rows, steps = self._rows(t), len(self.alphas_cumprod)
        i: Any
        if isinstance(t, Tensor):
            place: Any = t.to(rows.dtype) * steps
            i = place.detach().long().clamp(0, steps - 1)
        else:
            place = t * steps
            i = min(max(int(place), 0), steps - 1)
        (angle, rise), (rest, fall) = ((row[i], row[i + 1] - row[i]) for row in rows)
        part = place - i
        found = angle + part * rise, rest + part * fall, steps * rise
        return tuple(v.to(t.dtype) for v in found) if isinstance(t, Tensor) else found

    def _turned(self, angle: Scalar) -> Scalar:
        row, steps = self._rows(angle)[0], len(self.alphas_cumprod)
        i: Any
        if isinstance(angle, Tensor):
            wide = angle.to(row.dtype)
            i = torch.bucketize(wide.detach(), row, right=True).clamp(1, steps) - 1
            return ((i + (wide - row[i]) / (row[i + 1] - row[i])) / steps).to(angle.dtype)
        i = min(max(bisect_right(row, angle), 1), steps) - 1
        return (i + (angle - row[i]) / (row[i + 1] - row[i])) / steps
