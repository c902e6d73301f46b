"""The exponential engine: methods for semi-linear dynamics.

Diffusion's fast samplers are its coefficient choices; no schedule enters here, only a
``SemiLinear``.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar, expand, expm1, isfinite, magnitude, nonzero, phi1, sqrt, where
from .._state import State, tree_map
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.discrete import Chain
from ..dynamics.field import Field
from .base import Carry, Integrator, Step

__all__ = [
    "Exponential", "ExponentialAdams", "ExponentialEuler", "Multistep", "Polynomial", "Singlestep",
    "phi",
]  # fmt: skip

Weights = Callable[[Scalar], Sequence[Scalar]]
History = tuple[tuple[Scalar, State], ...]
NODES: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}


def check_split(integrator: Integrator, dynamics: Dynamics) -> None:
    """Raises TypeError, with the cure, on dynamics whose linear part is not known."""
    if isinstance(dynamics, Chain) or dynamics.split() is None:
        raise TypeError(
            f"{type(integrator).__name__} needs dynamics with a split; got "
            f"{type(dynamics).__name__}. Use Heun() or Tsit5(), or give ODE(f, linear=...) or "
            "LinearSDE(schedule).probability_flow(denoiser)"
        )
    noise = dynamics.noise
    if noise is not None and not (noise.ito or noise.additive):
        raise TypeError(
            f"{type(integrator).__name__} reads dW as Ito does; got a Stratonovich SDE. Use "
            "StochasticHeun(), or add half of g dg/dy to f and leave out stratonovich=True"
        )


def check_clock(integrator: Integrator, split: SemiLinear, t: Scalar) -> None:
    """Raises ValueError, with the cure, on a start where the form of the split is singular."""
    clock = split.clock(t)
    if not isinstance(clock, float) or math.isfinite(clock):
        return
    name = type(integrator).__name__
    if clock > 0:
        raise ValueError(
            f"{name} starts at t = {t}, where there is no noise and the clock is infinite: to "
            "sample, start where the noise is and end at a small time, t0=1.0, t1=1e-3; from data "
            "to noise, start at a small time such as 1e-3"
        )
    if split.dual is split:
        raise ValueError(
            f"{name} predicts noise, and starts at t = {t}, where there is no signal to tell from "
            "it: start at a slightly smaller time (such as 0.999), or use DPMSolverPP()"
        )


def phi(z: Scalar, last: int = 3) -> tuple[Scalar, ...]:
    """phi_2 to phi_last, where phi_(k+1) = (phi_k - 1/k!) / z and phi_0 = e^z.

    Taylor series for |z| < 1 and recurrences beyond, to 1e-14.
    """
    near = magnitude(z) < 1.0
    small, large = where(near, z, 0.0 * z), where(near, 1.0 + 0.0 * z, z)
    series: Scalar = 0.0 * small
    for n in range(16 + last, last - 1, -1):
        series = series * small + 1.0 / math.factorial(n)
    low, high = [series], [(expm1(large) / large - 1.0) / large]
    for k in range(2, last):
        high.append((high[-1] - 1.0 / math.factorial(k)) / large)
        low.insert(0, 1.0 / math.factorial(last + 1 - k) + small * low[0])
    return tuple(where(near, a, b) for a, b in zip(low, high, strict=True))


def between(split: SemiLinear, t0: Scalar, t1: Scalar, part: float) -> Scalar:
    """The time at which this part of the clock has run; t0 where it runs for ever."""
    s0, s1 = split.clock(t0), split.clock(t1)
    sound = isfinite(s1 - s0)
    s = where(sound, s0 + part * where(sound, s1 - s0, 0.0), 0.0 * t1)
    return where(sound, t1 if part == 1.0 else split.time(s), t0)


class Exponential(Integrator):
    """x1 = A x0 + B r0 + sum_j w_j (r_j - r0) + noise: A and B exact for a residual that stands
    still, w_j for one that bends; subclasses say which r_j, and how it bends.

    Attributes:
        dual: whether the residual is that of the split's ``dual``: the noise, on a noised state.
    """

    dual: bool = False

    def check(self, dynamics: Dynamics) -> None:
        check_split(self, dynamics)

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return None if dynamics.noise is None else Draws(dynamics.noise.shapes(y))

    def form(self, field: Field) -> SemiLinear:
        """The form of the split that is integrated."""
        assert field.split is not None
        return field.split.dual if self.dual else field.split

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        check_clock(self, self.form(field), t)
        return ()

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        residual, z = field.residual(t0, y, self.form(field)), None
        if dw is not None:
            z = self._normals(field, t0, t1, y, dw)
        return ExponentialStep(self, field, (t0, t1), y, residual, z, carry)

    def _normals(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment
    ) -> list[State]:
        """Standard normals, or g times them where the split asks for that; that of W is last."""
        root = sqrt(nonzero(magnitude(t1 - t0)))
        zs = [*(dw.z or ()), tree_map(lambda w: w / expand(root, w), dw.w)]
        assert field.split is not None
        return [field.noise_term(t0, y, z) for z in zs] if field.split.factored else zs

    @abstractmethod
    def move(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
        z: list[State] | None, carry: Carry,
    ) -> State:  # fmt: skip
        """The step's formula, for any end time."""

    def remember(self, t: Scalar, y: State, residual: State, carry: Carry) -> Carry:
        """What the next step starts from."""
        return carry


