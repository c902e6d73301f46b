"""Euler-Maruyama with an implicit drift, for SDEs whose drift is stiff."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .._increment import Increment
from .._scalar import Scalar
from .._state import State, combine
from ..dynamics.base import Noise
from ..dynamics.field import Field
from ..stepping import Stepping
from .base import Carry, Integrator, Step
from .implicit import ImplicitEuler, Trapezoid
from .newton import Equations, Implicit, Newton
from .stochastic import Stochastic, StraightStep

__all__ = ["DriftImplicitEuler"]


@dataclass(frozen=True)
class DriftImplicitEuler(Implicit, Stochastic):
    """y1 = y0 + (1 - theta) f0 dt + theta f(t1, y1) dt + g0 dW. Ito.

    Orders are those of ``EulerMaruyama``: strong 1/2, 1 for additive noise; weak 1. Steps are not
    bound by the rates at which the drift contracts. The equation is solved as ``ImplicitRK`` solves
    its stages, every sample by itself; what that says of failures, gradients and states holds here.

    Args:
        drift: ``ImplicitEuler()`` for theta = 1, which damps stiff parts; ``Trapezoid()`` for
            theta = 1/2, which keeps the variance of a linear drift; with their own ``newton`` and
            ``linear``.

    Raises:
        TypeError: on another drift; from the solve as ``ImplicitRK`` does.

    Source: Kloeden and Platen 1992, section 12.2; Higham 2000, "Mean-square and asymptotic
    stability of the stochastic theta method".
    """

    drift: ImplicitEuler | Trapezoid = ImplicitEuler()
    calculus = "ito"
    correlated = True
    cure = ImplicitEuler.cure

    def __post_init__(self) -> None:
        if not isinstance(self.drift, (ImplicitEuler, Trapezoid)):
            raise TypeError(f"drift is ImplicitEuler() or Trapezoid(); got {self.drift!r}")

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.additive else 0.5

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def check_graph(self) -> None:
        self.drift.check_graph()

    def bind(self, stepping: Stepping) -> Integrator:
        drift = self.drift.bind(stepping)
        assert isinstance(drift, (ImplicitEuler, Trapezoid))
        return replace(self, drift=drift)

    @property
    def equations(self) -> Equations:
        return self.drift

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return self.drift.init(field, t, y)

    def through(
        self, newton: Newton, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None,
        carry: Carry,
    ) -> Step:  # fmt: skip
        assert dw is not None
        table, dt = self.drift.tableau, t1 - t0
        start = combine(y, dt, table.rows[0], carry)
        start = field.diffuse(start, field.diffusion(t0, y), dw.w)
        k, past = newton.solve(t1, start, carry[0], newton.past)
        y1 = combine(start, dt * table.gamma, ((0, 1.0),), [k])
        return self.told(StraightStep(y, y1, (k,)), [k], past)
