"""Many given steps at once, in sweeps: a fixed point in the place of a recursion."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ._increment import Increment
from ._loop import Loop
from ._plan import GivenPlan
from ._scalar import Scalar
from ._state import State, batch_size, leaves, on_device, tree_map
from .dynamics.field import Field
from .integrators.base import Carry
from .solution import Stats
from .stepping import rms_norm

__all__ = ["Sweeps"]


class Sweeps:
    """Takes the steps of a loop a window at a time, as ``Picard`` says.

    Args:
        loop: the solve, of given steps; of its states nobody wants more than the last.
        window, tolerance: see ``Picard``.
    """

    def __init__(self, loop: Loop, window: int, tolerance: float) -> None:
        self._loop, self._window, self._tolerance = loop, window, tolerance
        self._batch = batch_size(loop.y0) or 0
        self._wide: dict[int, Field] = {}

    def begin(self, y: State, stats: Stats) -> tuple[State, Carry]:
        return self._loop.begin(y)

    def go(self, y: State, carry: Carry, stats: Stats) -> tuple[State, Carry]:
        loop, plan, taken = self._loop, self._loop.plan, 0
        assert isinstance(plan, GivenPlan)
        guess: State | None = None
        while plan.running and stats.attempts < loop.max_steps:
            times = plan.ahead(self._window)
            guess = _lengthen(y, guess, len(times) - 1)
            guess, off = self._sweep(taken, times, y, guess)
            count = self._settled(off)
            plan.skip(count)
            stats.attempts, taken = stats.attempts + 1, taken + count
            y = tree_map(lambda x, n=count: x[n - 1], guess)
            guess = tree_map(lambda x, n=count: x[n:], guess)
            if loop.progress is not None:
                loop.progress(plan.progress, plan.t, y)
        return y, None

    def _sweep(
        self, first: int, times: list[Scalar], y: State, guess: State
    ) -> tuple[State, State]:
        """Better states at the ends of the steps, ``(steps, batch, ...)``, and by how much.

        Of u_i = step_i(x_i) it makes x_{i+1} + sum_{j <= i} (u_j - x_{j+1}), in which what has
        settled is u_i itself, with no rounding of its own.
        """
        loop, steps = self._loop, len(times) - 1
        starts = tree_map(lambda a, x: torch.cat((a[None], x[:-1])).flatten(0, 1), y, guess)
        field, (t0, t1) = self._field(steps, starts), self._rows(times)
        carry = loop.integrator.init(field, t0, starts)
        dw = self._noise(first, times)
        ends = loop.integrator.step(field, t0, t1, starts, dw, carry).y1
        loop.field.evaluations += field.evaluations
        loop.field.products += field.products
        field.evaluations = field.products = 0
        ends = tree_map(lambda x: x.unflatten(0, (steps, self._batch)), ends)
        off = tree_map(lambda u, x: (u - x).cumsum(0), ends, guess)
        better = tree_map(lambda u, d: torch.cat((u[:1], u[1:] + d[:-1])), ends, off)
        return better, off

    def _field(self, steps: int, like: State) -> Field:
        """The field of so many copies of the batch."""
        if steps not in self._wide:
            own = self._loop.field
            rows = torch.arange(self._batch, device=leaves(like)[0].device).repeat(steps)
            args = tree_map(lambda x: x[rows] if self._has_rows(x) else x, own.args)
            self._wide[steps] = Field(own.dynamics.select(rows) or own.dynamics, args, like)
        return self._wide[steps]

    def _has_rows(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and len(x) == self._batch

    def _rows(self, times: list[Scalar]) -> tuple[Tensor, Tensor]:
        """Starts and ends of the steps, one a row."""
        grid = on_device(times, self._loop.y0).reshape(len(times), -1).expand(-1, self._batch)
        return grid[:-1].flatten(), grid[1:].flatten()

    def _noise(self, first: int, times: list[Scalar]) -> Increment | None:
        noise = self._loop.noise
        if noise is None:
            return None
        found = noise.several(first, list(itertools.pairwise(times)))
        return found.map(lambda x: x.flatten(0, 1))

    def _settled(self, off: State) -> int:
        """How many of the states are as good as found: those whose starts had stood still."""
        with torch.no_grad():
            rows = rms_norm(tree_map(lambda x: x.flatten(0, 1), off), True)
            rows = rows.reshape(len(leaves(off)[0]), self._batch)
            still = (rows <= self._tolerance).all(1).tolist()
        return min((still.index(False) if False in still else len(still)) + 1, len(still))


def _lengthen(y: State, guess: State | None, steps: int) -> State:
    """A guess for so many states: those known, then the last of them again."""
    if guess is None:
        guess = tree_map(lambda a: a[None][:0], y)

    def leaf(a: Tensor, x: Tensor) -> Tensor:
        last = x[-1] if len(x) else a
        return torch.cat((x, last.expand(steps - len(x), *last.shape)))

    return tree_map(leaf, y, guess)
