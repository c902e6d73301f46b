"""Methods whose steps can be taken back: the past is computed, not kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._increment import Increment
from .._scalar import Scalar
from .._state import State, combine, tree_map, weigh
from ..dynamics.base import Noise
from ..dynamics.field import Field
from .base import Carry, ReversibleIntegrator, SlopeCarrying, Step
from .explicit import Tsit5
from .runge_kutta import ExplicitRK
from .stochastic import TwoSlope, TwoSlopeStep, euler, trapezoid

__all__ = ["AsynchronousLeapfrog", "ReversibleHeun", "ReversibleRK"]


@dataclass(frozen=True)
class AsynchronousLeapfrog(SlopeCarrying, ReversibleIntegrator):
    """A midpoint step that carries a velocity v, which starts as f(t0, y0). Order 2(1).

        u = f(t0 + dt/2, y0 + dt/2 v0),    y1 = y0 + dt u,    v1 = 2 u - v0

    One evaluation a step, either way. The error estimate is dt (u - v0). Stable on the imaginary
    axis only: where the field contracts, v comes to swing about f with growing width, so take it
    for short spans, for oscillations, or where dt times the rate of decay stays small.

    Source: Mutze 2013, arXiv 1311.6602; Zhuang et al. 2021, "MALI", arXiv 2102.04668.
    """

    order = 2
    dense_order = 2
    error_order = 2
    remembers = True

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        half, v = 0.5 * (t1 - t0), carry
        u = field.drift(t0 + half, combine(y, half, ((0, 1.0),), [v]))
        return _LeapfrogStep(y, t1 - t0, v, u)

    def unstep(
        self, field: Field, t0: Scalar, t1: Scalar, y1: State, dw: Increment | None, carry: Carry
    ) -> tuple[State, Carry]:
        half, v = 0.5 * (t1 - t0), carry
        u = field.drift(t0 + half, combine(y1, -half, ((0, 1.0),), [v]))
        return combine(y1, t0 - t1, ((0, 1.0),), [u]), _reflect(u, v)


def _reflect(u: State, v: State) -> State:
    """2 u - v."""
    return tree_map(lambda a, b: 2.0 * a - b, u, v)


class _LeapfrogStep(Step):
    __slots__ = ("_dt", "_u", "_v", "_y0")

    def __init__(self, y0: State, dt: Scalar, v: State, u: State) -> None:
        super().__init__(combine(y0, dt, ((0, 1.0),), [u]), _reflect(u, v))
        self._y0, self._dt, self._v, self._u = y0, dt, v, u

    def error(self) -> State:
        return weigh(self._dt, ((0, 1.0), (1, -1.0)), [self._u, self._v])

    def dense(self, theta: Scalar) -> State:
        """y0 + theta dt (v0 + theta (u - v0))."""
        straight = combine(self._y0, theta * self._dt, ((0, 1.0),), [self._v])
        bend = ((0, 1.0), (1, -1.0))
        return combine(straight, theta * theta * self._dt, bend, [self._u, self._v])


@dataclass(frozen=True)
class ReversibleRK(ReversibleIntegrator):
    """Any explicit Runge-Kutta method, made reversible by a second state z, which starts as y0.

        y1 = l y0 + (1 - l) z0 + Psi(dt, t0, z0),    z1 = z0 - Psi(-dt, t1, y1)

    with Psi(dt, t, y) the increment of the base method. Its order, error estimate and dense output
    are the base's; a step costs two of its steps. Unlike leapfrog methods it is stable on a part
    of the left half-plane, the larger the further ``coupling`` is below 1. Taking a step back
    divides by the coupling, so that rounding grows as l^-n over n steps.

    Args:
        base: the method.
        coupling: l, in (0, 1].

    Raises:
        TypeError: on a base that is not an explicit Runge-Kutta method.
        ValueError: on a coupling outside (0, 1].

    Source: McCallum and Foster 2024, arXiv 2410.11648.
    """

    base: ExplicitRK = Tsit5()
    coupling: float = 0.999
    remembers = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, ExplicitRK):
            raise TypeError(f"base is an explicit method such as RK4(); got {self.base!r}")
        if not 0.0 < self.coupling <= 1.0:
            raise ValueError(f"coupling lies in (0, 1]; got {self.coupling}")
        for name in ("order", "dense_order", "error_order"):
            object.__setattr__(self, name, getattr(self.base, name))

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return y, field.drift(t, y)

    def slope(self, carry: Carry) -> State:
        return carry[1]

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        z0, slope = carry
        ahead = self.base.step(field, t0, t1, z0, None, slope)
        y1 = tree_map(lambda b, g: b + g, ahead.y1, self._gap(y, z0, self.coupling))
        back = self.base.step(field, t1, t0, y1, None, None)
        z1 = tree_map(lambda z, a, b: z - (b - a), z0, y1, back.y1)
        return _ReversibleStep(self, y, y1, z0, ahead, (z1, field.drift(t1, z1)))

    def unstep(
        self, field: Field, t0: Scalar, t1: Scalar, y1: State, dw: Increment | None, carry: Carry
    ) -> tuple[State, Carry]:
        back = self.base.step(field, t1, t0, y1, None, None)
        z0 = tree_map(lambda z, a, b: z + (b - a), carry[0], y1, back.y1)
        slope = field.drift(t0, z0)
        ahead = self.base.step(field, t0, t1, z0, None, slope)
        gap = self._gap(y1, ahead.y1, 1.0 / self.coupling)
        return tree_map(lambda z, g: z + g, z0, gap), (z0, slope)

    @staticmethod
    def _gap(y: State, z: State, factor: float) -> State:
        return tree_map(lambda a, b: factor * (a - b), y, z)


class _ReversibleStep(Step):
    __slots__ = ("_ahead", "_method", "_y0", "_z0")

    def __init__(
        self, method: ReversibleRK, y0: State, y1: State, z0: State, ahead: Step, carry: Carry
    ) -> None:
        super().__init__(y1, carry)
        self._method, self._y0, self._z0, self._ahead = method, y0, z0, ahead

    def error(self) -> State:
        return self._ahead.error()

    def dense(self, theta: Scalar) -> State:
        """y0 + Psi(theta dt, t0, z0) + theta (1 - l) (z0 - y0)."""
        between, rest = self._ahead.dense(theta), 1.0 - self._method.coupling

        def formula(y: State, z: State, b: State) -> State:
            return combine(y + (b - z), theta * rest, ((0, 1.0),), [z - y])

        return tree_map(formula, self._y0, self._z0, between)


@dataclass(frozen=True)
class ReversibleHeun(TwoSlope, ReversibleIntegrator):
    """Heun's method about a second state z, which starts as y0. Stratonovich.

        z1 = 2 y0 - z0 + f0 dt + g0 dW,    f1, g1 = f(t1, z1), g(t1, z1)
        y1 = y0 + (f0 + f1) dt/2 + (g0 + g1) dW/2

    One evaluation of drift and diffusion a step, either way: each serves the next step too. Strong
    order 1 for commutative noise (diagonal, scalar, additive), else 1/2; weak order 1, and 2 for
    additive noise. The error estimate is the distance from Euler's step.

    Source: Kidger, Foster, Li and Lyons 2021, arXiv 2105.13493, algorithms 1 and 2.
    """

    remembers = True

    def weak_order(self, noise: Noise) -> float:
        return 2.0 if noise.additive else 1.0

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return y, field.drift(t, y), field.diffusion(t, y)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        (z0, f0, g0), dt = carry, t1 - t0
        z1 = euler(field, _reflect(y, z0), dt, dw.w, f0, g0)
        f1, g1 = field.drift(t1, z1), field.diffusion(t1, z1)
        fs, gs = (f0, f1), (g0, g1)
        y1 = trapezoid(field, y, dt, dw.w, fs, gs)
        return TwoSlopeStep(field, y, y1, dt, dw.w, fs, gs, carry=(z1, f1, g1))

    def unstep(
        self, field: Field, t0: Scalar, t1: Scalar, y1: State, dw: Increment | None, carry: Carry
    ) -> tuple[State, Carry]:
        assert dw is not None
        (z1, f1, g1), dt, back = carry, t1 - t0, tree_map(torch.neg, dw.w)
        z0 = euler(field, _reflect(y1, z1), -dt, back, f1, g1)
        f0, g0 = field.drift(t0, z0), field.diffusion(t0, z0)
        return trapezoid(field, y1, -dt, back, (f0, f1), (g0, g1)), (z0, f0, g0)
