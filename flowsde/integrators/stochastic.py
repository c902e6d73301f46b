"""Methods for stochastic differential equations."""

from __future__ import annotations

import inspect
import operator
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .._increment import Draws, Increment
from .._scalar import Scalar
from .._state import State, combine, tree_map, weigh
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field
from .base import Carry, Integrator, Step, check_noise

__all__ = [
    "EulerHeun", "EulerMaruyama", "Stochastic", "StochasticHeun", "StochasticMidpoint",
    "StraightStep", "TwoSlope", "TwoSlopeStep", "euler", "trapezoid",
]  # fmt: skip


class StraightStep(Step):
    """States between are on the chord."""

    __slots__ = ("_y0",)

    def __init__(self, y0: State, y1: State, carry: Carry = None) -> None:
        super().__init__(y1, carry)
        self._y0 = y0

    def dense(self, theta: Scalar) -> State:
        jump = tree_map(lambda a, b: b - a, self._y0, self.y1)
        return combine(self._y0, theta, ((0, 1.0),), [jump])


def euler(field: Field, y: State, dt: Scalar, w: State, f: State, g: State) -> State:
    """y + f dt + g dW."""
    return field.diffuse(combine(y, dt, ((0, 1.0),), [f]), g, w)


def trapezoid(
    field: Field, y: State, dt: Scalar, w: State, fs: tuple[State, State], gs: tuple[State, State]
) -> State:
    """y + (f0 + f1) dt/2 + (g0 + g1) dW/2."""
    drifted = combine(y, dt, ((0, 0.5), (1, 0.5)), fs)
    return field.diffuse(drifted, tree_map(operator.add, *gs), w, 0.5)


class TwoSlopeStep(StraightStep):
    """A step on two slopes, the first that of Euler's: y1 = y0 + sum_i w_i (f_i dt + g_i dW).

    The error estimate is the distance from Euler's step.
    """

    __slots__ = ("_parts", "_weight")

    def __init__(
        self, field: Field, y0: State, y1: State, dt: Scalar, w: State, fs: tuple[State, State],
        gs: tuple[State, State], weight: float = 0.5, carry: Carry = None,
    ) -> None:  # fmt: skip
        super().__init__(y0, y1, carry)
        self._parts, self._weight = (field, dt, w, fs, gs), weight

    def error(self) -> State:
        """weight ((f1 - f0) dt + (g1 - g0) dW), with the weight of the second slope."""
        (field, dt, w, fs, (g0, g1)), weight = self._parts, self._weight
        drift = weigh(dt, ((0, -weight), (1, weight)), fs)
        return field.diffuse(drift, tree_map(operator.sub, g1, g0), w, weight)


class Stochastic(Integrator):
    """A method for SDEs. Subclasses are data and one formula; ``check`` follows from the data.

    Attributes:
        calculus: how it reads dW, or "either": as the dynamics does. On additive noise both
            readings agree.
        levy: what it needs of the path beside W: see ``Draws``.
        by_products: whether it takes g by its products with dW alone.
        correlated: whether W may have correlated components where g depends on the state: a method
            without double integrals of W, in which their covariances would stand.
    """

    order = 1
    dense_order = 0
    calculus: Literal["ito", "stratonovich", "either"]
    levy: Literal["W", "H", "K"] = "W"
    by_products: bool = False
    correlated: bool = False

    @abstractmethod
    def strong_order(self, noise: Noise) -> float | None:
        """Declared order of the pathwise error for this kind of noise; None where it does not
        fit it.
        """

    @abstractmethod
    def weak_order(self, noise: Noise) -> float:
        """Declared order of the error of expectations, for noise that it fits."""

    def fits(self, noise: Noise) -> bool:
        """Whether it integrates dynamics with this noise."""
        reads = noise.additive or self.calculus in ("either", _reading(noise))
        knows = self.by_products or not noise.by_products
        return reads and knows and self.strong_order(noise) is not None

    def check(self, dynamics: Dynamics) -> None:
        noise = check_noise(self, dynamics)
        if not self.fits(noise):
            others = sorted(f"{type(m).__name__}()" for m in _catalogue() if m.fits(noise))
            raise TypeError(
                f"{type(self).__name__} does not integrate {_describe(noise)}. Use "
                f"{' or '.join(others)}; declare additive=True if g does not depend on y, "
                "commutative=True if its columns commute"
            )

    def exponent(self, dynamics: Dynamics) -> float:
        check_pathwise(self, dynamics)
        if self.error_order is None:
            name = type(self).__name__
            raise TypeError(
                f"{name} has no error estimate to adapt its steps by: use StepDoubling({name}()), "
                "Fixed(...) or Grid(...)"
            )
        noise = check_noise(self, dynamics)  # if it is additive, Euler's own error is O(dt^1.5)
        return max(1.5, self.error_order) if noise.additive else self.error_order

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return Draws(check_noise(self, dynamics).shapes(y), self.levy)


