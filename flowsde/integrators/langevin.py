"""Methods for underdamped Langevin dynamics: friction is solved exactly, the force is stepped."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar, exp, expand, phi1, sqrt
from .._state import State, tree_map
from ..dynamics.base import Dynamics, Kinetic, Noise
from ..dynamics.field import Field
from .base import Carry, Step, check_noise
from .exponential import phi
from .stochastic import Stochastic, StraightStep
from .symplectic import check_pair

__all__ = ["ALIGN", "BAOAB", "QUICSORT", "KineticMethod"]


class KineticMethod(Stochastic):
    """A method for dynamics that answer ``kinetic()``. Forward in time it is contractive where
    the friction is. The noise of x, which it has none of, is drawn and left out: so v has the
    same path as under any other method.
    """

    calculus = "ito"

    def fits(self, noise: Noise) -> bool:
        """Never by its noise alone: see ``check``."""
        return False

    def check(self, dynamics: Dynamics) -> None:
        check_noise(self, dynamics)
        if dynamics.kinetic() is None:
            raise TypeError(
                f"{type(self).__name__} needs the structure of Langevin dynamics; got "
                f"{type(dynamics).__name__}. Use UnderdampedLangevin(force), or StochasticHeun()"
            )

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        check_pair(self, y, "(x, v)")
        return Draws(y, self.levy)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        assert field.kinetic is not None
        (x, v), h = y, t1 - t0
        dw = Increment(*(None if part is None else part[1] for part in dw[:3]))
        x1, v1, last = self.move(field, field.kinetic, t0, h, x, v, dw, carry)
        return StraightStep(y, (x1, v1), last)

    @abstractmethod
    def move(
        self, field: Field, kinetic: Kinetic, t: Scalar, h: Scalar, x: State, v: State,
        dw: Increment, carry: Carry,
    ) -> tuple[State, State, Carry]:  # fmt: skip
        """x, v and the carry after a step of length h."""


class _LastAcceleration(KineticMethod):
    """A method whose step ends with an evaluation that starts the next one."""

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return field.acceleration(t, y[0])


@dataclass(frozen=True)
class BAOAB(_LastAcceleration):
    """Kick, drift, friction and noise, drift, kick. One evaluation a step.

        v <- v + h/2 a(x),    x <- x + h/2 v,    v <- e^(-f h) v + s n,    x <- x + h/2 v,
        v <- v + h/2 a(x),    s^2 = variance (1 - e^(-2 f h)), f the friction

    n is W over its standard deviation. Strong order 1, weak order 2. For a harmonic potential the
    positions' stationary law is exact at any stable step; for others its error is of order 2, of
    order 4 where the friction is large.

    Source: Leimkuhler and Matthews 2013, "Rational construction of stochastic numerical methods
    for molecular sampling", arXiv 1203.5428.
    """

    def strong_order(self, noise: Noise) -> float:
        return 1.0

    def weak_order(self, noise: Noise) -> float:
        return 2.0

    def move(
        self, field: Field, kinetic: Kinetic, t: Scalar, h: Scalar, x: State, v: State,
        dw: Increment, carry: Carry,
    ) -> tuple[State, State, Carry]:  # fmt: skip
        z = kinetic.friction * h
        spread = sqrt(2.0 * kinetic.friction * kinetic.variance * phi1(-2.0 * z))
        v = _sum((1.0, 0.5 * h), (v, carry))
        x = _sum((1.0, 0.5 * h), (x, v))
        v = _sum((exp(-z), spread), (v, dw.w))
        x = _sum((1.0, 0.5 * h), (x, v))
        last = field.acceleration(t + h, x)
        return x, _sum((1.0, 0.5 * h), (v, last)), last


@dataclass(frozen=True)
class ALIGN(_LastAcceleration):
    """The acceleration interpolated between the step's ends, the path by a parabola with its W
    and H; both solved exactly. Strong and weak order 2. One evaluation a step.

    Source: Foster, Lyons and Oberhauser 2021, arXiv 2101.03446.
    """

    levy = "H"

    def strong_order(self, noise: Noise) -> float:
        return 2.0

    def weak_order(self, noise: Noise) -> float:
        return 2.0

    def move(
        self, field: Field, kinetic: Kinetic, t: Scalar, h: Scalar, x: State, v: State,
        dw: Increment, carry: Carry,
    ) -> tuple[State, State, Carry]:  # fmt: skip
        z, sigma = kinetic.friction * h, _sigma(kinetic)
        p1, (p2, p3) = phi1(-z), phi(-z)
        bend = 6.0 * sigma * (p2 - 2.0 * p3)
        x1 = _sum((1.0, h * p1, h * h * p2, sigma * h * p2, h * bend), (x, v, carry, dw.w, dw.h))
        last = field.acceleration(t + h, x1)
        v1 = _sum(
            (exp(-z), h * (p1 - p2), h * p2, sigma * p1, -z * bend), (v, carry, last, dw.w, dw.h)
        )
        return x1, v1, last


_EARLY, _LATE = 0.5 - math.sqrt(3.0) / 6.0, 0.5 + math.sqrt(3.0) / 6.0  # Gauss's nodes


@dataclass(frozen=True)
class QUICSORT(KineticMethod):
    """Two evaluations at Gauss's nodes of an ODE that is driven by a straight piece of a path.

        v <- v + sigma (H + 6 K),    v' = a(x) - f v + sigma (W - 12 K) / h over the step,
        v <- v - sigma (H - 6 K)

    with the ODE stepped by a Runge-Kutta-Nystrom method of order 3 that is exact without force.
    Strong order 3 where the force has two Lipschitz derivatives.

    Source: Scott, O'Kane, Jelincic and Foster 2025, "Underdamped Langevin MCMC with third order
    convergence", arXiv 2508.16485.
    """

    levy = "K"

    def strong_order(self, noise: Noise) -> float:
        return 3.0

    def weak_order(self, noise: Noise) -> float:
        return 3.0

    def move(
        self, field: Field, kinetic: Kinetic, t: Scalar, h: Scalar, x: State, v: State,
        dw: Increment, carry: Carry,
    ) -> tuple[State, State, Carry]:  # fmt: skip
        z, sigma = kinetic.friction * h, _sigma(kinetic)
        v = _sum((1.0, sigma, 6.0 * sigma), (v, dw.h, dw.k))
        push = _sum((sigma, -12.0 * sigma), (dw.w, dw.k))
        early, late = (_coast(h, z, part) for part in (_EARLY, _LATE))
        a = field.acceleration(t + _EARLY * h, _sum((1.0, *early), (x, v, push)))
        kick = h * h * phi1(-z / 3.0) / 3.0
        b = field.acceleration(t + _LATE * h, _sum((1.0, *late, kick), (x, v, push, a)))
        half, whole = 0.5 * h, _coast(h, z, 1.0)
        x1 = _sum((1.0, *whole, half * late[0], half * early[0]), (x, v, push, a, b))
        v1 = _sum(
            (exp(-z), phi1(-z), half * exp(-_LATE * z), half * exp(-_EARLY * z), -sigma,
             6.0 * sigma),
            (v, push, a, b, dw.h, dw.k),
        )  # fmt: skip
        return x1, v1, None


def _coast(h: Scalar, z: Scalar, part: float) -> tuple[Scalar, Scalar]:
    """What v and the push add to x over this part of the step, without force."""
    return h * part * phi1(-part * z), h * part * part * phi(-part * z)[0]


def _sigma(kinetic: Kinetic) -> Scalar:
    return sqrt(2.0 * kinetic.friction * kinetic.variance)


def _sum(weights: Sequence[Scalar], states: Sequence[State]) -> State:
    """sum_i weights_i states_i."""

    def leaf(*xs: Tensor) -> Tensor:
        total = xs[0] * expand(weights[0], xs[0])
        for w, x in zip(weights[1:], xs[1:], strict=True):
            total = total + expand(w, x) * x if isinstance(w, Tensor) else total.add(x, alpha=w)
        return total

    return tree_map(leaf, *states)
