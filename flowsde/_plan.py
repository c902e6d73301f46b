"""Where the steps of one solve go, and which of them count."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._increment import Source
from ._outset import Outset
from ._scalar import Scalar, expand, moving, still, to_float
from ._scalar import where as choose
from ._state import State, finite, leaves, mapped, put_rows, rows_of, tree_map
from .dynamics.field import Field
from .integrators.base import Carry, Integrator, Step
from .integrators.runge_kutta import ExplicitRK
from .solution import Stats, Status
from .stepping import Adaptive, Stepping, rms_norm

__all__ = ["Accept", "AdaptivePlan", "GivenPlan", "Plan", "coarse", "too_small"]

Accept = bool | Tensor
_NAMED = 5  # samples that a message names
_THIN = 7 / 8  # part of the samples that still run, at which the others are left out


class Plan(ABC):
    """Where the next step goes, and whether the last one counts. Made anew for each solve."""

    status: Status | Tensor = Status.RUNNING
    message: str = ""
    spoiled: bool = False  # whether rows that do not count were not finite: their graph is poison
    jumped: bool = False  # whether the last step ended where the field jumps, at least for some
    fresh: Accept = False  # the rows for which it did

    @property
    @abstractmethod
    def running(self) -> bool: ...

    @property
    @abstractmethod
    def t(self) -> Scalar:
        """The time reached."""

    @property
    @abstractmethod
    def progress(self) -> float:
        """The part of the way that is done, 0 to 1."""

    def start(self, field: Field, y: State, carry: Carry, noise: Source | None) -> None:
        """Sees the initial state and slope, and the path."""

    @abstractmethod
    def interval(self) -> tuple[Scalar, Scalar]:
        """The step to attempt."""

    def before(self, t: Scalar) -> Scalar:
        """The time that a step which ends at t shows to the field."""
        return t

    def after(self, t: Scalar) -> Scalar:
        """The time that a step which starts at t shows to the field."""
        return t

    @abstractmethod
    def judge(self, step: Step, y: State) -> Accept:
        """Whether the attempt counts: a bool, or row by row."""

    @abstractmethod
    def land(self, hit: Accept, t: Scalar, over: Accept) -> None:
        """An event cut the step that was just judged: it ended at t, where it was hit; for good,
        where it is over.
        """

    def rest(self) -> Tensor | None:
        """The rows that still run, where others have ended and may be left out."""
        return None

    def select(self, index: Tensor, stepping: Stepping) -> Plan:
        """The plan of these rows alone, by their own stepping."""
        raise NotImplementedError

    def absorb(self, index: Tensor, part: Plan) -> None:
        """Takes what became of these rows."""

    @abstractmethod
    def exhausted(self, max_steps: int) -> None:
        """Told that the loop stops short."""

    def finish(self, y: State, stats: Stats) -> None:
        """Sees the last state; writes its counts."""

    @abstractmethod
    def forget(self) -> None:
        """Told that the solve is over: lets go of graphs, as an adjoint may keep this in them."""


class GivenPlan(Plan):
    """Steps known beforehand: every one counts, and the host reads nothing until the end."""

    def __init__(
        self, times: list[Scalar], batch: int | None, cure: str = "take smaller steps"
    ) -> None:
        self._times, self._n, self._batch, self._cure = times, 0, batch, cure
        self._over: Tensor | None = None  # rows that an event has ended, and where they stand
        self._stay: Any = None
        self._taken: Any = 0  # the steps that each of them took
        self._cut = False  # whether an event has added a time

    @property
    def running(self) -> bool:
        return self._n < len(self._times) - 1 and self.status is Status.RUNNING

    @property
    def t(self) -> Scalar:
        return self._time(self._n)

    def _time(self, n: int) -> Scalar:
        t = self._times[n]
        return t if self._over is None else torch.where(self._over, self._stay, t)

    @property
    def progress(self) -> float:
        return self._n / max(1, len(self._times) - 1)

    def interval(self) -> tuple[Scalar, Scalar]:
        return self._time(self._n), self._time(self._n + 1)

    def judge(self, step: Step, y: State) -> Accept:
        if step.failure is not None:
            self.status, self.message = step.failure
            return False
        t0, t1 = self.interval()
        self._n += 1
        own = self._cut and self._batch is not None  # rows that were not hit stand still meanwhile
        return torch.as_tensor(t0 != t1) if own else True

    def ahead(self, most: int) -> list[Scalar]:
        """The times of the next steps, at most so many, from where the solve stands."""
        return self._times[self._n : self._n + most + 1]

    def skip(self, count: int) -> None:
        """Told that so many steps were taken elsewhere."""
        self._n += count

    def land(self, hit: Accept, t: Scalar, over: Accept) -> None:
        """The rest of a step that was cut is taken next; rows that were not hit stand still."""
        if isinstance(over, Tensor) or to_float(t) != to_float(self._times[self._n]):
            self._times.insert(self._n, t)
            self._cut = True
        if not isinstance(over, Tensor):
            self.status = Status.EVENT if over else Status.RUNNING
            return
        before = torch.zeros_like(over) if self._over is None else self._over
        self._stay = torch.where(before, t if self._stay is None else self._stay, t)
        self._taken = torch.where(over & ~before, self._n, self._taken)
        self._over = before | over
        if bool(self._over.all()):
            self.status = Status.EVENT

    def exhausted(self, max_steps: int) -> None:
        self.status = Status.MAX_STEPS
        self.message = (
            f"max_steps = {max_steps} used up at t = {self.t}, {len(self._times) - 1 - self._n} "
            "steps of the grid before its end: raise max_steps or take fewer steps"
        )

    def finish(self, y: State, stats: Stats) -> None:
        count: Any = self._n
        if self._batch is not None:
            count = torch.full((self._batch,), self._n, device=leaves(y)[0].device)
            count = count if self._over is None else torch.where(self._over, self._taken, count)
        stats.accepted, stats.rejected = count, 0 * count
        ended = self.status is Status.EVENT
        if ended or self.status is Status.RUNNING:
            self.status = Status.SUCCESS
            self._check_finite(y)
        if self._batch is not None and not isinstance(self.status, Tensor):
            self.status = torch.full_like(count, int(self.status))
        if self._over is not None:
            well = self._over & (self.status != Status.NON_FINITE)
            self.status = torch.where(well, int(Status.EVENT), self.status)
        elif ended and self.status is Status.SUCCESS:
            self.status = Status.EVENT

    def forget(self) -> None:
        self._stay = still(self._stay)
        if self._cut:
            self._times = [still(t) for t in self._times]

    def _check_finite(self, y: State) -> None:
        if leaves(y)[0].is_meta or mapped(y) or finite(y):
            return
        bad = [~torch.isfinite(leaf.detach()) for leaf in leaves(y)]
        self.message = (
            f"the state is not finite at t = {_show(self.t)} ({_where(bad)}), on a grid of "
            f"given steps: {self._cure}, use Adaptive() to find the time, or look at "
            "save_at=Steps()"
        )
        self.status = Status.NON_FINITE
        if self._batch is not None:
            rows = torch.stack([b.reshape(self._batch, -1).any(1) for b in bad]).any(0)
            self.status = torch.where(rows, int(Status.NON_FINITE), int(Status.SUCCESS))


def _show(t: Scalar) -> str:
    return f"{t:.6g}" if not isinstance(t, Tensor) or t.ndim == 0 else "the end"


def _where(bad: list[Tensor]) -> str:
    """Names the first marked component."""
    for i, leaf in enumerate(bad):
        if bool(leaf.any()):
            index = tuple(int(v) for v in torch.nonzero(leaf)[0])
            return f"component {index}" + (f" of leaf {i}" if len(bad) > 1 else "")
    return "no single component"


class _Stops:
    """The times inside one span on which steps land, and which of them the field jumps at.

    Those of ``landings``, ``(n,)`` or ``(n, batch)``, come to those of the stepping.
    """

    def __init__(
        self, stepping: Adaptive, landings: Tensor | None, start: Any, end: Any, sign: Any,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._end, self._sign = end, sign
        narrow = torch.finfo(dtype)  # the field sees times of the state's dtype
        self._gaps = {t: max(2.0 * narrow.eps * abs(t), narrow.tiny) for t in stepping.jump_at}
        self.jumps, fixed = bool(self._gaps), [*stepping.step_at, *stepping.jump_at]
        if isinstance(end, Tensor):
            table = torch.tensor(fixed, dtype=end.dtype, device=end.device)
            table = table[:, None].expand(-1, len(end))
            self._times: Any = table if landings is None else torch.cat((table, landings.to(end)))
            inside = ((self._times - start) * sign > 0) & ((end - self._times) * sign > 0)
            self.inside = bool(inside.any())
        else:
            fixed += [] if landings is None else landings.tolist()
            low, high = min(start, end), max(start, end)
            self._times = sorted((t for t in {*fixed} if low < t < high), key=self._along)
            self.inside = bool(self._times)

    def _along(self, t: float) -> float:
        return self._sign * t

    def select(self, index: Tensor) -> _Stops:
        """Those of these rows alone."""
        part = copy.copy(self)
        part._end, part._sign = self._end[index], self._sign[index]
        part._times = self._times[:, index]
        return part

    def next(self, now: Any) -> Any:
        """The next of them; the end after the last."""
        if not self.inside:
            return self._end
        if not isinstance(now, Tensor):
            i = bisect_right(self._times, self._along(now), key=self._along)
            return self._times[i] if i < len(self._times) else self._end
        ahead = (self._times - now) * self._sign
        least, which = torch.where(ahead > 0, ahead, torch.inf).min(0)
        aim = self._times.gather(0, which[None])[0]
        return torch.where(least < (self._end - now) * self._sign, aim, self._end)

    def jumps_at(self, t: Any) -> Any:
        """Whether t is a jump."""
        found: Any = False
        for jump in self._gaps:
            found = found | (t == jump)
        return found

    def beside(self, t: Scalar, side: float) -> Scalar:
        """t, or a time next to it where it is a jump: on the way to the end for side = 1."""
        for jump, gap in self._gaps.items():
            t = choose(still(t) == jump, t + side * self._sign * gap, t)
        return t


class AdaptivePlan(Plan):
    """Steps chosen on the way; one host read an attempt, shared or per sample.

    Shared time runs on host floats: ``t``, ``dt`` and the accepted flag are Python's. Per sample
    they are ``(batch,)`` tensors, rows that have ended take steps of length zero.
    """

    def __init__(
        self, stepping: Adaptive, integrator: Integrator, t0: Any, t1: Any, batch: int | None,
        dtype: torch.dtype, landings: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._stepping, self._integrator, self._batch = stepping, integrator, batch
        self._dtype = dtype
        self._order, self._rough = math.nan, False  # of the error, the path: the start tells
        self._zero: Any = 0
        if batch is not None:
            self._zero = torch.zeros(batch, dtype=torch.int64, device=t0.device)
            self.status = self._zero + int(Status.RUNNING)
        self._start, self._t, self._end = t0, t0, t1
        read: Callable[[Any], Any] = to_float if batch is None else torch.detach
        self._host: tuple[Any, Any] = read(t0), read(t1)
        self._now = self._host[0]
        gap = self._host[1] - self._now
        self._sign: Any = math.copysign(1.0, gap) if batch is None else torch.sign(gap)
        self._stops = _Stops(stepping, landings, *self._host, self._sign, dtype)
        self._aim: Any = self._stops.next(self._now)
        self._field: Field | None = None
        self._step: Step | None = None
        self._notes: dict[int, str] = {}
        self._ids, self._alive = list(range(batch or 0)), batch or 0
        self._memory: tuple[Scalar, Scalar] = (1.0, 1.0)
        self._accepted, self._rejected = self._zero, self._zero
        self._dt: Any = 0.0
        self._live = True
        if batch is not None:
            arrived = gap == 0
            if self.own_ends and torch.is_grad_enabled():  # their one step has a slope in time
                arrived = torch.zeros_like(arrived)
            self.status = torch.where(arrived, int(Status.SUCCESS), self.status)
            self._live, self.fresh = not bool(arrived.all()), torch.zeros_like(arrived)
        self._lands: Any = False  # whether the step ends on a stop, and whether on the last
        self._last: Any = False
        self._reach: Any = self._now

    @property
    def running(self) -> bool:
        return self._live

    @property
    def t(self) -> Scalar:
        return self._t

    @property
    def progress(self) -> float:
        start, end = still(self._start), self._host[1]
        whole = _mean(abs(end - start))
        return _mean(abs(self._now - start)) / whole if whole else 1.0

    def meet(self, field: Field) -> None:
        """Sees the field."""
        self._field, self._order = field, self._integrator.exponent(field.dynamics)

    def start(self, field: Field, y: State, carry: Carry, noise: Source | None) -> None:
        self.meet(field)
        stepping, span = self._stepping, abs(self._host[1] - self._now)
        if stepping.dt0 is not None:
            first: Any = stepping.dt0
        else:
            outset = Outset(field, stepping, self._order, self._now, y, self._sign, span)
            with torch.no_grad():
                if noise is None:
                    first = outset.smooth(self._integrator.slope(carry))
                else:
                    signs = tree_map(torch.sgn, noise(0, *self._host).w)
                    first = outset.rough(signs)  # of one size: none is small by chance
                    first = coarse(first, self._dtype)
        self._rough = noise is not None
        self._dt = stepping.first(first + 0.0 * span, self._now, span)

    def interval(self) -> tuple[Scalar, Scalar]:
        self._lands = self._stepping.longest(self._dt) >= abs(self._aim - self._now)
        self._last = self._lands & (self._aim == self._host[1])
        self._step = None
        going = self.status == Status.RUNNING  # rows that have ended stand still
        reach = choose(self._lands, self._aim, self._now + self._sign * self._dt)
        self._reach = choose(going, reach, self._now)
        return self._t, choose(going, choose(self._last, self._end, reach), self._t)

    def before(self, t: Scalar) -> Scalar:
        return self._stops.beside(t, -1.0)

    def after(self, t: Scalar) -> Scalar:
        return self._stops.beside(t, 1.0)

    def judge(self, step: Step, y: State) -> Accept:
        self._step = step
        with torch.no_grad():
            error: Any = step.size
            if error is None:
                error = self._stepping.measure(step.error(), y, step.y1)
            accept = self._decide(error if self._batch is not None else float(error))
        self._t = choose(accept, choose(self._last, self._end, self._reach), self._t)
        return accept

    def _decide(self, error: Any) -> Accept:
        width = abs(self._reach - self._now)
        accept, dt, memory = self._stepping.advise(error, width, self._order, self._memory)
        dt = coarse(dt, self._dtype) if self._rough else dt
        if self._stops.inside:  # a step cut short to land says little of the next
            cut = accept & self._lands & (dt < self._dt)
            dt = choose(cut, self._dt, dt)
            (now, before), (last, older) = memory, self._memory
            memory = choose(cut, last, now), choose(cut, older, before)
        if self._batch is None:
            return self._decide_shared(error, accept, dt, memory)
        self._memory = memory
        going = self.status == Status.RUNNING
        accept = accept & going
        self._now = torch.where(accept, self._reach, self._now)
        self._accepted = self._accepted + accept
        self._rejected = self._rejected + (going & ~accept)
        self._dt = torch.as_tensor(dt).to(self._now.dtype)
        stuck = going & ~accept & self._too_small(self._dt)
        failed = torch.where(torch.isfinite(error), int(Status.UNDERFLOW), int(Status.NON_FINITE))
        done = accept & self._last
        self.status = torch.where(done, int(Status.SUCCESS), self.status)
        self.status = torch.where(stuck, failed.to(self.status.dtype), self.status)
        spoilt = ~accept & ~torch.isfinite(error)
        signs = [(self.status == Status.RUNNING).sum(), spoilt.sum(), stuck.sum()]
        if self._stops.inside:
            self._aim = self._stops.next(self._now)
            self.fresh = fresh = accept & self._lands & self._stops.jumps_at(self._now)
            signs.append(fresh.sum())
        self._alive, spoiled, failing, *jumped = torch.stack(signs).tolist()
        self._live, self.spoiled, self.jumped = self._alive > 0, spoiled > 0, any(jumped)
        if failing:
            self._note(stuck)
        return accept

    def rest(self) -> Tensor | None:
        if self._batch is None or not 0 < self._alive <= _THIN * self._batch:
            return None
        if not self._stepping.per_sample:  # the error's norm is that of the whole batch
            return None
        status: Any = self.status
        return torch.nonzero(status == Status.RUNNING).flatten()

    def select(self, index: Tensor, stepping: Stepping) -> Plan:
        assert isinstance(stepping, Adaptive)
        part = copy.copy(self)
        vars(part).update({k: rows_of(v, index) for k, v in self._rows().items()})
        part._stops, part._batch, part._step = self._stops.select(index), len(index), None
        part._stepping = stepping
        part._ids = [self._ids[i] for i in index.tolist()]
        return part

    def absorb(self, index: Tensor, part: Plan) -> None:
        assert isinstance(part, AdaptivePlan)
        news = part._rows()
        vars(self).update({k: put_rows(v, index, news[k]) for k, v in self._rows().items()})
        self._live = False
        part.forget()

    def _rows(self) -> dict[str, Any]:
        """What there is of each row."""
        own = (Tensor, tuple)
        return {k: v for k, v in vars(self).items() if isinstance(v, own)}

    def land(self, hit: Accept, t: Scalar, over: Accept) -> None:
        if not isinstance(over, Tensor):
            self._now, self._t = to_float(t), t
            arrived = self._now == self._host[1]
            self.status = Status.EVENT if over else Status.SUCCESS if arrived else Status.RUNNING
            self._live = self.status is Status.RUNNING
            self._aim = self._stops.next(self._now)
            return
        self._now, self._t = choose(hit, still(t), self._now), choose(hit, t, self._t)
        going = torch.where(self._now == self._host[1], int(Status.SUCCESS), int(Status.RUNNING))
        landed: Any = choose(hit, torch.where(over, int(Status.EVENT), going), self.status)
        self.status, self._live = landed, bool((landed == Status.RUNNING).any())
        self._aim = self._stops.next(self._now)

    def _too_small(self, dt: Any) -> Any:
        span = abs(self._host[1] - self._host[0])
        return too_small(dt, self._now, span, self._stepping.dt_min)

    @property
    def whole(self) -> bool:
        """Whether no step has to end inside of the span."""
        return not self._stops.inside and not self._stops.jumps

    @property
    def own_ends(self) -> bool:
        """Whether an end of each sample's own asks for gradients."""
        ends = self._start, self._end
        return any(moving(t) and t.ndim > 0 for t in ends)

    @property
    def ends(self) -> Any:
        """(t0, t1) as the host knows them."""
        return self._host

    def marks(self) -> list[Any]:
        """Where the solve stands: time, next step, the two errors remembered, the counts of
        accepted and of rejected steps, whether it is on its way.
        """
        on = self.status == Status.RUNNING
        return [self._now, self._dt, *self._memory, self._accepted, self._rejected, on]

    def resume(self, marks: Tensor) -> None:
        """Told where the solve stands after steps that were taken elsewhere."""
        if self._batch is None:
            self._now, self._dt, *memory, accepted, rejected, on = marks.tolist()
            self._accepted, self._rejected = int(accepted), int(rejected)
            self.status = Status.RUNNING if on else Status.SUCCESS
            self._live = bool(on)
        else:
            self._now, self._dt, *memory, accepted, rejected, on = marks.unbind()
            self._accepted, self._rejected = accepted.long(), rejected.long()
            arrived = (self.status == Status.RUNNING) & (on == 0)
            self.status = torch.where(arrived, int(Status.SUCCESS), self.status)
            self._alive = int(on.sum())
            self._live = self._alive > 0
        self._memory, self._t = (memory[0], memory[1]), self._now

    def _decide_shared(self, error: float, accept: bool, dt: Any, memory: Any) -> Accept:
        self._dt, self._memory = dt, memory
        if accept:
            self._accepted += 1
            self._now = self._reach
            if self._last:
                self.status, self._live = Status.SUCCESS, False
            elif self._stops.inside:
                self._aim = self._stops.next(self._now)
                self.fresh = self.jumped = bool(self._stops.jumps_at(self._now))
            return True
        self.fresh = self.jumped = False
        self._rejected += 1
        if self._too_small(dt):
            self._live = False
            self.status = Status.UNDERFLOW if math.isfinite(error) else Status.NON_FINITE
            self.message = self._complaint(error, dt)
        return False

    def _place(self, t: float, dt: float, row: int | None = None) -> str:
        """Where, how, and in which component the last attempt failed."""
        worst = "" if self._step is None else f" (worst {_worst(self._step.error(), row)})"
        return f"at t = {t:.9g} with dt = {dt:.3g}{worst}"

    def _complaint(self, error: float, dt: float) -> str:
        place = self._place(self._now, dt)
        if self.status is Status.NON_FINITE:
            assert self._step is not None
            return (
                f"{self._step.fault(None)} {place}: look at the field there, bound its output, or "
                "stop before that time"
            )
        return (
            f"the step fell to nothing {place}, error {error:.3g} times the tolerance: loosen rtol "
            "and atol, use float64, or lower dt_min; the system may blow up"
        )

    def exhausted(self, max_steps: int) -> None:
        self._live = False
        if isinstance(self.status, Tensor):
            running = self.status == Status.RUNNING
            self.status = torch.where(running, int(Status.MAX_STEPS), self.status)
            self._note(running)
        else:
            self.status = Status.MAX_STEPS
            self.message = (
                f"max_steps = {max_steps} used up {self._place(self._now, self._dt)}: raise "
                "max_steps, or loosen the tolerances"
            )

    def _note(self, rows: Tensor) -> None:
        """Remembers how rows failed, while it can still be told."""
        for i in torch.nonzero(rows).flatten().tolist()[:_NAMED]:
            kind = Status(int(self.status[i])).name  # type: ignore[index]
            place = self._place(float(self._now[i]), float(self._dt[i]), i)
            if self.status[i] == Status.NON_FINITE and self._step is not None:  # type: ignore[index]
                place += f": {self._step.fault(i)}"
            self._notes[self._ids[i]] = f"{self._ids[i]} {kind} {place}"

    def finish(self, y: State, stats: Stats) -> None:
        stats.accepted, stats.rejected = self._accepted, self._rejected
        if isinstance(self.status, Tensor):
            count = int((self.status > Status.SUCCESS).sum())
            if count:
                told = "; ".join(self._notes[i] for i in sorted(self._notes)[:_NAMED])
                self.message = (
                    f"{count} of {self._batch} samples failed; the first: {told}. Raise max_steps, "
                    "loosen the tolerances, or look at the field there"
                )
        if self.message and self._stiff(y):
            self.message += (
                ". The steps are as long as an explicit method stands, at the field's fastest rate:"
                " stiffness is likely. Use an implicit method, such as Kvaerno5()"
            )

    def forget(self) -> None:
        self._step, self._t = None, still(self._t)

    def _stiff(self, y: State) -> bool:
        """Whether stability, not accuracy, seems to have set the steps where they ran out."""
        if not isinstance(self._integrator, ExplicitRK) or self._field is None:
            return False
        slow: Any = (self.status == Status.MAX_STEPS) | (self.status == Status.UNDERFLOW)
        if not _some(slow):
            return False
        with torch.no_grad():
            rate = _fastest_rate(self._field, self._now, y, self._batch is not None)
        return _some(slow & (self._dt * rate > 1.5))  # explicit methods stand up to 2 or 3