def check_pathwise(method: Stochastic, dynamics: Dynamics) -> float:
    """The strong order, or a TypeError where steps chosen by the path would lead astray.

    Below strong order 1 the sum of the local errors vanishes only because they average out; steps
    that are kept or rejected by those errors do not average, and the limit is another solution.

    Source: Gaines and Lyons 1997; Foster and Jelincic 2023, arXiv 2311.14201.
    """
    noise = check_noise(method, dynamics)
    strong = method.strong_order(noise) or 0.0
    if strong < 1.0:
        fine = (m for m in _catalogue() if m.fits(noise) and (m.strong_order(noise) or 0.0) >= 1.0)
        others = [f"StepDoubling({type(m).__name__}())" for m in fine]
        raise TypeError(
            f"{type(method).__name__} is of strong order {strong:g} on {_describe(noise)}: where "
            "its steps depend on the path it may converge to another solution. Use Fixed(...) or "
            f"Grid(...){''.join(f', or {name}' for name in sorted(others))}"
        )
    return strong


def _catalogue(kind: type[Stochastic] = Stochastic) -> Iterator[Stochastic]:
    """Every method that is made without arguments."""
    for each in kind.__subclasses__():
        if not inspect.isabstract(each) and not each.__name__.startswith("_"):
            yield each()
        yield from _catalogue(each)


def _reading(noise: Noise) -> str:
    return "ito" if noise.ito else "stratonovich"


def _describe(noise: Noise) -> str:
    kind = "additive" if noise.additive else "multiplicative"
    mixed = "" if noise.commutes else ", non-commutative"
    return f"{_reading(noise).capitalize()} SDEs with {kind} {noise.kind}{mixed} noise"


@dataclass(frozen=True)
class EulerMaruyama(Stochastic):
    """y1 = y0 + f dt + g dW. Ito. Strong order 1/2, 1 for additive noise; weak order 1.

    Source: Maruyama 1955; Kloeden and Platen 1992.
    """

    calculus = "ito"
    correlated = True
    by_products = True

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.additive else 0.5

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        f, g = field.drift(t0, y), field.diffusion(t0, y)
        return StraightStep(y, euler(field, y, t1 - t0, dw.w, f, g))


@dataclass(frozen=True)
class EulerHeun(Stochastic):
    """Euler's step in the drift, the mean of both ends in the noise. Stratonovich.

        y1 = y0 + f0 dt + (g0 + g(t1, y0 + g0 dW)) dW/2

    Strong order 1 for commutative noise (diagonal, scalar, additive), else 1/2; weak order 1. One
    evaluation of f, two of g.

    Source: Rumelin 1982; Kloeden and Platen 1992.
    """

    calculus = "stratonovich"
    correlated = True
    by_products = True

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.commutes else 0.5

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        f, g0 = field.drift(t0, y), field.diffusion(t0, y)
        g1 = field.diffusion(t1, field.diffuse(y, g0, dw.w))
        drifted = combine(y, t1 - t0, ((0, 1.0),), [f])
        return StraightStep(y, field.diffuse(drifted, tree_map(operator.add, g0, g1), dw.w, 0.5))


class TwoSlope(Stochastic):
    """A method whose steps are ``TwoSlopeStep``. Stratonovich, of strong order 1 for noise that
    commutes, else 1/2.
    """

    calculus = "stratonovich"
    correlated = True
    error_order = 1
    by_products = True

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.commutes else 0.5


@dataclass(frozen=True)
class StochasticHeun(TwoSlope):
    """An Euler predictor, then the mean of both ends' drift and diffusion. Stratonovich.

    Strong order 1 for commutative noise (diagonal, scalar, additive), else 1/2; weak order 1, and 2
    for additive noise. Two evaluations. The error estimate is the distance from Euler's step.

    Source: Rumelin 1982; Kloeden and Platen 1992.
    """

    def weak_order(self, noise: Noise) -> float:
        return 2.0 if noise.additive else 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        dt, f0, g0 = t1 - t0, field.drift(t0, y), field.diffusion(t0, y)
        guess = euler(field, y, dt, dw.w, f0, g0)
        f1, g1 = field.drift(t1, guess), field.diffusion(t1, guess)
        fs, gs = (f0, f1), (g0, g1)
        return TwoSlopeStep(field, y, trapezoid(field, y, dt, dw.w, fs, gs), dt, dw.w, fs, gs)


@dataclass(frozen=True)
class StochasticMidpoint(TwoSlope):
    """Half of Euler's step, whose drift and diffusion take the whole step. Stratonovich.

        y1 = y0 + f(t0 + dt/2, u) dt + g(t0 + dt/2, u) dW,    u = y0 + (f0 dt + g0 dW) / 2

    Strong order 1 for commutative noise (diagonal, scalar, additive), else 1/2; weak order 1. Two
    evaluations. The error estimate is the distance from Euler's step.

    Source: Kloeden and Platen 1992.
    """

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        dt, w, f0, g0 = t1 - t0, dw.w, field.drift(t0, y), field.diffusion(t0, y)
        middle, guess = t0 + 0.5 * dt, field.diffuse(combine(y, dt, ((0, 0.5),), [f0]), g0, w, 0.5)
        f1, g1 = field.drift(middle, guess), field.diffusion(middle, guess)
        y1 = euler(field, y, dt, w, f1, g1)
        return TwoSlopeStep(field, y, y1, dt, w, (f0, f1), (g0, g1), weight=1.0)
