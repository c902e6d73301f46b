"""The steps of a solve that wants only its end, as a loop within one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._graph import Calls, Graph, as_input
from ._increment import Increment
from ._loop import Loop
from ._plan import AdaptivePlan, GivenPlan, too_small
from ._save import SaveEnd
from ._scalar import Scalar
from ._state import State, builder, leaves, mapped, stack, tree_map, where
from .dynamics.field import Field
from .integrators.base import Carry, Integrator
from .solution import Stats
from .stepping import Adaptive

__all__ = ["Leap", "chosen", "given"]

_STEPS = 64  # given steps that one call of the graph takes
_NUMBERS = 1 << 22  # of noise that it takes at most


def chosen(
    _flowsde_method: Integrator, _flowsde_stepping: Adaptive, field: Field, ends: Tensor,
    limit: Tensor, marks: Tensor, y: State, carry: Carry,
) -> tuple[Tensor, Tensor, State, Carry]:  # fmt: skip
    """Attempts until all rows have arrived, one of them would fail, or there were ``limit``.

    Args:
        ends: start and end of the solve, ``(2,)`` or ``(2, batch)``.
        marks: as ``AdaptivePlan.marks`` gives them.

    Returns:
        How many attempts there were; marks, y and carry after them.
    """
    method, stepping = _flowsde_method, _flowsde_stepping
    assert method.error_order is not None
    order, build, (start, end) = method.error_order, _builder((y, carry)), ends.unbind()
    span = end - start

    def on(n: Tensor, live: Tensor, marks: Tensor, *flat: Tensor) -> Tensor:
        return live & (n < limit)

    def attempt(n: Tensor, live: Tensor, marks: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        y, carry = build(flat)
        t, dt, before, older, accepted, rejected, going = marks.unbind()
        on = going > 0
        lands = dt * 1.01 >= (end - t).abs()
        reach = torch.where(lands, end, t + torch.sign(span) * dt)
        reach = torch.where(on, reach, t)
        step = method.step(field, t, reach, y, None, carry)
        error = stepping.measure(step.error(), y, step.y1).to(t.dtype)
        accept, ahead, memory = stepping.advise(error, reach - t, order, (before, older))
        fails = (on & ~accept & too_small(ahead, t, span.abs(), stepping.dt_min)).any()
        takes = on & ~fails
        accept, missed = accept & takes, ~accept & takes
        going = on & ~(accept & lands)
        rows = torch.where(accept, reach, t), ahead, *memory
        rows = *rows, accepted + accept, rejected + missed, going
        after = torch.where(fails, marks, torch.stack([x.to(t.dtype) for x in rows]))
        new = where(accept, (step.y1, step.carry), (y, carry))
        return n + ~fails, ~fails & going.any(), after, *_tensors(new)

    n = torch.zeros_like(limit)
    n, _, marks, *flat = torch.while_loop(on, attempt, (n, n == 0, marks, *_tensors((y, carry))))
    return n, marks, *build(flat)


def given(
    _flowsde_method: Integrator, _flowsde_stepping: None, field: Field, times: Tensor,
    count: Tensor, dw: Increment | None, y: State, carry: Carry,
) -> tuple[State, Carry]:  # fmt: skip
    """The first ``count`` steps along ``times``, with increments stacked one after the other."""
    build = _builder((y, carry))

    def on(n: Tensor, *flat: Tensor) -> Tensor:
        return n < count

    def step(n: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        (y, carry), own = build(flat), tree_map(lambda x: _row(x, n), dw)
        taken = _flowsde_method.step(field, _row(times, n), _row(times, n + 1), y, own, carry)
        return n + 1, *(x.clone() for x in _tensors((taken.y1, taken.carry)))

    start = (torch.zeros_like(count), *_tensors((y, carry)))
    return build(torch.while_loop(on, step, start)[1:])


def _row(x: Any, n: Tensor) -> Any:
    return torch.index_select(x, 0, n.reshape(1)).squeeze(0) if isinstance(x, Tensor) else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def _builder(like: Any) -> Callable[[Sequence[Tensor]], Any]:
    """What builds such a tree from its tensors; the rest is as it is."""
    flat, build = leaves(like), builder(like)

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        found, rest = [], list(tensors)
        for x in flat:
            found.append(rest.pop(0) if isinstance(x, Tensor) else x)
        return build(found)

    return rebuild


class Leap:
    """Takes what steps it can at once; those that fail or start the method are left to the loop."""

    def __init__(self, loop: Loop, graph: Graph) -> None:
        adaptive = loop.stepping if isinstance(loop.stepping, Adaptive) else None
        self._loop, self._graph = loop, graph
        self._calls = Calls(graph, loop.integrator, adaptive, loop.field)
        self._ends: Tensor | None = None

    @staticmethod
    def suits(loop: Loop) -> bool:
        """Whether nobody needs to see the steps of this solve."""
        seen = loop.dense or loop.watch is not None or loop.progress is not None
        if seen or not isinstance(loop.saver, SaveEnd):
            return False
        if isinstance(loop.plan, AdaptivePlan) and (not loop.plan.whole or loop.noise is not None):
            return False
        return not leaves(loop.y0)[0].is_meta and not mapped(loop.y0)

    def __call__(self, y: State, carry: Carry, stats: Stats) -> tuple[State, Carry]:
        """The state and the carry after the steps taken; the plan is told of them."""
        room = self._loop.max_steps - 1 - stats.attempts  # the last one allowed is the loop's own
        cost = self._cost(stats.attempts, y, carry) if room > 0 else None
        if cost is None:
            return y, carry
        go = self._chosen if isinstance(self._loop.plan, AdaptivePlan) else self._given
        try:
            count, y, carry = go(stats.attempts, room, y, carry)
        except torch._dynamo.exc.TorchDynamoException:
            self._loop.leap, self._graph.fits = None, False  # each step is a graph from here on
            return y, carry
        stats.attempts += count
        self._loop.field.evaluations += count * cost
        return y, carry

    def _cost(self, n: int, y: State, carry: Carry) -> int | None:
        """Evaluations in one step, from one taken for this; None where the next step would not be
        of its kind.
        """
        loop, costs = self._loop, self._graph.costs
        kind = tuple(_look(x) for x in leaves((y, carry)))
        if kind not in costs:
            before = loop.field.evaluations
            step = loop.step(n, *loop.plan.interval(), y, carry)
            settled = kind == tuple(_look(x) for x in leaves((step.y1, step.carry)))
            costs[kind] = loop.field.evaluations - before if settled else None
            loop.field.evaluations = before
        return costs[kind]

    def _chosen(self, n: int, room: int, y: State, carry: Carry) -> tuple[int, State, Carry]:
        plan = self._loop.plan
        assert isinstance(plan, AdaptivePlan)
        if self._ends is None:
            self._ends = as_input(plan.ends, y)
        marks = as_input(plan.marks(), y)
        limit = torch.full((), room, device=marks.device)
        count, marks, y, carry = self._calls(self._ends, limit, marks, y, carry)
        plan.resume(marks)
        return int(count), y, carry

    def _given(self, n: int, room: int, y: State, carry: Carry) -> tuple[int, State, Carry]:
        loop, plan = self._loop, self._loop.plan
        assert isinstance(plan, GivenPlan)
        times, done = plan.ahead(room), 0
        most = _STEPS
        if loop.noise is not None:
            size = sum(x.numel() for x in leaves(loop.y0))
            most = max(4, min(_STEPS, _NUMBERS // max(1, size)))
        while done < len(times) - 1:
            part = times[done : done + most + 1]
            count = len(part) - 1
            spare = most - count
            dw = None if loop.noise is None else self._noise(n + done, part, spare)
            row = as_input([*part, *part[-1:] * spare], y)
            y, carry = self._calls(row, torch.full((), count, device=row.device), dw, y, carry)
            done += count
        plan.skip(done)
        return done, y, carry

    def _noise(self, n: int, times: Sequence[Scalar], spare: int) -> Increment:
        """The increments of these steps, and as many more as the graph has room for."""
        source = self._loop.noise
        assert source is not None
        rows = [source(n + i, *times[i : i + 2]) for i in range(len(times) - 1)]
        return stack(rows + rows[-1:] * spare)


def _look(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else x
