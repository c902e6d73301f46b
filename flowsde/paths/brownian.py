"""Brownian motion on a grid of times, replayable from a seed."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _random
from .._increment import Draws, Increment, Source
from .._scalar import (
    Scalar,
    expand,
    magnitude,
    maximum,
    minimum,
    moving,
    rounding,
    sqrt,
    to_float,
    where,
)
from .._state import State, tree_map
from .base import RandomPath
from .levy import DEVIATIONS, ORDER, halve, shares
from .normals import Law, Normals, ordered_sum
from .tree import DEPTH, Queries

__all__ = ["Brownian", "Increments", "Sums"]

_CHUNK = 1 << 17  # numbers drawn at once: about as many as stay in a cache


@dataclass(frozen=True, eq=False)
class Brownian(RandomPath):
    """W(t) with independent increments of variance t1 - t0, the same in every replay.

    An increment is a function of (seed, number of the step in its solve, position in the sample)
    only: not of the batch the sample stands in, the order of the queries, or the device. A second
    solve that goes on where the first one ended has the same normals again: give it another seed,
    or both a ``BrownianTree`` of the whole span, or their ``times``.

    Args:
        seed: an int, or an integer tensor of shape ``(batch,)`` that gives every sample its own
            path: sample i is then the same whatever the batch.
        times: the grid on which the path is defined. None takes the grid of the solve. Give a
            finer grid to have a coarse solve follow the same path: its increments are the sums,
            its Levy areas follow from the fine ones'.
        antithetic: whether the second half of the batch takes the paths of the first half
            negated (per-sample seeds are then one a pair).
        correlation: ``(m, m)``, the covariance per unit of time of the components along the last
            axis of W; None for independent ones of variance 1.

    Raises:
        ValueError: on a correlation that is no covariance; from the solve, when it steps on times
            that are not on the path's grid, or its state does not fit.
    """

    seed: int | Tensor
    times: Tensor | None = None
    antithetic: bool = field(default=False, kw_only=True)
    correlation: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._law()
        if self.times is not None and not (isinstance(self.times, Tensor) and self.times.ndim == 1):
            raise TypeError("times of a path are a tensor, (n,): give torch.tensor(times)")

    def _law(self) -> Law:
        return Law(self.seed, self.antithetic, self.correlation)

    def tree(self, t0: Scalar, t1: Scalar, draws: Draws) -> Source:
        """A path made for this span: see ``BrownianTree`` for one that other solves share."""
        if self.times is not None:
            raise TypeError(
                "a path on given times has no steps between them: give an adaptive solve "
                "Brownian(seed) or BrownianTree(seed, t0, t1)"
            )
        start, end = minimum(t0, t1), maximum(t0, t1)
        order = ORDER[draws.levy]
        return Queries(self._law(), draws, order, start, end - start, DEPTH)

    def bind(self, grid: Sequence[Scalar], draws: Draws) -> Source:
        if self.times is None:
            return Increments(self._law(), draws, *_widths(grid))
        if any(isinstance(t, Tensor) and t.ndim for t in grid):
            raise TypeError("a path on given times needs a time that the batch shares")
        if torch.is_grad_enabled() and any(moving(t) for t in grid):
            raise TypeError(
                "a path on given times has no derivative by the times of its steps: detach() them, "
                "or give Brownian(seed), whose steps scale with them"
            )
        own, slack = sorted(self.times.tolist()), rounding(self.times)
        return Sums(self._law(), draws, own, [_find(own, to_float(t), slack) for t in grid])


class Increments(Source):
    """One solve's view of a Brownian path: ``increments(n, t0, t1)`` is that of step n.

    Steps are numbered upwards in time, so that a solve that runs back over the same grid takes
    back the same increments. The numbers of a stretch of steps are drawn, scaled, shaped and taken
    apart at once.

    Args:
        law: of the path.
        draws: what the solve asks for.
        widths: of the steps upwards in time: floats, 0-d or ``(batch,)``.
        down: whether the solve runs down in time.
    """

    def __init__(self, law: Law, draws: Draws, widths: Sequence[Scalar], down: bool) -> None:
        self._normals = Normals(law, draws.shapes, normal=draws.normal)
        self._extra = None
        if draws.extra is not None:
            self._extra = Normals(law, draws.extra, correlated=False, normal=draws.normal)
        self._draws, self._widths, self._down = draws, widths, down
        self._scaled = all(isinstance(width, float) for width in widths)
        self._forget()

    def _forget(self) -> None:
        self._held, self._each = (range(0), Increment(None)), list[Increment]()

    def select(self, rows: Tensor) -> Increments:
        """The view of these rows of the batch alone."""
        part = copy.copy(self)
        part._normals = self._normals.select(rows)
        part._extra = None if self._extra is None else self._extra.select(rows)
        part._widths = [x[rows] if isinstance(x, Tensor) and x.ndim else x for x in self._widths]
        part._forget()
        return part

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        one = self.over(len(self._widths) - 1 - n if self._down else n)
        if self._scaled:
            return one
        width = magnitude(t1 - t0)  # of the times as given: an adjoint cuts them from their graph
        moves = width > 0
        root = where(moves, sqrt(where(moves, width, 1.0)), 0.0)
        return one.map(lambda x: x * expand(root, x))._replace(z=one.z)

    def several(self, n: int, spans: Sequence[tuple[Scalar, Scalar]]) -> Increment:
        if not self._scaled:
            return super().several(n, spans)
        first = len(self._widths) - n - len(spans) if self._down else n
        pieces = [piece for _, piece in self.pieces(first, first + len(spans))]
        found = pieces[0] if len(pieces) == 1 else Increment.cat(pieces)
        return found.map(lambda x: x.flip(0)) if self._down else found

    def pieces(self, start: int, end: int) -> Iterator[tuple[range, Increment]]:
        """Intervals start to end, numbered upwards; as many at once as are held together."""
        while start < end:
            places, stretch = self.stretch(start)
            now = range(start, min(places.stop, end))
            pick = slice(now.start - places.start, now.stop - places.start)
            yield now, stretch.map(itemgetter(pick))
            start = now.stop

    def over(self, i: int) -> Increment:
        """The increment over interval i, numbered upwards, in the direction of the solve.

        It is for an interval of length 1 where the widths are tensors.
        """
        places, stretch = self.stretch(i)
        if not self._each:
            self._each = stretch.unbind(len(places))
        return self._each[i - places.start]

    def stretch(self, i: int) -> tuple[range, Increment]:
        """The intervals that are held together with i; their numbers, one beside the other.

        They are for intervals of length 1 where the widths are tensors.
        """
        if i not in self._held[0]:
            size = self._normals.size * self._normals.rows
            length = max(1, _CHUNK // max(1, size))
            start = i - i % length
            places = range(start, min(start + length, len(self._widths)))
            self._held, self._each = (places, self._draw(places)), []
        return self._held

    def _draw(self, places: range) -> Increment:
        """The numbers of these intervals, of variance 1 for W where the widths are tensors."""
        order, size = ORDER[self._draws.levy], (len(places), 1, 1)
        steps = torch.tensor(places, dtype=torch.int64, device=self._normals.device)
        root = torch.ones(size, dtype=self._normals.dtype, device=steps.device)
        if self._scaled:
            widths = self._widths[places.start : places.stop]
            root = root.new_tensor([math.sqrt(width) for width in widths]).reshape(size)
        numbers = [  # W has a stream of its own: it is the same whether H and K are asked for
            self._normals.draw(_random.BROWNIAN, steps),
            *(self._normals.draw(_random.LEVY, 2 * steps + j) for j in range(order - 1)),
        ]
        parts = [x.mul_(root * s) for x, s in zip(numbers, DEVIATIONS, strict=False)]
        z = halves = None
        if self._draws.halves:
            splits = [self._normals.draw(_random.SPLIT, 3 * steps + j) * root for j in range(order)]
            first, second = (self._shaped(half) for half in halve(parts, splits))
            halves = (second, first) if self._down else (first, second)
        if self._extra is not None:
            z = self._extra.shape(self._extra.draw(_random.EXTRA, steps))
        return self._shaped(parts)._replace(z=z, halves=halves)

    def _shaped(self, parts: Sequence[Tensor]) -> Increment:
        """In the direction of the solve: w and K are odd under a turn of time, H is even."""
        signs = (-1.0, 1.0, -1.0) if self._down else (1.0, 1.0, 1.0)
        return Increment(
            *(self._normals.shape(x if s > 0 else -x) for x, s in zip(parts, signs, strict=False))
        )


class Sums(Source):
    """A solve's view of a path on given times: steps cover one of its intervals or several.

    Args:
        law: of the path.
        draws: what the solve asks for.
        times: of the path, ascending.
        marks: the places among them of the solve's grid.
    """

    def __init__(self, law: Law, draws: Draws, times: list[float], marks: list[int]) -> None:
        self._times, self._marks, self._down = times, marks, marks[-1] < marks[0]
        self._order, self._halves = ORDER[draws.levy], draws.halves
        widths = [b - a for a, b in itertools.pairwise(times)]
        self._fine = Increments(law, draws, widths, self._down)

    def select(self, rows: Tensor) -> Sums:
        """The view of these rows of the batch alone."""
        part = copy.copy(self)
        part._fine = self._fine.select(rows)
        return part

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        i, j = sorted(self._marks[n : n + 2])
        first = self._fine.over(i)
        if j == i + 1:
            return first
        halves = None
        if self._halves:
            mid = self._middle(i, j)
            upwards = self._sum(i, mid), self._sum(mid, j)
            halves = (upwards[1], upwards[0]) if self._down else upwards
        return self._sum(i, j)._replace(z=first.z, halves=halves)

    def _middle(self, i: int, j: int) -> int:
        mid = 0.5 * (self._times[i] + self._times[j])
        slack = 1e-6 * (self._times[j] - self._times[i])
        found = _nearest(self._times, mid)
        if abs(self._times[found] - mid) > slack:
            raise ValueError(
                f"the method takes the halves of a step, and t = {mid} is not on the grid of its "
                "Brownian path: halve the path's times, or give BrownianTree(seed, t0, t1)"
            )
        return found

    def _sum(self, i: int, j: int) -> Increment:
        """The increment over intervals i to j."""
        if j == i + 1:
            return self._fine.over(i)
        total: list[State] = []
        for places, piece in self._fine.pieces(i, j):
            parts = list(piece[: self._order])
            total = _add(total, self._shares(i, j, places), parts)
        return Increment(*map(_like, total, parts))

    def _shares(self, i: int, j: int, places: range) -> list[list[list[Any]]]:
        """What these intervals add to the one from i to j: (row, column, interval)."""
        start, end = self._times[i], self._times[j]
        rows = []
        for p in places:
            a, b = self._times[p], self._times[p + 1]
            before = end - b if self._down else a - start
            rows.append(shares(before / (end - start), (b - a) / (end - start)))
        return [
            [[row[out][c] for row in rows] for c in range(out + 1)] for out in range(self._order)
        ]


def _like(total: State, part: State) -> State:
    return tree_map(lambda x, like: x.to(like.dtype), total, part)


def _add(total: list[State], factors: list[list[list[float]]], parts: list[State]) -> list[State]:
    """The total so far and the weighted parts of more intervals, one after the other.

    In double precision, so that it does not show where a stretch of intervals begins.
    """
    new = [tree_map(functools.partial(_weigh, row), *parts[: len(row)]) for row in factors]
    if total:
        pairs = zip(total, new, strict=True)
        new = [tree_map(lambda old, x: torch.cat((old[None], x)), *pair) for pair in pairs]
    return [tree_map(lambda x: ordered_sum(x, 0), x) for x in new]


def _weigh(factors: list[list[float]], *parts: Tensor) -> Tensor:
    """The sum of parts, each with a factor for every one of its intervals."""
    terms = []
    for row, part in zip(factors, parts, strict=True):
        wide = _wide(part)
        terms.append(wide * wide.new_tensor(row).reshape(-1, *(1,) * (part.ndim - 1)))
    return functools.reduce(torch.add, terms)


def _widths(grid: Sequence[Scalar]) -> tuple[list[Scalar], bool]:
    """Of the steps upwards in time, and whether the grid runs down."""
    if all(isinstance(t, float) for t in grid):
        widths = np.abs(np.diff(np.array(grid))).tolist()
        return (widths[::-1], True) if grid[-1] < grid[0] else (widths, False)
    gap = grid[-1] - grid[0]
    down = bool((gap <= 0).all()) if isinstance(gap, Tensor) else gap < 0
    if isinstance(gap, Tensor) and not down and bool((gap < 0).any()):
        raise TypeError("a stochastic solve runs all its samples in one direction of time")
    widths = [magnitude(b - a) for a, b in itertools.pairwise(grid)]
    return (widths[::-1] if down else widths), down


def _nearest(own: list[float], t: float) -> int:
    """Of the ascending times, the one nearest to t."""
    i = bisect_left(own, t)
    near = range(max(i - 1, 0), min(i + 1, len(own)))
    return min(near, key=lambda j: abs(own[j] - t))


def _find(own: list[float], t: float, slack: float) -> int:
    i = _nearest(own, t)
    if abs(own[i] - t) > slack * max(abs(own[0]), abs(own[-1]), 1e-30):
        raise ValueError(
            f"the solve steps on t = {t}, which is not on the grid of its Brownian path: give "
            "Brownian(seed, times) a grid that holds every step, or no times at all"
        )
    return i


def _wide(x: Tensor) -> Tensor:
    """In double precision where the device has it."""
    return x.to(torch.promote_types(x.dtype, _random.widest(x.device)))
