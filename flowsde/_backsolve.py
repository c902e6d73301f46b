"""The way back of the continuous adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._graft import Inputs
from ._increment import Increment, Source
from ._loop import Loop, Recorder
from ._plan import AdaptivePlan, GivenPlan, Plan
from ._save import SaveEnd
from ._scalar import Scalar, to_float
from ._state import State, leaves, tree_map
from .dynamics.base import Dynamics
from .dynamics.field import Field
from .errors import SolveError
from .integrators.base import Integrator
from .solution import Solution, Status
from .stepping import Adaptive, Given, Stepping
from .transforms.costate import costate

__all__ = ["Back"]


def _inner(a: State, b: State) -> Tensor:
    """Sum of a conj(b), real."""
    pairs = zip(leaves(a), leaves(b), strict=True)
    return torch.stack([(x * y.conj()).sum().real.double() for x, y in pairs]).sum()


Taken = tuple[int, float, float]


class _Turned(Source):
    """The Brownian path over steps of the way there, from the last of them back."""

    def __init__(self, source: Source, steps: Sequence[Taken]) -> None:
        self._source, self._steps = source, steps

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        return Increment(tree_map(torch.neg, self._source(*self._steps[-1 - n]).w))

    def select(self, rows: Tensor) -> _Turned:
        """The path of these rows of the batch alone."""
        return _Turned(self._source.select(rows), self._steps)


@dataclass
class Back:
    """The way back of one solve.

    Attributes:
        dynamics: of the state, as ``costate`` takes it.
        steps: number, start and end of each step of the way there, where there is noise: they are
            taken back one by one, on the same path.
        timed: whether gradients by times are asked for.
    """

    loop: Loop
    dynamics: Dynamics
    inputs: Inputs
    integrator: Integrator
    stepping: Stepping
    start: Scalar
    solution: Solution
    steps: Sequence[Taken] | None
    timed: bool

    def run(self, end: State, rows: State | None) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Cotangents of y0, args and parameters, in a row, and by the identity of each time."""
        solution, targets = self.solution, self.inputs.targets
        saves = [] if solution.ts is None else [float(t) for t in solution.ts]
        asked = self.loop.saver.times
        t, y, a = to_float(solution.t1), solution.y1, end
        h = tuple(torch.zeros_like(x) for x in targets)
        before, after = self.loop.plan.before, self.loop.plan.after  # which side of a jump
        by_time = {id(solution.t1): self._rate(a, before(t), y)}
        slopes = []
        for i in reversed(range(len(saves))):
            y, a, h = self._stretch(t, saves[i], (y, a, h))
            t, y = saves[i], tree_map(lambda x, i=i: x[i], solution.ys)
            jump = tree_map(lambda x, i=i: x[i], rows)
            slopes.append(self._rate(jump, before(t), y))
            a = tree_map(torch.add, a, jump)
        y, a, h = self._stretch(t, to_float(self.start), (y, a, h))
        first = -self._rate(a, after(to_float(self.start)), self.loop.y0)
        by_time[id(self.start)] = by_time.get(id(self.start), 0.0) + first  # one time may be both
        if asked is not None:
            slopes += [torch.zeros_like(by_time[id(self.start)])] * (len(asked) - len(saves))
            by_time[id(asked)] = torch.stack(slopes[::-1]) if slopes else asked.detach()
        return [*leaves(a), *h], by_time

    def _rate(self, a: State, t: Scalar, y: State) -> Tensor:
        """The loss's derivative by a time at which the state is y and its cotangent a."""
        if not self.timed:
            return torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            return _inner(a, self.inputs.field.drift(t, tree_map(torch.detach, y)))

    def _stretch(self, t0: float, t1: float, state: State) -> State:
        """From t0 back to t1."""
        if t0 == t1:
            return state
        plan: Plan
        noise: Source | None = None
        if self.steps is not None:
            part = self.steps[self._step_at(t1) : self._step_at(t0)]
            if not part:
                return state
            plan = GivenPlan([part[-1][2], *(t for _, t, _ in reversed(part))], None)
            assert self.loop.noise is not None
            noise = _Turned(self.loop.noise, part)
        elif isinstance(self.stepping, Adaptive):
            dtype = leaves(state)[0].dtype.to_real()
            plan = AdaptivePlan(self.stepping, self.integrator, t0, t1, None, dtype)
        else:
            plan = GivenPlan(self._between(t0, t1), None)
        dynamics = costate(self.dynamics, self.inputs.targets)
        field = Field(dynamics, self.inputs.field.args, state)
        with torch.no_grad():
            sol = Loop(
                field, self.integrator, self.stepping, plan, SaveEnd(), noise, state,
                self.loop.max_steps, False, None,
            ).run(Recorder())  # fmt: skip
        self.solution.stats.backward_evaluations += sol.stats.evaluations
        if sol.status is not Status.SUCCESS:
            raise SolveError(f"on Backsolve's way back: {sol.message}", sol)
        return sol.y1

    def _step_at(self, t: float) -> int:
        """The step that starts nearest to t; their number for the end of the last."""
        assert self.steps
        ends = [*(t0 for _, t0, _ in self.steps), self.steps[-1][2]]
        return int((torch.tensor(ends, dtype=torch.float64, device="cpu") - t).abs().argmin())

    def _between(self, t0: float, t1: float) -> list[Scalar]:
        """The part of the given steps that lies between, turned round."""
        assert isinstance(self.stepping, Given)
        ends = to_float(self.start), to_float(self.solution.t1)
        times = [to_float(t) for t in self.stepping.times(*ends)]
        low, high = min(t0, t1), max(t0, t1)
        return [t0, *(t for t in reversed(times) if low < t < high), t1]
