"""Methods for stochastic differential equations."""

from __future__ import annotations

from dataclasses import dataclass

from .._scalar import Scalar
from .._state import State, combine, tree_map
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field
from .base import Carry, Integrator, Step, check_noise

__all__ = ["EulerMaruyama", "StochasticHeun"]


class _StraightStep(Step):
    """States between are on the chord."""

    __slots__ = ("_y0",)

    def __init__(self, y0: State, y1: State) -> None:
        super().__init__(y1)
        self._y0 = y0

    def dense(self, theta: Scalar) -> State:
        jump = tree_map(lambda a, b: b - a, self._y0, self.y1)
        return combine(self._y0, theta, ((0, 1.0),), [jump])


class _Stochastic(Integrator):
    order = 1
    dense_order = 0

    def strong_order(self, noise: Noise) -> float:
        """Declared order of the pathwise error, for this kind of noise."""
        raise NotImplementedError

    def noise_shapes(self, dynamics: Dynamics, y: State) -> State | None:
        return check_noise(self, dynamics).shapes(y)


@dataclass(frozen=True)
class EulerMaruyama(_Stochastic):
    """y1 = y0 + f dt + g dW. Ito. Strong order 1/2, 1 for additive noise; weak order 1.

    Source: Maruyama 1955; Kloeden and Platen 1992.
    """

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.additive else 0.5

    def check(self, dynamics: Dynamics) -> None:
        noise = check_noise(self, dynamics)
        if not (noise.ito or noise.additive):
            raise TypeError(
                "EulerMaruyama integrates Ito SDEs; got a Stratonovich one with multiplicative "
                "noise. Use StochasticHeun(), or add the Ito correction to the drift"
            )

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: State | None, carry: Carry
    ) -> Step:
        drifted = combine(y, t1 - t0, ((0, 1.0),), [field.drift(t0, y)])
        y1 = tree_map(lambda a, b: a + b, drifted, field.noise_term(t0, y, dw))
        return _StraightStep(y, y1)


@dataclass(frozen=True)
class StochasticHeun(_Stochastic):
    """An Euler predictor, then the mean of both ends' drift and diffusion. Stratonovich.

    Strong order 1 for commutative noise (diagonal, scalar, additive), else 1/2. Two evaluations.

    Source: Rumelin 1982; Kloeden and Platen 1992.
    """

    def strong_order(self, noise: Noise) -> float:
        return 1.0 if noise.additive or noise.commutative else 0.5

    def check(self, dynamics: Dynamics) -> None:
        noise = check_noise(self, dynamics)
        if noise.ito and not noise.additive:
            raise TypeError(
                "StochasticHeun integrates Stratonovich SDEs; got an Ito one with multiplicative "
                "noise. Use EulerMaruyama(), or declare additive=True if g does not depend on y"
            )

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: State | None, carry: Carry
    ) -> Step:
        dt, f0, g0 = t1 - t0, field.drift(t0, y), field.noise_term(t0, y, dw)
        guess = tree_map(lambda a, b: a + b, combine(y, dt, ((0, 1.0),), [f0]), g0)
        f1, g1 = field.drift(t1, guess), field.noise_term(t1, guess, dw)
        drifted = combine(y, dt, ((0, 0.5), (1, 0.5)), [f0, f1])
        return _StraightStep(y, combine(drifted, 1.0, ((0, 0.5), (1, 0.5)), [g0, g1]))
