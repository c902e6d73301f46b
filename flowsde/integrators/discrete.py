"""Discrete time."""

from __future__ import annotations

from dataclasses import dataclass

from .._increment import Increment
from .._scalar import Scalar, to_float
from .._state import State
from ..dynamics.base import Dynamics
from ..dynamics.discrete import Chain, Map
from ..dynamics.field import Field
from .base import Carry, Integrator, Step

__all__ = ["Iterate"]


@dataclass(frozen=True)
class Iterate(Integrator):
    """Takes a chain's steps one by one; a Map's backwards too, by ``unstep``. Exact."""

    order = 1
    dense_order = 0
    static = False

    def check(self, dynamics: Dynamics) -> None:
        if not isinstance(dynamics, Chain):
            raise TypeError(
                f"Iterate() moves chains and maps; got {type(dynamics).__name__}. Use Tsit5() for "
                "an ODE, EulerMaruyama() for an SDE"
            )

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        k0, k1 = int(to_float(t0)), int(to_float(t1))
        if k1 > k0:
            return _Jump(field.step(k0, y))
        if not isinstance(field.dynamics, Map):
            raise TypeError(
                f"{type(field.dynamics).__name__} does not invert: run it from t0 < t1, or make "
                "it a Map with unstep"
            )
        return _Jump(field.unstep(k1, y))


class _Jump(Step):
    __slots__ = ()

    def dense(self, theta: Scalar) -> State:
        raise TypeError("a chain has no states between its steps: save at whole numbers")
