"""Steps, all but the last forgotten on the way forward, that are taken again on the way back."""

from __future__ import annotations

import bisect
import math
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ._loop import Loop, Recorder
from ._plan import Accept
from ._scalar import Scalar
from ._state import State, detach, leaves, sources, tree_map, where
from .integrators.base import Carry, Step
from .solution import Stats

__all__ = ["Tape"]

STRETCH = 16
OTHERS = (
    "the field's parameters are not those that the solve was made with, as after torch.func."
    "functional_call or where FSDP shards its layers one by one, so that Checkpointed cannot take "
    "its steps again: use adjoint=Direct(), give them in args, or shard the whole model at once"
)
NOT_REPEATED = (
    "the field did not repeat itself when Checkpointed took its steps again: is there dropout, "
    "another random draw or a counter in it? Fix the draw for the solve, or use Direct()"
)
CHANGED = (
    "a parameter or an argument of the field, or another tensor that its gradient needs, was "
    "changed in place after the solve: call backward() first"
)
_Saved = list[tuple[Tensor, int]]  # tensors, and their versions when they were saved


class _Frame:
    """What one step saves for its backward: held or, where it is not any more, recomputed."""

    def __init__(self, tape: Tape, place: int) -> None:
        self.tape, self.place, self.count = tape, place, 0
        self.held: _Saved | None = []

    def pack(self, x: Tensor) -> tuple[_Frame, int]:
        if self.held is not None:
            self.held.append((x.detach(), x._version))  # its graph would hold this frame
        self.count += 1
        return self, self.count - 1

    def unpack(self, handle: tuple[_Frame, int]) -> Tensor:
        if self.held is None:
            self.tape.hold(self.place)
        assert self.held is not None
        x, version = self.held[handle[1]]
        if x._version != version:
            raise RuntimeError(CHANGED)
        return x


@dataclass
class _Record:
    """One attempt that counted, at least for some rows."""

    n: int
    t0: Scalar
    t1: Scalar
    frame: weakref.ref[_Frame]
    accept: Accept = False


