"""The one loop, under every solve."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ._increment import Source
from ._plan import Accept, GivenPlan, Plan
from ._save import SaveEnd, Saver
from ._scalar import Scalar
from ._scalar import where as choose
from ._state import State, leaves, put_rows, rows_of, tree_map, where
from .dynamics.field import Field
from .events import Watch
from .integrators.base import Carry, Integrator, Step
from .solution import Dense, Solution, Stats
from .stepping import Adaptive, Stepping

__all__ = ["Leaping", "Loop", "Recorder", "Report"]

Report = Callable[[float, Scalar, State], None]  # of the part that is done, the time, the state


class Recorder:
    """How the loop takes its steps. An adjoint may put its own in the place of this one.

    Attributes:
        whole: whether samples that have ended must stay in the batch.
    """

    whole: bool = False

    def take(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        """Attempt n."""
        return loop.advance(n, t0, t1, y, carry)

    def keep(self, accept: Accept) -> None:
        """Told whether the last attempt counts."""

    def restart(self, y: State) -> None:
        """Told that the last step ended in y, and the next one starts afresh."""

    def branch(self, y: State) -> Recorder:
        """Told that the last step ended in y; what takes the steps of fewer rows from there."""
        return self

    def finish(self, y: State, stats: Stats) -> None:
        """Told that the steps ended in y. What is needed again lives in the graph alone."""


class Leaping(Protocol):
    """Takes many steps of a loop at once, and tells its plan and its statistics of them."""

    def begin(self, y: State, stats: Stats) -> tuple[State, Carry]:
        """From the initial state: as far as it comes."""

    def go(self, y: State, carry: Carry, stats: Stats) -> tuple[State, Carry]:
        """On from where the loop stands: as far as it comes, perhaps not at all."""


class Stepper(Protocol):
    def __call__(
        self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry, /
    ) -> Step:
        """Attempt n of a loop."""


@dataclass
class Loop:
    """One solve, ready to run. ``run`` is the loop; an adjoint hands it the way to take steps."""

    field: Field
    integrator: Integrator
    stepping: Stepping
    plan: Plan
    saver: Saver
    noise: Source | None
    y0: State
    max_steps: int
    dense: bool
    progress: Report | None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        self.stepper: Stepper | None = None  # an executor's own way to take a step
        self.leap: Leaping | None = None  # and to take many at once
        self._thins = True  # whether rows that have ended may be left out

    def advance(self, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        """One attempt, as the executor takes it."""
        if self.stepper is None:
            return self.step(n, t0, t1, y, carry)
        return self.stepper(self, n, t0, t1, y, carry)

    def step(self, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        """One attempt: a pure function of its arguments."""
        dw = None if self.noise is None else self.noise(n, t0, t1)
        return self.integrator.step(self.field, t0, t1, y, dw, carry)

    def _attempt(
        self, recorder: Recorder, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry
    ) -> Step:
        t0, t1 = self.plan.after(t0), self.plan.before(t1)
        if self._leaps(recorder):  # what a leap leaves to the loop is one step now and then
            return self.step(n, t0, t1, y, carry)
        return recorder.take(self, n, t0, t1, y, carry)

    def _leaps(self, recorder: Recorder) -> bool:
        """Whether many steps may be taken at once, unseen by the loop."""
        given = isinstance(self.plan, GivenPlan)  # chosen steps leap in a loop of no gradient
        leaps = self.leap is not None and type(recorder) is Recorder
        return leaps and (given or not torch.is_grad_enabled())

    def _ahead(
        self, recorder: Recorder, y: State, carry: Carry, stats: Stats
    ) -> tuple[State, Carry]:
        """Where the solve stands after what could be taken at once."""
        if not self._leaps(recorder):
            return y, carry
        assert self.leap is not None
        return self.leap.go(y, carry, stats)

    def begin(self, y: State) -> tuple[State, Carry]:
        """The state and what the first step starts from, with its size chosen."""
        carry = self.integrator.init(self.field, self.plan.after(self.plan.t), y)
        self.plan.start(self.field, y, carry, self.noise)
        return y, carry

    def run(self, recorder: Recorder) -> Solution:
        plan, saver, y = self.plan, self.saver, self.y0
        stats, dense = Stats(), Dense(y) if self.dense else None
        saver.begin(plan.t, y)
        if self.watch is not None:
            self.watch.begin(plan.t, y)
        if plan.running:
            if self.leap is not None and self._leaps(recorder):
                y, carry = self.leap.begin(y, stats)
            else:
                y, carry = self.begin(y)
            if isinstance(plan, GivenPlan) and self._unseen and not self._leaps(recorder):
                y, carry = self._stride(plan, recorder, y, carry, stats)
            y = self._march(recorder, y, carry, stats, dense)
        if y is self.y0:
            y = tree_map(torch.clone, y)  # the caller's own stays the caller's
        plan.finish(y, stats)
        stats.evaluations, stats.products = self.field.evaluations, self.field.products
        ts, ys = saver.finish(plan.t, y)
        events = None if self.watch is None else self.watch.finish(y)
        end = plan.t
        plan.forget()
        self.field.forget()
        self.leap = None  # which knows the loop: what a solve held is free when it is let go
        return Solution(y, end, ts, ys, stats, plan.status, plan.message, dense, events)

    def _march(
        self, recorder: Recorder, y: State, carry: Carry, stats: Stats, dense: Dense | None
    ) -> State:
        plan, saver = self.plan, self.saver
        while plan.running:
            y, carry = self._ahead(recorder, y, carry, stats)
            if not plan.running:
                break
            if stats.attempts == self.max_steps:
                plan.exhausted(self.max_steps)
                break
            t0, t1 = plan.interval()
            step = self._attempt(recorder, stats.attempts, t0, t1, y, carry)
            accept = plan.judge(step, y)
            if plan.spoiled and torch.is_grad_enabled():  # rejected rows stand still instead
                t1 = choose(accept, t1, t0)
                step = self._attempt(recorder, stats.attempts, t0, t1, y, carry)
            recorder.keep(accept)
            landing = None
            if self.watch is not None and accept is not False:
                landing = self.watch.look(t0, t1, step, accept)
            afresh = landing is not None or plan.jumped
            if afresh:
                recorder.restart(where(accept, step.y1, y))
            if landing is not None:
                plan.land(landing.hit, landing.t1, landing.over)
                t1, step = landing.t1, landing
            saver.keep(t0, t1, y, step, accept)
            if dense is not None and accept is not False:
                dense.pieces.append((t0, choose(accept, t1, t0), step))
            y, carry = where(accept, step.y1, y), where(accept, step.carry, carry)
            if landing is not None:
                y = landing.resume(plan.t, y)
            if afresh and plan.running:
                again = self.integrator.init(self.field, plan.after(plan.t), y)
                fresh = plan.fresh if landing is None else plan.fresh | landing.hit
                carry = self._resumed(fresh, again, carry)
            del step, landing  # their stages make room for those of the next
            stats.attempts += 1
            if self.progress is not None and accept is not False:
                self.progress(plan.progress, plan.t, y)
            rows = plan.rest() if self._thins else None
            if rows is not None:
                y = self._go_on(rows, recorder, y, carry, stats)
        recorder.finish(y, stats)
        return y

    def _resumed(self, fresh: Accept, again: Carry, carry: Carry) -> Carry:
        """What the next step starts from, after an event or a jump of these rows."""
        if not self.integrator.remembers:
            return again
        if isinstance(fresh, Tensor) and len(leaves(again)) != len(leaves(carry)):
            raise TypeError(
                f"{type(self.integrator).__name__} keeps one history for all samples, which an "
                "event of some of them would break: let the batch share its time, or use a method "
                "of one step"
            )
        return where(fresh, again, carry)

    @property
    def _unseen(self) -> bool:
        """Whether nobody wants to know more of the steps than where they end."""
        watched = self.dense or self.watch is not None or self.progress is not None
        return not watched and isinstance(self.saver, SaveEnd)

    def _stride(
        self, plan: GivenPlan, recorder: Recorder, y: State, carry: Carry, stats: Stats
    ) -> tuple[State, Carry]:
        """Given steps, of which nothing is asked on the way: with no more than they take."""
        for t0, t1 in itertools.pairwise(plan.ahead(self.max_steps)):
            step = recorder.take(self, stats.attempts, t0, t1, y, carry)
            accept = plan.judge(step, y)
            recorder.keep(accept)
            stats.attempts += 1
            if not accept:
                break
            y, carry = step.y1, step.carry
            del step
        return y, carry

    def _go_on(
        self, rows: Tensor, recorder: Recorder, y: State, carry: Carry, stats: Stats
    ) -> State:
        """The rest of the way, of these rows alone; the state of all."""
        part = self._part(rows, y, recorder)
        if part is None:
            self._thins = False
            return y
        end = part._march(recorder.branch(y), part.y0, rows_of(carry, rows), stats, None)
        self.plan.absorb(rows, part.plan)
        self.saver.absorb(rows, part.saver)
        self.field.evaluations += part.field.evaluations
        self.field.products += part.field.products
        return put_rows(y, rows, end)

    def _whole(self, report: Report, rows: Tensor, y: State) -> Report:
        """What is told of these rows from here on, as of the whole batch."""
        t, share = self.plan.t, len(rows) / len(leaves(y)[0])

        def told(done: float, now: Scalar, part: State) -> None:
            t_all = put_rows(t, rows, now) if isinstance(t, Tensor) and t.ndim else now
            report(1.0 - (1.0 - done) * share, t_all, put_rows(y, rows, part))

        return told

    def _part(self, rows: Tensor, y: State, recorder: Recorder) -> Loop | None:
        """The solve of these rows alone, from here; None where it takes the whole batch."""
        plain = self.stepper is None and self.watch is None
        saver = None if self.dense or recorder.whole or not plain else self.saver.select(rows)
        if saver is None:
            return None
        field = self.field.select(rows, y)
        if field is None:
            return None
        progress = None if self.progress is None else self._whole(self.progress, rows, y)
        noise = None if self.noise is None else self.noise.select(rows)
        stepping, integrator = self.stepping, self.integrator
        if isinstance(stepping, Adaptive):
            stepping = stepping.select(rows, y)
        if stepping is not self.stepping:
            integrator = integrator.bind(stepping)
        return replace(
            self, field=field, plan=self.plan.select(rows, stepping), saver=saver, noise=noise,
            stepping=stepping, integrator=integrator,
            y0=rows_of(y, rows), progress=progress,
        )  # fmt: skip
