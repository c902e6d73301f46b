"""A state with one more number a sample that rides along."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._state import State, describe
from ..dynamics.base import Dynamics, Noise
from ..dynamics.discrete import Chain

__all__ = ["Augmented", "fill", "noise_of"]


class Augmented(Dynamics):
    """Dynamics of z = [y, l]: a state ``(batch, d)``, and in the last column a number that y drives
    and that acts on nothing. One tensor, so that every kind of noise, and every integrator for it,
    takes z as it takes y; the Brownian path that drives y is that of y alone.

    ``enter(y)`` starts it, ``leave(z)`` gives (y, l) of a state or of saved states.
    """

    def __init__(self, dynamics: Dynamics, noise: Noise | None) -> None:
        super().__init__()
        self.noise = noise
        self.follow(dynamics)

    def enter(self, y: Tensor) -> Tensor:
        """z of y, with l = 0."""
        return functional.pad(y, (0, 1))

    def leave(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(y, l) of z, ``(..., d)`` and ``(...,)``."""
        return z[..., :-1], z[..., -1]

    @abstractmethod
    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """The drift of y, and that of l, ``(batch,)``."""

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        drift, rate = self.drift_and_rate(t, y[:, :-1], *args)
        return torch.cat((drift, rate[:, None]), -1)

    @staticmethod
    def state(z: State) -> Tensor:
        """y, of a z that has been looked at."""
        if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[1] < 2 or z.is_complex():
            raise TypeError(
                f"the state is a real (batch, d + 1) tensor, made by enter(y) of a (batch, d) one; "
                f"got {describe(z)}"
            )
        return z[:, :-1]

    def check_span(self, t0: float, t1: float) -> None:
        if t1 < t0:
            raise ValueError(
                f"{type(self).__name__.strip('_')} is a law of paths that run forwards, t1 >= t0; "
                f"got {t0} to {t1}. Write the SDE in the time in which it runs"
            )


def noise_of(sde: Dynamics) -> Noise:
    """The noise of an SDE, or a TypeError."""
    if isinstance(sde, Chain) or sde.noise is None:
        raise TypeError(
            f"{type(sde).__name__} has no noise: give an SDE(f, g, noise='diagonal') or another "
            "stochastic dynamics"
        )
    return sde.noise


def fill(g: Any, y: Tensor) -> Tensor:
    """A diagonal or scalar diffusion, a number or a tensor, in the shape of y."""
    return g.expand_as(y) if isinstance(g, Tensor) else torch.full_like(y, g)
