"""The one loop, under every solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._plan import Accept, Plan
from ._save import Saver
from ._scalar import Scalar
from ._scalar import where as choose
from ._state import State, where
from .dynamics.field import Field
from .events import Watch
from .integrators.base import Carry, Integrator, Step
from .solution import Dense, Solution, Stats
from .stepping import Stepping

__all__ = ["Loop", "Recorder"]


class Recorder:
    """How the loop takes its steps. An adjoint may put its own in the place of this one."""

    def take(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        """Attempt n."""
        return loop.advance(n, t0, t1, y, carry)

    def keep(self, accept: Accept) -> None:
        """Told whether the last attempt counts."""

    def restart(self, y: State) -> None:
        """Told that the last step ended in y, and the next one starts afresh."""


@dataclass
class Loop:
    """One solve, ready to run. ``run`` is the loop; an adjoint hands it the way to take steps."""

    field: Field
    integrator: Integrator
    stepping: Stepping
    plan: Plan
    saver: Saver
    noise: Callable[[int], State] | None
    y0: State
    max_steps: int
    dense: bool
    progress: Callable[[float], None] | None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        self.advance: Callable[..., Step] = self.step  # an executor may put its own in its place

    def step(self, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        """One attempt: a pure function of its arguments."""
        dw = None if self.noise is None else self.noise(n)
        return self.integrator.step(self.field, t0, t1, y, dw, carry)

    def _attempt(
        self, recorder: Recorder, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry
    ) -> Step:
        return recorder.take(self, n, self.plan.after(t0), self.plan.before(t1), y, carry)

    def run(self, recorder: Recorder) -> Solution:
        plan, saver, y = self.plan, self.saver, self.y0
        stats, dense = Stats(), Dense() if self.dense else None
        saver.begin(plan.t, y)
        if self.watch is not None:
            self.watch.begin(plan.t, y)
        if plan.running:
            carry = self.integrator.init(self.field, plan.after(plan.t), y)
            plan.start(self.field, y, carry)
        while plan.running:
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
                dense.pieces.append((t0, choose(accept, t1, t0), step.dense))
            y, carry = where(accept, step.y1, y), where(accept, step.carry, carry)
            if landing is not None:
                y = landing.resume(plan.t, y)
            if afresh and plan.running:
                carry = self.integrator.init(self.field, plan.after(plan.t), y)
            stats.attempts += 1
            if self.progress is not None:
                self.progress(plan.progress)
        plan.finish(y, stats)
        stats.evaluations, stats.products = self.field.evaluations, self.field.products
        ts, ys = saver.finish(plan.t, y)
        events = None if self.watch is None else self.watch.finish(y)
        return Solution(y, plan.t, ts, ys, stats, plan.status, plan.message, dense, events)