class ExponentialStep(Step):
    """A step by a formula of its end time."""

    __slots__ = ("_before", "_field", "_method", "_residual", "_span", "_y0", "_z")

    def __init__(
        self, method: Exponential, field: Field, span: tuple[Scalar, Scalar], y0: State,
        residual: State, z: list[State] | None, before: Carry,
    ) -> None:  # fmt: skip
        self._method, self._field, self._span, self._before = method, field, span, before
        self._y0, self._residual, self._z = y0, residual, z
        super().__init__(self._to(span[1]), method.remember(span[0], y0, residual, before))

    def _to(self, t: Scalar) -> State:
        return self._method.move(
            self._field, self._span[0], t, self._y0, self._residual, self._z, self._before
        )

    def dense(self, theta: Scalar) -> State:
        """The same formula with this end; methods of one step evaluate their stages again."""
        t0, t1 = self._span
        return self._to(t0 + theta * (t1 - t0))


@dataclass(frozen=True)
class ExponentialEuler(Exponential):
    """The residual of the step's start. Order 1; on a probability flow it is DDIM.

    On ``SDE(f, g, linear=rate)`` it is exact in law for a constant f and, with diagonal noise, a
    constant g: an Ornstein-Uhlenbeck process at any step. Else strong order 1/2, 1 for additive
    noise, and weak order 1.

    Source: Hochbruck and Ostermann 2010, "Exponential integrators".
    """

    order = 1
    dense_order = 1

    def move(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
        z: list[State] | None, carry: Carry,
    ) -> State:  # fmt: skip
        split = self.form(field)
        y1 = split.advance(t0, t1, y, residual)
        return y1 if z is None else split.stir(t0, t1, y1, z[-1])


# --- one step, several stages ---------------------------------------------------------------------


class Singlestep(Exponential):
    """Stages at given parts of the clock, each from the line through the start and the last one.

        u_i = A(c_i) x0 + B(c_i) r0 + (c_i / c_(i-1)) w(c_i) (r_(i-1) - r0),    r_i = r(u_i)

    and x1 as the stage at c = 1. The weight w of a slope is phi2 of rate h c, exact, or with one
    stage phi1 / 2. With noise, every stage has that of the path so far, whose pieces are exact in
    law. A step onto an infinite clock is of first order, for one evaluation.

    Attributes:
        nodes: c_1, c_2, ..., of the stages.
    """

    nodes: tuple[float, ...]

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        if dynamics.noise is None:
            return None
        shapes = dynamics.noise.shapes(y)
        return Draws(shapes, extra=(shapes,) * len(self.nodes) or None)

    def move(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
        z: list[State] | None, carry: Carry,
    ) -> State:  # fmt: skip
        return climb(self.form(field), field, t0, t1, y, residual, z, self.nodes)


