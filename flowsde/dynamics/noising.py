"""The process that turns data into noise, and the two that turn it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._scalar import Scalar, exp, expand, expm1, sqrt, where, whole
from ..paths.schedule import Schedule
from .base import Dynamics, Noise, SemiLinear
from .denoiser import Data, Denoiser, Point

__all__ = ["AnnealedLangevin", "LinearSDE", "Reverse", "as_denoiser"]


class _NoisedSplit(SemiLinear):
    """What both forms of a noised state's equation share: the clock is lambda."""

    noising = True

    def __init__(self, denoiser: Denoiser, eta: float) -> None:
        self._denoiser, self._schedule, self._eta2 = denoiser, denoiser.schedule, eta * eta

    def clock(self, t: Scalar) -> Scalar:
        return self._schedule.half_log_snr(t)

    def time(self, s: Scalar) -> Scalar:
        return self._schedule.time(s)

    def _ask(
        self, what: Callable[..., Tensor], t: Tensor, x: Tensor, *args: Any, now: Scalar | None
    ) -> Tensor:
        """What the denoiser says, with the schedule worked out on the host if it can be."""
        at = Point.at(self._schedule, t if now is None else now, x)
        if now is not None and self._denoiser.precise and t.dtype.itemsize < 4:
            t = torch.as_tensor(now, dtype=torch.float32, device=x.device)
        return what(t, x, *args, at=at)


class _DataSplit(_NoisedSplit):
    """scale = alpha, clock = lambda, rate = -(1 + eta^2), residual = (1 + eta^2) x0_hat.

    In x, with h = lambda1 - lambda0:
        x1 = sigma1/sigma0 e^(-eta^2 h) x0 + (alpha1 - alpha0 sigma1/sigma0 e^(-eta^2 h)) x0_hat
    which is finite where alpha0 = 0 and where sigma1 = 0.
    """

    def __init__(self, denoiser: Denoiser, eta: float) -> None:
        super().__init__(denoiser, eta)
        self.rate, self._dual = -(1.0 + self._eta2), _NoiseSplit(denoiser, eta)

    @property
    def dual(self) -> SemiLinear:
        return self._dual

    def scale(self, t: Scalar) -> Scalar:
        return self._schedule.alpha(t)

    def residual(self, t: Tensor, x: Tensor, *args: Any, now: Scalar | None = None) -> Tensor:
        x0 = self._ask(self._denoiser, t, x, *args, now=now)
        return (1.0 + self._eta2) * x0 if self._eta2 else x0

    def weights(self, t0: Scalar, t1: Scalar) -> tuple[Scalar, Scalar]:
        (alpha0, sigma0), (alpha1, sigma1) = self._schedule(t0), self._schedule(t1)
        decay = sigma1 / sigma0
        if self._eta2:
            decay = decay * exp(-self._eta2 * (self.clock(t1) - self.clock(t0)))
        return decay, (alpha1 - alpha0 * decay) / (1.0 + self._eta2)

    def deviation(self, t0: Scalar, t1: Scalar) -> Scalar | None:
        if not self._eta2:
            return None
        h = self.clock(t1) - self.clock(t0)
        return self._schedule.sigma(t1) * sqrt(-expm1(-2.0 * self._eta2 * h))


class _NoiseSplit(_NoisedSplit):
    """scale = sigma, clock = lambda, rate = 1, residual = -(1 + eta^2) eps_hat.

    In x:
        x1 = alpha1/alpha0 x0 + (1 + eta^2) (sigma1 - sigma0 alpha1/alpha0) eps_hat
    which is finite where sigma1 = 0: there eta is taken as 0, so that x1 = alpha1 x0_hat and no
    noise is left over. Where alpha0 = 0 noise says nothing about data.
    """

    rate = 1.0

    def scale(self, t: Scalar) -> Scalar:
        return self._schedule.sigma(t)

    def residual(self, t: Tensor, x: Tensor, *args: Any, now: Scalar | None = None) -> Tensor:
        return -(1.0 + self._eta2) * self._ask(self._denoiser.noise, t, x, *args, now=now)

    def weights(self, t0: Scalar, t1: Scalar) -> tuple[Scalar, Scalar]:
        (alpha0, sigma0), (alpha1, sigma1) = self._schedule(t0), self._schedule(t1)
        growth = alpha1 / alpha0
        gain = where(sigma1 == 0, 1.0 + self._eta2, 1.0 + 0.0 * sigma1)
        return growth, (sigma0 * growth - sigma1) / gain

    def deviation(self, t0: Scalar, t1: Scalar) -> Scalar | None:
        if not self._eta2:
            return None
        (alpha0, sigma0), (alpha1, sigma1) = self._schedule(t0), self._schedule(t1)
        grown = sigma0 * (alpha1 / alpha0)
        square = self._eta2 * (grown - sigma1) * (grown + sigma1)  # sigma1^2 eta^2 expm1(2 h)
        return where(sigma1 == 0, 0.0, sqrt(square))


