"""Diagonally implicit Runge-Kutta methods, and their additive pairs: one tableau each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._increment import Increment
from .._scalar import Scalar, still, whole
from .._state import State, Weights, combine, describe, leaves, transformed, tree_map, weigh
from ..dynamics.base import Dynamics
from ..dynamics.field import MIXED, Field
from ..stepping import Adaptive, Stepping
from .base import Carry, Integrator, Step
from .interpolation import Interpolation, hermite, polynomial
from .linear import Dense, Linearization, LinearSolver, Rows
from .newton import Equations, Implicit, Newton, PerRow, count_rows
from .runge_kutta import Row, demand, sparse

__all__ = [
    "ImplicitEuler", "ImplicitRK", "ImplicitTableau", "KenCarp3", "KenCarp4", "KenCarp5",
    "Kvaerno3", "Kvaerno4", "Kvaerno5", "Trapezoid",
]  # fmt: skip


@dataclass(frozen=True)
class ImplicitTableau:
    """A diagonally implicit Butcher tableau with an explicit first stage, checked at birth.

        k_i = g(t0 + c_i dt, Y_i),      Y_i = r_i + dt gamma k_i
        r_i = y0 + dt sum_{j<i} (a_ij k_j + e_ij l_j),      l_i = f(t0 + c_i dt, Y_i)
        y1 = y0 + dt sum_i b_i (k_i + l_i)

    with f and its rows e in an additive (IMEX) pair alone. Pairs share c, b and b_low.

    Args:
        c: nodes, c_0 = 0.
        a: rows below the diagonal, the first of length 1.
        gamma: the diagonal after the first stage.
        b: weights. Where the last stage of a method without a partner ends on them, its slope is
            the next step's first; the engine sees that for itself.
        order: of ``b``.
        b_low: weights of the embedded method.
        order_low: its order.
        explicit: the rows e of the partner, or None.
        dense: for each stage the polynomial b_i(theta) = sum_n dense[i][n] theta^(n+1), or None
            for cubic Hermite interpolation.
        dense_order: of those polynomials.

    Raises:
        ValueError: if rows do not sum to c, weights not to one, or the weights miss a quadrature
            condition sum_i b_i c_i^(q-1) = 1/q of their order or, from order three on, the
            condition sum_ij b_i a_ij c_j = 1/6 of either tableau.
    """

    c: Row
    a: tuple[Row, ...]
    gamma: float
    b: Row
    order: int
    b_low: Row
    order_low: int
    explicit: tuple[Row, ...] | None = None
    dense: tuple[Row, ...] | None = None
    dense_order: int = 3
    rows: tuple[Weights, ...] = field(init=False)
    partner: tuple[Weights, ...] = field(init=False)
    weights: Weights = field(init=False)
    error: Weights = field(init=False)
    near: tuple[int, ...] = field(init=False)
    fsal: bool = field(init=False)

    def __post_init__(self) -> None:
        stages, full = len(self.b), [(*row, self.gamma) for row in self.a]
        if self.c[0] != 0 or [len(row) for row in self.a] != list(range(1, stages)):
            raise ValueError(f"{stages} weights need nodes from 0, and rows of 1..{stages - 1}")
        for rows in (full, self.explicit):
            if rows is not None:
                self._check_rows(rows)
        for b, order in ((self.b, self.order), (self.b_low, self.order_low)):
            for q in range(1, order + 1):
                moment = math.fsum(w * c ** (q - 1) for w, c in zip(b, self.c, strict=True))
                demand(moment, 1 / q, f"the weights miss the quadrature condition of order {q}")
        if self.dense is not None:
            for w, powers in zip(self.b, self.dense, strict=True):
                demand(sum(powers), w, "a dense weight does not end at its b")
        error = [b - low for b, low in zip(self.b, self.b_low, strict=True)]
        near = [
            min(range(i), key=partial(self._gap, c))
            for i, c in enumerate(self.c) if i
        ]  # fmt: skip
        object.__setattr__(self, "rows", tuple(sparse(row) for row in self.a))
        object.__setattr__(self, "partner", tuple(sparse(row) for row in self.explicit or ()))
        object.__setattr__(self, "weights", sparse(self.b))
        object.__setattr__(self, "error", sparse(error))
        object.__setattr__(self, "near", tuple(near))
        object.__setattr__(self, "fsal", self.explicit is None and full[-1] == self.b)

    def _gap(self, c: float, j: int) -> tuple[float, int]:
        """How far node j lies from c; of equal ones the latest is nearest."""
        return abs(self.c[j] - c), -j

    def _check_rows(self, rows: Any) -> None:
        for c, row in zip(self.c[1:], rows, strict=True):
            demand(sum(row), c, "a row does not sum to its node")
        if self.order >= 3:
            nodes = [sum(a * c for a, c in zip(row, self.c, strict=False)) for row in rows]
            moment = math.fsum(b * node for b, node in zip(self.b[1:], nodes, strict=True))
            demand(moment, 1 / 6, "the weights miss the coupling condition of order 3")


@dataclass(frozen=True)
class ImplicitRK(Implicit):
    """Any diagonally implicit method with an explicit first stage. A subclass is its tableau.

    Each stage is solved for its slope by simplified Newton iteration, every sample by itself: the
    Jacobian is that of the step's start, made once a state, and (I - dt gamma J) is factored once
    a step. It has converged where a correction of the state is expected to leave less than a
    hundredth of the tolerance of ``Adaptive``, in its norm; on given steps, eps^0.8 of abs(y) and
    of 1, or of the sample's largest component where that is less, and what is rounding anyway.
    Samples that do not converge within ``newton`` corrections get NaN for their step: an adaptive
    solve rejects it and takes a shorter one. Given steps cannot be shortened: there the Jacobian
    is made anew for each correction after the third, and a failed solve ends NON_FINITE.

    A state whose leaves share their leading size, one of them with two axes or more, is batch
    first; any other is one sample (but for times of each row's own), and so is the whole batch
    where the field is found, at the start, to mix its samples. One host read a correction, one at
    the start. ``Kvaerno4`` and ``Kvaerno5`` look beyond t1, by at most a quarter of the step, and
    so take no ``jump_at``; the others do not.

    Gradients are exact for the discrete solve, by the implicit function theorem: recording costs
    one more evaluation a stage, the backward pass one Jacobian at its solution and one transposed
    solve. They cannot be differentiated again: that raises. Under ``torch.no_grad()`` neither is
    paid. ``Compiled`` takes steps by ``Dense()``, iterations and all, as loops in its graph, and
    makes the Jacobian anew after a rejected step; where gradients are recorded, a second graph
    makes those at the solutions.

    Args:
        newton: corrections allowed for each stage.
        linear: ``Dense()``, or ``GMRES()`` for many components.

    Raises:
        ValueError: on newton < 1.
        TypeError: on complex or half-precision states; in ``torch.inference_mode()``, within
            ``torch.func``'s transformations and under forward-mode differentiation; on per-sample
            times where the field mixes samples.

    Source: Hairer and Wanner 1996, "Solving ordinary differential equations II", IV.8.
    """

    newton: int = 10
    linear: LinearSolver = Dense()
    stepping: Adaptive | None = field(default=None, repr=False, compare=False)
    cure = "take smaller steps, allow Newton's iteration more corrections (newton=30)"
    tableau: ClassVar[ImplicitTableau]

    def __init_subclass__(cls) -> None:
        tableau = cls.tableau
        cls.order = tableau.order
        cls.error_order = min(tableau.order, tableau.order_low) + 1
        cls.dense_order = min(tableau.order, 3)
        if tableau.dense is not None:
            cls.dense_order = tableau.dense_order

    def __post_init__(self) -> None:
        if not whole(self.newton, 1):
            raise ValueError(f"newton is a whole number of corrections >= 1; got {self.newton}")
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(f"linear is Dense() or GMRES(); got {self.linear!r}")

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if self.tableau.explicit is not None and dynamics.parts() is None:
            raise TypeError(
                f"{type(self).__name__} needs dynamics in two parts; got "
                f"{type(dynamics).__name__}. Give ODE(f, implicit=g) or ODE(f, linear=...), or use "
                "Kvaerno5()"
            )

    def check_graph(self) -> None:
        if not isinstance(self.linear, Dense):
            raise TypeError(
                f"one graph does not hold {type(self.linear).__name__}'s products: give "
                f"{type(self).__name__}(linear=Dense()), or use executor=Eager()"
            )

    def bind(self, stepping: Stepping) -> Integrator:
        if not isinstance(stepping, Adaptive):
            return replace(self, stepping=None)
        if stepping.jump_at and max(self.tableau.c) > 1.0:
            raise TypeError(
                f"{type(self).__name__} asks for times beyond the end of a step, and so beyond a "
                "jump: use Kvaerno3(), or solve up to the jump and on from there"
            )
        return replace(self, stepping=stepping)

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        _check_state(type(self).__name__, y)
        at = self.linearize(field, t, y)
        if at.mixes():
            if isinstance(t, Tensor) and t.ndim:
                raise TypeError(MIXED)
            field.mixes = True
        else:
            field.once(t, y, lambda: at)
        return self._start(field, t, y)

    def slope(self, carry: Carry) -> State:
        k, *partner = carry
        return tree_map(torch.add, k, partner[0]) if partner else k

    @property
    def equations(self) -> Equations:
        return self

    @property
    def gamma(self) -> float:
        return self.tableau.gamma

    def through(
        self, newton: Newton, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None,
        carry: Carry,
    ) -> Step:  # fmt: skip
        tableau, dt = self.tableau, t1 - t0
        first, *partner = self._start(field, t0, y) if carry is None else carry
        ks, ls = [first], [*partner]  # slopes of the stages, and of the explicit partner
        past = newton.past
        for i, c in enumerate(tableau.c[1:]):
            t = t1 if c == 1.0 else t0 + c * dt
            start = combine(y, dt, tableau.rows[i], ks)
            if ls:
                start = combine(start, dt, tableau.partner[i], ls)
            k, past = newton.solve(t, start, ks[tableau.near[i]], past)
            ks.append(k)
            if ls:
                stage = combine(start, dt * tableau.gamma, ((0, 1.0),), [ks[-1]])
                ls.append(field.explicit(t, stage))
        solutions = ks[1:]
        if ls:
            ks = [tree_map(torch.add, k, l) for k, l in zip(ks, ls, strict=True)]
        step = _ImplicitStep(self, t0, t1, y, ks, past.lost)
        others = len(tableau.partner) + (1 + len(partner) if carry is None else 0)
        return self.told(step, solutions, past, others)

    def _start(self, field: Field, t: Scalar, y: State) -> Carry:
        """The slopes of the first stage."""
        if self.tableau.explicit is None:
            return (field.drift(t, y),)
        return field.implicit(t, y), field.explicit(t, y)

    def stiff(self, field: Field) -> Callable[[Scalar, State], State]:
        """What is solved for: the whole drift, or the implicit part of a pair."""
        return field.drift if self.tableau.explicit is None else field.implicit

    def linearize(self, field: Field, t: Scalar, y: State) -> Linearization:
        """The Jacobian of what is solved for at y, off the record."""
        rows = Rows(y, count_rows(field, t, y))
        return Linearization.of(partial(self.stiff(field), still(t)), y, rows, field.count)


def _check_state(name: str, y: State) -> None:
    if any(leaf.dtype not in (torch.float32, torch.float64) for leaf in leaves(y)):
        raise TypeError(
            f"{name} takes real states of single or double precision; got {describe(y)}. Give the "
            "real and imaginary parts of a complex state (torch.view_as_real), y0.float() for half "
            "precision"
        )
    if transformed():
        raise TypeError(
            f"{name} takes gradients of its own, which torch.func does not see: use "
            "torch.autograd.grad, or an explicit integrator"
        )
    if torch.is_inference_mode_enabled() or any(leaf.is_inference() for leaf in leaves(y)):
        raise TypeError(
            f"{name} needs autograd: use torch.no_grad(), not inference_mode(), and clone() what "
            "was made under that"
        )


class _ImplicitStep(Step):
    __slots__ = ("_ks", "_lost", "_method", "_t0", "_t1", "_y0")

    def __init__(
        self, method: ImplicitRK, t0: Scalar, t1: Scalar, y0: State, ks: list[State], lost: PerRow
    ) -> None:
        tableau = method.tableau
        y1 = combine(y0, t1 - t0, tableau.weights, ks)
        super().__init__(y1, (ks[-1],) if tableau.fsal else None)
        self._method, self._t0, self._t1, self._y0, self._ks = method, t0, t1, y0, ks
        self._lost = lost

    def fault(self, row: int | None) -> str:
        own = self._lost if row is None or len(self._lost) == 1 else self._lost[row]
        if bool(own.any()):
            return "Newton's iteration finds no solution of the step"
        return super().fault(row)

    def error(self) -> State:
        return weigh(self._t1 - self._t0, self._method.tableau.error, self._ks)

    def interpolation(self) -> Interpolation:
        dense, dt = self._method.tableau.dense, self._t1 - self._t0
        if dense is not None:
            return polynomial(self._y0, self._ks, dense, dt)
        return hermite(self._y0, self.y1, self._ks[0], self._ks[-1], dt)


@dataclass(frozen=True)
class ImplicitEuler(ImplicitRK):
    """y1 = y0 + dt f(t1, y1). Order 1, L-stable; its error is measured against ``Trapezoid``."""

    tableau = ImplicitTableau(
        c=(0, 1), a=((0,),), gamma=1, b=(0, 1), order=1, b_low=(1 / 2, 1 / 2), order_low=2
    )


@dataclass(frozen=True)
class Trapezoid(ImplicitRK):
    """The mean of the slopes at both ends. Order 2(1), A-stable, does not damp stiff parts."""

    tableau = ImplicitTableau(
        c=(0, 1), a=((1 / 2,),), gamma=1 / 2, b=(1 / 2, 1 / 2), order=2, b_low=(0, 1), order_low=1
    )


def _kvaerno3(g: float) -> ImplicitTableau:
    """The family in its diagonal; L-stable where g^3 - 3 g^2 + 3/2 g - 1/6 = 0."""
    low = ((6 * g - 4 * g * g - 1) / (4 * g), (1 - 2 * g) / (4 * g))
    high = (
        (6 * g - 1) / (12 * g), 1 / (12 * g * (1 - 2 * g)),
        (6 * g * g - 6 * g + 1) / (3 * (1 - 2 * g)),
    )  # fmt: skip
    return ImplicitTableau(
        c=(0, 2 * g, 1, 1), a=((g,), low, high), gamma=g, b=(*high, g), order=3,
        b_low=(*low, g, 0), order_low=2,
    )  # fmt: skip


def _kvaerno4(g: float) -> ImplicitTableau:
    """The family in its diagonal; L-stable where g^4 - 4 g^3 + 3 g^2 - 2/3 g + 1/24 = 0."""
    p, q, r = 12 * g * g - 6 * g + 1, 12 * g * g - 9 * g + 2, 3 * g - 1
    third = (
        g * (144 * g**4 - 180 * g**3 + 81 * g * g - 15 * g + 1) / p**2,
        g * (-36 * g**3 + 39 * g * g - 15 * g + 2) / p**2,
    )
    low = (
        (-144 * g**5 + 396 * g**4 - 330 * g**3 + 117 * g * g - 18 * g + 1) / (12 * g * g * q),
        (72 * g**4 - 126 * g**3 + 69 * g * g - 15 * g + 1) / (12 * g * g * r),
        (-6 * g * g + 6 * g - 1) * p**2 / (12 * g * g * q * r),
    )
    high = (
        (288 * g**4 - 312 * g**3 + 120 * g * g - 18 * g + 1) / (48 * g * g * q),
        (24 * g * g - 12 * g + 1) / (48 * g * g * r),
        -(p**3) / (48 * g * g * r * q * (6 * g * g - 6 * g + 1)),
        (-24 * g**3 + 36 * g * g - 12 * g + 1) / (24 * g * g - 24 * g + 4),
    )
    return ImplicitTableau(
        c=(0, 2 * g, g + sum(third), 1, 1), a=((g,), third, low, high), gamma=g, b=(*high, g),
        order=4, b_low=(*low, g, 0), order_low=3,
    )  # fmt: skip


@dataclass(frozen=True)
class Kvaerno3(ImplicitRK):
    """Order 3(2), L-stable, both weights stiffly accurate. Source: Kvaerno 2004."""

    tableau = _kvaerno3(0.4358665215084590)


@dataclass(frozen=True)
class Kvaerno4(ImplicitRK):
    """Order 4(3), L-stable, both weights stiffly accurate. Source: Kvaerno 2004."""

    tableau = _kvaerno4(0.5728160624821349)


@dataclass(frozen=True)
class Kvaerno5(ImplicitRK):
    """Order 5(4), L-stable, both weights stiffly accurate: the first choice for stiff systems.

    Source: Kvaerno 2004, "Singly diagonally implicit Runge-Kutta methods with an explicit first
    stage".
    """

    tableau = ImplicitTableau(
        c=(0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1, 1),
        a=(
            (0.26,),
            (0.13, 0.84033320996790809),
            (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
            (0.16648564323248321, 0.10450018841591720, 0.03631482272098715,
             -0.13090704451073998),
            (0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141,
             0.61943039072480676),
            (0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046,
             0.62993304899016403, 0.06962479448202728),
        ),
        gamma=0.26,
        b=(0.13659751177640291, 0, -0.05496908796538376, -0.04118626728321046,
           0.62993304899016403, 0.06962479448202728, 0.26),
        order=5,
        b_low=(0.13855640231268224, 0, -0.04245337201752043, 0.02446657898003141,
               0.61943039072480676, 0.26, 0),
        order_low=4,
    )  # fmt: skip


@dataclass(frozen=True)
class KenCarp3(ImplicitRK):
    """IMEX, order 3(2), its implicit part L-stable. Source: Kennedy and Carpenter 2003."""

    tableau = ImplicitTableau(
        c=(0, 1767732205903 / 2027836641118, 3 / 5, 1),
        a=(
            (1767732205903 / 4055673282236,),
            (2746238789719 / 10658868560708, -640167445237 / 6845629431997),
            (1471266399579 / 7840856788654, -4482444167858 / 7529755066697,
             11266239266428 / 11593286722821),
        ),
        explicit=(
            (1767732205903 / 2027836641118,),
            (5535828885825 / 10492691773637, 788022342437 / 10882634858940),
            (6485989280629 / 16251701735622, -4246266847089 / 9704473918619,
             10755448449292 / 10357097424841),
        ),
        gamma=1767732205903 / 4055673282236,
        b=(1471266399579 / 7840856788654, -4482444167858 / 7529755066697,
           11266239266428 / 11593286722821, 1767732205903 / 4055673282236),
        order=3,
        b_low=(2756255671327 / 12835298489170, -10771552573575 / 22201958757719,
               9247589265047 / 10645013368117, 2193209047091 / 5459859503100),
        order_low=2,
        dense=(
            (4655552711362 / 22874653954995, -215264564351 / 13552729205753),
            (-18682724506714 / 9892148508045, 17870216137069 / 13817060693119),
            (34259539580243 / 13192909600954, -28141676662227 / 17317692491321),
            (584795268549 / 6622622206610, 2508943948391 / 7218656332882),
        ),
        dense_order=2,
    )  # fmt: skip


@dataclass(frozen=True)
class KenCarp4(ImplicitRK):
    """IMEX, order 4(3), its implicit part L-stable. Source: Kennedy and Carpenter 2003."""

    tableau = ImplicitTableau(
        c=(0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1),
        a=(
            (1 / 4,),
            (8611 / 62500, -1743 / 31250),
            (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
            (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768,
             2285395 / 8070912),
            (82889 / 524892, 0, 15625 / 83664, 69875 / 102672, -2260 / 8211),
        ),
        explicit=(
            (1 / 2,),
            (13861 / 62500, 6889 / 62500),
            (-116923316275 / 2393684061468, -2731218467317 / 15368042101831,
             9408046702089 / 11113171139209),
            (-451086348788 / 2902428689909, -2682348792572 / 7519795681897,
             12662868775082 / 11960479115383, 3355817975965 / 11060851509271),
            (647845179188 / 3216320057751, 73281519250 / 8382639484533,
             552539513391 / 3454668386233, 3354512671639 / 8306763924573, 4040 / 17871),
        ),
        gamma=1 / 4,
        b=(82889 / 524892, 0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4),
        order=4,
        b_low=(4586570599 / 29645900160, 0, 178811875 / 945068544, 814220225 / 1159782912,
               -3700637 / 11593932, 61727 / 225920),
        order_low=3,
        dense=(
            (6943876665148 / 7220017795957, -54480133 / 30881146, 6818779379841 / 7100303317025),
            (0, 0, 0),
            (7640104374378 / 9702883013639, -11436875 / 14766696,
             2173542590792 / 12501825683035),
            (-20649996744609 / 7521556579894, 174696575 / 18121608,
             -31592104683404 / 5083833661969),
            (8854892464581 / 2390941311638, -12120380 / 966161, 61146701046299 / 7138195549469),
            (-11397109935349 / 6675773540249, 3843 / 706, -17219254887155 / 4939391667607),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class KenCarp5(ImplicitRK):
    """IMEX, order 5(4), its implicit part L-stable. Source: Kennedy and Carpenter 2003,
    "Additive Runge-Kutta schemes for convection-diffusion-reaction equations".
    """

    tableau = ImplicitTableau(
        c=(0, 41 / 100, 2935347310677 / 11292855782101, 1426016391358 / 7196633302097, 23 / 25,
           6 / 25, 3 / 5, 1),
        a=(
            (41 / 200,),
            (41 / 400, -567603406766 / 11931857230679),
            (683785636431 / 9252920307686, 0, -110385047103 / 1367015193373),
            (3016520224154 / 10081342136671, 0, 30586259806659 / 12414158314087,
             -22760509404356 / 11113319521817),
            (218866479029 / 1489978393911, 0, 638256894668 / 5436446318841,
             -1179710474555 / 5321154724896, -60928119172 / 8023461067671),
            (1020004230633 / 5715676835656, 0, 25762820946817 / 25263940353407,
             -2161375909145 / 9755907335909, -211217309593 / 5846859502534,
             -4269925059573 / 7827059040719),
            (-872700587467 / 9133579230613, 0, 0, 22348218063261 / 9555858737531,
             -1143369518992 / 8141816002931, -39379526789629 / 19018526304540,
             32727382324388 / 42900044865799),
        ),
        explicit=(
            (41 / 100,),
            (367902744464 / 2072280473677, 677623207551 / 8224143866563),
            (1268023523408 / 10340822734521, 0, 1029933939417 / 13636558850479),
            (14463281900351 / 6315353703477, 0, 66114435211212 / 5879490589093,
             -54053170152839 / 4284798021562),
            (14090043504691 / 34967701212078, 0, 15191511035443 / 11219624916014,
             -18461159152457 / 12425892160975, -281667163811 / 9011619295870),
            (19230459214898 / 13134317526959, 0, 21275331358303 / 2942455364971,
             -38145345988419 / 4862620318723, -1 / 8, -1 / 8),
            (-19977161125411 / 11928030595625, 0, -40795976796054 / 6384907823539,
             177454434618887 / 12078138498510, 782672205425 / 8267701900261,
             -69563011059811 / 9646580694205, 7356628210526 / 4942186776405),
        ),
        gamma=41 / 200,
        b=(-872700587467 / 9133579230613, 0, 0, 22348218063261 / 9555858737531,
           -1143369518992 / 8141816002931, -39379526789629 / 19018526304540,
           32727382324388 / 42900044865799, 41 / 200),
        order=5,
        b_low=(-975461918565 / 9796059967033, 0, 0, 78070527104295 / 32432590147079,
               -548382580838 / 3424219808633, -33438840321285 / 15594753105479,
               3629800801594 / 4656183773603, 4035322873751 / 18575991585200),
        order_low=4,
        dense=(
            (-17674230611817 / 10670229744614, 43486358583215 / 12773830924787,
             -9257016797708 / 5021505065439),
            (0, 0, 0),
            (0, 0, 0),
            (65168852399939 / 7868540260826, -91478233927265 / 11067650958493,
             26096422576131 / 11239449250142),
            (15494834004392 / 5936557850923, -79368583304911 / 10890268929626,
             92396832856987 / 20362823103730),
            (-99329723586156 / 26959484932159, -12239297817655 / 9152339842473,
             30029262896817 / 10175596800299),
            (-19024464361622 / 5461577185407, 115839755401235 / 10719374521269,
             -26136350496073 / 3983972220547),
            (-6511271360970 / 6095937251113, 5843115559534 / 2180450260947,
             -5289405421727 / 3760307252460),
        ),
    )  # fmt: skip
