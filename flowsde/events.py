"""Events: where a function of time and state crosses zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._plan import Accept
from ._random import widest
from ._save import Found, scatter
from ._scalar import Scalar, to_float
from ._state import State, by_row, check_like, dual, leaves, on_device, stack, tree_map, where
from .dynamics.field import Field
from .integrators.base import Step
from .solution import Crossings

__all__ = ["Event", "Landing", "Watch"]

# Places in a step at which the event functions are looked at. The first one is close to the start,
# so that an event which has just fired is past it.
_PLACES = (2.0**-10, *(n / 8 for n in range(1, 9)))
_WIDTH = 2.0**-52  # of a root's last bracket, in steps
_SAME = 2.0**-44  # events as close as this fire together
_UNSEEN = (
    "an event's fn is not a number where the state is finite, so that no crossing could be seen: "
    "give a function that is defined along the whole solution"
)


@dataclass(frozen=True, eq=False)
class Event:
    """A zero crossing of ``fn(t, y, *args)`` along the solution.

        t* = t - fn(t, y(t)) / (d/dt fn(t, y(t)))      (for its derivatives)

    Each accepted step is looked at in ten places of its dense output, both ends included: two
    crossings in one step are found unless they lie between two of them, as where a ball bounces
    ever lower: bound the step there (``Adaptive(dt_max=)``), or end the solve at a least height.
    The root is polished on the dense output to rounding, and differentiates by the implicit
    function theorem, as does the state there. A value of zero at t0 is no crossing, nor is one at
    the time of an update. Events
    that fall on one time all fire, the first of the list being the one that is named.

    Args:
        fn: real, continuous and differentiable. Where the batch shares its time, a 0-d value for
            the whole state; per sample ``(batch,)``.
        terminal: whether the solve, or that sample, ends here with ``Status.EVENT``; else the
            crossing is recorded only.
        direction: 1 for crossings from below, -1 for those from above (as the solve meets them),
            0 for both.
        update: ``update(t, y, *args)``, the state from which the solve goes on; it does not end
            then. Saved times and dense output at t* itself are those before it.

    Raises:
        TypeError: on an fn or update that cannot be called.
        ValueError: on another direction; in the solve, on an fn that is not a number where the
            state is finite.

    Source: Chen, Amos and Nickel 2021, arXiv 2011.03902; roots by Oliveira and Takahashi 2021,
    "An enhancement of the bisection method average performance preserving minmax optimality".
    """

    fn: Callable[..., Tensor]
    terminal: bool = True
    direction: int = 0
    update: Callable[..., State] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn) or not (self.update is None or callable(self.update)):
            raise TypeError("Event takes fn(t, y, *args) and perhaps update(t, y, *args)")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction is -1, 0 or 1; got {self.direction}")

    @property
    def stops(self) -> bool:
        """Whether a step is cut short here."""
        return self.terminal or self.update is not None

    @property
    def ends(self) -> bool:
        """Whether the solve is over here."""
        return self.terminal and self.update is None


class Landing(Step):
    """A step that events cut short, where it was hit."""

    __slots__ = ("_fires", "_step", "_theta", "_watch", "hit", "over", "t1")

    def __init__(
        self, watch: Watch, step: Step, t0: Scalar, t1: Scalar, theta: Tensor, hit: Accept,
        fires: list[Any],
    ) -> None:  # fmt: skip
        self._watch, self._step, self._fires, self.hit = watch, step, fires, hit
        self.over: Accept = _any([f for f, e in zip(fires, watch.events, strict=True) if e.ends])
        self._theta = torch.where(hit, theta, 1.0) if isinstance(hit, Tensor) else theta
        self.t1: Scalar = t0 + self._theta * (t1 - t0)
        if isinstance(hit, Tensor):
            self.t1, self.over = torch.where(hit, self.t1, t1), torch.zeros_like(hit) | self.over
        else:  # a shared time lives on the host
            self.t1 = self.t1.cpu() if self.t1.requires_grad else to_float(self.t1)
        super().__init__(where(hit, step.dense(self._theta), step.y1), step.carry)

    def dense(self, theta: Scalar) -> State:
        return self._step.dense(theta * self._theta)

    def resume(self, t: Scalar, y: State) -> State:
        """The state from which the solve goes on."""
        return self._watch.update(self._fires, self.hit, t, y)


class Watch:
    """Looks into every accepted step of one solve for crossings."""

    def __init__(self, events: tuple[Event, ...], field: Field, batch: int | None) -> None:
        self.events, self._field, self._batch = events, field, batch
        self._found: list[list[Found]] = [[] for _ in events]
        self._fired: Any = -1

    def begin(self, t: Scalar, y: State) -> None:
        """Sees the initial state; raises TypeError on values of another shape."""
        device = leaves(y)[0].device
        self._wide = widest(device)
        shape = (-1,) if self._batch is None else (-1, 1)
        up, down = ([e.direction != s for e in self.events] for s in (-1, 1))
        self._up, self._down = (torch.tensor(x, device=device).reshape(shape) for x in (up, down))
        self._places = torch.tensor((0.0, *_PLACES), dtype=self._wide, device=device)
        if self._batch is not None:
            self._fired = torch.full((self._batch,), -1, device=device)
            self._counts = [torch.zeros_like(self._fired) for _ in self.events]
        with torch.no_grad():
            self._last = self._values(t, y)
        if bool(self._lost(self._last, y).any()):
            raise ValueError(_UNSEEN)

    def _value(self, event: Event, t: Scalar, y: State) -> Tensor:
        value = event.fn(self._field.time(t), y, *self._field.args)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError("an event's fn returns a tensor of real numbers that cross zero")
        if self._batch is None and value.numel() == 1:
            return value.reshape(()).to(self._wide)
        if self._batch is not None and value.shape == (self._batch,):
            return value.to(self._wide)
        if self._batch is None:
            raise TypeError(
                f"an event's fn returned {tuple(value.shape)} where the batch shares its time: "
                "reduce it to one value, as fn(t, y).min(); or let each sample have its own "
                "events, with Adaptive(per_sample=True) or t1 of shape (batch,)"
            )
        raise TypeError(
            f"an event's fn returned {tuple(value.shape)}: with per-sample time it returns one "
            f"value a sample, ({self._batch},)"
        )

    def _values(self, t: Scalar, y: State) -> Tensor:
        return torch.stack([self._value(event, t, y) for event in self.events])

    def _lost(self, values: Tensor, y: State) -> Tensor:
        """Where a value is not a number, though the state is finite; shaped as the values."""
        rows = 1 if self._batch is None else self._batch
        finite = [leaf.isfinite().all(1) for leaf in by_row(y, rows)]
        return values.isnan() & torch.stack(finite).all(0).expand(values.shape)

    def _choose(self, mask: Accept, values: Tensor) -> Tensor:
        """The values where the mask holds, those seen last elsewhere."""
        return torch.where(mask, values, self._last) if isinstance(mask, Tensor) else values

    def look(self, t0: Scalar, t1: Scalar, step: Step, accept: Accept) -> Landing | None:
        """Records the crossings in an accepted step; where one stops it, the step up to there."""
        if self._batch == 0:
            return None
        values = self._sample(t0, t1, step)
        if self._batch is None and _keeps_signs(values.tolist()):  # as most steps do
            self._last = values[-1]
            return None
        before, after = values[:-1], values[1:]
        crossing = (before < 0) & (after >= 0) & self._up | (before > 0) & (after <= 0) & self._down
        crossing = crossing & accept
        self._last = self._choose(accept, values[-1])
        most = crossing.sum(0).reshape(len(self.events), -1).amax(1)
        lost = (self._lost(values[1:], step.y1) & accept).any()
        *counts, unseen = torch.cat((most, lost[None])).tolist()
        if unseen:
            raise ValueError(_UNSEEN)
        if not any(counts):
            return None
        roots: list[tuple[int, Tensor, Tensor]] = []
        for i, event in enumerate(self.events):
            for _ in range(min(counts[i], 1) if event.stops else counts[i]):
                found, first = crossing[:, i].any(0), crossing[:, i].int().argmax(0)[None]
                crossing[:, i] = crossing[:, i].scatter(0, first, False)
                phi = self._along(event, t0, t1, step)
                roots.append((i, found, self._root(phi, values[:, i], first, found)))
        return self._settle(roots, t0, t1, step)

    def _sample(self, t0: Scalar, t1: Scalar, step: Step) -> Tensor:
        # The first look records a graph where one is wanted: a step may keep what it works out.
        first = t0 + _PLACES[0] * (t1 - t0), step.dense(_PLACES[0])
        with torch.no_grad():
            inner = _PLACES[1:-1]
            times = [t0 + theta * (t1 - t0) for theta in inner]
            looks = [first, *zip(times, step.between(inner), strict=True), (t1, step.y1)]
            values = torch.stack([self._value(e, t, y) for t, y in looks for e in self.events])
            values = values.reshape(len(looks), *self._last.shape)
            return torch.cat((self._last[None], values))

    def _along(
        self, event: Event, t0: Scalar, t1: Scalar, step: Step
    ) -> Callable[[Tensor], Tensor]:
        return lambda theta: self._value(event, t0 + theta * (t1 - t0), step.dense(theta))

    def _root(
        self, phi: Callable[[Tensor], Tensor], values: Tensor, first: Tensor, found: Tensor
    ) -> Tensor:
        places = self._places.reshape(-1, *(1,) * found.ndim).expand_as(values)
        a, fa = (x.gather(0, first)[0] for x in (places, values))
        b, fb = (x.gather(0, first + 1)[0] for x in (places, values))
        with torch.no_grad():
            theta = _polish(phi, torch.where(found, a, b), b, fa, fb)
        return _attach(phi, theta, found)

    def _settle(
        self, roots: list[tuple[int, Tensor, Tensor]], t0: Scalar, t1: Scalar, step: Step
    ) -> Landing | None:
        """What is recorded up to the first stop, and the stop."""
        stop = torch.full_like(roots[0][2].detach(), torch.inf)
        for i, found, theta in roots:
            if self.events[i].stops:
                stop = torch.where(found & (theta < stop), theta, stop)
        fires: list[Any] = [torch.zeros_like(stop, dtype=torch.bool) for _ in self.events]
        for i, found, theta in roots:
            fires[i] = fires[i] | (found & ((theta - stop).abs() <= _SAME))
            if not self.events[i].stops:
                early = found & (theta < stop - _SAME)
                self._record(i, early, t0 + theta * (t1 - t0), step.dense(theta))
        if not any(self.events[i].stops for i, _, _ in roots):
            return None
        hit: Accept = stop < torch.inf
        if self._batch is None:
            fires, hit = torch.stack(fires).tolist(), True
        landing = Landing(self, step, t0, t1, stop, hit, fires)
        for i, fired in enumerate(fires):
            self._record(i, torch.as_tensor(fired), landing.t1, landing.y1)
        return landing

    def _record(self, i: int, mask: Tensor, t: Scalar, y: State) -> None:
        if self._batch is None:
            if bool(mask):
                time = t.cpu() if isinstance(t, Tensor) else t
                self._found[i].append((mask, mask, (time, y)))
        elif bool(mask.any()):
            rows = torch.arange(self._batch, device=mask.device)
            self._found[i].append((mask, self._counts[i] * self._batch + rows, (t, y)))
            self._counts[i] = self._counts[i] + mask

    def update(self, fires: list[Any], hit: Accept, t: Scalar, y: State) -> State:
        """What the events that fired make of the state."""
        for i, (event, fired) in enumerate(zip(self.events, fires, strict=True)):
            if event.ends:
                self._fired = where(fired & (self._fired < 0), self._fired * 0 + i, self._fired)
            if event.update is not None and bool(torch.as_tensor(fired).any()):
                own = tree_map(torch.clone, y)  # what was recorded stays as it was
                new = event.update(self._field.time(t), own, *self._field.args)
                y = where(fired, check_like(new, y, "an event's update"), y)
        with torch.no_grad():
            quiet = torch.stack([torch.as_tensor(f, device=self._last.device) for f in fires])
            values = torch.where(quiet, 0.0, self._values(t, y))
            self._last = self._choose(hit, values)
        return y

    def finish(self, y: State) -> Crossings:
        """All that was found; kept no longer, as an adjoint may keep this."""
        ts, ys = [], []
        for i, found in enumerate(self._found):
            t, state = self._gather(i, found, y)
            ts.append(t)
            ys.append(state)
            found.clear()
        return Crossings(ts, ys, self._fired)

    def _gather(self, i: int, found: list[Found], y: State) -> tuple[Tensor, State]:
        if self._batch is None:
            if not found:
                return on_device([], y), tree_map(lambda leaf: leaf[None][:0], y)
            ts = on_device([t for _, _, (t, _) in found], y)
            return ts, stack([state for _, _, (_, state) in found])
        count = int(self._counts[i].max()) if self._batch else 0
        like = self._last[0], y
        return scatter(found, count, like)


def _keeps_signs(values: list[list[float]]) -> bool:
    """Whether no event's value touches zero, or is not a number."""
    return all(
        all(value > 0.0 for value in own) or all(value < 0.0 for value in own)
        for own in zip(*values, strict=True)
    )


