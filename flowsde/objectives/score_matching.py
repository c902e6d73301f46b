"""Denoising score matching, in any parametrization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._scalar import Scalar
from ..dynamics.denoiser import Denoiser, Point
from ..paths.schedule import Schedule

__all__ = [
    "DenoisingScoreMatching", "LogNormal", "TimeLaw", "UniformLambda", "UniformTime",
    "likelihood_weight",
]  # fmt: skip


class TimeLaw(ABC):
    """How training times are drawn: stratified, one draw in each n-th of the law."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which the law has mass u."""

    def sample(self, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """``(count,)`` times in ``like``'s dtype, in random order."""
        u = torch.rand(count, generator=generator, dtype=torch.float64, device=like.device)
        strata = torch.randperm(count, generator=generator, device=like.device)
        return self.quantile((strata + u) / count).to(like.dtype)


@dataclass(frozen=True)
class UniformTime(TimeLaw):
    """t uniform on [t0, t1]."""

    t0: float
    t1: float

    def quantile(self, u: Tensor) -> Tensor:
        return self.t0 + (self.t1 - self.t0) * u


@dataclass(frozen=True)
class UniformLambda(TimeLaw):
    """log(alpha / sigma) uniform between its values at t0 and t1."""

    schedule: Schedule
    t0: float
    t1: float

    def quantile(self, u: Tensor) -> Tensor:
        first, last = self.schedule.half_log_snr(self.t0), self.schedule.half_log_snr(self.t1)
        return torch.as_tensor(self.schedule.time(first + (last - first) * u))


@dataclass(frozen=True)
class LogNormal(TimeLaw):
    """log(sigma / alpha) normal, EDM's law. Source: Karras et al. 2022, arXiv 2206.00364."""

    schedule: Schedule
    mean: float = -1.2
    std: float = 1.2

    def quantile(self, u: Tensor) -> Tensor:
        return torch.as_tensor(self.schedule.time(-self.mean - self.std * torch.special.ndtri(u)))


def likelihood_weight(at: Point) -> Scalar:
    """(alpha / sigma)^2 on the error of x0, which is 1 on the error of eps.

    With lambda uniform this is the variational bound: the loss is that of the noise, and its
    integral over lambda bounds -log p in nats. Source: Kingma et al. 2021, arXiv 2107.00630.
    """
    ratio = at.alpha / at.sigma
    return ratio * ratio


class DenoisingScoreMatching(nn.Module):
    """E_t E_eps w(t) | x0_hat(t, x_t) - x_0 |^2, the mean over components.

    Without a weight the error is taken in the network's own output instead (for EDM's
    preconditioning that is EDM's weighting, for noise prediction DDPM's simple loss).

    Args:
        denoiser: what is trained.
        times: law of t.
        weight: of the squared error of x0, a function of the schedule's point.

    Source: Vincent 2011; Song et al. 2021, arXiv 2011.13456.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: TimeLaw,
        weight: Callable[[Point], Scalar] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.times, self.weight = denoiser, times, weight

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        t = self.times.sample(len(x), x, generator)
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        at = Point.at(self.denoiser.schedule, t, x)
        noised = at.alpha * x + at.sigma * eps
        at, output = self.denoiser.output(t, noised, *args, at=at)
        prediction = self.denoiser.prediction
        if self.weight is None:
            return (output - prediction.target(at, x, eps)).square().mean()
        error = (prediction.data(at, noised, output) - x).square()
        return (self.weight(at) * error).mean()
