"""The steps of a solve that wants only its end, as a loop within one graph."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._graph import Calls, Graph, as_input, of_sizes
from ._increment import Increment, Source
from ._loop import Loop
from ._outset import Outset
from ._plan import AdaptivePlan, GivenPlan, coarse, too_small
from ._save import SaveEnd
from ._scalar import Scalar
from ._state import State, builder, leaves, mapped, tree_map, unhooked, where
from .dynamics.field import Field
from .integrators.base import Carry, Integrator, Step
from .solution import Stats
from .stepping import Adaptive

__all__ = ["Leap", "look", "tried"]

_loop: Callable[..., Any] = torch.while_loop
_STEPS, _CALLS = 8, 16  # given steps that an unrolled graph takes at most, so many evaluations
_TIME = torch.Size(()), torch.float64  # of a time that a method keeps
_NUMBERS, _MOST = 1 << 18, 1 << 12  # of increments, and of steps, that are put together


def chosen(
    _flowsde_method: Integrator, _flowsde_stepping: Adaptive, field: Field, source: Source | None,
    ends: Tensor, limit: Tensor, marks: Tensor, y: State, carry: Carry,
) -> tuple[Tensor, Tensor, State, Carry, Tensor | None]:  # fmt: skip
    """Attempts until all rows have arrived, one of them would fail, or there were ``limit``.

    Args:
        source: of the increments, where there are any.
        ends: start and end of the solve, ``(2,)`` or ``(2, batch)``.
        marks: as ``AdaptivePlan.marks`` gives them.

    Returns:
        How many attempts there were; marks, y and carry after them; what the steps ``spent``, where
        that depends on their values.
    """
    method, stepping, (start, end) = _flowsde_method, _flowsde_stepping, ends.unbind()
    here = None if source is None else source.at(marks[0])
    spent = None if method.static else torch.zeros(3, dtype=limit.dtype, device=limit.device)
    build, span = _builder((y, carry, here, spent)), end - start
    exponent = method.exponent(field.dynamics)

    def on(n: Tensor, live: Tensor, marks: Tensor, *flat: Tensor) -> Tensor:
        return live & (n < limit)

    def attempt(n: Tensor, live: Tensor, marks: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        y, carry, here, spent = build(flat)
        t, dt, before, older, accepted, rejected, going = marks.unbind()
        on = going > 0
        lands = stepping.longest(dt) >= (end - t).abs()
        reach = torch.where(lands, end, t + torch.sign(span) * dt)
        reach = torch.where(on, reach, t)
        dw, there = (None, None) if source is None else source.walk(0, t, reach, here)
        step = method.step(field, t, reach, y, dw, carry)
        error = stepping.measure(step.error(), y, step.y1)
        accept, ahead, memory = stepping.advise(error, reach - t, exponent, (before, older))
        ahead = ahead if source is None else coarse(ahead, leaves(y)[0].dtype)
        fails = (on & ~accept & too_small(ahead, t, span.abs(), stepping.dt_min)).any()
        takes = on & ~fails
        accept, missed = accept & takes, ~accept & takes
        going = on & ~(accept & lands)
        counts = accepted + accept, rejected + missed
        rows: list[Any] = [torch.where(accept, reach, t), ahead, *memory, *counts, going]
        after = torch.where(fails, marks, torch.stack([x.to(t.dtype) for x in rows]))
        new = where(accept, (step.y1, step.carry, there), (y, carry, here))
        if spent is not None:
            spent = spent + ~fails * step.spent
        return n + ~fails, ~fails & going.any(), after, *_tensors((*new, spent))

    n = torch.zeros_like(limit)
    start_of = n, n == 0, marks, *_tensors((y, carry, here, spent))
    n, _, marks, *flat = _loop(on, attempt, start_of)
    y, carry, _, spent = build(flat)
    return n, marks, y, carry, spent


def outright(
    _flowsde_method: Integrator, _flowsde_stepping: Adaptive, field: Field, source: None,
    ends: Tensor, limit: Tensor, first: Tensor | None, y: State,
) -> tuple[Tensor, Tensor, State, Carry, Tensor | None]:  # fmt: skip
    """The same from the start on, which chooses the first step where none is given."""
    method, stepping, (start, end) = _flowsde_method, _flowsde_stepping, ends.unbind()
    carry, span, sign = method.init(field, start, y), (end - start).abs(), torch.sign(end - start)
    outset = Outset(field, stepping, method.exponent(field.dynamics), start, y, sign, span)
    size: Any = outset.smooth(method.slope(carry)) if first is None else first
    size = stepping.first(size, start, span)
    one, none = torch.ones_like(start), torch.zeros_like(start)
    on = (span > 0).to(start.dtype)
    marks = torch.stack([start, size, one, one, none, none, on])
    return chosen(method, stepping, field, source, ends, limit, marks, y, carry)


def given(
    _flowsde_method: Integrator, _flowsde_stepping: None, field: Field, source: None,
    times: Tensor, count: Tensor, dw: Increment | None, y: State, carry: Carry,
) -> tuple[State, Carry]:  # fmt: skip
    """The first ``count`` of these steps, one after the other in the graph.

    The others repeat the last one, from where it started: a step from anywhere else may leave what
    the field is defined on, and what is not finite spoils gradients, wanted or not.

    Args:
        times: their starts and ends, ``(2, steps)`` or ``(2, steps, batch)``.
        dw: their increments, stacked.
    """
    steps = times.shape[1]
    increments = [None] * steps if dw is None else dw.unbind(steps)
    start = y, carry
    for i, (t0, t1, own) in enumerate(zip(*times, increments, strict=True)):
        start = where(i < count, (y, carry), start)
        step = _flowsde_method.step(field, t0, t1, start[0], own, start[1])
        y, carry = where(i < count, (step.y1, step.carry), (y, carry))
    return y, carry


def looped(
    _flowsde_method: Integrator, _flowsde_stepping: None, field: Field, source: Source | None,
    times: Tensor, count: Tensor, dw: Increment | None, y: State, carry: Carry,
) -> tuple[State, Carry]:  # fmt: skip
    """The same in a loop: any number of steps, and no gradient; ``source`` in the place of ``dw``,
    or ``dw`` itself.
    """
    here = None if source is None else source.at(times[0, 0])
    build = _builder((y, carry, here))

    def on(n: Tensor, *flat: Tensor) -> Tensor:
        return n < count

    def step(n: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        y, carry, here = build(flat)
        t0, t1 = times.index_select(1, n[None]).squeeze(1).unbind()
        own, there = (None, None) if source is None else source.walk(0, t0, t1, here)
        if dw is not None:
            own = dw.map(lambda x: x.index_select(0, n[None]).squeeze(0))
        step = _flowsde_method.step(field, t0, t1, y, own, carry)
        return n + 1, *_tensors((step.y1, step.carry, there))

    _, *flat = _loop(on, step, (torch.zeros_like(count), *_tensors((y, carry, here))))
    y, carry, _ = build(flat)
    return y, carry


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


_BETWEEN = "torch.autograd", "torch.overrides", "torch.utils", __name__
_TRACED = __name__.partition(".")[0], "torch._functorch"


class _Listener(TorchFunctionMode):
    """Hears whether somebody takes gradients, but ``torch.func``, which the compiler traces, and
    the library, which has other ways in a graph.
    """

    heard = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            names = (frame.f_globals["__name__"] for frame, _ in traceback.walk_stack(None))
            caller = next(name for name in names if not name.startswith(_BETWEEN))
            self.heard |= not caller.startswith(_TRACED)
        return func(*args, **(kwargs or {}))


def tried(loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> tuple[Step, int]:
    """A step that does not count, before the graphs are made, and its evaluations. Raises TypeError
    where the graphs would have no gradients.
    """
    field, asks = loop.field, torch.is_grad_enabled()
    asks &= any(x.requires_grad for x in (*leaves(y), *field.parameters()))
    with field.aside(), torch.no_grad(), unhooked():
        dw = None if loop.noise is None else loop.noise(n, t0, t1)  # by graphs that hear the mode
        before = field.evaluations
        with _Listener() as listener:
            step = loop.integrator.step(field, t0, t1, y, dw, carry)
        spent = field.evaluations - before
    if asks and listener.heard:
        raise TypeError(
            "a graph has no gradients of a field that calls torch.autograd.grad: write "
            "torch.func.grad in it, or use executor=Eager()"
        )
    return step, spent


class Leap:
    """Takes what steps it can at once; those that fail or start the method are left to the loop.

    Args:
        loop: the solve.
        graph: of a function of this module, for each of them.
        source: of the increments, where a graph can ask it.
    """

    def __init__(
        self, loop: Loop, graph: Callable[[Callable[..., Any]], Graph], source: Source | None
    ) -> None:
        self._loop, self._graph, self._source = loop, graph, source
        self._adaptive = loop.stepping if isinstance(loop.stepping, Adaptive) else None
        self._calls = Calls(graph(given), loop.integrator, None, loop.field, None)

    @staticmethod
    def suits(loop: Loop, source: Source | None) -> bool:
        """Whether nobody needs to see the steps of this solve."""
        seen = loop.dense or loop.watch is not None or loop.progress is not None
        if seen or not isinstance(loop.saver, SaveEnd):
            return False
        drawn = loop.noise is None or source is not None  # or an input, as of given steps alone
        if isinstance(loop.plan, AdaptivePlan) and not (loop.plan.whole and drawn):
            return False
        if isinstance(loop.plan, GivenPlan) and not loop.integrator.static:
            return False
        return not leaves(loop.y0)[0].is_meta and not mapped(loop.y0)

    def begin(self, y: State, stats: Stats) -> tuple[State, Carry]:
        loop, plan = self._loop, self._loop.plan
        alone = isinstance(plan, AdaptivePlan) and loop.noise is None and loop.integrator.static
        cost = self._cost_of_start(y) if alone else None
        if cost is None or loop.max_steps < 2:
            return loop.begin(y)
        assert isinstance(plan, AdaptivePlan)
        assert self._adaptive is not None
        plan.meet(loop.field)
        first = None if self._adaptive.dt0 is None else as_input(self._adaptive.dt0, y)
        found = self._call(outright, self._ends(y), self._limit(y, loop.max_steps - 1), first, y)
        if found is None:
            return loop.begin(y)
        loop.field.evaluations += cost
        return self._resume(found, stats)

    def go(self, y: State, carry: Carry, stats: Stats) -> tuple[State, Carry]:
        loop, plan = self._loop, self._loop.plan
        carry = tree_map(lambda x: as_input(x, y) if isinstance(x, float) else x, carry)  # times
        room = loop.max_steps - 1 - stats.attempts  # the last one allowed is the loop's own
        if room < 1 or self._cost(y, carry) is None:
            return y, carry
        if isinstance(plan, GivenPlan):
            return self._given(plan, room, y, carry, stats)
        assert isinstance(plan, AdaptivePlan)
        marks, limit = as_input(plan.marks(), y), self._limit(y, room)
        if not loop.integrator.static:
            y, carry = of_sizes((y, carry))
        found = self._call(chosen, self._ends(y), limit, marks, y, carry)
        return (y, carry) if found is None else self._resume(found, stats)

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What a graph returns; None, where the compiler does not take it, and no more leaps, but
        for steps that can be taken without a loop.
        """
        graph, loop = self._graph(function), self._loop
        before = loop.field.evaluations
        try:
            if graph.fits and function is given:
                return self._calls(*inputs)
            if graph.fits:  # called once a solve, or a few times
                return graph(loop.integrator, self._adaptive, loop.field, self._source, *inputs)[0]
        except torch._dynamo.exc.TorchDynamoException:
            graph.fits = False
        finally:
            loop.field.evaluations = before
        if function is not looped:
            loop.leap = None
        return None

    def _ends(self, y: State) -> Tensor:
        assert isinstance(self._loop.plan, AdaptivePlan)
        return as_input(self._loop.plan.ends, y)

    def _limit(self, y: State, room: int) -> Tensor:
        return torch.full((), room, device=leaves(y)[0].device)

    def _resume(self, found: Any, stats: Stats) -> tuple[State, Carry]:
        count, marks, y, carry, spent = found
        assert isinstance(self._loop.plan, AdaptivePlan)
        self._loop.plan.resume(marks)
        if spent is None:
            self._told(int(count), self._cost(y, carry), stats)
        else:
            self._told(int(count), 0, stats)
            self._loop.field.spend(spent)
        return y, carry

    def _told(self, count: int, cost: int | None, stats: Stats) -> None:
        stats.attempts += count
        self._loop.field.evaluations += count * (cost or 0)

    def _given(
        self, plan: GivenPlan, room: int, y: State, carry: Carry, stats: Stats
    ) -> tuple[State, Carry]:
        cost = self._cost(y, carry)
        together = min(_MOST, max(2, _NUMBERS // max(1, sum(x.numel() for x in leaves(y)))))
        while plan.running and room > 0 and self._loop.leap is self:
            loops = self._loops(y)
            most = together if loops else min(_STEPS, _CALLS // max(1, cost or _CALLS))
            if most < 2:
                break
            wide = most * max(1, together // most)
            times = plan.ahead(min(wide, room))
            most = max(2, len(times) - 1) if loops else most
            for count, *inputs in self._inputs(times, most, stats.attempts, y):
                if loops:
                    _any_number(*inputs)
                found = self._call(looped if loops else given, *inputs, y, carry)
                if found is None:
                    break
                y, carry = found
                plan.skip(count)
                self._told(count, cost, stats)
                room -= count
        return y, carry

    def _loops(self, y: State) -> bool:
        """Whether given steps are a loop: on other devices its end would be read by the host, step
        by step.
        """
        near = leaves(y)[0].device.type == "cpu"
        return near and not torch.is_grad_enabled() and self._graph(looped).fits

    def _inputs(
        self, times: list[Scalar], most: int, n: int, y: State
    ) -> Iterator[tuple[Any, ...]]:
        """For each call its number of steps; their ends, that number, their increments."""
        drawn = self._source is not None and self._loops(y)  # within the graph
        noise, steps = None if drawn else self._loop.noise, len(times) - 1
        spare = -steps % most  # the last call is filled with the last step again, unused
        calls = (steps + spare) // most
        marks = as_input(times, y)
        ends = torch.stack((marks[:-1], marks[1:]))
        ends = torch.cat((ends, *[ends[:, -1:]] * spare), 1)
        ends = ends.reshape(2, calls, most, *ends.shape[2:]).transpose(0, 1).contiguous()
        dws: list[Any] = [None] * calls
        if noise is not None:
            found = noise.several(n, list(itertools.pairwise(times)))
            if spare:
                found = Increment.cat([found, *[found.map(itemgetter(slice(-1, None)))] * spare])
            dws = found.map(lambda x: x.reshape(calls, most, *x.shape[1:])).unbind(calls)
        all_of_them, rest = self._limit(y, most), self._limit(y, most - spare)
        for i in range(calls - 1):
            yield most, ends[i], all_of_them, dws[i]
        yield most - spare, ends[-1], rest, dws[-1]

    def _cost(self, y: State, carry: Carry) -> int | None:
        """Evaluations in one step, from one taken for this; None where the next step would not be
        of its kind.
        """
        loop, costs = self._loop, self._graph(chosen if self._adaptive else given).costs
        kind = look((y, carry))
        if kind not in costs:
            step, spent = tried(loop, 0, *loop.plan.interval(), y, carry)
            costs[kind] = spent if kind == look((step.y1, step.carry)) else None
        return costs[kind]

    def _cost_of_start(self, y: State) -> int | None:
        """Evaluations before the first step; None where that one is not of the others' kind."""
        assert self._adaptive is not None
        costs, field = self._graph(outright).costs, self._loop.field
        kind = self._adaptive.dt0 is None, *look(y)
        if kind not in costs:
            with field.aside():
                before = field.evaluations
                y, carry = self._loop.begin(y)
                spent = field.evaluations - before
                costs[kind] = None if self._cost(y, carry) is None else spent
        return costs[kind]


def _any_number(times: Tensor, count: Tensor, dw: Increment | None) -> None:
    """Tells the compiler that the number of steps differs from call to call."""
    torch._dynamo.maybe_mark_dynamic(times, 1)
    for x in leaves(dw):
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)


def look(tree: Any) -> tuple[Any, ...]:
    """What tells one kind of a step's start from another."""
    return tuple(
        (x.shape, x.dtype) if isinstance(x, Tensor) else _TIME if isinstance(x, float) else x
        for x in leaves(tree)
    )
