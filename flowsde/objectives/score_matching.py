"""Denoising score matching, in any parametrization."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._random import widest
from .._scalar import Scalar, minimum, to_float
from .._state import factorable
from ..dynamics.denoiser import Denoiser, Point
from ..paths.schedule import Schedule

__all__ = [
    "DenoisingScoreMatching", "EDMWeight", "Levels", "LogNormal", "LogitNormal", "LowDiscrepancy",
    "MinSNR", "TimeLaw", "UniformLambda", "UniformTime", "likelihood_weight", "noise_weight",
    "squares", "v_weight",
]  # fmt: skip


def squares(x: Tensor) -> Tensor:
    """|x|^2, number by number."""
    return x.abs().square() if x.is_complex() else x.square()


class TimeLaw(ABC):
    """How training times are drawn: stratified, one draw in each n-th of the law."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which the law has mass u."""

    def places(self, count: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """``(count,)`` numbers in [0, 1): where in its stratum each time stands."""
        return torch.rand(count, generator=generator, dtype=widest(device), device=device)

    def sample(self, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """``(count,)`` times in ``like``'s real dtype, float32 at least, in random order."""
        u = self.places(count, like.device, generator)
        strata = torch.randperm(count, generator=generator, device=like.device)
        return self.quantile((strata + u) / count).to(factorable(like.dtype.to_real()))

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError, with the cure, on a law of times that a schedule does not have."""
        device = torch.as_tensor(schedule.alpha(0.5)).device  # of a learned one
        if device.type == "meta":
            return
        u = torch.tensor([0.0, 0.5, 1.0 - 1e-9], dtype=widest(device), device=device)
        ends, last = self.quantile(u).tolist(), schedule.horizon * (1.0 + 1e-6)
        if not all(schedule.holds(t) and t <= last for t in ends):
            raise ValueError(
                f"{self} draws times from {min(ends):g} to {max(ends):g}, and those of {schedule} "
                f"are [0, {schedule.horizon:g}]: step i of T is t = (i + 1) / T"
            )


@dataclass(frozen=True)
class UniformTime(TimeLaw):
    """t uniform on [t0, t1]."""

    t0: float
    t1: float

    def quantile(self, u: Tensor) -> Tensor:
        return self.t0 + (self.t1 - self.t0) * u


@dataclass(frozen=True)
class UniformLambda(TimeLaw):
    """log(alpha / sigma) uniform between its values at t0 and t1.

    Raises:
        ValueError: from a draw, where the schedule has no noise or no signal at one of them.
    """

    schedule: Schedule
    t0: float
    t1: float

    def quantile(self, u: Tensor) -> Tensor:
        first, last = self.schedule.half_log_snr(self.t0), self.schedule.half_log_snr(self.t1)
        if not math.isfinite(to_float(first) - to_float(last)):
            raise ValueError(
                f"lambda runs from {to_float(first)} to {to_float(last)}: move the end away from "
                "where the signal or the noise is zero (1e-3 is usual)"
            )
        t = torch.as_tensor(self.schedule.time(first + (last - first) * u))
        return t.clamp(*sorted((self.t0, self.t1)))


@dataclass(frozen=True)
class LogNormal(TimeLaw):
    """log(sigma / alpha) normal, EDM's law, cut off at the schedule's ends.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """

    schedule: Schedule
    mean: float = -1.2
    std: float = 1.2

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self._below(0.0), self._below(self.schedule.horizon)
        place = torch.special.ndtri(low + (high - low) * u)
        t = torch.as_tensor(self.schedule.time(-self.mean - self.std * place))
        return t.clamp(0.0, self.schedule.horizon)

    def _below(self, t: float) -> float:
        """The part of the normal law that lies before t."""
        far = to_float(self.schedule.half_log_snr(t)) + self.mean
        return 0.5 * math.erfc(far / (self.std * math.sqrt(2.0)))


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """logit t normal, on [0, 1]. Source: Esser et al. 2024, arXiv 2403.03206."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()


@dataclass(frozen=True)
class Levels(TimeLaw):
    """Each of some times as often as the others: a geometric ladder of noise, which is even in
    ``VE``'s time (NCSN), or the steps of a DDPM, (i + 1) / T.
    """

    times: tuple[float, ...]

    def quantile(self, u: Tensor) -> Tensor:
        place = (u * len(self.times)).long().clamp(max=len(self.times) - 1)
        return u.new_tensor(self.times)[place]


@dataclass(frozen=True)
class LowDiscrepancy(TimeLaw):
    """A law's times one n-th apart, moved by one random number for the whole batch.

    Source: Kingma et al. 2021, arXiv 2107.00630, appendix I.1.
    """

    law: TimeLaw

    def quantile(self, u: Tensor) -> Tensor:
        return self.law.quantile(u)

    def places(self, count: int, device: torch.device, generator: torch.Generator) -> Tensor:
        return super().places(1, device, generator).expand(count)


def noise_weight(at: Point) -> Scalar:
    """(alpha / sigma)^2: the error of the noise. DDPM's simple loss, and NCSN's sigma^2 on the
    score. With ``UniformLambda`` it is the variational bound, too.
    """
    ratio = at.alpha / at.sigma
    return ratio * ratio


def v_weight(at: Point) -> Scalar:
    """The error of v = alpha eps - sigma x0; SNR + 1 where variance is preserved.

    Source: Salimans and Ho 2022, arXiv 2202.00512.
    """
    size = (at.alpha * at.alpha + at.sigma * at.sigma) / at.sigma
    return size * size


def likelihood_weight(at: Point) -> Scalar:
    """-lambda' (alpha / sigma)^2, the half of g^2 on the error of the score.

    With t uniform, its sum over components and integral over t bounds -log p in nats, but for the
    ends. Source: Song et al. 2021, arXiv 2101.09258; Kingma et al. 2021, arXiv 2107.00630.
    """
    return (at.dsigma * at.alpha - at.dalpha * at.sigma) * at.alpha / at.sigma**3


@dataclass(frozen=True)
class EDMWeight:
    """1 / sigma_data^2 + (alpha / sigma)^2. Source: Karras et al. 2022, arXiv 2206.00364."""

    sigma_data: float = 0.5

    def __call__(self, at: Point) -> Scalar:
        return self.sigma_data**-2 + noise_weight(at)


@dataclass(frozen=True)
class MinSNR:
    """min((alpha / sigma)^2, gamma). Source: Hang et al. 2023, arXiv 2303.09556."""

    gamma: float = 5.0

    def __call__(self, at: Point) -> Scalar:
        return minimum(noise_weight(at), self.gamma)


class DenoisingScoreMatching(nn.Module):
    """E_t E_eps w(t) | x0_hat(t, x_t) - x_0 |^2, the mean over components.

    Without a weight the error is taken in the network's own output instead (for EDM's
    preconditioning that is EDM's weighting, for noise prediction DDPM's simple loss).

    Args:
        denoiser: what is trained.
        times: law of t.
        weight: of the squared error of x0, a function of the schedule's point: ``noise_weight``,
            ``v_weight``, ``likelihood_weight``, ``EDMWeight(sigma_data)``, ``MinSNR(gamma)``.

    Raises:
        ValueError: on times that the denoiser's schedule does not have.

    Source: Vincent 2011; Song et al. 2021, arXiv 2011.13456.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: TimeLaw,
        weight: Callable[[Point], Scalar] | None = None,
    ) -> None:
        super().__init__()
        times.check(denoiser.schedule)
        self.denoiser, self.times, self.weight = denoiser, times, weight

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        t = self.times.sample(len(x), x, generator)
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        wide = x.to(factorable(x.dtype))  # of half precision, the loss is beyond its numbers
        at = Point.at(self.denoiser.schedule, t, wide)
        noised = at.alpha * wide + at.sigma * eps
        near = at if wide is x else Point.at(self.denoiser.schedule, t, x)
        shown = t if self.denoiser.precise else t.to(x.dtype.to_real())
        _, output = self.denoiser.output(shown, noised.to(x.dtype), *args, at=near)
        prediction = self.denoiser.prediction
        if self.weight is None:
            return squares(output - prediction.target(at, wide, eps)).mean()
        error = squares(prediction.data(at, noised, output) - wide)
        return (self.weight(at) * error).mean()