def climb(
    split: SemiLinear, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
    z: list[State] | None, nodes: tuple[float, ...],
) -> State:  # fmt: skip
    """The formula of ``Singlestep``."""
    if isfinite(split.clock(t1) - split.clock(t0)) is False:
        nodes, z = (), z and z[-1:]
    slope = half if len(nodes) == 1 else exact
    change, noise, before, last = None, None, t0, 1.0
    for i, part in enumerate((*nodes, 1.0)):
        t = between(split, t0, t1, part) if i < len(nodes) else t1
        x = split.advance(t0, t, y, residual)
        if change is not None:
            x = split.bend(t0, t, x, _steeper(slope, part / last), [change])
        if z is not None:
            noise = tree_map(torch.zeros_like, x) if noise is None else noise
            noise = split.stir(before, t, split.decay(before, t, noise), z[i])
            x = tree_map(torch.add, x, noise)
        if i < len(nodes):
            found = field.residual(t, x, split)
            change = tree_map(torch.sub, found, residual)
            before, last = t, part
    return x


def exact(z: Scalar) -> Scalar:
    """phi2: the weight of a residual that grows from 0 to 1 over the step."""
    return phi(z, 2)[0]


def half(z: Scalar) -> Scalar:
    """phi1 / 2: the same as if it had its mean all the way, up to O(z)."""
    return 0.5 * phi1(z)


def _steeper(slope: Callable[[Scalar], Scalar], by: float) -> Weights:
    return lambda z: [by * slope(z)]


# --- several steps, one evaluation ----------------------------------------------------------------


