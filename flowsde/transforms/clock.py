"""A semi-linear system in its own clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._scalar import exp, expand, to_float
from .._state import State, tree_map
from ..dynamics.base import Dynamics
from ..dynamics.noising import Reverse
from ..paths.schedule import Schedule

__all__ = ["NoiseClock", "change_clock"]


def change_clock(flow: Reverse) -> NoiseClock:
    """The probability flow in EDM's coordinates, z = x / alpha and s = sigma / alpha.

        dz/ds = eps_hat(t(s), alpha z) = (z - x0_hat) / s

    Its curves are straight where the denoiser stands still. ``Heun()`` on it is EDM's
    deterministic sampler. Use ``clock.enter(x)``, ``clock.leave(z)`` and ``clock.grid(times)``.

    Raises:
        TypeError: on dynamics other than a probability flow.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    if not isinstance(flow, Reverse) or flow.noise is not None:
        raise TypeError("change_clock takes LinearSDE(schedule).probability_flow(denoiser)")
    return NoiseClock(flow)


class NoiseClock(Dynamics):
    """dz/ds = eps_hat, from ``change_clock``."""

    def __init__(self, flow: Reverse) -> None:
        super().__init__()
        self.flow = flow
        self.follow(flow)
        self.horizon = to_float(self.clock(flow.horizon))

    @property
    def schedule(self) -> Schedule:
        return self.flow.denoiser.schedule

    def clock(self, t: Any) -> Any:
        """s = sigma / alpha at t."""
        return exp(-self.schedule.half_log_snr(t))

    def grid(self, times: Tensor) -> Tensor:
        """A grid in t, as a grid in s."""
        return torch.as_tensor(self.clock(times))

    def enter(self, t: float, x: State) -> State:
        """z of x at t."""
        return tree_map(lambda v: v / self.schedule.alpha(t), x)

    def leave(self, t: float, z: State) -> State:
        """x of z at t."""
        return tree_map(lambda v: v * self.schedule.alpha(t), z)

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        time = torch.as_tensor(self.schedule.time(-t.log()))
        return self.flow.denoiser.noise(time, expand(self.schedule.alpha(time), y) * y, *args)