class LinearSDE(Dynamics):
    """dx = (alpha'/alpha) x dt + g(t) dW, with g^2 = 2 sigma^2 (sigma'/sigma - alpha'/alpha).

    Its transition from data is exact: x_t given x_0 is N(alpha x_0, sigma^2).

    Args:
        schedule: alpha and sigma.

    Source: Song et al. 2021, arXiv 2011.13456.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule is a flowsde.paths.Schedule; got {type(schedule).__name__}")
        self.schedule = schedule
        self.noise = Noise("diagonal", additive=True)
        self.horizon = schedule.horizon

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        return expand(self.schedule.dalpha(t) / self.schedule.alpha(t), y) * y

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Scalar:
        return expand(self.schedule.diffusion(t), y)

    def marginal(self, t: Scalar, x0: Tensor) -> tuple[Tensor, Scalar]:
        """Mean and standard deviation of x_t given x_0."""
        alpha, sigma = self.schedule(t)
        return expand(alpha, x0) * x0, expand(sigma, x0)

    def reverse_sde(self, denoiser: Callable[..., Tensor], eta: float = 1.0) -> Reverse:
        """The reverse-time SDE, to be run from the horizon down to data.

            dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW,    score = (alpha x0 - x) / sigma^2

        Args:
            denoiser: a ``Denoiser``, or any ``(t, x, *args) -> x0``.
            eta: how much noise; 1 is Anderson's reversal, 0 the probability flow. Every eta has
                the same marginals.
        """
        return Reverse(as_denoiser(denoiser, self.schedule), eta)

    def probability_flow(self, denoiser: Callable[..., Tensor]) -> Reverse:
        """The ODE with the marginals of the noising process: data at 0, noise at the horizon."""
        return self.reverse_sde(denoiser, eta=0.0)

    def annealed_langevin(
        self, denoiser: Callable[..., Tensor], levels: Tensor, steps: int = 100, eps: float = 2e-5
    ) -> AnnealedLangevin:
        """NCSN's dynamics: see ``AnnealedLangevin``."""
        return AnnealedLangevin(as_denoiser(denoiser, self.schedule), levels, steps, eps)


def as_denoiser(denoiser: Callable[..., Tensor], schedule: Schedule) -> Denoiser:
    """A ``Denoiser`` on this schedule; a plain callable is taken to return x0."""
    if not isinstance(denoiser, Denoiser):
        return Denoiser(denoiser, schedule, Data())
    if denoiser.schedule != schedule:
        raise ValueError(
            f"the denoiser was made for {denoiser.schedule}, the process is {schedule}: "
            "use one schedule for both"
        )
    return denoiser


