"""Symplectic methods for separable systems: one engine of kicks and drifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .._increment import Increment
from .._scalar import Scalar
from .._state import State, combine, describe
from ..dynamics.base import Dynamics
from ..dynamics.field import Field
from .base import Carry, Integrator, Step
from .interpolation import Interpolation, hermite

__all__ = ["Leapfrog", "Symplectic", "Yoshida4"]


def check_pair(integrator: Integrator, y: State, names: str) -> None:
    """Raises TypeError on a state that is not a tuple of two alike."""
    if type(y) is not tuple or len(y) != 2 or describe(y[0]) != describe(y[1]):
        raise TypeError(
            f"{type(integrator).__name__} moves y0 = {names}, a tuple of two alike; got "
            f"{describe(y)}"
        )


class Symplectic(Integrator):
    """A composition of kicks and drifts for dq/dt = v(t, p), dp/dt = a(t, q).

        p <- p + kicks_0 dt a(q),   then for each i:
        q <- q + drifts_i dt v(p),    p <- p + kicks_(i+1) dt a(q)

    Each map is a shear, so that the step preserves volume and, where the system is Hamiltonian,
    the symplectic form. Kicks happen at the time that the drifts have reached, and drifts at that
    of the kicks. The field f(t, (q, p)) gives both halves at once: every kick and every drift
    costs one call of it, of which the other half goes unused. The last kick's slope starts the
    next step.

    Attributes:
        kicks, drifts: fractions of the step, each summing to one; one kick more than drifts.
    """

    kicks: ClassVar[tuple[float, ...]]
    drifts: ClassVar[tuple[float, ...]]

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if not dynamics.separable:
            raise TypeError(
                f"{type(self).__name__} needs dq/dt = v(t, p), dp/dt = a(t, q): declare "
                "ODE(f, separable=True) if f(t, (q, p)) is so, or use Tsit5()"
            )

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        check_pair(self, y, "(q, p)")
        return field.drift(t, y)[1]

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        (q, p), dt, a = y, t1 - t0, carry
        p, at_p, at_q = combine(p, dt, ((0, self.kicks[0]),), [a]), self.kicks[0], 0.0
        for drift, kick in zip(self.drifts, self.kicks[1:], strict=True):
            v = field.drift(t0 + at_p * dt, (q, p))[0]
            q, at_q = combine(q, dt, ((0, drift),), [v]), at_q + drift
            a = field.drift(t0 + at_q * dt, (q, p))[1]
            p, at_p = combine(p, dt, ((0, kick),), [a]), at_p + kick
        return _SymplecticStep(field, t0, t1, y, (q, p), a)


class _SymplecticStep(Step):
    __slots__ = ("_field", "_t0", "_t1", "_y0")

    def __init__(
        self, field: Field, t0: Scalar, t1: Scalar, y0: State, y1: State, carry: Carry
    ) -> None:
        super().__init__(y1, carry)
        self._field, self._t0, self._t1, self._y0 = field, t0, t1, y0

    def interpolation(self) -> Interpolation:
        """The cubic through both ends with their slopes, for two more evaluations a step."""
        drift = self._field.drift
        first, last = self.later(lambda: (drift(self._t0, self._y0), drift(self._t1, self.y1)))
        return hermite(self._y0, self.y1, first, last, self._t1 - self._t0)


@dataclass(frozen=True)
class Leapfrog(Symplectic):
    """Kick, drift, kick: velocity Verlet. Order 2, two evaluations a step.

    Source: Verlet 1967; Hairer, Lubich and Wanner 2006, "Geometric numerical integration".
    """

    order = 2
    dense_order = 2
    kicks = (1 / 2, 1 / 2)
    drifts = (1.0,)


_OUTER = 1.0 / (2.0 - 2.0 ** (1 / 3))
_INNER = 1.0 - 2.0 * _OUTER


@dataclass(frozen=True)
class Yoshida4(Symplectic):
    """Three leapfrogs, the middle one backward in time. Order 4, six evaluations a step.

    Source: Yoshida 1990, "Construction of higher order symplectic integrators".
    """

    order = 4
    dense_order = 3
    kicks = (_OUTER / 2, (_OUTER + _INNER) / 2, (_OUTER + _INNER) / 2, _OUTER / 2)
    drifts = (_OUTER, _INNER, _OUTER)
