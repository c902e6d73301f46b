"""Stochastic Runge-Kutta methods of strong order 1.5: tableaus of two engines, and SlowRK."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .._increment import Increment
from .._scalar import Scalar, expand, nonzero, sqrt_abs
from .._state import State, Weights, combine, tree_map, weigh
from ..dynamics.base import Noise
from ..dynamics.field import Field
from .base import Carry, Step
from .runge_kutta import Row, demand, sparse
from .stochastic import Stochastic, StraightStep

__all__ = [
    "SEA", "SRA", "SRA1", "SRA3", "SRI", "SRI2", "SRIW1", "SRATableau", "SRITableau", "ShARK",
    "SlowRK",
]  # fmt: skip

Rows = tuple[Row, ...]


def _at(t0: Scalar, t1: Scalar, c: float) -> Scalar:
    if c in (0.0, 1.0):
        return t1 if c else t0
    return t0 + c * (t1 - t0)


def _dot(*factors: Sequence[float]) -> float:
    return math.fsum(math.prod(values) for values in zip(*factors, strict=False))


# --- diagonal and scalar noise --------------------------------------------------------------------


@dataclass(frozen=True)
class SRITableau:
    """Of a method for diagonal or scalar noise, of strong order 1.5, checked at birth.

        f_i = f(t0 + c0_i dt, y0 + dt sum_j a0_ij f_j + I10 / h sum_j b0_ij g_j)
        g_i = g(t0 + c1_i dt, y0 + dt sum_j a1_ij f_j + sqrt(h) sum_j b1_ij g_j)
        y1 = y0 + dt sum_i alpha_i f_i
             + sum_i (beta_1i dW + beta_2i I11 / sqrt(h) + beta_3i I10 / h + beta_4i I111 / h) g_i

    with h = abs(dt) and Ito's integrals I11 = (dW^2 - h) / 2, I10 = h (dW / 2 + H) and
    I111 = (dW^3 - 3 h dW) / 6. Stages of f and of g are counted apart: each is evaluated once, and
    none that has no use. Both kinds see those of lower number.

    Args:
        c0, c1: nodes of the stages of f and of g, from 0.
        a0, b0, a1, b1: rows of the second stage and after, which may end early.
        alpha: weights of f.
        beta: the four rows of weights of g.

    Raises:
        ValueError: if a condition of strong order 1.5 is missed.

    Source: Roessler 2010, "Runge-Kutta methods for the strong approximation of solutions of
    stochastic differential equations", SIAM J. Numer. Anal. 48(3), theorem 5.1.
    """

    c0: Row
    a0: Rows
    b0: Rows
    c1: Row
    a1: Rows
    b1: Rows
    alpha: Row
    beta: tuple[Row, Row, Row, Row]
    drifts: tuple[tuple[float, Weights, Weights], ...] = field(init=False)
    diffusions: tuple[tuple[float, Weights, Weights], ...] = field(init=False)
    weights: Weights = field(init=False)
    integrals: tuple[Weights, ...] = field(init=False)
    error: Weights = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        for name, nodes, a, b in (
            ("drifts", self.c0, self.a0, self.b0), ("diffusions", self.c1, self.a1, self.b1),
        ):  # fmt: skip
            rows = zip(nodes, ((), *a), ((), *b), strict=True)
            stages = tuple((c, sparse(along), sparse(across)) for c, along, across in rows)
            object.__setattr__(self, name, stages)
        object.__setattr__(self, "weights", sparse(self.alpha))
        object.__setattr__(self, "integrals", tuple(sparse(row) for row in self.beta))
        object.__setattr__(self, "error", sparse((self.alpha[0] - 1.0, *self.alpha[1:])))

    def _check(self) -> None:
        one = (1.0,) * len(self.c1)
        for nodes, rows in ((self.c0, self.a0), (self.c1, self.a1)):
            for c, row in zip(nodes, ((), *rows), strict=True):
                demand(math.fsum(row), c, "a row does not sum to its node")
        b0 = [math.fsum(row) for row in ((), *self.b0)]
        b1 = [math.fsum(row) for row in ((), *self.b1)]
        twice = [_dot(row, b1) for row in ((), *self.b1)]
        bent = [_dot(row, b0) for row in ((), *self.a1)]
        for factors, wanted in (
            ((), 1.0), ((self.c0,), 0.5), ((b0,), 1.0), ((b0, b0), 1.5),
        ):  # fmt: skip
            moment = _dot(self.alpha, *factors)
            demand(moment, wanted, "the weights of the drift miss a condition of order 1.5")
        for factor, wanted4 in (
            (one, (1.0, 0.0, 0.0, 0.0)), (b1, (0.0, 1.0, 0.0, 0.0)),
            (self.c1, (1.0, 0.0, -1.0, 0.0)), ([b * b for b in b1], (1.0, 0.0, -1.0, 2.0)),
            (twice, (0.0, 0.0, 0.0, 1.0)),
        ):  # fmt: skip
            for row, wanted in zip(self.beta, wanted4, strict=True):
                demand(_dot(row, factor), wanted, "the weights of the diffusion miss a condition")
        mixed = _dot(self.beta[0], bent) / 2 + _dot(self.beta[2], bent) / 3
        demand(mixed, 0.0, "drift and diffusion miss their common condition")


class SRI(Stochastic):
    """Any method of Roessler's for diagonal and scalar noise. Ito. A subclass is its tableau.

    Strong order 1.5, where g_i depends on y_i alone for diagonal noise; weak order 1.5, 2 for
    additive noise. The error estimate is the distance from the method of strong order 1 within:
    the drift of the start for that of all stages, and no triple integrals.
    """

    calculus = "ito"
    levy = "H"
    error_order = 1.5

    @property
    @abstractmethod
    def tableau(self) -> SRITableau:
        """Its coefficients."""

    def strong_order(self, noise: Noise) -> float | None:
        return None if noise.kind == "general" else 1.5

    def weak_order(self, noise: Noise) -> float:
        return 2.0 if noise.additive else 1.5

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        table, dt = self.tableau, t1 - t0
        root = sqrt_abs(dt)
        area = tree_map(_mean, dw.w, dw.h)
        fs: list[State] = []
        gs: list[State] = []
        for i in range(max(len(table.drifts), len(table.diffusions))):
            last = tuple(fs), tuple(gs)
            if i < len(table.drifts):
                c, along, across = table.drifts[i]
                start = combine(y, dt, along, last[0])
                for j, weight in across:
                    start = field.diffuse(start, gs[j], area, weight)
                fs.append(field.drift(_at(t0, t1, c), start))
            if i < len(table.diffusions):
                c, along, across = table.diffusions[i]
                start = combine(combine(y, dt, along, last[0]), root, across, last[1])
                gs.append(field.diffusion(_at(t0, t1, c), start))
        integrals = dw.w, tree_map(_double(root), dw.w), area, tree_map(_triple(root), dw.w)
        return _SRIStep(table, field, y, dt, integrals, fs, gs)


def _mean(w: Tensor, h: Tensor) -> Tensor:
    """I10 / h, the mean of the path over the step."""
    return h.add(w, alpha=0.5)


def _double(root: Scalar) -> Callable[[Tensor], Tensor]:
    """I11 / sqrt(h)."""
    return lambda w: w * w * (0.5 / expand(nonzero(root), w)) - 0.5 * expand(root, w)


def _triple(root: Scalar) -> Callable[[Tensor], Tensor]:
    """I111 / h."""
    return lambda w: w * (w * w * (1.0 / 6.0 / expand(nonzero(root * root), w)) - 0.5)


class _SRIStep(StraightStep):
    __slots__ = ("_dt", "_field", "_fs", "_gs", "_integrals", "_table")

    def __init__(
        self, table: SRITableau, field: Field, y0: State, dt: Scalar, integrals: tuple[State, ...],
        fs: list[State], gs: list[State],
    ) -> None:  # fmt: skip
        y1 = combine(y0, dt, table.weights, fs)
        for weights, integral in zip(table.integrals, integrals, strict=True):
            y1 = field.diffuse(y1, weigh(1.0, weights, gs), integral)
        super().__init__(y0, y1)
        self._table, self._field, self._dt = table, field, dt
        self._integrals, self._fs, self._gs = integrals, fs, gs

    def error(self) -> State:
        total = weigh(self._dt, self._table.error, self._fs)
        for n in (2, 3):
            weighed = weigh(1.0, self._table.integrals[n], self._gs)
            total = self._field.diffuse(total, weighed, self._integrals[n])
        return total


@dataclass(frozen=True)
class SRIW1(SRI):
    """Strong order 1.5 in two evaluations of f and four of g. Ito.

    Source: Roessler 2010, table 6.3.
    """

    tableau = SRITableau(
        c0=(0, 3 / 4),
        a0=((3 / 4,),),
        b0=((3 / 2,),),
        c1=(0, 1 / 4, 1, 1 / 4),
        a1=((1 / 4,), (1,), (1 / 4,)),
        b1=((1 / 2,), (-1, 0), (-5, 3, 1 / 2)),
        alpha=(1 / 3, 2 / 3),
        beta=(
            (-1, 4 / 3, 2 / 3, 0),
            (-1, 4 / 3, -1 / 3, 0),
            (2, -4 / 3, -2 / 3, 0),
            (-2, 5 / 3, -2 / 3, 1),
        ),
    )


@dataclass(frozen=True)
class SRI2(SRI):
    """Strong order 1.5, order 3 where there is no noise: three evaluations of f, four of g. Ito.

    Source: Roessler 2010, table 6.2.
    """

    tableau = SRITableau(
        c0=(0, 1, 1 / 2),
        a0=((1,), (1 / 4, 1 / 4)),
        b0=((0,), (1, 1 / 2)),
        c1=(0, 1 / 4, 1, 1 / 4),
        a1=((1 / 4,), (1,), (0, 0, 1 / 4)),
        b1=((-1 / 2,), (1, 0), (2, -1, 1 / 2)),
        alpha=(1 / 6, 1 / 6, 2 / 3),
        beta=(
            (-1, 4 / 3, 2 / 3, 0),
            (1, -4 / 3, 1 / 3, 0),
            (2, -4 / 3, -2 / 3, 0),
            (-2, 5 / 3, -2 / 3, 1),
        ),
    )


# --- additive noise -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SRATableau:
    """Of a method for additive noise, checked at birth.

        f_i = f(t0 + c_i dt, y0 + dt sum_j a_ij f_j + g0 (w_i dW + h_i H))
        y1 = y0 + dt sum_i b_i f_i + g0 (dW/2 + H) + g1 (dW/2 - H),    g0, g1 = g(t0), g(t1)

    The last two terms are the integral of a g that is linear over the step.

    Args:
        c: nodes.
        a: rows of the second stage and after.
        b: weights.
        w, h: what each stage takes of the path.
        order: strong, 1 or 1.5.

    Raises:
        ValueError: if rows do not sum to c (but for a first stage that stands in the middle), or
            the weights miss sum b = 1, sum b w = 1/2, sum b h = 1 or, of order 1.5, sum b c = 1/2
            and sum b (w^2 + h^2 / 12) = 1/2.

    Source: Roessler 2010, theorem 6.1; Foster, dos Reis and Strange 2023, arXiv 2210.17543.
    """

    c: Row
    a: Rows
    b: Row
    w: Row
    h: Row
    order: float
    stages: tuple[tuple[float, Weights, Weights], ...] = field(init=False)
    weights: Weights = field(init=False)
    error: Weights = field(init=False)

    def __post_init__(self) -> None:
        for c, row in zip(self.c[1:], self.a, strict=True):
            demand(math.fsum(row), c, "a row does not sum to its node")
        demand(math.fsum(self.b), 1.0, "the weights do not sum to one")
        demand(_dot(self.b, self.w), 0.5, "the stages miss the mean of the path in dW")
        demand(_dot(self.b, self.h), 1.0, "the stages miss the mean of the path in H")
        if self.order > 1.0:
            demand(_dot(self.b, self.c), 0.5, "the weights miss the middle of the step")
            square = _dot(self.b, self.w, self.w) + _dot(self.b, self.h, self.h) / 12
            demand(square, 0.5, "the stages miss the mean square of the path")
        rows = zip(self.c, ((), *self.a), self.w, self.h, strict=True)
        stages = tuple((c, sparse(row), sparse((w, h))) for c, row, w, h in rows)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "weights", sparse(self.b))
        object.__setattr__(self, "error", sparse((self.b[0] - 1.0, *self.b[1:])))


class SRA(Stochastic):
    """Any stochastic Runge-Kutta method for additive noise. A subclass is its tableau.

    Diagonal, scalar and general noise, one evaluation of g a step: that of its end serves the next
    one's start. The error estimate of methods of order 1.5 is the distance from Euler's step.
    """

    calculus = "ito"
    levy = "H"

    @property
    @abstractmethod
    def tableau(self) -> SRATableau:
        """Its coefficients."""

    def strong_order(self, noise: Noise) -> float | None:
        return self.tableau.order if noise.additive else None

    def weak_order(self, noise: Noise) -> float:
        return 2.0 if self.tableau.order > 1.0 else 1.0

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return field.diffusion(t, y)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        table, dt, g0 = self.tableau, t1 - t0, carry
        moves = field.product(g0, dw.w), field.product(g0, dw.h)
        fs: list[State] = []
        for c, row, shift in table.stages:
            stage = combine(combine(y, dt, row, tuple(fs)), 1.0, shift, moves)
            fs.append(field.drift(_at(t0, t1, c), stage))
        g1 = field.diffusion(t1, y)
        rest = field.product(g1, tree_map(lambda w, h: 0.5 * w - h, dw.w, dw.h))
        return _SRAStep(table, y, dt, fs, (*moves, rest), g1)


class _SRAStep(StraightStep):
    __slots__ = ("_dt", "_fs", "_moves", "_table")

    def __init__(
        self, table: SRATableau, y0: State, dt: Scalar, fs: list[State], moves: tuple[State, ...],
        carry: Carry,
    ) -> None:  # fmt: skip
        drifted = combine(y0, dt, table.weights, fs)
        super().__init__(y0, combine(drifted, 1.0, ((0, 0.5), (1, 1.0), (2, 1.0)), moves), carry)
        self._table, self._dt, self._fs, self._moves = table, dt, fs, moves

    def error(self) -> State:
        if not self._table.error:
            return super().error()
        drift = weigh(self._dt, self._table.error, self._fs)
        return combine(drift, 1.0, ((0, -0.5), (1, 1.0), (2, 1.0)), self._moves)


@dataclass(frozen=True)
class SEA(SRA):
    """Euler's step from the mean of the path: the shifted Euler method for additive noise.

    Strong order 1, one evaluation of f, and no error estimate.

    Source: Foster, dos Reis and Strange 2023, arXiv 2210.17543.
    """

    tableau = SRATableau(c=(1 / 2,), a=(), b=(1,), w=(1 / 2,), h=(1,), order=1.0)


@dataclass(frozen=True)
class ShARK(SRA):
    """The shifted Runge-Kutta method for additive noise: strong order 1.5, two evaluations of f.

    Source: Foster, dos Reis and Strange 2023, arXiv 2210.17543.
    """

    tableau = SRATableau(
        c=(0, 5 / 6), a=((5 / 6,),), b=(2 / 5, 3 / 5), w=(0, 5 / 6), h=(1, 1), order=1.5
    )
    error_order = 1.5


@dataclass(frozen=True)
class SRA1(SRA):
    """Strong order 1.5 for additive noise, two evaluations of f.

    Source: Roessler 2010; with H, Foster, dos Reis and Strange 2023, arXiv 2210.17543.
    """

    tableau = SRATableau(
        c=(0, 3 / 4), a=((3 / 4,),), b=(1 / 3, 2 / 3), w=(0, 3 / 4), h=(0, 3 / 2), order=1.5
    )
    error_order = 1.5


@dataclass(frozen=True)
class SRA3(SRA):
    """Strong order 1.5 for additive noise, order 3 where there is none: three evaluations of f.

    Source: Roessler 2010.
    """

    tableau = SRATableau(
        c=(0, 1, 1 / 2), a=((1,), (1 / 4, 1 / 4)), b=(1 / 6, 1 / 6, 2 / 3), w=(0, 0, 3 / 4),
        h=(0, 0, 3 / 2), order=1.5,
    )  # fmt: skip
    error_order = 1.5


# --- commutative noise ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SlowRK(Stochastic):
    """Runge's and Kutta's steps along the noise between those of the drift. Stratonovich.

        k = RK4 of g dW from u = y0 + f0 dt/2, at t0 + dt/2
        y1 = y0 + (f0 + 2 f(t0 + 3/4 dt, v)) dt/3 + (k1 + 2 k2 + 2 k3 + k4) dW/6 + 2 (g0 - k1) H
        v = y0 + 3/4 f0 dt + k2 (3/4 dW + 3/2 H)

    Strong order 1.5 and weak order 2 for commutative noise (diagonal, scalar, additive), else 1/2
    and 1; two evaluations of f and five of g. The error estimate is the distance from the method
    with f0 for the drift and without H.

    Source: Foster, dos Reis and Strange 2023, arXiv 2210.17543.
    """

    calculus = "stratonovich"
    levy = "H"
    error_order = 1.5

    def strong_order(self, noise: Noise) -> float:
        return 1.5 if noise.commutes else 0.5

    def weak_order(self, noise: Noise) -> float:
        return 2.0 if noise.commutes else 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        dt, w, half = t1 - t0, dw.w, _at(t0, t1, 0.5)
        f0, g0 = field.drift(t0, y), field.diffusion(t0, y)
        u = combine(y, dt, ((0, 0.5),), [f0])
        ks = [field.diffusion(half, u)]
        for weight in (0.5, 0.5, 1.0):
            ks.append(field.diffusion(half, field.diffuse(u, ks[-1], w, weight)))
        shift = tree_map(lambda a, b: 0.75 * a + 1.5 * b, w, dw.h)
        v = field.diffuse(combine(y, dt, ((0, 0.75),), [f0]), ks[1], shift)
        f1 = field.drift(_at(t0, t1, 0.75), v)
        rest = weigh(dt, ((0, -2 / 3), (1, 2 / 3)), [f0, f1])
        rest = field.diffuse(rest, tree_map(lambda a, b: a - b, g0, ks[0]), dw.h, 2.0)
        mean = weigh(1.0, ((0, 1 / 6), (1, 1 / 3), (2, 1 / 3), (3, 1 / 6)), ks)
        return _RestStep(y, field.diffuse(combine(y, dt, ((0, 1.0),), [f0]), mean, w), rest)


class _RestStep(StraightStep):
    """A step of two parts: y1 = lower + rest, where the rest is the error estimate."""

    __slots__ = ("_rest",)

    def __init__(self, y0: State, lower: State, rest: State) -> None:
        super().__init__(y0, tree_map(lambda a, b: a + b, lower, rest))
        self._rest = rest

    def error(self) -> State:
        return self._rest
