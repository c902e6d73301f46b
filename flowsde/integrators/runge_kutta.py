"""The explicit Runge-Kutta engine: methods are tableaus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .._increment import Increment
from .._scalar import Scalar, whole
from .._state import State, Weights, combine, weigh
from ..dynamics.field import Field
from .base import Carry, SlopeCarrying, Step
from .interpolation import Interpolation, hermite, polynomial

__all__ = ["ExplicitRK", "Tableau"]

Row = tuple[float, ...]


def sparse(row: Sequence[float]) -> Weights:
    return tuple((i, float(w)) for i, w in enumerate(row) if w != 0)


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau, checked at birth.

        k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j),    y1 = y0 + dt sum_i b_i k_i

    Args:
        c: nodes, c_0 = 0.
        a: rows of the strictly lower triangle, the first of length 1.
        b: weights. Where the last row of ``a`` equals them the method is first-same-as-last; the
            engine sees that for itself.
        order: of ``b``.
        b_low: weights of the embedded method, or None.
        order_low: its order.
        dense: for each stage the polynomial b_i(theta) = sum_n dense[i][n] theta^(n+1), or None
            for cubic Hermite interpolation.
        dense_order: of those polynomials.

    Raises:
        ValueError: if c_0 is not 0 or the order not >= 1, rows do not sum to c, weights not to
            one, or the weights miss a quadrature condition sum_i b_i c_i^(q-1) = 1/q of their
            order.
    """

    c: Row
    a: tuple[Row, ...]
    b: Row
    order: int
    b_low: Row | None = None
    order_low: int = 0
    dense: tuple[Row, ...] | None = None
    dense_order: int = 3
    rows: tuple[Weights, ...] = field(init=False)
    weights: Weights = field(init=False)
    error: Weights | None = field(init=False)
    fsal: bool = field(init=False)

    def __post_init__(self) -> None:
        stages = len(self.b)
        if len(self.c) != stages or [len(row) for row in self.a] != list(range(1, stages)):
            raise ValueError(f"{stages} weights need {stages} nodes and rows of 1..{stages - 1}")
        if self.c[0] != 0 or not whole(self.order, 1):
            raise ValueError(
                f"the first node is 0, and the order 1 or more; got {self.c[0]} and {self.order}"
            )
        for c, row in zip(self.c[1:], self.a, strict=True):
            demand(sum(row), c, "a row does not sum to its node")
        self._check(self.b, self.order)
        error = None
        if self.b_low is not None:
            self._check(self.b_low, self.order_low)
            error = sparse([b - low for b, low in zip(self.b, self.b_low, strict=True)])
        if self.dense is not None:
            for b, powers in zip(self.b, self.dense, strict=True):
                demand(sum(powers), b, "a dense weight does not end at its b")
        object.__setattr__(self, "rows", tuple(sparse(row) for row in self.a))
        object.__setattr__(self, "weights", sparse(self.b))
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "fsal", stages > 1 and (*self.a[-1], 0) == self.b)

    def _check(self, b: Row, order: int) -> None:
        for q in range(1, order + 1):
            moment = math.fsum(w * c ** (q - 1) for w, c in zip(b, self.c, strict=True))
            demand(moment, 1 / q, f"the weights miss the quadrature condition of order {q}")


def demand(value: float, wanted: float, complaint: str) -> None:
    if not math.isclose(value, wanted, rel_tol=1e-11, abs_tol=1e-11):
        raise ValueError(f"{complaint}: {value} for {wanted}")


class ExplicitRK(SlopeCarrying):
    """Any explicit Runge-Kutta method. A subclass is its tableau."""

    tableau: ClassVar[Tableau]

    def __init_subclass__(cls) -> None:
        tableau = cls.tableau
        cls.order = tableau.order
        cls.error_order = None if tableau.b_low is None else tableau.order_low + 1
        if tableau.dense is not None:
            cls.dense_order = tableau.dense_order
        else:
            cls.dense_order = tableau.order if tableau.order > 4 else min(tableau.order, 3)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        tableau, dt = self.tableau, t1 - t0
        ks = [field.drift(t0, y) if carry is None else carry]
        y1 = y
        for c, row in zip(tableau.c[1:], tableau.rows, strict=True):
            y1 = combine(y, dt, row, ks)
            ks.append(field.drift(t1 if c == 1.0 else t0 + c * dt, y1))
        if tableau.fsal:
            return _RKStep(self, field, t0, t1, y, y1, ks, ks[-1])
        return _RKStep(self, field, t0, t1, y, combine(y, dt, tableau.weights, ks), ks, None)


class _RKStep(Step):
    __slots__ = ("_end", "_field", "_ks", "_method", "_t0", "_t1", "_y0")

    def __init__(
        self, method: ExplicitRK, field: Field, t0: Scalar, t1: Scalar, y0: State, y1: State,
        ks: list[State], end: State | None,
    ) -> None:  # fmt: skip
        super().__init__(y1, end)
        self._method, self._field = method, field
        self._t0, self._t1, self._y0, self._ks, self._end = t0, t1, y0, ks, end

    def error(self) -> State:
        weights = self._method.tableau.error
        assert weights is not None
        return weigh(self._t1 - self._t0, weights, self._ks)

    def interpolation(self) -> Interpolation | None:
        tableau, dt = self._method.tableau, self._t1 - self._t0
        if tableau.dense is not None:
            return polynomial(self._y0, self._ks, tableau.dense, dt)
        if tableau.order > 4:
            return None
        end = self._end
        if end is None:
            end = self.later(lambda: self._field.drift(self._t1, self.y1))
        return hermite(self._y0, self.y1, self._ks[0], end, dt)

    def dense(self, theta: Scalar) -> State:
        found = self.interpolation()
        if found is not None:
            return found.at(theta)
        t = self._t0 + theta * (self._t1 - self._t0)  # a shorter step: as exact as the method
        start = self._ks[0]
        return self._method.step(self._field, self._t0, t, self._y0, None, start).y1
