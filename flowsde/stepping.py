"""Where the steps of a solve fall."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ._files import load_checkpoint, save_checkpoint
from ._scalar import (
    Scalar,
    clamp,
    isfinite,
    magnitude,
    minimum,
    moving,
    on_host,
    power,
    resolution,
    to_float,
    where,
    whole,
)
from ._state import State, batch_size, by_row, leaves, tree_map

__all__ = ["Adaptive", "Fixed", "Grid", "Norm", "Stepping", "max_norm", "rms_norm"]

Norm = Callable[[State, bool], Tensor]
Times = Tensor | Sequence[float]


class Stepping(ABC):
    """Where the steps of a solve fall."""


class Given(Stepping):
    """Steps known before the solve."""

    @abstractmethod
    def times(self, t0: Scalar, t1: Scalar) -> list[Scalar]:
        """The grid from t0 to t1, both included."""


@dataclass(frozen=True)
class Fixed(Given):
    """Steps of one size.

    Args:
        steps: how many; or
        dt: their size, > 0 in either direction (the last one is shortened to end on t1).

    Raises:
        ValueError: unless exactly one is given, and positive.
    """

    steps: int | None = None
    dt: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.dt is None):
            raise ValueError("give Fixed(steps=50) or Fixed(dt=0.02), one of the two")
        if self.steps is not None and not whole(self.steps, 1):
            raise ValueError(
                f"Fixed(steps) is a whole number >= 1; got {self.steps}. A length is Fixed(dt=...)"
            )
        if moving(self.dt):
            raise ValueError("no gradient comes back by dt: detach() it, or give Fixed(steps)")
        if self.dt is not None and not (self.dt > 0 and math.isfinite(self.dt)):
            raise ValueError(f"Fixed(dt) is > 0, also where t1 < t0; got {self.dt}")

    def times(self, t0: Scalar, t1: Scalar) -> list[Scalar]:
        if self.steps is not None:
            inner = [t0 + (t1 - t0) * (n / self.steps) for n in range(1, self.steps)]
        else:
            assert self.dt is not None
            gap = t1 - t0
            if isinstance(gap, Tensor) and gap.ndim:
                raise TypeError("per-sample spans take a number of steps: Fixed(steps=...)")
            span = to_float(gap)
            count = abs(span) / self.dt
            count = max(1, math.ceil(count - min(2.0**-23 * count, 0.01)))  # ends may be float32's
            dt = math.copysign(self.dt, span)
            inner = [t0 + n * dt for n in range(1, count)]
        return [t0, *inner, t1]


@dataclass(frozen=True, eq=False)
class Grid(Given):
    """The given times, verbatim.

    Args:
        grid: ``(steps + 1,)`` or, per sample, ``(steps + 1, batch)``; strictly monotone, from t0
            to t1 of the solve. Differentiable: a grid can be learned; by its ends, too, unless t0
            and t1 are differentiated themselves.

    Raises:
        ValueError: on times that turn back, or do not start at t0 and end at t1.
    """

    grid: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Tensor) or self.grid.ndim not in (1, 2) or len(self.grid) < 2:
            raise ValueError("Grid takes a tensor of at least two times")
        jumps = self.grid.detach().diff(dim=0)
        if not bool(((jumps > 0).all(0) | (jumps < 0).all(0)).all()):
            raise ValueError("Grid takes strictly increasing or strictly decreasing times")

    def save(self, path: str | Path) -> None:
        """Writes it to a file, whole or not at all."""
        save_checkpoint(path, {"grid": self.grid})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote."""
        return cls(**load_checkpoint(path))

    def towards(self, t0: float, t1: float) -> Grid:
        """The same times, in the direction of this span."""
        up = bool((self.grid[-1] > self.grid[0]).all())
        return self if up == (t1 > t0) else Grid(self.grid.flip(0))

    def times(self, t0: Scalar, t1: Scalar) -> list[Scalar]:
        rows = self.grid.ndim == 2
        own: Any = self.grid.detach().double().cpu() if rows else on_host(self.grid)
        ends = abs(own[0]) + abs(own[-1])
        slack = resolution(self.grid) * ends + 1e-6 * abs(own[-1] - own[0])
        for t, end, near, name in ((t0, own[0], own[1], "t0"), (t1, own[-1], own[-2], "t1")):
            mine = torch.as_tensor(t, dtype=torch.float64).detach().cpu() if rows else to_float(t)
            off = abs(end - mine)
            if not bool(((off <= slack) & (off <= 0.5 * abs(end - near))).all()):
                raise ValueError(f"the grid's end {end} is not the solve's {name} = {t}")
        if self.grid.ndim == 1 and not moving(self.grid):
            return [t0, *self.grid[1:-1].tolist(), t1]
        first, *inner, last = self.grid.double().unbind()
        return [_end(first, t0), *inner, _end(last, t1)]