class Reverse(Dynamics):
    """The reverse SDE (eta > 0) or the probability flow (eta = 0) of a denoiser."""

    def __init__(self, denoiser: Denoiser, eta: float) -> None:
        super().__init__()
        if eta < 0:
            raise ValueError(f"eta scales noise: eta >= 0; got {eta}")
        self.denoiser, self.eta = denoiser, float(eta)
        self.horizon = denoiser.schedule.horizon
        if eta:
            self.noise = Noise("diagonal", additive=True)

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        at, output = self.denoiser.output(t, y, *args)
        prediction = self.denoiser.prediction
        drift = prediction.velocity(at, y, output)
        if self.eta:
            rate = at.dsigma - at.sigma * at.dalpha / at.alpha  # g^2 / (2 sigma)
            drift = drift + self.eta**2 * rate * prediction.eps(at, y, output)
        return drift

    def hint(self, t: float) -> str:
        if self.denoiser.schedule.sigma(t) > 0.0:
            return ""
        return (
            f". There is no noise at t = {t:g}, where slopes may have no value: stay a little away "
            "from it, as at 1e-3 (for a density Flow(t0=1e-3)), or use DDIM() or DPMSolverPP(), "
            "which land there"
        )

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Scalar | None:
        if not self.eta:
            return None
        return expand(self.eta * self.denoiser.schedule.diffusion(t), y)

    def split(self) -> SemiLinear:
        return _DataSplit(self.denoiser, self.eta)

    def check_span(self, t0: float, t1: float) -> None:
        if self.eta and t1 > t0:
            raise ValueError(
                f"the reverse SDE runs from noise down to data, t1 < t0; got {t0} to {t1}. To "
                "noise data, integrate LinearSDE(schedule) itself"
            )
        prediction, schedule = self.denoiser.prediction, self.denoiser.schedule
        if not (schedule.holds(t0) and schedule.holds(t1)):
            raise ValueError(
                f"{schedule} has neither noise before t = 0 nor signal below 0; got a solve from "
                f"{t0} to {t1}: its times are those of [0, {schedule.horizon:g}]"
            )
        if prediction.needs_signal and min(schedule.alpha(t0), schedule.alpha(t1)) <= 0.0:
            raise ValueError(
                f"{prediction} says nothing about x0 where the signal is zero, and {schedule} "
                f"has none at an end of [{t0}, {t1}]: start at a slightly smaller time (such as "
                "0.999), or train with VPrediction(), Velocity() or Data()"
            )


class AnnealedLangevin(Dynamics):
    """Langevin dynamics at one noise level after the other, in a time that counts its steps.

        dx = a/2 score(levels[i], x) dk + sqrt(a) dW,    a = eps (sigma_i / sigma_last)^2

    with i = floor(k / steps). NCSN's sampler is ``EulerMaruyama()`` with ``Fixed(dt=1.0)`` from 0
    to the horizon, and then ``denoiser(levels[-1], x)``, where the last noise is to go.

    Args:
        denoiser: a ``Denoiser``.
        levels: ``(n,)`` times of its schedule, from noise to data.
        steps: of each level.
        eps: the size of a step at the last one.

    Raises:
        ValueError: on levels that are not ``(n,)``, or rise, or steps or eps that are not positive.

    Source: Song and Ermon 2019, arXiv 1907.05600, algorithm 1.
    """

    levels: Tensor

    def __init__(self, denoiser: Denoiser, levels: Tensor, steps: int, eps: float) -> None:
        super().__init__()
        if levels.ndim != 1 or not len(levels) or not whole(steps, 1) or not eps > 0.0:
            raise ValueError(
                "annealed Langevin dynamics takes levels of shape (n,), a whole number of steps >= "
                f"1 and eps > 0; got {tuple(levels.shape)}, {steps} and {eps}"
            )
        if bool((levels.diff() > 0).any()):
            raise ValueError(
                "annealed Langevin dynamics goes from noise to data, down its levels: give "
                "levels.flip(0)"
            )
        self.denoiser, self.steps, self.eps = denoiser, steps, float(eps)
        self.register_buffer("levels", levels)
        self.noise = Noise("diagonal", additive=True)
        self.horizon = float(steps * len(levels))

    def _level(self, k: Tensor) -> Tensor:
        """The time of the schedule that step k is at."""
        index = (k / self.steps).floor().long().clamp(0, len(self.levels) - 1)
        return self.levels[index].to(k.dtype)

    def _size(self, t: Tensor) -> Tensor:
        sigma = torch.as_tensor(self.denoiser.schedule.sigma(t))
        last = torch.as_tensor(self.denoiser.schedule.sigma(self.levels[-1].to(t.dtype)))
        return self.eps * (sigma / last) ** 2

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        level = self._level(t)
        return expand(0.5 * self._size(level), y) * self.denoiser.score(level, y, *args)

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        return expand(self._size(self._level(t)).sqrt(), y)
