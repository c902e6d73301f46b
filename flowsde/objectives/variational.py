"""A diffusion in steps: the variational bound, the variances that enter it, and the sampler."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import _random
from .._scalar import Scalar, expand
from .._state import check_like
from ..bases import Normal
from ..dynamics.denoiser import Denoiser, Point, Prediction
from ..dynamics.discrete import Chain
from ..paths.normals import Law, Normals
from ..paths.schedule import Schedule

__all__ = [
    "Ancestral", "Bound", "Discretized", "FixedVariance", "HybridLoss", "LearnedVariance",
    "Transition", "VariationalBound",
]  # fmt: skip


class Transition(nn.Module, ABC):
    """A DDPM's step from t down to s, with q(x_s | x_t, x_0)'s mean at x0_hat:

        p(x_s | x_t) = N(sqrt(r) sigma_s / sigma_t x_t + alpha_s (1 - r) x0_hat, b),
        b = (1 - r) sigma_t^(2 v) sigma_s^(2 - 2 v),    r = (alpha_t sigma_s / (alpha_s sigma_t))^2

    At v = 0 the variance is that of q(x_s | x_t, x_0), at v = 1 that of q(x_t | x_s): DDPM's two.
    """

    denoiser: Denoiser

    @property
    def schedule(self) -> Schedule:
        """alpha and sigma."""
        return self.denoiser.schedule

    @abstractmethod
    def output(self, at: Point, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Scalar]:
        """What the network says of x at t, where the schedule is at this point, and v."""

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Scalar]:
        """x0_hat and v."""
        at = Point.at(self.schedule, t, x)
        output, v = self.output(at, t, x, *args)
        return self.denoiser.prediction.data(at, x, output), v

    def law(self, s: Tensor, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """The mean of p(x_s | x_t), shaped as x, and its standard deviation, to multiply x."""
        x0, v = self(t.to(x), x, *args)
        (alpha, sigma), (_, before) = self.schedule(s), self.schedule(t)
        fresh = -torch.expm1(2.0 * (self._lambda(t) - self._lambda(s)))  # 1 - r
        keep = (1.0 - fresh).sqrt() * sigma / before
        wider = expand(torch.as_tensor(before / sigma).log(), x)
        std = expand(fresh.sqrt() * sigma, x) * torch.exp(v * wider)
        return expand(keep, x) * x + expand(alpha * fresh, x) * x0, std

    def _lambda(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.schedule.half_log_snr(t))


class FixedVariance(Transition):
    """v is a number: 0 is best for data at one point, 1 for data N(0, 1).

    Args:
        denoiser: of the mean.
        v: between the two.

    Source: Ho et al. 2020, arXiv 2006.11239, section 3.2.
    """

    def __init__(self, denoiser: Denoiser, v: float = 0.0) -> None:
        super().__init__()
        self.denoiser, self.v = denoiser, v

    def output(self, at: Point, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Scalar]:
        return self.denoiser.output(t, x, *args, at=at)[1], self.v


class LearnedVariance(Transition):
    """v is learned: the network's second half of channels is 2 v - 1, the first its prediction.

    Args:
        network: ``network(t, x, *args)``, with twice as many channels (dim 1) as x.
        schedule, prediction: as of a ``Denoiser``; ``denoiser`` is that of the first half.

    Source: Nichol and Dhariwal 2021, arXiv 2102.09672, equation 15.
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: Schedule, prediction: Prediction
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(_First(network), schedule, prediction)

    def output(self, at: Point, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Scalar]:
        first = self.denoiser.network
        assert isinstance(first, _First)
        both = first.network(*self.denoiser.prediction.inputs(at, t, x), *args)
        output, v = (check_like(half, x, "half of the network") for half in both.chunk(2, dim=1))
        return output, 0.5 * (v + 1.0)


