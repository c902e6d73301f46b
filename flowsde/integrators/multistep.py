"""Adams methods on any grid: the coefficients are those of the times at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from .._increment import Increment
from .._scalar import Scalar
from .._state import State, tree_map
from ..dynamics.field import Field
from .base import Carry, Integrator, Step
from .explicit import Bosh3, Dopri8, Tsit5
from .interpolation import Interpolation
from .runge_kutta import ExplicitRK

__all__ = ["Adams"]

_STARTERS: dict[int, ExplicitRK] = {
    3: Bosh3(), 4: Tsit5(), 5: Tsit5(), 6: Dopri8(), 7: Dopri8(), 8: Dopri8(),
}  # fmt: skip


@dataclass(frozen=True)
class Adams(Integrator):
    """Adams-Bashforth-Moulton with steps of any size: predict, evaluate, correct, evaluate.

        y* = y0 + int P(s) ds,    P through f at the last k - 1 times
        y1 = y0 + int C(s) ds,    C through f(t1, y*) and f at the last k - 1 times

    Both polynomials are integrated exactly over the step, so that order k holds on every grid; the
    first k - 2 steps are those of a Runge-Kutta method of at least that order. The error estimate
    is that of the corrector of order k - 1 on the same times, (y1 - y*) c / p with c and p the
    integrals of its and the predictor's node polynomials. Two evaluations a step. The history is
    the batch's: time is shared.

    Args:
        order: k, 3 to 8.

    Raises:
        ValueError: on another order.
        TypeError: in a solve with times of each sample's own.

    Source: Shampine and Gordon 1975; Hairer, Norsett and Wanner 1993, III.5.
    """

    order: int = 4
    static = False

    def __post_init__(self) -> None:
        if self.order not in _STARTERS:
            raise ValueError(f"Adams has orders 3 to 8; got {self.order}")
        object.__setattr__(self, "error_order", self.order)
        object.__setattr__(self, "dense_order", min(self.order, self._starter.dense_order))

    @property
    def _starter(self) -> ExplicitRK:
        return _STARTERS[self.order]

    def check_own_times(self) -> None:
        raise TypeError(
            "Adams keeps one history for all samples: let the batch share its time, or use "
            "Tsit5() for per-sample steps and spans"
        )

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return (t,), (field.drift(t, y),)

    def slope(self, carry: Carry) -> State:
        return carry[1][0]

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        (times, slopes), dt = carry, t1 - t0
        if len(times) < self.order - 1:
            step = self._starter.step(field, t0, t1, y, None, slopes[0])
            end = field.drift(t1, step.y1) if step.carry is None else step.carry
            step.carry = (t1, *times), (end, *slopes)
            return step
        past = [(t - t0) / dt for t in times]
        guess = _through(y, dt, past, slopes).at(1.0)
        nodes, values = [1.0, *past], [field.drift(t1, guess), *slopes]
        corrected = _through(y, dt, nodes, values)
        y1 = corrected.at(1.0)
        p, c = (sum(_integral(_product(roots))) for roots in (past, nodes[:-1]))
        carry = (t1, *times[:-1]), (field.drift(t1, y1), *slopes[:-1])
        return _AdamsStep(y1, carry, corrected, guess, c / p)


def _product(roots: Sequence[Scalar]) -> list[Scalar]:
    """Coefficients of prod_i (u - r_i), the constant first."""

    def times(p: list[Scalar], r: Scalar) -> list[Scalar]:
        return [a - r * b for a, b in zip([0.0, *p], [*p, 0.0], strict=True)]

    return reduce(times, roots, [1.0])


def _integral(polynomial: Sequence[Scalar]) -> list[Scalar]:
    """Coefficients of its integral from 0, the first power's first."""
    return [c / n for n, c in enumerate(polynomial, start=1)]


def _through(
    y: State, dt: Scalar, nodes: Sequence[Scalar], values: Sequence[State]
) -> Interpolation:
    """y + dt times the integral, from 0 to theta, of the polynomial through the values."""
    powers, factors = [], []
    for i, node in enumerate(nodes):
        others = [*nodes[:i], *nodes[i + 1 :]]
        height: Scalar = 1.0
        for other in others:
            height = height * (node - other)
        powers.append(_integral(_product(others)))
        factors.append(dt / height)
    return Interpolation(y, values, powers, factors)


class _AdamsStep(Step):
    __slots__ = ("_corrected", "_guess", "_ratio")

    def __init__(
        self, y1: State, carry: Carry, corrected: Interpolation, guess: State, ratio: Scalar
    ) -> None:
        super().__init__(y1, carry)
        self._corrected, self._guess, self._ratio = corrected, guess, ratio

    def error(self) -> State:
        return tree_map(lambda a, b: (a - b) * self._ratio, self.y1, self._guess)

    def interpolation(self) -> Interpolation:
        """The integral of the corrector's polynomial, so far."""
        return self._corrected