def coarse(dt: Any, dtype: torch.dtype) -> Any:
    """The step to half of the digits of such a state.

    A Brownian path is rough: the rounding of one step would change the next error, and with it the
    next step, a hundredfold. So a sample would not take the same steps alone as among others.
    """
    kept, own = round(0.45 * _digits(dtype)), _digits(getattr(dt, "dtype", torch.float64))
    high = dt * (2.0 ** (own - kept) + 1.0)  # Veltkamp's splitting
    return high - (high - dt)


def _digits(dtype: torch.dtype) -> int:
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def too_small(dt: Any, t: Any, span: Any, least: float) -> Any:
    """Whether a step of this size would hardly move the time, or is below the least allowed."""
    return (dt < 4e-16 * abs(t)) | (dt < 1e-24 * span) | (dt < least)


def _fastest_rate(field: Field, t: Any, y: State, per_sample: bool) -> Tensor:
    """The largest eigenvalue of df/dy in size, by power iteration on differences of f."""

    def scaled(x: State, factor: Tensor) -> State:
        return tree_map(lambda leaf: leaf * expand(factor, leaf), x)

    slope = field.drift(t, y)
    size = rms_norm(slope, per_sample)
    way = tree_map(lambda k: k + 1.0, scaled(slope, 1.0 / torch.where(size > 0, size, 1.0)))
    small = torch.finfo(size.dtype).eps ** 0.5 * (1.0 + rms_norm(y, per_sample))
    for _ in range(12):
        size = rms_norm(way, per_sample)
        shift = scaled(way, small / torch.where(size > 0, size, 1.0))
        change = tree_map(torch.sub, field.drift(t, tree_map(torch.add, y, shift)), slope)
        way = scaled(change, 1.0 / small)
    return rms_norm(way, per_sample)


def _worst(error: State, row: int | None) -> str:
    """Names the component of the largest error, or the first that is not finite."""
    sizes = [(leaf if row is None else leaf[row]).detach().abs() for leaf in leaves(error)]
    bad = [~torch.isfinite(size) for size in sizes]
    if any(bool(mask.any()) for mask in bad):
        return _where(bad)
    peak = max((float(size.max()) for size in sizes if size.numel()), default=math.nan)
    return _where([size == peak for size in sizes])


def _some(mask: Any) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else mask


def _mean(t: Any) -> float:
    return float(t.mean()) if isinstance(t, Tensor) else float(t)
