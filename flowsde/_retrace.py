"""Steps of a reversible method, taken back one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._graft import Inputs
from ._loop import Loop, Recorder
from ._plan import Accept
from ._scalar import Scalar
from ._state import State, leaves, tree_map, unflatten, where
from .integrators.base import Carry, ReversibleIntegrator, Step
from .solution import Solution

__all__ = ["Trail", "Way"]


@dataclass
class _Mark:
    """One attempt that counted, and how many states had been saved before it."""

    n: int
    t0: Scalar
    t1: Scalar
    saved: int
    accept: Accept = True


class Trail(Recorder):
    """The times of the steps, and what the last one carries."""

    whole = True

    def __init__(self) -> None:
        self.marks: list[_Mark] = []
        self.carry: Carry = None

    def take(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        step = super().take(loop, n, t0, t1, y, carry)
        self._last = _Mark(n, t0, t1, loop.saver.count), carry, step.carry
        return step

    def keep(self, accept: Accept) -> None:
        mark, before, after = self._last
        self.carry = where(accept, after, before)
        if accept is not False:
            self.marks.append(replace(mark, accept=accept))


@dataclass
class Way:
    """The way back over the steps of one solve."""

    loop: Loop
    inputs: Inputs
    trail: Trail
    solution: Solution
    start: Scalar
    times: list[Tensor]
    _totals: list[Tensor] = field(init=False)

    def pullback(self, end: State, rows: State | None) -> list[Tensor | None]:
        """Cotangents of y0, args, parameters and times from those of y1 and of the saved states."""
        self._totals = [torch.zeros_like(x) for x in (*self.inputs.targets, *self.times)]
        count = 0 if self.solution.ts is None else len(self.solution.ts)
        y, carry = tree_map(torch.detach, self.solution.y1), self.trail.carry
        marks = self.trail.marks
        a, last = end, count
        b = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, carry)
        for mark in reversed(marks):
            y, carry = self._unstep(mark, y, carry)
            a, b = self._through(mark, y, carry, a, b, rows, last)
            last = mark.saved
        if marks:
            self._check_met(y)
        for i in range(last):
            a = tree_map(torch.add, a, _row(rows, i))
        if marks:
            a = self._start(a, b)
        return [*leaves(a), *self._totals]

    def _check_met(self, y: State) -> None:
        """Raises RuntimeError where the steps back have not come to where the solve started."""
        ends = leaves(self.inputs.y0), leaves(self.solution.y1)
        for found, first, last in zip(leaves(y), *ends, strict=True):
            size = torch.maximum(first.detach().abs(), last.detach().abs())
            gap = (found - first.detach()).abs()
            if gap.numel() and not bool(gap.max() <= 1e-3 * size.max()):
                raise RuntimeError(
                    f"Reversible came back {float(gap.max()):.2g} away from y0: does the field "
                    "repeat itself, without dropout or other draws of its own? If so, rounding "
                    "grew on the way back: use adjoint=Checkpointed(), float64, fewer steps, or a "
                    "coupling nearer to 1"
                )

    def _unstep(self, mark: _Mark, y1: State, carry: Carry) -> tuple[State, Carry]:
        loop, integrator = self.loop, self.loop.integrator
        assert isinstance(integrator, ReversibleIntegrator)
        with torch.no_grad():
            dw = None if loop.noise is None else loop.noise(mark.n, mark.t0, mark.t1)
            y, before = integrator.unstep(loop.field, mark.t0, mark.t1, y1, dw, carry)
        return where(mark.accept, y, y1), where(mark.accept, before, carry)

    def _through(
        self, mark: _Mark, y: State, carry: Carry, a: State, b: Carry, rows: State | None, last: int
    ) -> tuple[State, Carry]:
        """Cotangents of a step's start from those of its end and of what was saved within it."""
        with torch.enable_grad():
            y, carry = _open(y), _open(carry)
            t0, t1 = (t if self._total(t) is None else _open(t) for t in (mark.t0, mark.t1))
            step = self.loop.step(mark.n, t0, t1, y, carry)
            outputs = [(where(mark.accept, step.y1, y), a)]
            outputs += [(where(mark.accept, step.carry, carry), b)]
            times = [(self._total(mark.t0), t0), (self._total(mark.t1), t1)]
            for i in range(mark.saved, last):
                t, total = self._saved(i)
                times.append((total, t))
                value = self.loop.saver.value(i, t, t0, t1, step)
                outputs.append((where(mark.accept, value, y), _row(rows, i)))
        found = self._pull(outputs, times, y, carry)
        return unflatten(found[: len(leaves(y))], y), unflatten(found[len(leaves(y)) :], carry)

    def _saved(self, i: int) -> tuple[Scalar, Tensor | None]:
        """The i-th saved time, and where its cotangent is added up."""
        ts, asked = self.solution.ts, self.loop.saver.times
        assert ts is not None
        total = self._total(asked)
        if total is not None:
            return _open(ts[i]), total[i]
        return ts[i] if ts[i].ndim else float(ts[i]), None

    def _total(self, t: Scalar | None) -> Tensor | None:
        """Where the cotangent of this time is added up."""
        for own, total in zip(self.times, self._totals[-len(self.times) :], strict=False):
            if own is t:
                return total
        return None

    def _start(self, a: State, b: Carry) -> State:
        """Through the integrator's start."""
        with torch.enable_grad():
            y, t = _open(self.inputs.y0), _open(self.start)
            carry = self.loop.integrator.init(self.loop.field, t, y)
        found = self._pull([(y, a), (carry, b)], [(self._total(self.start), t)], y)
        return unflatten(found, y)

    def _pull(
        self, outputs: list[tuple[State, State]], times: list[tuple[Tensor | None, Scalar]],
        *wanted: State,
    ) -> list[Tensor]:  # fmt: skip
        """Cotangents of ``wanted``; those of the targets and of times are added up."""
        pairs = [
            (x, w) for tree, weight in outputs
            for x, w in zip(leaves(tree), leaves(weight), strict=True)
            if isinstance(x, Tensor) and x.requires_grad
        ]  # fmt: skip
        first = leaves(wanted)
        tensors = [x for x in first if isinstance(x, Tensor)]
        sums = list(zip(self._totals, self.inputs.targets, strict=False))
        sums += [(total, t) for total, t in times if total is not None and isinstance(t, Tensor)]
        asked = [*tensors, *(x for _, x in sums)]
        xs, ws = zip(*pairs, strict=True)
        found = torch.autograd.grad(xs, asked, ws, materialize_grads=True)
        for (total, _), g in zip(sums, found[len(tensors) :], strict=True):
            total += g
        ours = iter(found)
        return [next(ours) if isinstance(x, Tensor) else x for x in first]


def _open(tree: State) -> State:
    """Leaves of a graph of their own."""
    return tree_map(lambda x: x.detach().requires_grad_() if isinstance(x, Tensor) else x, tree)


def _row(rows: State, i: int) -> State:
    return tree_map(lambda x: x[i], rows)
