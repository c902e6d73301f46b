"""The way back of the continuous adjoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._graft import Inputs
from ._loop import Loop, Recorder
from ._plan import AdaptivePlan, GivenPlan, Plan
from ._save import SaveEnd
from ._scalar import Scalar, to_float
from ._state import State, leaves, tree_map
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


@dataclass
class Back:
    """The way back of one solve."""

    loop: Loop
    inputs: Inputs
    integrator: Integrator
    stepping: Stepping
    start: Scalar
    solution: Solution

    def run(self, end: State, rows: State | None) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Cotangents of y0, args and parameters, in a row, and by the identity of each time."""
        solution, targets = self.solution, self.inputs.targets
        saves = [] if solution.ts is None else [float(t) for t in solution.ts]
        asked = self.loop.saver.times
        t, y, a = to_float(solution.t1), solution.y1, end
        g = tuple(torch.zeros_like(x) for x in targets)
        by_time = {id(solution.t1): _inner(a, self._drift(t, y))}
        slopes = []
        for i in reversed(range(len(saves))):
            y, a, g = self._stretch(t, saves[i], (y, a, g))
            t, y = saves[i], tree_map(lambda x, i=i: x[i], solution.ys)
            jump = tree_map(lambda x, i=i: x[i], rows)
            slopes.append(_inner(jump, self._drift(t, y)))
            a = tree_map(torch.add, a, jump)
        y, a, g = self._stretch(t, to_float(self.start), (y, a, g))
        by_time[id(self.start)] = -_inner(a, self._drift(to_float(self.start), self.loop.y0))
        if asked is not None:
            slopes += [torch.zeros_like(by_time[id(self.start)])] * (len(asked) - len(saves))
            by_time[id(asked)] = torch.stack(slopes[::-1])
        return [*leaves(a), *g], by_time

    def _drift(self, t: Scalar, y: State) -> State:
        with torch.no_grad():
            return self.inputs.field.drift(t, tree_map(torch.detach, y))

    def _stretch(self, t0: float, t1: float, state: State) -> State:
        """From t0 back to t1."""
        if t0 == t1:
            return state
        dynamics = costate(self.loop.field.dynamics, self.inputs.targets)
        field = Field(dynamics, self.inputs.field.args, state)
        plan: Plan
        if isinstance(self.stepping, Adaptive):
            dtype = leaves(state)[0].dtype.to_real()
            plan = AdaptivePlan(self.stepping, self.integrator, t0, t1, None, dtype)
        else:
            plan = GivenPlan(self._grid(t0, t1), None)
        with torch.no_grad():
            sol = Loop(
                field, self.integrator, self.stepping, plan, SaveEnd(), None, state,
                self.loop.max_steps, False, None,
            ).run(Recorder())  # fmt: skip
        self.solution.stats.backward_evaluations += sol.stats.evaluations
        if sol.status is not Status.SUCCESS:
            raise SolveError(f"on Backsolve's way back: {sol.message}", sol)
        return sol.y1

    def _grid(self, t0: float, t1: float) -> list[Scalar]:
        """The part of the given steps that lies between, turned round."""
        assert isinstance(self.stepping, Given)
        ends = to_float(self.start), to_float(self.solution.t1)
        times = [to_float(t) for t in self.stepping.times(*ends)]
        low, high = min(t0, t1), max(t0, t1)
        return [t0, *(t for t in reversed(times) if low < t < high), t1]
