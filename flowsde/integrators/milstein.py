"""Milstein's method, with derivatives of g and without."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .._increment import Increment
from .._scalar import Scalar, expand, magnitude, sqrt
from .._state import State, combine, contract, tree_map, weigh
from ..dynamics.base import Noise
from ..dynamics.field import Field
from .base import Carry, Step
from .stochastic import Stochastic, StraightStep, euler

__all__ = ["Milstein", "MilsteinRK"]

Slope = Callable[[State], State]


class _Milstein(Stochastic):
    """y1 = y0 + f dt + g dW + sum_k Dg_k[sum_l g_l J_lk], with J the products of dW."""

    calculus = "either"

    def strong_order(self, noise: Noise) -> float | None:
        return 1.0 if noise.additive or noise.commutative else None

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        assert field.noise is not None
        dt, noise = t1 - t0, field.noise
        f, g = field.drift(t0, y), field.diffusion(t0, y)
        y1 = euler(field, y, dt, dw.w, f, g)
        if noise.additive:
            return StraightStep(y, y1)
        slope, h = self._slope(field, t0, dt, y, g), magnitude(dt)
        if noise.kind == "general":
            return StraightStep(y, y1 + _general(slope, g, dw.w, h if noise.ito else None))
        products = tree_map(_square(h if noise.ito else 0.0), dw.w)
        bend = slope(field.product(g, products))
        return StraightStep(y, tree_map(lambda a, b: a + b, y1, bend))

    @abstractmethod
    def _slope(self, field: Field, t: Scalar, dt: Scalar, y: State, g: State) -> Slope:
        """v to Dg(t, y)[v]: for diagonal noise shaped as y, for general noise ``(*y.shape, m)``."""


def _square(h: Scalar) -> Callable[[Tensor], Tensor]:
    """w to (w^2 - h) / 2."""
    return lambda w: 0.5 * (w * w - expand(h, w))


def _general(slope: Slope, g: Tensor, w: Tensor, h: Scalar | None) -> Tensor:
    """1/2 sum_kl Dg_k[g_l] (w_l w_k - h if k = l): h is None for Stratonovich's products."""
    whole = 0.5 * contract(g, w)
    if h is None:
        return contract(slope(whole), w)
    total = 0.0 * whole
    for k in range(g.shape[-1]):
        column = g[..., k]
        weight = w[:, k].reshape((-1,) + (1,) * (column.ndim - 1))
        total = total + slope(weight * whole - 0.5 * expand(h, column) * column)[..., k]
    return total


@dataclass(frozen=True)
class Milstein(_Milstein):
    """Euler's step and the term of dW's products, by derivatives of g. Ito or Stratonovich.

        y1 = y0 + f dt + g dW + 1/2 sum_kl Dg_k[g_l] (dW_l dW_k - d_lk dt)

    and without the last dt for Stratonovich. Reads dW as the dynamics does. Strong and weak order
    1, for noise that commutes: diagonal (where g_i depends on y_i alone), scalar, additive, or
    declared commutative. Costs one Jacobian-vector product of g by forward differentiation; for
    general noise in the sense of Ito, m.

    Source: Milstein 1974; Kloeden and Platen 1992, section 10.3.
    """

    def _slope(self, field: Field, t: Scalar, dt: Scalar, y: State, g: State) -> Slope:
        return lambda v: field.diffusion_along(t, y, v)


@dataclass(frozen=True)
class MilsteinRK(_Milstein):
    """Milstein's method with differences for derivatives. Ito or Stratonovich.

        Dg[v] = (g(y + v / sqrt(dt)) - g(y)) sqrt(dt)

    One more evaluation of g than Euler's; for general noise in the sense of Ito, m more. Orders
    are those of ``Milstein``.

    Source: Kloeden and Platen 1992, section 11.1; Roessler 2010, SIAM J. Numer. Anal. 48(3).
    """

    def _slope(self, field: Field, t: Scalar, dt: Scalar, y: State, g: State) -> Slope:
        root = sqrt(magnitude(dt))

        def slope(v: State) -> State:
            ahead = field.diffusion(t, combine(y, 1.0 / root, ((0, 1.0),), [v]))
            return weigh(root, ((0, 1.0), (1, -1.0)), [ahead, g])

        return slope
