"""Exponential time differencing: Runge-Kutta methods that solve the linear part exactly."""

from __future__ import annotations

from dataclasses import dataclass

from .._increment import Increment
from .._scalar import Scalar
from .._state import State, tree_map
from ..dynamics.base import Dynamics
from ..dynamics.field import Field
from .base import Carry, Integrator, Step
from .exponential import between, check_clock, check_split, phi

__all__ = ["ETDRK4"]


@dataclass(frozen=True)
class ETDRK4(Integrator):
    """Four evaluations of the residual N, exact in the linear part z = rate h. Order 4.

        a = e^(z/2) u + h/2 phi1(z/2) N(u),    b = e^(z/2) u + h/2 phi1(z/2) N(a),
        c = e^(z/2) a + h/2 phi1(z/2) (2 N(b) - N(u)),
        u1 = e^z u + h phi1 N(u) + h (2 phi2 - 4 phi3) (N(a) + N(b) - 2 N(u))
             + h (4 phi3 - phi2) (N(c) - N(u))

    in the split's clock, of which the middle is taken. At rate 0 it is RK4. On ``ODE(f,
    linear=rate)`` the rate may be complex, one a component: a stiff equation in Fourier space. On
    a probability flow it is a sampler of order 4; a step onto an infinite clock is of first order.

    Source: Cox and Matthews 2002; Kassam and Trefethen 2005.
    """

    order = 4
    dense_order = 4

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        check_split(self, dynamics)

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        assert field.split is not None
        check_clock(self, field.split, t)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        return _ETDStep(field, t0, t1, y, field.residual(t0, y))


class _ETDStep(Step):
    __slots__ = ("_field", "_n0", "_t0", "_t1", "_y0")

    def __init__(self, field: Field, t0: Scalar, t1: Scalar, y0: State, n0: State) -> None:
        self._field, self._t0, self._t1, self._y0, self._n0 = field, t0, t1, y0, n0
        super().__init__(self._to(t1))

    def _to(self, t1: Scalar) -> State:
        field, t0, u, n0 = self._field, self._t0, self._y0, self._n0
        split = field.split
        assert split is not None
        middle, end = between(split, t0, t1, 0.5), between(split, t0, t1, 1.0)
        a = split.advance(t0, middle, u, n0)
        na = field.residual(middle, a)
        nb = field.residual(middle, split.advance(t0, middle, u, na))
        ahead = tree_map(lambda x, y: 2.0 * x - y, nb, n0)
        nc = field.residual(end, split.advance(middle, end, a, ahead))
        first = tree_map(lambda x, y, z: x + y - 2.0 * z, na, nb, n0)
        last = tree_map(lambda x, y: x - y, nc, n0)
        return split.bend(t0, t1, split.advance(t0, t1, u, n0), _weights, [first, last])

    def dense(self, theta: Scalar) -> State:
        """A shorter step from the same start, for three more evaluations."""
        return self._to(self._t0 + theta * (self._t1 - self._t0))


def _weights(z: Scalar) -> tuple[Scalar, Scalar]:
    """2 phi2 - 4 phi3, 1/3 at 0, and 4 phi3 - phi2, 1/6 at 0."""
    phi2, phi3 = phi(z)
    return 2.0 * phi2 - 4.0 * phi3, 4.0 * phi3 - phi2
