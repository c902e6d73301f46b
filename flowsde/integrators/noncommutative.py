"""Methods for noise whose columns do not commute: of weak order two, and with Levy areas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar, expand, nonzero, sqrt_abs
from .._state import State, combine, tree_map, weigh
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field
from .base import Carry, Step, check_noise
from .explicit import RK4
from .stochastic import Stochastic, StraightStep, euler

__all__ = ["LogODE", "NinomiyaNinomiya", "PlatenWeak2"]


class _Crossing(Stochastic):
    """A method for all noise of its calculus. Strong order 1 where columns commute, else 1/2."""

    def strong_order(self, noise: Noise) -> float:
        return 0.5 if _crosses(noise) else 1.0

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        return StraightStep(y, self.move(field, t0, t1, y, dw))

    @abstractmethod
    def move(self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment) -> State:
        """The state at t1."""


@dataclass(frozen=True)
class PlatenWeak2(_Crossing):
    """Weak order 2 without derivatives. Ito.

        y1 = y + (f(y) + f(y + f dt + g dW)) dt/2 + (g(y) + g(y + f dt)) dW/2
             + sum_r [(g(u_r) + g(v_r) - 2 g) dW + (g(u_r) - g(v_r)) X_r / sqrt(dt)] / 4,
        u_r, v_r = y + g_r sqrt(dt), y - g_r sqrt(dt),    X_rj = dW_r dW_j - d_rj dt + V_rj

    with V antisymmetric, of independent normals of variance dt^2. Two evaluations of f and, for m
    Brownian motions, 2 m + 2 of g, where Platen's own scheme takes 4 m + 1. Diagonal and scalar
    noise take that scheme, whose u and v start from y + f dt: three evaluations of g; additive
    noise takes two. Strong order 1/2, and 1 where the columns commute.

    Source: Platen 1984; Kloeden and Platen 1992, section 15.1.
    """

    calculus = "ito"

    def weak_order(self, noise: Noise) -> float:
        return 2.0

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        noise = check_noise(self, dynamics)
        return Draws(noise.shapes(y), extra=_pairs(y, noise) if _crosses(noise) else None)

    def move(self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment) -> State:
        assert field.noise is not None
        dt, w, f, g = t1 - t0, dw.w, field.drift(t0, y), field.diffusion(t0, y)
        last = field.drift(t1, euler(field, y, dt, w, f, g))
        total = combine(y, dt, ((0, 0.5), (1, 0.5)), [f, last])
        ahead = combine(y, dt, ((0, 1.0),), [f])
        if field.noise.additive or field.noise.kind == "general":
            total = field.diffuse(total, tree_map(torch.add, g, field.diffusion(t1, ahead)), w, 0.5)
            return total if field.noise.additive else _cross(field, t0, dt, y, g, dw, total)
        root = sqrt_abs(dt)
        total = field.diffuse(total, g, w, 0.5)
        for side in (root, -root):
            there = field.diffusion(t1, combine(ahead, side, ((0, 1.0),), [g]))
            total = field.diffuse(total, there, tree_map(_square(side), w), 0.25)
        return total


def _square(root: Scalar) -> Callable[[Tensor], Tensor]:
    """w + (w^2 - root^2) / root, for a root of either sign."""
    return lambda w: w + expand(root, w) * (_unit(w, root).square() - 1.0)


def _cross(
    field: Field, t: Scalar, dt: Scalar, y: Tensor, g: Tensor, dw: Increment, total: Tensor
) -> Tensor:
    """The total and Platen's sum over r."""
    root, size = sqrt_abs(dt), dw.w.shape[-1]
    unit = _unit(dw.w, root)
    odd = unit[:, :, None] * unit[:, None, :] - torch.eye(size).to(unit)
    if dw.z is not None:
        odd = odd + _antisymmetric(dw.z, size)
    total = field.diffuse(total, g, dw.w, -0.5 * size)
    return _sweep(field, t, root, y, g, total, 0.25 * dw.w, 0.25 * expand(root, odd) * odd)


@dataclass(frozen=True)
class LogODE(_Crossing):
    """An ODE's flow over unit time, driven by the path's increment and its Levy area. Stratonovich.

        dz/ds = f(z) dt + g(z) dW + sum_(i<j) A_ij [g_i, g_j](y),    z(0) = y,
        A = H W' - W H' + 12 (K H' - H K') + sqrt(dt^2 / 20) V

    with V antisymmetric, of independent normals: the area's mean given W, H and K, and noise of
    the variance that is left. RK4 solves the ODE; the bracket is that at the start, by central
    differences, for 2 m evaluations of g. No polynomial in normals gives the area itself, so that
    the strong order stays 1/2 where columns do not commute (Clark and Cameron 1980); its second
    moments are exact. Weak order 1. Where columns commute there is no bracket: strong order 1.

    Source: Castell 1993; Foster and Habermann 2021, arXiv 2102.10095; Davie 2014.
    """

    calculus = "stratonovich"
    levy = "K"

    def weak_order(self, noise: Noise) -> float:
        return 1.0

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        noise = check_noise(self, dynamics)
        if not _crosses(noise):
            return Draws(noise.shapes(y))
        return Draws(noise.shapes(y), self.levy, extra=_pairs(y, noise))

    def move(self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment) -> State:
        assert field.noise is not None
        dt, w = t1 - t0, dw.w
        bracket = _bracket(field, t0, dt, y, dw) if _crosses(field.noise) else None

        def slope(s: float, z: State) -> State:
            t = t1 if s == 1.0 else t0 + s * dt
            drifted = weigh(dt, ((0, 1.0),), [field.drift(t, z)])
            k = field.diffuse(drifted, field.diffusion(t, z), w)
            return k if bracket is None else k + bracket

        return _flow(slope, y)


