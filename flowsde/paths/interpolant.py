"""Ways from a point of the data to a point of the noise, or of another distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .._scalar import Scalar, expand, sqrt
from .schedule import FlowMatching, Schedule

__all__ = ["Interpolant"]


@dataclass(frozen=True)
class Interpolant:
    """x_t = alpha(t) x0 + sigma(t) x1 + gamma(t) z, with z ~ N(0, 1) of its own.

        gamma(t) = bridge sqrt(t (T - t) / T),    T the schedule's horizon

    With ``bridge`` at 0 this is any schedule's line from x0 to x1, the straight one by default.
    Otherwise it is that line with a Brownian bridge about it, of diffusion ``bridge``.

    Args:
        schedule: alpha and sigma, the weights of the two ends.
        bridge: deviation of the bridge a root of time.

    Raises:
        ValueError: on a negative deviation.

    Source: Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797; Tong et al. 2023,
    arXiv 2302.00482.
    """

    schedule: Schedule = FlowMatching()
    bridge: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.bridge < math.inf:
            raise ValueError(f"bridge is a standard deviation >= 0; got {self.bridge}")

    @property
    def horizon(self) -> float:
        """The time at which x1 stands."""
        return self.schedule.horizon

    def gamma(self, t: Scalar) -> Scalar:
        """Standard deviation of x_t given its ends."""
        return self.bridge * sqrt(t * (self.horizon - t) / self.horizon)

    def dgamma(self, t: Scalar) -> Scalar:
        """d gamma / dt, unbounded towards both ends."""
        return 0.5 * self.bridge**2 * (1.0 - 2.0 * t / self.horizon) / self.gamma(t)

    def point(self, t: Scalar, x0: Tensor, x1: Tensor, z: Tensor | None = None) -> Tensor:
        """x_t at a 0-d or ``(batch,)`` time; without z, its mean given the ends."""
        alpha, sigma = self.schedule(t)
        mean = expand(alpha, x0) * x0 + expand(sigma, x1) * x1
        return mean if z is None else mean + expand(self.gamma(t), z) * z

    def velocity(self, t: Scalar, x0: Tensor, x1: Tensor, z: Tensor | None = None) -> Tensor:
        """dx_t/dt, with the ends and z held."""
        alpha, sigma = self.schedule.dalpha(t), self.schedule.dsigma(t)
        mean = expand(alpha, x0) * x0 + expand(sigma, x1) * x1
        return mean if z is None else mean + expand(self.dgamma(t), z) * z
