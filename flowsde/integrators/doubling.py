"""Error estimates by taking every step twice."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .._increment import Draws, Increment
from .._scalar import Scalar
from .._state import State, tree_map, where
from ..dynamics.base import Dynamics
from ..dynamics.field import Field
from ..stepping import Stepping
from .base import Carry, Integrator, Step
from .stochastic import Stochastic, StochasticHeun, check_pathwise

__all__ = ["StepDoubling"]


@dataclass(frozen=True)
class StepDoubling(Integrator):
    """One step of a stochastic method beside two of half its length, on the same path.

    The two halves are kept; the error estimate is their distance from the one step. For a method
    of strong order p it is O(dt^(p + 1/2)) in the mean square, and mostly larger than the error of
    the halves. Costs three steps of the method; its orders are those of the
    method, at half the step. A method with an ``error`` of its own does not need it.

    Args:
        method: whose steps are taken.

    Raises:
        TypeError: on anything but a method for SDEs; from the solve, where the steps depend on
            the path and the method is of strong order below 1 for that noise.

    Source: Gaines and Lyons 1997, "Variable step size control in the numerical solution of
    stochastic differential equations".
    """

    method: Stochastic = StochasticHeun()

    def __post_init__(self) -> None:
        if not isinstance(self.method, Stochastic):
            raise TypeError(
                f"StepDoubling takes a method for SDEs, such as StochasticHeun(); got "
                f"{self.method!r}. ODE methods such as Tsit5() have their own error estimate"
            )
        for name in ("order", "dense_order", "static", "remembers"):
            object.__setattr__(self, name, getattr(self.method, name))

    def check(self, dynamics: Dynamics) -> None:
        self.method.check(dynamics)

    def bind(self, stepping: Stepping) -> Integrator:
        method = self.method.bind(stepping)
        assert isinstance(method, Stochastic)
        return replace(self, method=method)

    def exponent(self, dynamics: Dynamics) -> float:
        return check_pathwise(self.method, dynamics) + 0.5

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        draws = self.method.draws(dynamics, y)
        if draws is None:
            return None
        if draws.extra is not None:
            raise TypeError(
                f"{type(self.method).__name__} draws numbers that are not of the path, and those "
                "of a step do not follow from its halves': use it with Fixed(...) or Grid(...)"
            )
        return replace(draws, halves=True)

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return self.method.init(field, t, y)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        assert dw.halves is not None
        middle = t0 + 0.5 * (t1 - t0)
        whole = self.method.step(field, t0, t1, y, dw, carry)
        first = self.method.step(field, t0, middle, y, dw.halves[0], carry)
        second = self.method.step(field, middle, t1, first.y1, dw.halves[1], first.carry)
        return _DoubledStep(whole, first, second)


class _DoubledStep(Step):
    __slots__ = ("_first", "_second", "_whole")

    def __init__(self, whole: Step, first: Step, second: Step) -> None:
        super().__init__(second.y1, second.carry)
        self._whole, self._first, self._second = whole, first, second

    def error(self) -> State:
        return tree_map(lambda a, b: a - b, self.y1, self._whole.y1)

    def dense(self, theta: Scalar) -> State:
        first, second = self._first.dense(2.0 * theta), self._second.dense(2.0 * theta - 1.0)
        return where(theta < 0.5, first, second)
