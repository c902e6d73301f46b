"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, data at t = 0 and noise at the horizon.

Every function takes a host float (and returns one) or a tensor of any shape. ``lambda`` is **half**
the log signal-to-noise ratio, log(alpha / sigma), everywhere in the library.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .._scalar import Scalar, asinh, atan, cos, exp, expm1, log, minimum, sin, sqrt

__all__ = [
    "EDM", "VE", "VP", "Cosine", "FlowMatching", "Schedule", "SubVP", "Trigonometric",
]  # fmt: skip


class Schedule(ABC):
    """How signal turns into noise. Subclasses give alpha, sigma, their rates and the inverse."""

    @property
    def horizon(self) -> float:
        """The time at which the noise is complete."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Scalar) -> Scalar:
        """Scale of the data."""

    @abstractmethod
    def sigma(self, t: Scalar) -> Scalar:
        """Standard deviation of the noise."""

    @abstractmethod
    def dalpha(self, t: Scalar) -> Scalar:
        """d alpha / dt."""

    @abstractmethod
    def dsigma(self, t: Scalar) -> Scalar:
        """d sigma / dt."""

    @abstractmethod
    def time(self, lam: Scalar) -> Scalar:
        """The t at which ``half_log_snr(t)`` is ``lam``."""

    def holds(self, t: float) -> bool:
        """Whether t is one of its times: there is no noise before 0, nor signal below none."""
        return t >= 0.0 and bool(self.alpha(t) >= 0.0)

    def diffusion(self, t: Scalar) -> Scalar:
        """g(t) of the noising SDE, g^2 = 2 sigma (sigma' - sigma alpha' / alpha)."""
        alpha, sigma = self(t)
        return sqrt(2.0 * sigma * (self.dsigma(t) - sigma * ratio(self.dalpha(t), alpha)))

    def half_log_snr(self, t: Scalar) -> Scalar:
        """lambda(t) = log(alpha / sigma); +inf where there is no noise, -inf where no signal."""
        return log(self.alpha(t)) - log(self.sigma(t))

    def __call__(self, t: Scalar) -> tuple[Scalar, Scalar]:
        return self.alpha(t), self.sigma(t)


class _Decaying(Schedule):
    """Written on log alpha, so that small noise keeps its digits."""

    @abstractmethod
    def log_alpha(self, t: Scalar) -> Scalar:
        """log alpha."""

    @abstractmethod
    def dlog_alpha(self, t: Scalar) -> Scalar:
        """Its rate, alpha' / alpha."""

    def alpha(self, t: Scalar) -> Scalar:
        return exp(self.log_alpha(t))

    def dalpha(self, t: Scalar) -> Scalar:
        return self.alpha(t) * self.dlog_alpha(t)

    def half_log_snr(self, t: Scalar) -> Scalar:
        return self.log_alpha(t) - log(self.sigma(t))


class _VariancePreserving(_Decaying):
    """alpha^2 + sigma^2 = 1."""

    def sigma(self, t: Scalar) -> Scalar:
        return sqrt(0.0 - expm1(2.0 * self.log_alpha(t)))  # 0, and not -0, without noise

    def dsigma(self, t: Scalar) -> Scalar:
        return ratio(-self.alpha(t) * self.dalpha(t), self.sigma(t))

    def diffusion(self, t: Scalar) -> Scalar:
        return sqrt(-2.0 * self.dlog_alpha(t))


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """a / b, infinite at b = 0 for floats as for tensors."""
    if isinstance(b, float) and isinstance(a, float) and b == 0.0:
        return math.copysign(math.inf, a) if a else math.nan
    return a / b


