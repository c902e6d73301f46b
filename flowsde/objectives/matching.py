"""Training a continuous flow without solving it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._scalar import expand
from ..dynamics.base import Dynamics
from ..paths.schedule import FlowMatching as Straight
from ..paths.schedule import Schedule
from .score_matching import TimeLaw, UniformTime

__all__ = ["FlowMatching"]


class FlowMatching(nn.Module):
    """E | f(t, x_t) - (alpha' x_0 + sigma' eps) |^2 over x_t = alpha x_0 + sigma eps.

    The mean over components. Trains an ODE whose noise stands at t = 1, a CNF for one.

    Args:
        dynamics: dx/dt = f(t, x, *args); takes ``(batch,)`` times.
        schedule: the straight line by default.
        times: law of t, uniform by default.

    Source: Lipman et al. 2023, arXiv 2210.02747.
    """

    def __init__(
        self, dynamics: Dynamics, schedule: Schedule | None = None, times: TimeLaw | None = None
    ) -> None:
        super().__init__()
        if not dynamics.batched_time:
            raise TypeError("flow matching draws a time a sample: ODE(f, batched_time=True)")
        self.dynamics, self.schedule = dynamics, schedule or Straight()
        self.times = times or UniformTime(0.0, self.schedule.horizon)

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        t = self.times.sample(len(x), x, generator)
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        alpha, sigma, dalpha, dsigma = (
            expand(part(t), x)
            for part in (
                self.schedule.alpha, self.schedule.sigma,
                self.schedule.dalpha, self.schedule.dsigma,
            )
        )  # fmt: skip
        velocity = self.dynamics(t, alpha * x + sigma * eps, *args)
        return (velocity - dalpha * x - dsigma * eps).square().mean()
