"""Brownian motion on a grid of times, replayable from a seed."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _random
from .._increment import Draws, Increment, Source
from .._scalar import Scalar, expand, magnitude, minimum, rounding, sqrt, to_float, where
from .._state import State, batch_size, leaves, unflatten
from .base import RandomPath
from .levy import ORDER
from .normals import Law
from .tree import DEPTH, Queries

__all__ = ["Brownian", "Increments"]

_CHUNK = 1 << 18  # numbers drawn at once


@dataclass(frozen=True, eq=False)
class Brownian(RandomPath):
    """W(t) with independent increments of variance t1 - t0, the same in every replay.

    An increment is a function of (seed, interval, position in the sample) only: not of the batch
    the sample stands in, the order of the queries, or the device.

    Args:
        seed: an int, or an integer tensor of shape ``(batch,)`` that gives every sample its own
            path: sample i is then the same whatever the batch.
        times: the grid on which the path is defined. None takes the grid of the solve. Give a
            finer grid to have a coarse solve follow the same path: its increments are the sums.

    Raises:
        ValueError: from the solve, when it steps on times that are not on the path's grid.
    """

    seed: int | Tensor
    times: Tensor | None = None
    antithetic: bool = field(default=False, kw_only=True)
    correlation: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._law()

    def _law(self) -> Law:
        return Law(self.seed, self.antithetic, self.correlation)

    def tree(self, t0: Scalar, t1: Scalar, draws: Draws) -> Source:
        """A path made for this span: see ``BrownianTree`` for one that other solves share."""
        if self.times is not None:
            raise TypeError(
                "a path on given times has no steps between them: give an adaptive solve "
                "Brownian(seed) or BrownianTree(seed, t0, t1)"
            )
        start, end = minimum(t0, t1), -minimum(-t0, -t1)
        order = ORDER[draws.levy]
        return Queries(self._law(), draws, order, start, end - start, DEPTH)

    def bind(self, grid: Sequence[Scalar], draws: Draws) -> Increments:
        """The increments over the steps of ``grid``."""
        return Increments(self, grid, draws.shapes)


class Increments:
    """One solve's view of a Brownian path: ``increments(n, t0, t1)`` is that of step n."""

    def __init__(self, path: Brownian, grid: Sequence[Scalar], shapes: State) -> None:
        self._like, self._flat = shapes, leaves(shapes)
        self._batch = batch_size(shapes)
        if self._batch is None and isinstance(path.seed, Tensor):
            raise ValueError("per-sample seeds need a state whose leaves all lead with the batch")
        first = self._flat[0]
        self._dtype = torch.promote_types(first.dtype.to_real(), torch.float32)
        self._rows = self._batch or 1
        self._sizes = [leaf.numel() // self._rows for leaf in self._flat]
        self._key = _random.keys(path.seed, self._rows, first.device, _random.BROWNIAN)
        self._fine, self._spans = _intervals(path.times, grid)
        self._chunk = range(0)
        self._draws: Tensor = self._key

    def select(self, rows: Tensor) -> Increments:
        """The view of these rows of the batch alone."""
        raise NotImplementedError

    def _normal(self, n: int) -> Tensor:
        """The standard normals of fine interval n, ``(rows, size)``; drawn a chunk at a time."""
        if n not in self._chunk:
            size = sum(self._sizes)
            length = max(1, _CHUNK // max(1, size * self._rows))
            start = n - n % length
            self._chunk = range(start, min(start + length, len(self._fine)))
            steps = torch.arange(
                self._chunk.start, self._chunk.stop, dtype=torch.int64, device=self._key.device
            )
            self._draws = _random.normal(self._key, steps, size, self._dtype)
        return self._draws[n - self._chunk.start]

    def _piece(self, i: int) -> Tensor:
        draw = self._normal(i)
        width = self._fine[i]
        moves = width > 0
        return draw * expand(where(moves, sqrt(where(moves, width, 1.0)), 0.0), draw)

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        span, sign = self._spans[n]
        total = self._piece(span[0])
        for i in span[1:]:
            total = total + self._piece(i)
        parts = torch.split(sign * total, self._sizes, dim=-1)
        shaped = [
            part.reshape(leaf.shape).to(leaf.dtype)
            for part, leaf in zip(parts, self._flat, strict=True)
        ]
        return Increment(unflatten(shaped, self._like))


def _intervals(
    times: Tensor | None, grid: Sequence[Scalar]
) -> tuple[list[Scalar], list[tuple[range, float]]]:
    """Widths of the path's own intervals, and for each step those it covers and its direction.

    Intervals are numbered upwards in time, so that a solve that runs back over the same grid
    takes back the same increments.
    """
    count = len(grid) - 1
    if times is None:
        gap = grid[-1] - grid[0]
        down = bool((gap <= 0).all()) if isinstance(gap, Tensor) else gap < 0
        if isinstance(gap, Tensor) and not down and bool((gap < 0).any()):
            raise TypeError("a stochastic solve runs all its samples in one direction of time")
        widths: list[Scalar] = [magnitude(b - a) for a, b in itertools.pairwise(grid)]
        order = widths[::-1] if down else widths
        sign = -1.0 if down else 1.0
        numbers = [count - 1 - n if down else n for n in range(count)]
        return order, [(range(i, i + 1), sign) for i in numbers]
    if any(isinstance(t, Tensor) and t.ndim for t in grid):
        raise TypeError("a path on given times needs a time that the batch shares")
    own = sorted(times.tolist())
    fine: list[Scalar] = [b - a for a, b in itertools.pairwise(own)]
    marks = [_find(own, to_float(t), rounding(times)) for t in grid]
    return fine, [
        (range(min(a, b), max(a, b)), 1.0 if b > a else -1.0) for a, b in itertools.pairwise(marks)
    ]


def _find(own: list[float], t: float, slack: float) -> int:
    tolerance = slack * max(abs(own[0]), abs(own[-1]), 1e-30)
    i = bisect_left(own, t - tolerance)
    if i == len(own) or not math.isclose(own[i], t, rel_tol=0.0, abs_tol=tolerance):
        raise ValueError(
            f"the solve steps on t = {t}, which is not on the grid of its Brownian path: give "
            "Brownian(seed, times) a grid that holds every step, or no times at all"
        )
    return i