def _softplus(x: Scalar) -> Scalar:
    """log(1 + e^x) without overflow."""
    if isinstance(x, Tensor):
        return torch.logaddexp(x, torch.zeros_like(x))
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@dataclass(frozen=True)
class _LinearBeta(_Decaying):
    """log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (self.beta_min >= 0.0 and 0.0 < self.beta_max < math.inf):
            raise ValueError(
                f"rates of noise are beta_min >= 0 and beta_max > 0; got {self.beta_min} and "
                f"{self.beta_max}"
            )

    def log_alpha(self, t: Scalar) -> Scalar:
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def dlog_alpha(self, t: Scalar) -> Scalar:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def _decayed(self, decay: Scalar) -> Scalar:
        """The t at which log alpha is -decay."""
        half = 0.5 * self.beta_min
        decay = minimum(decay, 1e30)  # where nothing is left, not infinity by infinity
        return 2.0 * decay / (half + sqrt(half**2 + decay * (self.beta_max - self.beta_min)))


@dataclass(frozen=True)
class VP(_LinearBeta, _VariancePreserving):
    """Variance preserving: log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.

    Source: Song et al. 2021, arXiv 2011.13456.
    """

    def time(self, lam: Scalar) -> Scalar:
        return self._decayed(0.5 * _softplus(-2.0 * lam))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """VP's alpha, with less noise: sigma = 1 - alpha^2. Source: as for VP, equation 29."""

    def sigma(self, t: Scalar) -> Scalar:
        return 0.0 - expm1(2.0 * self.log_alpha(t))

    def dsigma(self, t: Scalar) -> Scalar:
        return -2.0 * self.alpha(t) * self.dalpha(t)

    def time(self, lam: Scalar) -> Scalar:
        return self._decayed(asinh(0.5 * exp(-lam)))  # 1 / alpha - alpha = exp(-lambda)


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """alpha = cos(((t + s) / (1 + s)) pi / 2), divided by its value at 0.

    The signal is gone at t = 1: start samplers of noise-predicting models a little before it.
    Source: Nichol and Dhariwal 2021, arXiv 2102.09672.
    """

    offset: float = 0.008

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1.0 + self.offset)

    @property
    def _start(self) -> float:
        return math.sin(self._speed)

    def alpha(self, t: Scalar) -> Scalar:
        return sin((1.0 - t) * self._speed) / self._start  # exactly 0 at t = 1

    def sigma(self, t: Scalar) -> Scalar:
        # sin^2 a - sin^2 b = sin(a - b) sin(a + b): 1 - alpha^2 without its cancellation
        return sqrt(sin(t * self._speed) * sin((2.0 - t) * self._speed)) / self._start

    def dalpha(self, t: Scalar) -> Scalar:
        return -self._speed * cos((1.0 - t) * self._speed) / self._start

    def log_alpha(self, t: Scalar) -> Scalar:
        return log(self.alpha(t))

    def dlog_alpha(self, t: Scalar) -> Scalar:
        return ratio(self.dalpha(t), self.alpha(t))

    def time(self, lam: Scalar) -> Scalar:
        # the tangent of t speed, in sums of what is positive: an arc sine loses small noise
        alpha, square = exp(-0.5 * _softplus(-2.0 * lam)), exp(-_softplus(2.0 * lam))
        sine, cosine = self._start, math.cos(self._speed)
        beside = sqrt(cosine**2 + square * sine**2)  # the cosine of (1 - t) speed
        opposite = sine * square / (beside + alpha * cosine)
        return atan(opposite / (cosine * beside + alpha * sine**2)) / self._speed


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    Data stands at noise ``sigma_min``, t = 0. Source: Song et al. 2021, arXiv 2011.13456.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"noise grows, 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Scalar) -> Scalar:
        return 1.0 + 0.0 * t

    def sigma(self, t: Scalar) -> Scalar:
        return self.sigma_min * exp(self._rate * t)

    def dalpha(self, t: Scalar) -> Scalar:
        return 0.0 * t

    def dsigma(self, t: Scalar) -> Scalar:
        return self._rate * self.sigma(t)

    def time(self, lam: Scalar) -> Scalar:
        return (-lam - math.log(self.sigma_min)) / self._rate


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t, up to ``sigma_max``. Source: Karras et al. 2022, arXiv 2206.00364."""

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_max < math.inf:
            raise ValueError(f"sigma_max is a standard deviation > 0; got {self.sigma_max}")

    @property
    def horizon(self) -> float:
        return self.sigma_max

    def alpha(self, t: Scalar) -> Scalar:
        return 1.0 + 0.0 * t

    def sigma(self, t: Scalar) -> Scalar:
        return 1.0 * t

    def dalpha(self, t: Scalar) -> Scalar:
        return 0.0 * t

    def dsigma(self, t: Scalar) -> Scalar:
        return 1.0 + 0.0 * t

    def time(self, lam: Scalar) -> Scalar:
        return exp(-lam)


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """alpha = 1 - t, sigma = t: straight lines from data to noise.

    Source: Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003 (with this
    library's direction of time).
    """

    def alpha(self, t: Scalar) -> Scalar:
        return 1.0 - t

    def sigma(self, t: Scalar) -> Scalar:
        return 1.0 * t

    def dalpha(self, t: Scalar) -> Scalar:
        return -1.0 + 0.0 * t

    def dsigma(self, t: Scalar) -> Scalar:
        return 1.0 + 0.0 * t

    def time(self, lam: Scalar) -> Scalar:
        return 1.0 / (1.0 + exp(lam))


@dataclass(frozen=True)
class Trigonometric(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Source: Albergo and Vanden-Eijnden 2023, arXiv 2209.15571.
    """

    def alpha(self, t: Scalar) -> Scalar:
        return sin(_QUARTER * (1.0 - t))  # exactly 0 at t = 1

    def sigma(self, t: Scalar) -> Scalar:
        return sin(_QUARTER * t)

    def dalpha(self, t: Scalar) -> Scalar:
        return -_QUARTER * self.sigma(t)

    def dsigma(self, t: Scalar) -> Scalar:
        return _QUARTER * self.alpha(t)

    def time(self, lam: Scalar) -> Scalar:
        return atan(exp(-lam)) / _QUARTER


_QUARTER = 0.5 * math.pi