def _end(own: Tensor, t: Scalar) -> Tensor:
    """The solve's t, where a grid of its own ends: differentiated once, by t if that moves."""
    return t + 0.0 * own.detach() if moving(t) else own + (t - own.detach())


def rms_norm(scaled: State, per_sample: bool) -> Tensor:
    """Root mean square over all components, or over those of each sample."""
    if isinstance(scaled, Tensor) and not per_sample:
        return torch.linalg.vector_norm(scaled) * max(1, scaled.numel()) ** -0.5
    rows = len(leaves(scaled)[0]) if per_sample else 1
    flat = by_row(scaled, rows)
    total: Any = sum(x.abs().square().sum(-1) for x in flat)
    count = max(1, sum(leaf.numel() for leaf in flat)) / max(1, rows)
    norm = torch.sqrt(total / count)
    return norm if per_sample else norm[0]


def max_norm(scaled: State, per_sample: bool) -> Tensor:
    """Largest component, or that of each sample."""
    rows: Any = batch_size(scaled) if per_sample else 1
    peaks = [x.abs().amax(-1) if x.shape[1] else x.sum(-1) for x in by_row(scaled, rows)]
    peak = torch.stack(peaks).amax(0)
    return peak if per_sample else peak[0]


@dataclass(frozen=True, eq=False)
class Adaptive(Stepping):
    """Steps chosen so that the estimated local error, over ``atol + rtol |y|``, has norm <= 1.

        dt' = dt * clamp(safety e_n^(-(p + i + d)/q) e_{n-1}^((p + 2d)/q) e_{n-2}^(-d/q))

    with q the order of the error estimate: a PID controller. Step sizes are detached: gradients
    are those of the accepted grid.

    For SDEs the error is that of the path, and a step that is rejected is tried again on the same
    path, which nothing disturbs. Steps end on all times of ``save_at``. With local errors O(dt^q),
    a method of strong order p errs in the end by about tol^(p/q). Errors that come and go with the
    path are best followed slowly: give pcoeff=0.1, icoeff=0.3. Per sample, the error of a state of
    one component is now and then small by chance, and a step that is too long is kept.

    Args:
        rtol, atol: tolerances; floats, or tensors that broadcast to the state: ``(d,)`` for its
            components, ``(batch, 1)`` for its samples.
        per_sample: each sample keeps its own t, dt and error norm; equal to solving it alone.
        pcoeff, icoeff, dcoeff: gains; the default is the elementary controller that torchdiffeq
            and diffrax use. (0.2, 0.65, 0) rejects fewer steps, and takes smaller ones; for SDEs
            (0.1, 0.3, 0) gives smaller errors for the same work.
        safety, factor_min, factor_max: of one change of step.
        dt0: first step; None chooses it by Hairer's rule, for one more evaluation; for an SDE by
            drift and diffusion, for two.
        dt_min, dt_max: bounds of all steps but those that end where they have to. The solve fails
            where a rejected step would have to be shorter than ``dt_min``.
        norm: ``rms_norm``, ``max_norm``, or a callable of (scaled error, per_sample).
        step_at: times, ``(n,)`` in any order, on which steps end; those outside the span of the
            solve are ignored.
        jump_at: the same, where f or a derivative of it jumps: the step before sees times before
            the jump only, the step after it starts afresh from its far side. Not for SDEs.

    Raises:
        ValueError: on tolerances, steps, gains, factors or times out of range, and on tolerances
            that ask for a gradient.

    Source: Hairer, Norsett and Wanner 1993, II.4; Soderlind 2003.
    """

    rtol: float | Tensor = 1e-5
    atol: float | Tensor = 1e-6
    per_sample: bool = False
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    dt0: float | None = None
    dt_min: float = 0.0
    dt_max: float = math.inf
    norm: Norm = field(default=rms_norm, repr=False)
    step_at: Times = ()
    jump_at: Times = ()

    def __post_init__(self) -> None:
        if not callable(self.norm):
            raise TypeError(f"norm is a callable of (scaled error, per_sample); got {self.norm!r}")
        for name in ("step_at", "jump_at"):
            object.__setattr__(self, name, _stops(name, getattr(self, name)))
        for name, value, bound in (("rtol", self.rtol, ">= 0"), ("atol", self.atol, "> 0")):
            if moving(value):
                raise ValueError(f"no gradient comes back by {name}: detach() it")
            fine = (value >= 0.0 if bound == ">= 0" else value > 0.0) & isfinite(value)
            if not (bool(fine.all()) if isinstance(fine, Tensor) else fine):
                raise ValueError(f"{name} is a tolerance {bound}; got {value}")
        if self.dt0 is not None and not 0 < self.dt0 < math.inf:
            raise ValueError(f"dt0 is > 0, also where t1 < t0; got {self.dt0}")
        gains = self.pcoeff, self.icoeff, self.dcoeff
        if not (all(map(math.isfinite, gains)) and sum(gains) > 0.0):
            raise ValueError(
                "pcoeff, icoeff and dcoeff are finite, and their sum is > 0: a greater error asks "
                f"for a shorter step; got {gains}"
            )
        if not (0 <= self.dt_min <= self.dt_max and self.dt_max > 0):
            raise ValueError(f"0 <= dt_min <= dt_max > 0; got {self.dt_min} and {self.dt_max}")
        if not (0 < self.safety < 1 and 0 < self.factor_min < 1 < self.factor_max):
            raise ValueError("safety and factor_min lie in (0, 1), factor_max above 1")

    def select(self, index: Tensor, y: State) -> Adaptive:
        """Those of these rows of a state alone: tolerances ``(batch, ...)`` have a row each."""
        rows: dict[str, Any] = {
            name: value[index]
            for name, value in (("rtol", self.rtol), ("atol", self.atol))
            if isinstance(value, Tensor) and value.ndim == leaves(y)[0].ndim and len(value) > 1
        }
        return replace(self, **rows) if rows else self

    @property
    def terms(self) -> tuple[Any, ...]:
        """What says how an error is measured and the next step chosen: all but given times."""
        mine = (f.name for f in fields(self) if f.name not in ("dt0", "step_at", "jump_at"))
        return tuple(getattr(self, name) for name in mine)

    def first(self, dt: Scalar, t: Scalar, span: Scalar) -> Scalar:
        """The first step from t within the bounds and the span; none that t would not feel."""
        least = self.dt_min + 1e-15 * magnitude(t)
        dt = where(dt < least, least + 0.0 * dt, dt)
        return minimum(minimum(dt, span), self.dt_max + 0.0 * span)

    def longest(self, dt: Scalar) -> Scalar:
        """What a step may be in the place of dt, to end where steps have to and leave no sliver.

        It takes up half of what the safety factor holds back, so that the error to be expected of
        it is below 1, and dt after a rejection does not reach as far again.
        """
        return clamp(dt * self.safety**-0.5, 0.0, 1.01 * self.dt_max)

    def scale(self, *states: State) -> State:
        """atol + rtol max |y|."""

        return tree_map(self._tolerance, *states)

    def _tolerance(self, y: Tensor, *others: Tensor) -> Tensor:
        size = y.abs()
        for other in others:
            size = torch.maximum(size, other.abs())
        return size.mul_(self.rtol).add_(self.atol)

    def measure(self, error: State, *states: State) -> Tensor:
        """Norm of the scaled error, 0-d or ``(batch,)``."""
        return self.length(tree_map(torch.div, error, self.scale(*states)), self.per_sample)

    def length(self, scaled: State, per_sample: bool) -> Tensor:
        """The norm, 0-d or ``(batch,)``.

        Raises:
            TypeError: on a user's own that is something else.
        """
        found = self.norm(scaled, per_sample)
        if isinstance(found, float) and not per_sample:
            return torch.tensor(found, dtype=torch.float64)
        shape = leaves(scaled)[0].shape[:1] if per_sample else ()
        if not isinstance(found, Tensor) or found.shape != shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"norm(scaled error, per_sample={per_sample}) is a tensor of shape "
                f"{tuple(shape)}; got {given}"
            )
        return found

    def advise(
        self, error: Scalar, dt: Scalar, order: float, memory: tuple[Scalar, Scalar]
    ) -> tuple[Any, Scalar, tuple[Scalar, Scalar]]:
        """Whether to accept, the next (unsigned) step, and the errors to remember.

        ``error`` is a scaled norm, ``order`` its exponent in dt; NaN counts as a great error.
        """
        if isinstance(error, Tensor) and isinstance(dt, Tensor):
            error = error.to(dt.dtype)
        accept = error <= 1.0
        now = where(error <= 1e10, clamp(error, 1e-10, 1e10), 1e10)
        before, older = memory
        factor: Scalar = self.safety * power(
            now, -(self.pcoeff + self.icoeff + self.dcoeff) / order
        )
        if self.pcoeff or self.dcoeff:
            factor = factor * power(before, (self.pcoeff + 2 * self.dcoeff) / order)
        if self.dcoeff:
            factor = factor * power(older, -self.dcoeff / order)
        factor = clamp(factor, self.factor_min, self.factor_max)
        factor = where(accept, factor, minimum(factor, 1.0 * self.safety))
        dt = clamp(magnitude(dt) * factor, 0.0, self.dt_max)
        if self.dt_min:
            dt = where(accept & (dt < self.dt_min), self.dt_min + 0.0 * dt, dt)
        memory = where(accept, now, before), where(accept, before, older)
        return accept, dt, memory


def _stops(name: str, given: Times) -> tuple[float, ...]:
    """The times, checked."""
    if isinstance(given, tuple) and not given:
        return given
    times = torch.as_tensor(given, dtype=torch.float64)
    if times.ndim != 1 or moving(times) or not bool(torch.isfinite(times).all()):
        raise ValueError(f"{name} is finite times, (n,), without a gradient: detach() it")
    return tuple(times.tolist())