class Tape(Recorder):
    """Keeps some states and the times of all steps; alive as long as a graph holds a frame.

    On the way forward states are kept ``spacing`` steps apart; when they take up half of the
    ``slots`` every other one is dropped. The steps of one block of at most ``block`` are held at a
    time, with the states that they start from: the last ones on the way forward, and then, on the
    way back, one block after the other. The free slots serve for states in between, placed as
    revolve does (Griewank and Walther 2000).
    """

    def __init__(self, budget: int | None) -> None:
        self._budget, self._most = budget, 0
        self._block, self._slots = STRETCH, math.inf
        self._spacing = STRETCH if budget is None else 1
        self._records: list[_Record] = []
        self._kept: dict[int, tuple[State, Carry]] = {}
        self._starts: dict[int, tuple[State, Carry]] = {}  # where the solve started afresh
        self._ends: dict[int, State] = {}  # what it had come to before
        self._held: deque[tuple[weakref.ref[_Frame], State, Carry]] = deque()
        self._last: tuple[_Record, _Frame, State, Carry] | None = None
        self._stats: Stats | None = None
        self._loop: Loop | None = None
        self._used: _Saved = []  # by the field, as they then were
        self._found: _Saved = []  # in the first step's graph, of closures too
        self._written: dict[str, int] = {}  # after the first step
        self._met = False  # whether steps taken again came to where they had

    def take(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        place = len(self._records)
        if self._loop is None:
            self._loop = loop
            kind = leaves(y)[0].device.type
            self._autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._used = [(x, _version(x)) for x in self._given()]
            y, carry = _copies((y, carry))  # the caller's own may change
        if place in self._ends and place not in self._starts:
            self._starts[place] = detach(y), detach(carry)
        elif place % self._spacing == 0 and place not in self._kept:
            self._keep(place, y, carry)
        self._release(self._block - 1)
        frame = _Frame(self, place)
        with saved_tensors_hooks(frame.pack, frame.unpack):
            step = loop.advance(n, t0, t1, y, carry)
        if not place:
            own = [x for x in leaves((y, carry)) if isinstance(x, Tensor)]
            self._found = [(x, _version(x)) for x in sources(leaves(step.y1), own)]
        if place == 1:  # the first step may have filled a cache
            loop.field.check_written(self._written)
        elif not place:
            self._written = loop.field.written()
        record = _Record(n, detach(t0), detach(t1), weakref.ref(frame))
        self._last = record, frame, detach(y), detach(carry)
        return step

    def _given(self) -> list[Tensor]:
        """The tensors that the field is known to use."""
        assert self._loop is not None
        field = self._loop.field
        given: list[Any] = [*field.dynamics.parameters(), *leaves(field.args)]
        return [x for x in given if isinstance(x, Tensor)]

    def keep(self, accept: Accept) -> None:
        assert self._last is not None
        (record, frame, *start), self._last = self._last, None
        if self._budget is not None and frame.count > self._most:
            self._share(self._budget, frame, start)
        if accept is not False:
            record.accept = accept
            self._records.append(record)
            self._held.append((record.frame, *start))

    def _release(self, most: int) -> None:
        """Lets go of what the first steps that are held have saved, until there are so many."""
        while len(self._held) > most:
            ref, *_ = self._held.popleft()
            frame = ref()
            if frame is not None:
                frame.held = None

    def _share(self, budget: int, frame: _Frame, start: list[Any]) -> None:
        """Half of the budget for the steps held, if all save what this one does; then states."""
        assert self._loop is not None
        assert frame.held is not None
        own = {_place(x) for x in self._loop.field.parameters()}
        saved = [x for x, _ in frame.held]
        step = max(1, _bytes([*saved, *leaves(start)], own))
        state = max(1, _bytes(leaves(next(iter(self._kept.values()))), set()))
        self._block, self._most = max(1, budget // 2 // step), frame.count
        least = max(2, step // (16 * state))  # of small states more cost nothing beside one step
        self._slots = max(least, (budget - self._block * step) // state)

    def _keep(self, place: int, y: State, carry: Carry) -> None:
        if len(self._kept) >= self._slots / 2:
            self._spacing *= 2
            self._kept = {k: v for k, v in self._kept.items() if k % self._spacing == 0}
            if place % self._spacing:
                return
        self._kept[place] = detach(y), detach(carry)

    def branch(self, y: State) -> Tape:
        self._release(0)
        self.restart(y)
        if self._budget is None:
            return Tape(None)
        return Tape(max(1, self._budget - _bytes(leaves(list(self._kept.values())), set())))

    def restart(self, y: State) -> None:
        self._ends[len(self._records)] = tree_map(_copied, detach(y))

    def finish(self, y: State, stats: Stats) -> None:
        self._ends.setdefault(len(self._records), tree_map(_copied, detach(y)))
        if self._held:
            _, *start = self._held[0]
            self._kept.setdefault(len(self._records) - len(self._held), tuple(start))
        self._stats = stats

    def hold(self, place: int) -> None:
        """Takes the steps of the block that ends with this one again, and holds what they save."""
        assert self._loop is not None
        for x, (used, version) in zip(self._given(), self._used, strict=True):
            if x is not used:
                raise RuntimeError(OTHERS)
            if _version(x) != version:
                raise RuntimeError(CHANGED)
        if any(_version(x) != version for x, version in self._found):
            raise RuntimeError(CHANGED)
        self._release(0)
        field, (kind, enabled, dtype) = self._loop.field, self._autocast
        evaluations, cast = field.evaluations, torch.autocast(kind, enabled=enabled, dtype=dtype)
        with field.still(), torch.enable_grad(), cast:
            self._hold(place)
        field.forget()
        if self._stats is not None:
            self._stats.backward_evaluations += field.evaluations - evaluations

    def _hold(self, place: int) -> None:
        ends = {**{k: y for k, (y, _) in self._kept.items()}, **self._ends}
        near = place + (1 if self._met else STRETCH)  # looked for once, where no state is next
        check = min((k for k in ends if place < k <= near), default=None)
        known = {**self._kept, **self._starts}
        places = sorted(k for k in known if k <= place)
        start = max(places[-1], place + 1 - self._block)
        at = places[bisect.bisect_right(places, start) - 1]
        self._kept = {k: v for k, v in self._kept.items() if k <= at}
        y, carry = known[at]
        stops = set(_stops(at, start, int(min(self._slots - len(self._kept), start - at))))
        for n in range(at, start):
            y, carry = self._again(n, y, carry, hold=False)
            if n + 1 in stops:
                self._kept[n + 1] = y, carry
        for n in range(start, place + 1):
            self._held.append((self._records[n].frame, y, carry))
            y, carry = self._again(n, y, carry, hold=True)
        if check is not None:
            for n in range(place + 1, check):
                y, carry = self._again(n, y, carry, hold=False)
            _compare(y, ends[check])
            self._met = True

    def _again(self, n: int, y: State, carry: Carry, hold: bool) -> tuple[State, Carry]:
        record, again = self._records[n], _Frame(self, n)
        frame = record.frame()
        assert self._loop is not None
        with saved_tensors_hooks(again.pack, again.unpack):
            step = self._loop.advance(record.n, record.t0, record.t1, y, carry)
        if frame is not None and again.count != frame.count:
            raise RuntimeError(NOT_REPEATED)
        if hold and frame is not None:
            frame.held = again.held
        accept = record.accept
        return detach(where(accept, step.y1, y)), detach(where(accept, step.carry, carry))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _copies(tree: Any) -> Any:
    """Copies of its tensors, one of each: the sums of their gradients keep their order."""
    made = {id(x): _copied(x) for x in leaves(tree)}
    return tree_map(lambda x: made[id(x)], tree)


def _bytes(tensors: Iterable[object], but: set[int]) -> int:
    """Of the storages of these tensors, as far as they use them: a step's noise is a part of what
    was drawn for many.
    """
    sizes: dict[int, int] = {}
    for x in tensors:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            place = _place(x)
            sizes[place] = min(sizes.get(place, 0) + x.nbytes, storage.nbytes() or x.nbytes)
    return sum(size for place, size in sizes.items() if place not in but)


def _place(x: Tensor) -> int:
    """Where its numbers lie; those of a tensor that torch.func has wrapped are its own."""
    try:
        return x.untyped_storage().data_ptr()
    except RuntimeError:
        return -id(x)


def _stops(start: int, end: int, slots: int) -> list[int]:
    """Where to keep states between start and end, for the fewest steps taken again.

    With s slots and at most r passes over each step, C(s + r, s) steps can be undone.
    """
    stops: list[int] = []
    while slots > 0 and end - start > 1:
        passes = 1
        while math.comb(slots + passes, slots) < end - start:
            passes += 1
        jump = end - start - math.comb(slots + passes - 1, slots - 1)
        jump = min(max(jump, math.comb(slots + passes - 2, slots), 1), end - start - 1)
        start, slots = start + jump, slots - 1
        stops.append(start)
    return stops


def _compare(again: State, kept: State) -> None:
    for a, b in zip(leaves(again), leaves(kept), strict=True):
        size = b.abs().nan_to_num(0.0, 0.0)
        gap = (a.detach() - b.detach()).abs().nan_to_num(0.0, 0.0)
        if b.numel() and bool(gap.max() > 1e-3 * size.max()):
            raise RuntimeError(NOT_REPEATED)
