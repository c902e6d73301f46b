"""The last step of samplers whose grids end where there is no noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._increment import Draws, Increment
from .._scalar import Scalar
from .._state import State
from ..dynamics.base import Dynamics
from ..dynamics.field import Field
from ..fitting import Nonstationary
from ..integrators.base import Carry, Integrator, Step
from ..integrators.exponential import Exponential, ExponentialEuler
from ..stepping import Stepping

__all__ = ["Around", "land"]


@dataclass(frozen=True)
class Around(Integrator):
    """An integrator within another one: what it says and does, until ``step`` is altered."""

    inner: Integrator

    def __post_init__(self) -> None:
        for name in ("order", "dense_order", "static", "remembers"):
            object.__setattr__(self, name, getattr(self.inner, name))

    def check(self, dynamics: Dynamics) -> None:
        self.inner.check(dynamics)

    def bind(self, stepping: Stepping) -> Integrator:
        return replace(self, inner=self.inner.bind(stepping))

    def along(self, times: Sequence[Scalar]) -> Integrator:
        return replace(self, inner=self.inner.along(times))

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return self.inner.draws(dynamics, y)

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return self.inner.init(field, t, y)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        return self.inner.step(field, t0, t1, y, dw, carry)


@dataclass(frozen=True)
class _Landing(Around):
    """Onto no noise by the exponential Euler step, x1 = alpha1 x0_hat: the slope there is 0 / 0."""

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert field.split is not None
        if field.split.clock(t1) == math.inf:
            return ExponentialEuler().step(field, t0, t1, y, dw, ())
        return super().step(field, t0, t1, y, dw, carry)


def land(integrator: Integrator) -> Integrator:
    """The integrator, fit for steps onto zero noise, as those that take residuals are."""
    fit = isinstance(integrator, Exponential | Nonstationary)
    return integrator if fit else _Landing(integrator)