class _First(nn.Module):
    """The first half of a network's channels."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        return self.network(t, x, *args).chunk(2, dim=1)[0]


class _Timed(nn.Module):
    """What has times, whose digits stay when the weights are made others."""

    times: Tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        times = self.times
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not times.is_meta:
            self.times = times.to(self.times.device)
        return self


class Ancestral(_Timed, Chain):
    """DDPM's sampler: from noise down the times, x_s from p(x_s | x_t); at the end x0_hat.

        solve(Ancestral(transition, times), x, generator=g).y1

    One evaluation a time. With ``FixedVariance(denoiser)`` it is ``DDIM(eta=1.0)`` down to
    ``times[0]``, for the same generator too, and then the denoiser; the variance that a network has
    learned is what makes few steps right.

    Args:
        transition: ``FixedVariance(denoiser)`` or ``LearnedVariance(network, ...)``.
        times: as of ``VariationalBound``.

    Raises:
        ValueError: on times that do not rise from some noise.
        TypeError: from a solve without a generator.

    Source: Ho et al. 2020, arXiv 2006.11239, algorithm 2; Nichol and Dhariwal 2021, arXiv
    2102.09672.
    """

    random = True

    def __init__(self, transition: Transition, times: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", _rising(times, transition))
        self.transition = transition
        self._normals: Normals | None = None

    def __len__(self) -> int:
        return len(self.times)

    def prepare(self, y0: Tensor, seed: int | None) -> Ancestral:
        prepared = Ancestral(self.transition, self.times)
        prepared._normals = None if seed is None else Normals(Law(seed), y0)
        return prepared

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, None]:
        place = len(self) - 1 - k
        if place == 0:
            return self.transition(self.times[0].to(y), y, *args)[0], None
        assert self._normals is not None
        mean, std = self.transition.law(self.times[place - 1], self.times[place], y, *args)
        number = torch.tensor([place - 1], device=y.device)  # a path's steps count upwards in time
        z = self._normals.shape(self._normals.draw(_random.BROWNIAN, number))[0]
        return mean - std * z, None  # and are taken back on the way down


@dataclass(frozen=True)
class Discretized:
    """Data of ``levels`` values, evenly spaced from ``low`` to ``high``: a Gaussian's mass between
    the midpoints, the outermost values taking all that is beyond them.

    Source: Ho et al. 2020, arXiv 2006.11239, equation 13.
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def log_prob(self, x: Tensor, mean: Tensor, std: Scalar) -> Tensor:
        """log P(x) of each component, in nats, shaped as x."""
        width = (self.high - self.low) / (self.levels - 1)
        place = (x - self.low) / width
        off = (place - place.round()).abs() > 1e-3
        if bool((off | (place < -0.5) | (place > self.levels - 0.5)).any()):
            raise ValueError(
                f"data is one of {self.levels} values from {self.low} to {self.high}; leave "
                "``levels`` out for continuous data"
            )
        below, above = ((x + side * width - mean) / std for side in (-0.5, 0.5))
        below, above = (
            torch.where(place < 0.5, above.clamp(max=0.0) - 40.0, below),
            torch.where(place > self.levels - 1.5, below.clamp(min=0.0) + 40.0, above),
        )
        upper = below + above > 0  # mirrored there, so that both tails keep their digits
        a, b = torch.where(upper, -above, below), torch.where(upper, -below, above)
        small, great = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        return great + torch.log(-torch.expm1(small - great))