def _any(masks: list[Any]) -> Any:
    """The union of masks: a bool, or row by row."""
    total: Any = False
    for mask in masks:
        total = total | mask
    return total


def _polish(
    phi: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, fa: Tensor, fb: Tensor
) -> Tensor:
    """The end of a bracket of the root that lies on its far side, by the ITP method.

    Never more looks than bisection and a few, about eight where phi is smooth; the host reads once
    in four.
    """
    sign = torch.where(fa < 0, 1.0, -1.0)
    fa, fb, width = sign * fa, sign * fb, torch.where(b > a, b - a, 1.0)
    for n in range(56):
        if n % 4 == 0 and bool((b - a <= _WIDTH).all()):
            break
        middle, gap = 0.5 * (a + b), torch.where(fb > fa, fb - fa, 1.0)
        secant = torch.where(fb > fa, (fb * a - fa * b) / gap, middle)
        side, reach = (middle - secant).sign(), (middle - secant).abs()
        shift = 0.2 * (b - a).square() / width
        guess = torch.where(shift <= reach, secant + side * shift, middle)
        radius = 0.5 * (_WIDTH * 2.0 ** (56 - n) - (b - a))
        x = torch.where((guess - middle).abs() <= radius, guess, middle - side * radius)
        fx = sign * phi(x)
        low, high = fx <= 0, ~(fx < 0)  # both where the root is met
        a, fa = torch.where(low, x, a), torch.where(low, fx, fa)
        b, fb = torch.where(high, x, b), torch.where(high, fx, fb)
    return b


def _attach(phi: Callable[[Tensor], Tensor], theta: Tensor, found: Tensor) -> Tensor:
    """The root as a function of all that phi depends on: Newton steps that move only derivatives.

    One gives first derivatives, the other second ones.
    """
    if dual(phi(theta)):
        raise TypeError(
            "the time of an event is not differentiated forwards: take gradients backwards "
            "(torch.autograd.grad)"
        )
    if not (torch.is_grad_enabled() and phi(theta).requires_grad):
        return theta
    theta.requires_grad_()
    for _ in range(2):
        value = phi(theta)
        (slope,) = torch.autograd.grad(
            value.sum(), theta, create_graph=True, materialize_grads=True
        )
        slope = torch.where(found & (slope != 0), slope, 1.0)
        theta = theta - torch.where(found, (value - value.detach()) / slope, 0.0)
    return theta
