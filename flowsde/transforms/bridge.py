"""Paths that are on their way to a given end."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from .._scalar import Scalar, exp, expand, expm1
from .._state import State
from ..dynamics.base import Dynamics
from .augmented import Augmented, fill, noise_of

__all__ = ["Bridge", "bridge"]


def bridge(
    sde: Dynamics, end: Tensor, t1: float, *, rate: float = 0.0, level: float | Tensor = 0.0
) -> Bridge:
    """Dynamics of [y, l]: paths drawn towards y(t1) = end, and the log-weight that makes of them
    the paths of the SDE that end there.

        dy = [f + g^2 r] dt + g dW,    r = d log p(end, t1 | y, t) / dy
        dl/dt = r . (f - f_aux) + 1/2 sum_i (g_i^2 - s_i^2) (r_i^2 + dr_i/dy_i)

    p belongs to dy = rate (y - level) dt + s dW, s = g(t1, end), whose transitions are Gaussian.
    E[exp(l(t1))] is the SDE's own transition density over ``log_prob(t0, y0).exp()``. For Brownian
    motion, and for an Ornstein-Uhlenbeck process with its rate and level, l stays 0: the paths are
    exact draws of the bridge.

    The pull grows as 1 / (t1 - t). Step on ``Grid(bridge.times(t0, steps))``, which crowds towards
    the end, by a method that evaluates nothing there, such as Euler-Maruyama; the last state lies
    about g / steps from the end.

    Args:
        sde: with diagonal noise that nowhere vanishes.
        end: ``(d,)`` or ``(batch, d)``.
        t1: when the paths are there.
        rate, level: of the auxiliary process: negative where it reverts to the level.

    Raises:
        TypeError: on noise that is not diagonal, or multiplicative in the sense of Stratonovich.

    Source: Delyon and Hu 2006; Schauer, van der Meulen and van Zanten 2017, arXiv 1311.3606.
    """
    return Bridge(sde, end, t1, rate, level)


@final
class Bridge(Augmented):
    """What ``bridge`` returns."""

    whitens = True
    end: Tensor
    level: float | Tensor

    def __init__(
        self, sde: Dynamics, end: Tensor, t1: float, rate: float, level: float | Tensor
    ) -> None:
        noise = noise_of(sde)
        if noise.kind != "diagonal" or not (noise.ito or noise.additive):
            raise TypeError(
                "a bridge is made of an Ito SDE with diagonal noise: give SDE(f, g, "
                "noise='diagonal'), or to_ito of a Stratonovich one"
            )
        super().__init__(sde, noise)
        self.sde, self.t1, self.rate = sde, t1, rate
        self.hold("level", level)
        self.register_buffer("end", end)

    def prepare(self, y0: State, seed: int | None) -> Bridge:
        inner = self.sde.prepare(self.state(y0), seed)
        return Bridge(inner, self.end, self.t1, self.rate, self.level)

    def check_span(self, t0: float, t1: float) -> None:
        super().check_span(t0, t1)
        self.sde.check_span(t0, t1)
        if t1 > self.t1:
            raise ValueError(f"this bridge ends at {self.t1}; got a solve from {t0} to {t1}")

    def times(self, t0: float, steps: int) -> Tensor:
        """A grid from t0 to the end with steps that shrink linearly to 1 / steps of their mean."""
        s = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        return t0 + (self.t1 - t0) * s * (2.0 - s)

    def log_prob(self, t: Scalar, y: Tensor, *args: Any) -> Tensor:
        """log p(end, t1 | y, t) of the auxiliary process, ``(batch,)``."""
        left = self.t1 - t
        mean, spread = self._mean(left, y), self._spread(y, args).square()
        growth = left if self.rate == 0.0 else expm1(2.0 * self.rate * left) / (2.0 * self.rate)
        variance = spread * expand(growth, y)
        gap = self.end - mean
        return -0.5 * (gap.square() / variance + (2.0 * math.pi * variance).log()).sum(-1)

    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        left = expand(self.t1 - t, y)
        drift, square = self.sde(t, y, *args), fill(self.sde.diffusion(t, y, *args), y).square()
        goal = self._spread(y, args).square()
        score = self._pull(left) * (self.end - self._mean(left, y)) / goal
        bend = -self._curve(left) / goal
        rate = score * (drift - self.rate * (y - self.level))
        rate = rate + 0.5 * (square - goal) * (score.square() + bend)
        return drift + square * score, rate.sum(-1)

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        y = y[:, :-1]
        return functional.pad(fill(self.sde.diffusion(t, y, *args), y), (0, 1))

    def _spread(self, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        """s, shaped as y."""
        at, end = self.end.new_tensor(self.t1), self.end.expand_as(y)
        return fill(self.sde.diffusion(at, end, *args), y)

    def _mean(self, left: Scalar, y: Tensor) -> Tensor:
        """E[y(t1)] of the auxiliary process, from y a time before."""
        return self.level + expand(exp(self.rate * left), y) * (y - self.level)

    def _pull(self, left: Tensor) -> Tensor:
        """d mean / dy over variance / s^2."""
        return 1.0 / left if self.rate == 0.0 else self.rate / torch.sinh(self.rate * left)

    def _curve(self, left: Tensor) -> Tensor:
        """(d mean / dy)^2 over variance / s^2."""
        if self.rate == 0.0:
            return 1.0 / left
        return -2.0 * self.rate / torch.expm1(-2.0 * self.rate * left)