@dataclass(frozen=True)
class Bound:
    """-log p(x) <= the sum of T + 1 terms, in nats, each an unbiased estimate.

    Attributes:
        terms: ``(T + 1, batch)``: the reconstruction from the first time, the steps' divergences
            onto the first, second, ... time, and the prior's.
        dims: components of a sample.
    """

    terms: Tensor
    dims: int

    @property
    def total(self) -> Tensor:
        """``(batch,)``: the bound of each sample."""
        return self.terms.sum(0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Each term's mean over the batch and the standard error of that, ``(T + 1,)``."""
        return self.terms.mean(1), self.terms.std(1) / math.sqrt(self.terms.shape[1])

    def bits_per_dim(self) -> tuple[Tensor, Tensor]:
        """The mean bound in bits a component, and its standard error; for data in levels."""
        bits = self.total / (self.dims * math.log(2.0))
        return bits.mean(), bits.std() / math.sqrt(len(bits))


class VariationalBound(_Timed):
    """The bound of -log p(x) that a DDPM is trained by, at every one of its T times.

        -log p(x_0 | x_1) + sum_i KL(q(x_i | x_{i+1}, x_0), p(x_i | x_{i+1}))
        + KL(q(x_T | x_0), base)

    with p(x_0 | x_1) = N(x0_hat, sigma_1^2), or its mass at each of the data's levels. Every term
    draws a noise of its own. With times even in lambda the gap of an exact denoiser falls as 1 / T.

    Args:
        transition: ``FixedVariance(denoiser)`` or ``LearnedVariance(network, ...)``.
        times: ``(T,)``, rising, the first one's sigma > 0: ``uniform(1 / T, 1.0, T - 1)``.
        base: the law of x_T.
        levels: what values the data takes; None for a density.

    Raises:
        ValueError: on times that do not rise from some noise.

    Source: Sohl-Dickstein et al. 2015, arXiv 1503.03585; Ho et al. 2020, arXiv 2006.11239.
    """

    def __init__(
        self, transition: Transition, times: Tensor, base: Normal, levels: Discretized | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("times", _rising(times, transition))
        self.transition, self.base, self.levels = transition, base, levels

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Bound:
        schedule = self.transition.schedule

        def denoised(t: Tensor) -> tuple[Tensor, Scalar]:
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            alpha, sigma = (expand(part, x) for part in schedule(t))
            return self.transition(t.to(x.dtype), alpha * x + sigma * eps, *args)

        x0, _ = denoised(self.times[0])
        parts = [self._reconstruction(x, x0)]
        for s, t in itertools.pairwise(self.times):
            x0, v = denoised(t)
            parts.append(_divergence(schedule, s, t, x - x0, v))
        parts.append(self._prior(x))
        return Bound(torch.stack([part.flatten(1).sum(1) for part in parts]), x[0].numel())

    def _reconstruction(self, x: Tensor, x0: Tensor) -> Tensor:
        sigma = torch.as_tensor(self.transition.schedule.sigma(self.times[0]))
        if self.levels is not None:
            return -self.levels.log_prob(x, x0, sigma)
        return 0.5 * ((x - x0) / sigma).square() + sigma.log() + 0.5 * math.log(2.0 * math.pi)

    def _prior(self, x: Tensor) -> Tensor:
        alpha, sigma = (part / self.base.scale for part in self.transition.schedule(self.times[-1]))
        return 0.5 * (sigma**2 + (alpha * x).square() - 1.0) - torch.as_tensor(sigma).log()


class HybridLoss(_Timed):
    """E | output - target |^2 + weight L, which trains a mean and its variance in one pass.

    L estimates the bound's divergences, the mean over components, at one of the times a sample;
    its gradient reaches v alone.

    Args:
        transition: what is trained.
        times: as of ``VariationalBound``.
        weight: of L.

    Source: Nichol and Dhariwal 2021, arXiv 2102.09672, equation 16.
    """

    def __init__(self, transition: LearnedVariance, times: Tensor, weight: float = 1e-3) -> None:
        super().__init__()
        self.register_buffer("times", _rising(times, transition))
        self.transition, self.weight = transition, weight

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        schedule, prediction = self.transition.schedule, self.transition.denoiser.prediction
        place = torch.randint(
            len(self.times), (len(x),), generator=generator, device=self.times.device
        )
        s, t = self.times[(place - 1).clamp(min=0)], self.times[place]  # alike: a divergence of 0
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        at = Point.at(schedule, t, x)
        noised = at.alpha * x + at.sigma * eps
        output, v = self.transition.output(at, t.to(x.dtype), noised, *args)
        error = x - prediction.data(at, noised, output).detach()
        bound = len(self.times) * _divergence(schedule, s, t, error, v).mean()
        return (output - prediction.target(at, x, eps)).square().mean() + self.weight * bound


def _rising(times: Tensor, transition: Transition) -> Tensor:
    schedule, prediction = transition.schedule, transition.denoiser.prediction
    if times.ndim != 1 or not bool((times.diff() > 0).all()) or not schedule.sigma(times[0]) > 0:
        raise ValueError(
            "times of the bound rise, (T,), from a first one with some noise: "
            "paths.uniform(1 / T, 1.0, T - 1), data itself left out"
        )
    if prediction.needs_signal and not schedule.alpha(times[-1]) > 0:
        raise ValueError(
            f"{prediction} says nothing about x0 where the signal is zero, and {schedule} has none "
            f"at t = {float(times[-1]):g}: end at a slightly smaller time (such as 0.999), or "
            "train with VPrediction(), Velocity() or Data()"
        )
    return times


def _divergence(schedule: Schedule, s: Tensor, t: Tensor, error: Tensor, v: Scalar) -> Tensor:
    """KL(q(x_s | x_t, x_0), p(x_s | x_t)) of each component, for the error of x0_hat."""
    lam = torch.as_tensor(schedule.half_log_snr(s))
    fresh = -torch.expm1(2.0 * (schedule.half_log_snr(t) - lam))
    missed = expand(0.5 * fresh * (2.0 * lam).exp(), error) * error.square()
    wider = torch.as_tensor(schedule.sigma(t) / schedule.sigma(s)).log()
    ratio = v * expand(2.0 * wider, error)  # the log of p's variance over q's
    return 0.5 * (ratio + torch.expm1(-ratio)) + missed * torch.exp(-ratio)
