"""Explicit methods with long real stability intervals, for mildly stiff parabolic systems."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._increment import Increment
from .._scalar import Scalar, whole
from .._state import State, combine, weigh
from ..dynamics.field import Field
from .base import Carry, SlopeCarrying, Step
from .interpolation import Interpolation, hermite

__all__ = ["RKC2"]

Row = tuple[float, float, float, float]


@dataclass(frozen=True)
class RKC2(SlopeCarrying):
    """Runge-Kutta-Chebyshev with damping 2/13: order 2, stable for
    dt lambda in [-0.653 (s^2 - 1), 0].

        Y_j = (1 - mu_j - nu_j) y0 + mu_j Y_{j-1} + nu_j Y_{j-2}
              + dt (m_j f(t0 + c_{j-1} dt, Y_{j-1}) + g_j f(t0, y0)),    y1 = Y_s

    One evaluation a stage, and the stability grows with their square: for diffusion, whose
    spectrum is real. The error estimate is 4/5 (y0 - y1) + 2/5 dt (f0 + f1), of third order.

    Args:
        stages: s >= 2.

    Raises:
        ValueError: on fewer.

    Source: Sommeijer, Shampine and Verwer 1998, "RKC: an explicit solver for parabolic PDEs".
    """

    stages: int = 10
    nodes: tuple[float, ...] = field(init=False, repr=False)
    rows: tuple[Row, ...] = field(init=False, repr=False)
    order = 2
    dense_order = 2
    error_order = 3

    def __post_init__(self) -> None:
        if not whole(self.stages, 2):
            raise ValueError(f"RKC2 takes a whole number of stages >= 2; got {self.stages}")
        nodes, rows = _coefficients(self.stages)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "rows", rows)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        dt, f0 = t1 - t0, carry
        before, now = y, combine(y, dt, ((0, self.nodes[1]),), [f0])
        for c, (mu, nu, m, g) in zip(self.nodes[1:], self.rows, strict=True):
            slopes = [field.drift(t0 + c * dt, now), f0]
            mean = weigh(1.0, ((0, 1.0 - mu - nu), (1, mu), (2, nu)), [y, now, before])
            before, now = now, combine(mean, dt, ((0, m), (1, g)), slopes)
        return _ChebyshevStep(y, now, dt, f0, field.drift(t1, now))


class _ChebyshevStep(Step):
    __slots__ = ("_dt", "_f0", "_y0")

    def __init__(self, y0: State, y1: State, dt: Scalar, f0: State, f1: State) -> None:
        super().__init__(y1, f1)
        self._y0, self._dt, self._f0 = y0, dt, f0

    def error(self) -> State:
        moved = weigh(1.0, ((0, 0.8), (1, -0.8)), [self._y0, self.y1])
        return combine(moved, self._dt, ((0, 0.4), (1, 0.4)), [self._f0, self.carry])

    def interpolation(self) -> Interpolation:
        return hermite(self._y0, self.y1, self._f0, self.carry, self._dt)


def _coefficients(s: int) -> tuple[tuple[float, ...], tuple[Row, ...]]:
    """Nodes c_0 .. c_(s-1), and (mu, nu, m, g) of stages 2 .. s."""
    w0 = 1.0 + 2.0 / (13.0 * s * s)
    t, dt, ddt = [1.0, w0], [0.0, 1.0], [0.0, 0.0]  # Chebyshev polynomials and derivatives at w0
    for j in range(2, s + 1):
        t.append(2.0 * w0 * t[-1] - t[-2])
        dt.append(2.0 * t[j - 1] + 2.0 * w0 * dt[-1] - dt[-2])
        ddt.append(4.0 * dt[j - 1] + 2.0 * w0 * ddt[-1] - ddt[-2])
    w1 = dt[s] / ddt[s]
    b = [ddt[max(j, 2)] / dt[max(j, 2)] ** 2 for j in range(s + 1)]
    nodes = [0.0, b[1] * w1, *(w1 * ddt[j] / dt[j] for j in range(2, s))]
    rows = []
    for j in range(2, s + 1):
        mu, nu, m = 2.0 * w0 * b[j] / b[j - 1], -b[j] / b[j - 2], 2.0 * w1 * b[j] / b[j - 1]
        rows.append((mu, nu, m, -(1.0 - b[j - 1] * t[j - 1]) * m))
    return tuple(nodes), tuple(rows)
