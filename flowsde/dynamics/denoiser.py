"""What a score network knows: E[x_0 | x_t], in whichever parametrization it was trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._scalar import Scalar, expand
from .._state import check_like
from ..paths.schedule import Schedule

__all__ = [
    "Data", "Denoiser", "EDMPrediction", "NoisePrediction", "Point", "Prediction", "Score",
    "VPrediction", "Velocity",
]  # fmt: skip


class Point(NamedTuple):
    """The schedule at a time, shaped to multiply a state."""

    alpha: Scalar
    sigma: Scalar
    dalpha: Scalar
    dsigma: Scalar

    @classmethod
    def at(cls, schedule: Schedule, t: Scalar, like: Tensor) -> Point:
        parts = (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma)
        return cls(*(expand(part(t), like) for part in parts))


class Prediction(ABC):
    """What a network's output means. x = alpha x0 + sigma eps throughout.

    Attributes:
        needs_signal: whether x0 cannot be had where alpha = 0.
    """

    needs_signal: bool = False

    def inputs(self, at: Point, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown: its noise condition and its input."""
        return t, x

    @abstractmethod
    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        """x0 from the output."""

    @abstractmethod
    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        """The output that names x0 and eps exactly."""

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        """The noise from the output."""
        return (x - at.alpha * self.data(at, x, output)) / at.sigma

    def velocity(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps, the drift of the probability flow."""
        x0 = self.data(at, x, output)
        return at.dalpha * x0 + at.dsigma / at.sigma * (x - at.alpha * x0)


@dataclass(frozen=True)
class Data(Prediction):
    """The output is x0.

    Args:
        needs_signal: whether what makes it cannot where alpha = 0.
    """

    needs_signal: bool = False

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return output

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        return x0


@dataclass(frozen=True)
class NoisePrediction(Prediction):
    """The output is eps. Refused where the signal is zero: it says nothing about x0 there."""

    needs_signal = True

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return (x - at.sigma * output) / at.alpha

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return output

    def velocity(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        slope = at.dalpha / at.alpha
        return slope * x + (at.dsigma - slope * at.sigma) * output

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True)
class Score(Prediction):
    """The output is the score, grad log p_t(x) = -eps / sigma. Refused where the signal is 0."""

    needs_signal = True

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return (x + at.sigma * at.sigma * output) / at.alpha

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return -at.sigma * output

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        return -eps / at.sigma


@dataclass(frozen=True)
class VPrediction(Prediction):
    """The output is v = alpha eps - sigma x0. Source: Salimans and Ho 2022, arXiv 2202.00512."""

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return (at.alpha * x - at.sigma * output) / (at.alpha**2 + at.sigma**2)

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return (at.sigma * x + at.alpha * output) / (at.alpha**2 + at.sigma**2)

    def velocity(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return at.dalpha * self.data(at, x, output) + at.dsigma * self.eps(at, x, output)

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        return at.alpha * eps - at.sigma * x0


@dataclass(frozen=True)
class Velocity(Prediction):
    """The output is the probability flow's velocity, alpha' x0 + sigma' eps."""

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        turn = at.dsigma * at.alpha - at.sigma * at.dalpha
        return (at.dsigma * x - at.sigma * output) / turn

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        turn = at.dsigma * at.alpha - at.sigma * at.dalpha
        return (at.alpha * output - at.dalpha * x) / turn

    def velocity(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return output

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        return at.dalpha * x0 + at.dsigma * eps


@dataclass(frozen=True, eq=False)
class EDMPrediction(Prediction):
    """EDM's preconditioning, on z = x / alpha at noise s = sigma / alpha.

        x0 = c_skip z + c_out F(c_in z, c_noise),    c_noise = log(s) / 4,
        c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2)

    Args:
        sigma_data: d, the data's standard deviation: a float, or a tensor shaped as one sample.
            Where the data's principal axes are its coordinates, a tensor makes F = 0 the exact
            denoiser of the full-covariance Gaussian, and F learns what is not Gaussian.

    Source: Karras et al. 2022, arXiv 2206.00364, table 1.
    """

    sigma_data: Scalar = 0.5
    needs_signal = True

    def _ratio(self, at: Point, like: Tensor) -> tuple[Scalar, Scalar, Scalar]:
        """s, d and s^2 + d^2."""
        d = self.sigma_data
        if isinstance(d, Tensor):
            d = d.to(like)
        s = at.sigma / at.alpha
        return s, d, s * s + d * d

    def inputs(self, at: Point, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s, _, total = self._ratio(at, x)
        noise = torch.as_tensor(s).to(x)
        noise = noise.reshape(t.shape).clamp(min=torch.finfo(x.dtype).tiny).log() / 4.0
        return noise, x / at.alpha * total**-0.5

    def data(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        s, d, total = self._ratio(at, x)
        return d * d / total * (x / at.alpha) + s * d * total**-0.5 * output

    def eps(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        s, d, total = self._ratio(at, x)
        return s / total * (x / at.alpha) - d * total**-0.5 * output

    def velocity(self, at: Point, x: Tensor, output: Tensor) -> Tensor:
        return at.dalpha * self.data(at, x, output) + at.dsigma * self.eps(at, x, output)

    def target(self, at: Point, x0: Tensor, eps: Tensor) -> Tensor:
        s, d, total = self._ratio(at, x0)
        return (s * x0 / d - d * eps) * total**-0.5


class Denoiser(nn.Module):
    """The posterior mean E[x_0 | x_t], and everything that follows from it.

    Args:
        network: ``network(t, x, *args)``, output shaped as x; t is 0-d or ``(batch,)`` (EDM
            shows it log(sigma / alpha) / 4 in the place of t).
        schedule: how the data was noised.
        prediction: what the network's output means.

    Called as ``denoiser(t, x, *args)`` it returns x0; ``noise``, ``score`` and ``velocity`` take
    the same arguments.
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: Schedule, prediction: Prediction
    ) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule is a flowsde.paths.Schedule; got {type(schedule).__name__}")
        if not isinstance(prediction, Prediction):
            raise TypeError(f"prediction is an object such as NoisePrediction(); got {prediction}")
        self.network, self.schedule, self.prediction = network, schedule, prediction

    @property
    def precise(self) -> bool:
        """Whether the network takes times in float32 beside states of half precision, whose own
        numbers lie too far apart: it says so by an attribute ``precise_time``.
        """
        return bool(getattr(self.network, "precise_time", False))

    def output(
        self, t: Tensor, x: Tensor, *args: Any, at: Point | None = None
    ) -> tuple[Point, Tensor]:
        """The schedule at t, and what the network says there."""
        at = Point.at(self.schedule, t, x) if at is None else at
        output = self.network(*self.prediction.inputs(at, t, x), *args)
        return at, check_like(output, x, "the network")

    def forward(self, t: Tensor, x: Tensor, *args: Any, at: Point | None = None) -> Tensor:
        """x0, shaped as x."""
        at, output = self.output(t, x, *args, at=at)
        return self.prediction.data(at, x, output)

    def noise(self, t: Tensor, x: Tensor, *args: Any, at: Point | None = None) -> Tensor:
        """E[eps | x_t]."""
        at, output = self.output(t, x, *args, at=at)
        return self.prediction.eps(at, x, output)

    def score(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        """grad log p_t(x)."""
        at, output = self.output(t, x, *args)
        return -self.prediction.eps(at, x, output) / at.sigma

    def velocity(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        """dx/dt of the probability flow."""
        at, output = self.output(t, x, *args)
        return self.prediction.velocity(at, x, output)
