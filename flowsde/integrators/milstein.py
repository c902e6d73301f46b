"""Milstein's method, with derivatives of g and without."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._increment import Increment
from .._scalar import Scalar, expand, magnitude, nonzero, sqrt_abs
from .._state import State, combine, contract, tree_map, weigh
from ..dynamics.base import Noise
from ..dynamics.field import Field
from .base import Carry, Step
from .stochastic import Stochastic, StraightStep, euler

__all__ = ["Milstein", "MilsteinRK"]

Slope = Callable[[State], State]


class _Milstein(Stochastic):
    """y1 = y0 + f dt + g dW + sum_l Dg[g_l] J_l, with J_lk the products of dW_l and dW_k."""

    calculus = "either"

    def strong_order(self, noise: Noise) -> float | None:
        return 1.0 if noise.commutes else None

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        assert field.noise is not None
        dt, noise, f = t1 - t0, field.noise, field.drift(t0, y)
        if noise.additive:
            return StraightStep(y, euler(field, y, dt, dw.w, f, field.diffusion(t0, y)))
        g, along = self._along(field, t0, y, sqrt_abs(dt) if noise.ito else 1.0)
        y1 = euler(field, y, dt, dw.w, f, g)
        if not noise.ito:
            return StraightStep(y, field.diffuse(y1, along(field.product(g, dw.w)), dw.w, 0.5))
        h = magnitude(dt)
        if noise.kind == "general":
            return StraightStep(y, _general(along, y1, g, dw.w, h))
        return StraightStep(y, field.diffuse(y1, along(g), tree_map(_product(h), dw.w), 0.5))

    @abstractmethod
    def _along(self, field: Field, t: Scalar, y: State, scale: Scalar) -> tuple[State, Slope]:
        """g(t, y) and v to Dg(t, y)[v], shaped as g; differences go as far as scale v."""


def _product(h: Scalar) -> Callable[[Tensor], Tensor]:
    """w to w^2 - h."""
    return lambda w: w * w - expand(h, w)


def _general(along: Slope, y: Tensor, g: Tensor, w: Tensor, h: Scalar) -> Tensor:
    """y + 1/2 sum_lk Dg_k[g_l] (w_l w_k - h if l = k)."""
    size = w.shape[-1]
    products = w[:, :, None] * w[:, None, :] - expand(h, w[:, :, None]) * torch.eye(size).to(w)
    for column in range(size):
        y = y.add(contract(along(g[..., column]), products[:, column]), alpha=0.5)
    return y


@dataclass(frozen=True)
class Milstein(_Milstein):
    """Euler's step and the term of dW's products, by derivatives of g. Ito or Stratonovich.

        y1 = y0 + f dt + g dW + 1/2 sum_kl Dg_k[g_l] (dW_l dW_k - d_lk dt)

    and without the last dt for Stratonovich. Reads dW as the dynamics does. Strong and weak order
    1, for noise that commutes: diagonal (where g_i depends on y_i alone), scalar, additive, or
    declared commutative. Costs one derivative of g along a direction; for general noise in the
    sense of Ito, m.

    Source: Milstein 1974; Kloeden and Platen 1992, section 10.3.
    """

    def _along(self, field: Field, t: Scalar, y: State, scale: Scalar) -> tuple[State, Slope]:
        return field.diffusion_along(t, y)


@dataclass(frozen=True)
class MilsteinRK(_Milstein):
    """Milstein's method with differences for derivatives. Ito or Stratonovich.

        Dg[g_l] = (g(y + g_l sqrt(dt)) - g(y)) / sqrt(dt)

    and for Stratonovich Dg[g dW] = g(y + g dW) - g(y), which is exact in the mean. One more
    evaluation of g than Euler's; for general noise in the sense of Ito, m more. Orders are those
    of ``Milstein``.

    Source: Kloeden and Platen 1992, section 11.1.
    """

    def _along(self, field: Field, t: Scalar, y: State, scale: Scalar) -> tuple[State, Slope]:
        g = field.diffusion(t, y)

        def along(v: State) -> State:
            ahead = field.diffusion(t, combine(y, scale, ((0, 1.0),), [v]))
            return weigh(1.0 / nonzero(scale), ((0, 1.0), (1, -1.0)), [ahead, g])

        return g, along
