"""What comes out of a solve."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from ._scalar import Scalar, clamp, moving, nonzero, resolution, rounding, to_float, whole
from ._state import State, on_device, stack, tree_map, where

__all__ = ["Crossings", "Dense", "Solution", "Stats", "Status", "Steps"]


class Status(IntEnum):
    """How a solve, or one sample of it, ended. Failures are positive."""

    RUNNING = -2
    EVENT = -1
    SUCCESS = 0
    MAX_STEPS = 1
    NON_FINITE = 2
    UNDERFLOW = 3
    UNSETTLED = 4


@dataclass
class Stats:
    """Counts of one solve.

    Attributes:
        evaluations: calls of the field, batched calls counting once.
        accepted, rejected: steps; tensors ``(batch,)`` under per-sample stepping.
        attempts: passes of the loop.
        products: Jacobian-vector products of an implicit method, each a pass backward through the
            field beside its calls; a dense Jacobian counts one for each component of a sample.
        backward_evaluations: calls of the field made again by ``Checkpointed`` in the backward.
    """

    evaluations: int = 0
    accepted: int | Tensor = 0
    rejected: int | Tensor = 0
    attempts: int = 0
    products: int = 0
    backward_evaluations: int = 0


@dataclass(frozen=True)
class Steps:
    """``save_at=Steps(every=n)``: save the start, every n-th accepted step, and the end.

    Under per-sample stepping every n-th attempt is saved: a row repeats its last state where its
    attempt was rejected, or where it has finished.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if not whole(self.every, 1):
            raise ValueError(f"Steps(every) is a whole number >= 1; got {self.every}")


class Between(Protocol):
    """What a step knows of the states between its ends."""

    def between(self, thetas: Sequence[Scalar]) -> list[State]:
        """At places that all samples share."""

    def by_rows(self, thetas: Tensor) -> State:
        """At places ``(n, batch)`` of each sample's own."""


@dataclass
class Dense:
    """The solution between its steps, piece by piece, from a state on."""

    start: State
    pieces: list[tuple[Scalar, Scalar, Between]] = field(default_factory=list)

    def __call__(self, times: Sequence[Scalar]) -> list[State]:
        """The states at these times; where samples have their own, each may be ``(batch,)``."""
        if not self.pieces:
            raise ValueError("the solve took no step: there is nothing between t0 and t1")
        if any(isinstance(side, Tensor) and side.ndim for side in self.pieces[0][:2]):
            return self._per_sample(times)
        sign = 1.0 if to_float(self.pieces[-1][1]) > to_float(self.pieces[0][0]) else -1.0
        ends = [sign * to_float(end) for _, end, _ in self.pieces]
        start, last = sign * to_float(self.pieces[0][0]), len(ends) - 1
        late, inside = max(abs(start), abs(ends[-1])), list[tuple[int, Scalar]]()
        for t in times:
            at, slack = to_float(t), resolution(t) * late + rounding(t) * (ends[-1] - start)
            if not start - slack <= sign * at <= ends[-1] + slack:
                raise ValueError(f"t = {at} lies outside what was solved")
            piece = min(bisect_left(ends, sign * at), last)
            inside.append((piece, t if moving(t) else at))

        def piece_of(n: int) -> int:
            return inside[n][0]

        found = dict[int, State]()
        for piece, own in groupby(sorted(range(len(inside)), key=piece_of), piece_of):
            (t0, t1, step), places = self.pieces[piece], list(own)
            thetas = [clamp((inside[n][1] - t0) / nonzero(t1 - t0), 0.0, 1.0) for n in places]
            found.update(zip(places, step.between(thetas), strict=True))
        return [found[n] for n in range(len(inside))]

    def _per_sample(self, times: Sequence[Scalar]) -> list[State]:
        start, end = (torch.as_tensor(t) for t in (self.pieces[0][0], self.pieces[-1][1]))
        t: Tensor = on_device([start + 0.0 * end, *times], self.start)[1:]
        way = (t - start) / torch.where(end == start, 1.0, end - start)
        slack = max((rounding(time) for time in times), default=0.0)
        outside = (way < -slack) | (way > 1.0 + slack) | ((end == start) & (t != end))
        if bool(outside.any()):
            raise ValueError(f"t = {times} lies outside what was solved")
        t = start + way.clamp(0.0, 1.0) * (end - start)
        total = tree_map(lambda x: x.expand(len(t), *x.shape), self.start)
        for t0, t1, step in self.pieces:
            width = torch.as_tensor(t1 - t0)
            theta = (t - t0) / torch.where(width == 0, 1.0, width)
            inside = (theta > 0) & (theta <= 1) & (width != 0)  # before the jump of an event
            total = where(inside, step.by_rows(theta.clamp(0, 1)), total)
        return [tree_map(itemgetter(n), total) for n in range(len(t))]


@dataclass(frozen=True)
class Crossings:
    """Where the events of a solve fell; each list has an entry an event, in the order given.

    Attributes:
        ts: times, ``(n,)``, on the state's device; per sample ``(n, batch)``, NaN after a sample's
            last.
        ys: states there, before any update, ``(n, batch, ...)``; filled up likewise.
        fired: the number of the event that ended the solve, -1 where none did; an int, or
            ``(batch,)``.
    """

    ts: list[Tensor]
    ys: list[State]
    fired: int | Tensor


@dataclass
class Solution:
    """What comes out of a solve.

    Attributes:
        y1: state at the end: at t1 of the solve, at the event that ended it, or at the last time
            reached where it failed.
        t1: that time; a float, or ``(batch,)``.
        ts: saved times, ``(n,)`` or ``(n, batch)``, in float64 on the state's device; None without
            ``save_at``.
        ys: saved states, time first, ``(n, batch, ...)``. Times that were not reached are left
            out; per sample they hold NaN.
        stats: evaluations, accepted and rejected steps.
        status: a ``Status``, or ``(batch,)`` of their numbers.
        message: what went wrong and what to try; empty on success.
        events: where the events fell; None where none was watched for.

    With ``dense=True``, ``sol(t)`` is the state at any t between, a float or a 1-d tensor of
    times; per sample, a ``(batch,)`` tensor gives each its own.
    """

    y1: State
    t1: Scalar
    ts: Tensor | None
    ys: State | None
    stats: Stats
    status: Status | Tensor
    message: str = ""
    dense: Dense | None = None
    events: Crossings | None = None

    @property
    def success(self) -> bool:
        """Whether every sample reached its end, or an event that ended it."""
        if isinstance(self.status, Tensor):
            return bool((self.status <= Status.SUCCESS).all())
        return self.status <= Status.SUCCESS

    def __call__(self, t: Scalar | Sequence[float]) -> State:
        if self.dense is None:
            raise TypeError("no dense output was kept: solve(..., dense=True)")
        own = (len(self.status),) if isinstance(self.status, Tensor) else None
        if isinstance(t, Tensor) and isinstance(self.status, Tensor):
            t = t.to(self.status.device)
        if isinstance(t, Tensor) and (t.ndim == 0 or t.shape == own):
            return self.dense([t])[0]
        if isinstance(t, Tensor) and t.ndim != 1 and t.shape[1:] != own:
            raise ValueError(f"times are numbers, (n,) or one a sample; got {tuple(t.shape)}")
        if isinstance(t, (int, float)):
            return self.dense([float(t)])[0]
        if isinstance(t, Tensor) and own is None and not moving(t):
            t = t.cpu()  # read at once
        times = list(t)
        found = self.dense(times) if times else []
        return stack(found) if found else tree_map(lambda x: x.new_empty((0, *x.shape)), self.y1)
