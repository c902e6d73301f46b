"""Brownian motion from outside, such as torchsde's ``BrownianInterval``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._increment import Draws, Increment, Source
from .._scalar import Scalar, to_float
from .._state import check_like
from . import levy
from .base import RandomPath

__all__ = ["Outside"]


@dataclass(frozen=True, eq=False)
class Outside(RandomPath):
    """Increments ``motion(ta, tb)``, ta < tb, shaped as one increment of the solve.

    Args:
        motion: torchsde's ``BrownianInterval``, or any function of that kind. One whose
            ``levy_area_approximation`` is not ``"none"`` gives (w, U) when called with
            ``return_U=True``, U the integral of W(s) - W(ta): H = U/h - w/2.

    Raises:
        TypeError: from the solve, when its method needs what the motion does not give, its samples
            have times of their own, or increments are not shaped as its noise.
    """

    motion: Callable[..., Any]

    def bind(self, grid: Sequence[Scalar], draws: Draws) -> Source:
        return self.tree(grid[0], grid[-1], draws)

    def tree(self, t0: Scalar, t1: Scalar, draws: Draws) -> Source:
        if draws.levy == "K" or draws.extra is not None:
            raise TypeError(
                "the method needs more of its path than W and H, and a path from outside has "
                "nothing else: give path=Brownian(seed)"
            )
        if draws.levy == "H" and getattr(self.motion, "levy_area_approximation", "none") == "none":
            raise TypeError(
                "the method needs the space-time Levy area of its path: give path=Brownian(seed), "
                "or BrownianInterval(..., levy_area_approximation='space-time')"
            )
        first, last = (getattr(self.motion, name, None) for name in ("_start", "_end"))
        own = any(isinstance(t, Tensor) and t.ndim for t in (t0, t1))
        if isinstance(first, float) and isinstance(last, float) and not own:
            low, high = sorted((to_float(t0), to_float(t1)))
            slack = 1e-6 * (last - first)
            if low < first - slack or high > last + slack:
                raise ValueError(
                    f"the solve goes from {low:g} to {high:g}, and its path from outside from "
                    f"{first:g} to {last:g}: make one of the whole span"
                )
        return _Intervals(self.motion, draws)


@dataclass(frozen=True, eq=False)
class _Intervals(Source):
    """One solve's view of a motion from outside."""

    motion: Callable[..., Any]
    draws: Draws
    rows: Tensor | None = None

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        for t in (t0, t1):
            if isinstance(t, Tensor) and (t.ndim or t.requires_grad):
                raise TypeError(
                    "a path from outside has one time for the whole batch, and no derivative by "
                    "it: give path=Brownian(seed)"
                )
        a, b = to_float(t0), to_float(t1)
        if not self.draws.halves:
            return _increment(self._parts(a, b))
        mid = 0.5 * (a + b)
        first, second = self._parts(a, mid), self._parts(mid, b)
        whole = _increment(levy.compose(first, second))
        return whole._replace(halves=(_increment(first), _increment(second)))

    def _parts(self, a: float, b: float) -> list[Tensor]:
        low, high = min(a, b), max(a, b)
        if self.draws.levy == "W":
            return [self._like(self.motion(low, high)) * (1.0 if a <= b else -1.0)]
        w, u = map(self._like, self.motion(low, high, return_U=True))
        area = u / (high - low) - 0.5 * w if high > low else torch.zeros_like(w)
        return [w if a <= b else -w, area]

    def _like(self, x: Tensor) -> Tensor:
        like = self.draws.shapes
        if isinstance(x, Tensor) and isinstance(like, Tensor):
            if x.shape == (*like.shape, 1):  # torchsde's form of one number a sample
                x = x[..., 0]
            if x.shape != like.shape or x.dtype != like.dtype:
                raise TypeError(
                    f"the Brownian path gives increments {tuple(x.shape)} {x.dtype} where this "
                    f"noise takes {tuple(like.shape)} {like.dtype}: give "
                    f"BrownianInterval(size={tuple(like.shape)}, dtype={like.dtype})"
                )
        whole = check_like(x, like, "the Brownian path")
        return whole if self.rows is None else whole[self.rows]

    def select(self, rows: Tensor) -> Source:
        """The view of these rows of the batch alone."""
        rows = rows if self.rows is None else self.rows[rows]
        return _Intervals(self.motion, self.draws, rows)


def _increment(parts: Sequence[Tensor]) -> Increment:
    return Increment(parts[0], parts[1] if len(parts) > 1 else None)