class Polynomial(Exponential):
    """The residual continued as the polynomial through its last values. One evaluation a step.

    The polynomial is in the split's clock, in Newton's form: a value at an infinite clock drops
    out of it. Its weights, int_0^1 e^((1 - c) rate h) p(c) dc, are worked out for the times at
    hand, shared or per sample, so that the order holds on every grid. A step onto an infinite
    clock (no noise left, or no signal yet) is of first order.

    Attributes:
        values: how many values it goes through.
        start: the order of the first steps, until there are as many. With 1 each of them takes
            the values there are; with 2 or 3 they are single steps of that order.
        final: how many values the last step goes through at most; each step before it, one more.
    """

    values: int
    start: int
    final: int
    remembers = True
    _late: tuple[Scalar, ...] = ()  # where the last steps start, and the end

    def _settle(self, values: int) -> None:
        """Checks and takes the data of a subclass."""
        if not NODES.keys() >= {values, self.start, self.final}:
            raise ValueError(
                f"{type(self).__name__} goes through 1, 2 or 3 values, starts with steps of order "
                f"1, 2 or 3, and ends with 1, 2 or 3 values; got {values}, {self.start} and "
                f"{self.final}"
            )
        for name, value in (
            ("values", values), ("dense_order", values), ("static", self.final >= values)
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def along(self, times: Sequence[Scalar]) -> Integrator:
        if self.static:
            return self
        bound = copy.copy(self)
        object.__setattr__(bound, "_late", tuple(times[self.final - len(NODES) - 1 :]))
        return bound

    def limit(self, t0: Scalar) -> int:
        """How many values a step from t0 may go through, seen from the end of the solve."""
        if not self._late:
            return len(NODES)
        *late, end = self._late
        way = magnitude(end - t0)  # 0 in rows that never move
        ahead = [(magnitude(end - t) < way) | (way == 0) for t in late]
        return self.final + sum(bool(a.all()) if isinstance(a, Tensor) else a for a in ahead)

    def remember(self, t: Scalar, y: State, residual: State, carry: Carry) -> Carry:
        return ((t, residual), *carry)[: self.values - 1]

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        if self.start > 1 and dynamics.noise is not None:
            raise TypeError(
                f"single steps of order {self.start} draw more noise than the steps after them: "
                f"leave start=1 to {type(self).__name__} on an SDE"
            )
        return super().draws(dynamics, y)

    def move(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
        z: list[State] | None, carry: Carry,
    ) -> State:  # fmt: skip
        split, most = self.form(field), self.limit(t0)
        if len(carry) + 1 < min(self.start, self.values, most):
            return climb(split, field, t0, t1, y, residual, z, NODES[min(self.start, most)])
        y1 = self.through(split, t0, t1, y, residual, carry[: most - 1])
        return y1 if z is None else split.stir(t0, t1, y1, z[-1])

    def tilt(self, z: Scalar) -> Scalar:
        """The weight of a line's slope."""
        return exact(z)

    def through(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, y: State, residual: State, others: History
    ) -> State:
        """x at t1 with the polynomial through the residual at t0 and these others."""
        y1 = split.advance(t0, t1, y, residual)
        if not others:
            return y1
        weights = self.weights(split, t0, t1, [t for t, _ in others])
        changes = [tree_map(torch.sub, other, residual) for _, other in others]
        return split.bend(t0, t1, y1, weights, changes)

    def weights(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, times: Sequence[Scalar]
    ) -> Weights:
        """The weights of the values at these times, as functions of rate h."""
        s0 = split.clock(t0)
        h, nodes = split.clock(t1) - s0, [0.0 * t0, *(split.clock(t) - s0 for t in times)]
        h = where(isfinite(h), h, 0.0)
        factors = [math.factorial(m) * _power(h, m) for m in range(1, len(nodes))]
        polynomials = lagrange(nodes)[1:]

        def weights(z: Scalar) -> list[Scalar]:
            known = [self.tilt(z)] if len(nodes) == 2 else phi(z, len(nodes))
            parts = [f * p for f, p in zip(factors, known, strict=True)]
            return [
                sum((c * part for c, part in zip(p[1:], parts, strict=True)), start=0.0 * z)
                for p in polynomials
            ]

        return weights


def _power(h: Scalar, m: int) -> Scalar:
    return math.prod([h] * m, start=1.0)


def lagrange(nodes: Sequence[Scalar]) -> list[list[Scalar]]:
    """Coefficients, the constant first, of the polynomials that are 1 at one node and 0 at the
    others. The first node is 0. By divided differences, of which those over a node at infinity, or
    over two that meet, are none.
    """
    basis: list[Scalar] = [1.0]
    sums: list[list[Scalar]] = [[float(i == 0)] for i in range(len(nodes))]
    table: list[list[Scalar]] = [[1.0] for _ in nodes]  # of the values i, i + 1, ..., i + k
    for k in range(1, len(nodes)):
        gaps = [_inverse(nodes[i + k] - nodes[i]) for i in range(len(nodes) - k)]
        table = [
            [gap * (b - a) for a, b in zip([*row, 0.0], [0.0, *after], strict=True)]
            for gap, (row, after) in zip(gaps, itertools.pairwise(table), strict=True)
        ]
        last = nodes[k - 1]
        basis = [a - last * b for a, b in zip([0.0, *basis], [*basis, 0.0], strict=True)]
        weights = [*table[0], *[0.0] * (len(nodes) - k - 1)]
        sums = [
            [c + w * b for c, b in zip([*p, 0.0], basis, strict=True)]
            for p, w in zip(sums, weights, strict=True)
        ]
    return sums


def _inverse(gap: Scalar) -> Scalar:
    met = gap == 0
    return where(met, 0.0, 1.0 / where(met, 1.0, gap))


@dataclass(frozen=True)
class Multistep(Polynomial):
    """What ``ExponentialAdams``, ``DPMSolverPP`` and ``DEIS`` are given.

    Args:
        order: 1 to 3, for one evaluation a step.
        start: the order of the first steps. With 1, as published, each takes the residuals that
            there are, and order 3 is 2 in all; with 2 or 3 they are single steps of that order.
        final: the order of the last step at most; of each step before it, one more. With 1, as
            diffusers does where there are fewer than 15 steps, a coarse end is steadier; order 3
            is 2 in all.
    """

    order: int = 2
    start: int = 1
    final: int = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        self._settle(self.order)


@dataclass(frozen=True)
class ExponentialAdams(Multistep):
    """Exponential Adams-Bashforth, exact for the polynomial that it continues.

    On ``ODE(f, linear=rate)`` a cheap method for a stiff linear part. On a probability flow a
    sampler: with ``dual`` it is DEIS with polynomials in log(sigma / alpha), else DPM-Solver++ with
    exact weights.

    Args:
        order, start, final: see ``Multistep``.
        dual: whether to predict noise rather than data.

    Source: Hochbruck and Ostermann 2010, "Exponential integrators".
    """

    dual: bool = False