def _bracket(field: Field, t: Scalar, dt: Scalar, y: Tensor, dw: Increment) -> Tensor:
    """sum_(i<j) A_ij [g_i, g_j](y)."""
    assert dw.h is not None
    assert dw.k is not None
    assert dw.z is not None
    root = sqrt_abs(dt)
    w, h, k = (_unit(part, root) for part in (dw.w, dw.h, dw.k))
    half = h[:, :, None] * (w - 12.0 * k)[:, None, :]
    area = half - half.mT + 20.0**-0.5 * _antisymmetric(dw.z, w.shape[-1])
    odd = 0.5 * expand(root, area) * area
    return _sweep(field, t, root, y, field.diffusion(t, y), torch.zeros_like(y), 0.0, odd)


@dataclass(frozen=True)
class NinomiyaNinomiya(_Crossing):
    """Two ODEs' flows over unit time, one after the other. Weak order 2. Stratonovich.

        dz/ds = g(z) S1,    dz/ds = f(z) dt + g(z) S2,    S1 = sqrt(dt/2) Z,  S2 = dW - S1

    with Z normal and independent of W. RK4 solves both: its error is of an odd power of sqrt(dt),
    whose mean is nil. Four evaluations of f and eight of g, for any number of Brownian motions.

    Source: Ninomiya and Ninomiya 2009, "A new higher-order weak approximation scheme for
    stochastic differential equations and the Runge-Kutta method", with u = 1/2.
    """

    calculus = "stratonovich"

    def weak_order(self, noise: Noise) -> float:
        return 2.0

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        shapes = check_noise(self, dynamics).shapes(y)
        return Draws(shapes, extra=shapes)

    def move(self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment) -> State:
        dt = t1 - t0
        root = 0.5**0.5 * sqrt_abs(dt)
        first = tree_map(lambda z: expand(root, z) * z, dw.z)
        second = tree_map(torch.sub, dw.w, first)

        def slope(s: float, z: State) -> State:
            t = t1 if s == 1.0 else t0 + s * dt
            drifted = weigh(dt, ((0, 1.0),), [field.drift(t, z)])
            return field.diffuse(drifted, field.diffusion(t, z), second)

        middle = _flow(lambda s, z: field.product(field.diffusion(t0, z), first), y)
        return _flow(slope, middle)


def _flow(slope: Callable[[float, State], State], y: State) -> State:
    """z(1) of dz/ds = slope(s, z), z(0) = y, by one step of RK4."""
    tableau = RK4.tableau
    ks: list[State] = []
    for c, row in zip(tableau.c, ((), *tableau.rows), strict=True):
        ks.append(slope(c, combine(y, 1.0, row, ks)))
    return combine(y, 1.0, tableau.weights, ks)


def _sweep(
    field: Field, t: Scalar, root: Scalar, y: Tensor, g: Tensor, total: Tensor,
    even: Tensor | float, odd: Tensor,
) -> Tensor:  # fmt: skip
    """total + sum_r [(g(u_r) + g(v_r)) even + (g(u_r) - g(v_r)) odd_r], u, v = y +- root g_r."""
    for r, column in enumerate(g.unbind(-1)):
        for sign in (1.0, -1.0):
            beside = field.diffusion(t, combine(y, sign * root, ((0, 1.0),), [column]))
            total = field.diffuse(total, beside, even + sign * odd[:, r])
    return total


def _crosses(noise: Noise) -> bool:
    """Whether the columns of g need not commute."""
    several = noise.size is not None and noise.size > 1
    return several and not noise.commutes


def _pairs(y: Tensor, noise: Noise) -> Tensor:
    """Shaped as one number for each pair of Brownian motions."""
    assert noise.size is not None
    return y.new_empty((y.shape[0], noise.size * (noise.size - 1) // 2))


def _antisymmetric(z: Tensor, size: int) -> Tensor:
    """``(batch, size, size)``, with z above the diagonal."""
    rows, columns = torch.triu_indices(size, size, 1, device=z.device)
    upper = z.new_zeros((z.shape[0], size, size))
    upper[:, rows, columns] = z
    return upper - upper.mT


def _unit(x: Tensor, root: Scalar) -> Tensor:
    """x over the root; zero where that is, for then x is."""
    return x / expand(nonzero(root), x)
