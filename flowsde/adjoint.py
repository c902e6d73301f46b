"""How gradients come back."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ._loop import Loop, Recorder
from ._plan import Accept
from ._scalar import Scalar
from ._state import State, detach, leaves, where
from .integrators.base import Carry, Engine, Step
from .solution import Solution, Stats

__all__ = ["Adjoint", "Checkpointed", "Direct"]


class Adjoint(ABC):
    """How gradients come back through a solve."""

    @abstractmethod
    def run(self, loop: Loop) -> Solution:
        """Runs the loop so that its outputs differentiate in this way."""


@dataclass(frozen=True)
class Direct(Adjoint):
    """Through every operation of the accepted steps: exact, memory grows with the steps."""

    def run(self, loop: Loop) -> Solution:
        return loop.run(Recorder())


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """The same gradient, bit by bit, from recomputed steps.

    Keeps the state at every ``every``-th step and, in the backward pass, takes the steps of one
    stretch again, with the same times and the same noise. What a step saves for its backward is
    held for one stretch at a time; closures, frozen and shared parameters are no different from
    ``Direct``. Costs one more evaluation each. The field must be deterministic.

    Args:
        every: steps in a stretch, >= 1.

    Raises:
        ValueError: on every < 1.
        RuntimeError: in the backward pass, if recomputation does not meet the forward pass.

    Source: Griewank 1992; Chen et al. 2016, arXiv 1604.06174.
    """

    every: int = 16

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Checkpointed(every) is >= 1; got {self.every}")

    def run(self, loop: Loop) -> Solution:
        if isinstance(loop.integrator, Engine):
            raise TypeError(
                f"{type(loop.integrator).__name__} takes its own steps, which cannot be taken "
                "again one by one: use adjoint=Direct()"
            )
        if not torch.is_grad_enabled():
            return loop.run(Recorder())
        tape = _Tape(self.every)
        solution = loop.run(tape)
        tape.finish(solution)
        return solution


class _Frame:
    """What one step saves for its backward: held while it runs, afterwards recomputed."""

    def __init__(self, stretch: _Stretch) -> None:
        self.stretch, self.count = stretch, 0
        self.held: list[Tensor] | None = []

    def pack(self, x: Tensor) -> tuple[_Frame, int]:
        if self.held is not None:
            self.held.append(x)
        self.count += 1
        return self, self.count - 1

    def unpack(self, handle: tuple[_Frame, int]) -> Tensor:
        if self.held is None:
            self.stretch.recompute()
        assert self.held is not None
        return self.held[handle[1]]


@dataclass
class _Record:
    """One attempt that counted, at least for some rows."""

    n: int
    t0: Scalar
    t1: Scalar
    frame: weakref.ref[_Frame]
    accept: Accept


@dataclass(eq=False)
class _Stretch:
    """Steps between two kept states. Alive as long as a graph holds one of its frames."""

    tape: _Tape
    loop: Loop
    y: State
    carry: Carry
    autocast: tuple[str, bool, torch.dtype]
    records: list[_Record] = field(default_factory=list)
    end: State = None

    def recompute(self) -> None:
        """Takes the steps again, and holds what they save."""
        self.tape.hold(self)
        evaluations = self.loop.field.evaluations
        y, carry = self.y, self.carry
        kind, enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(kind, enabled=enabled, dtype=dtype):
            for record in self.records:
                step = self._again(record, y, carry)
                y = where(record.accept, step.y1, y)
                carry = where(record.accept, step.carry, carry)
        for again, kept in zip(leaves(y), leaves(self.end), strict=True):
            size = kept.abs().nan_to_num(0.0, 0.0)
            gap = (again.detach() - kept.detach()).abs().nan_to_num(0.0, 0.0)
            if kept.numel() and bool(gap.max() > 1e-3 * size.max()):
                raise RuntimeError(_NOT_REPEATED)
        self.tape.count(self.loop.field.evaluations - evaluations)

    def _again(self, record: _Record, y: State, carry: Carry) -> Step:
        frame = record.frame()
        held: list[Tensor] = []

        def pack(x: Tensor) -> int:
            held.append(x.detach())
            return len(held) - 1

        with saved_tensors_hooks(pack, held.__getitem__):
            step = self.loop.advance(record.n, record.t0, record.t1, y, carry)
        if frame is not None:
            if len(held) != frame.count:
                raise RuntimeError(_NOT_REPEATED)
            frame.held = held
        return step

    def release(self) -> None:
        for record in self.records:
            frame = record.frame()
            if frame is not None:
                frame.held = None


_NOT_REPEATED = (
    "the field did not repeat itself when Checkpointed took its steps again: is there dropout, "
    "another random draw or a counter in it? Fix the draw for the solve, or use Direct()"
)


class _Tape(Recorder):
    """Takes steps whose saved tensors are forgotten, and remembers how to take them again."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._current: _Stretch | None = None
        self._live: weakref.ref[_Stretch] | None = None
        self._last: tuple[_Frame, int, Scalar, Scalar] | None = None
        self._stats: Stats | None = None

    def take(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
        stretch = self._current
        if stretch is None or len(stretch.records) == self._every:
            start = detach(y)
            if stretch is not None:
                stretch.end = start
            kind = leaves(y)[0].device.type
            autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            stretch = self._current = _Stretch(self, loop, start, detach(carry), autocast)
        frame = _Frame(stretch)
        with saved_tensors_hooks(frame.pack, frame.unpack):
            step = loop.advance(n, t0, t1, y, carry)
        self._last = frame, n, detach(t0), detach(t1)
        return step

    def keep(self, accept: Accept) -> None:
        assert self._last is not None
        assert self._current is not None
        (frame, n, t0, t1), self._last = self._last, None
        frame.held = None
        if accept is not False:
            record = _Record(n, t0, t1, weakref.ref(frame), accept)
            self._current.records.append(record)

    def restart(self, y: State) -> None:
        if self._current is not None:
            self._current.end, self._current = detach(y), None

    def finish(self, solution: Solution) -> None:
        """The solve is over: what is needed again lives in the graph alone."""
        if self._current is not None:
            self._current.end = detach(solution.y1)
        self._current, self._stats = None, solution.stats

    def hold(self, stretch: _Stretch) -> None:
        """One stretch is held at a time."""
        live = self._live() if self._live is not None else None
        if live is not None and live is not stretch:
            live.release()
        self._live = weakref.ref(stretch)

    def count(self, evaluations: int) -> None:
        if self._stats is not None:
            self._stats.backward_evaluations += evaluations
