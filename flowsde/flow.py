"""One object for sampling and likelihood, whatever the dynamics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from . import _random
from .dynamics.base import Dynamics
from .solve import Solver
from .transforms.density import Divergence, log_density

__all__ = ["Base", "Flow", "Normal", "bits_per_dim"]


class Base(nn.Module, ABC):
    """Where a flow's noise comes from. Ours, since torch's ``sample`` takes no generator."""

    event_shape: torch.Size

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``(..., *event_shape)``, in nats."""

    @abstractmethod
    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        """``(count, *event_shape)`` from one seed, or from one seed a sample."""


class Normal(Base):
    """N(0, scale^2) in every component.

    Args:
        shape: of one sample.
        scale: standard deviation (sigma at the horizon, for a diffusion).
    """

    scale: Tensor

    def __init__(self, shape: int | tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale is a standard deviation > 0; got {scale}")
        self.event_shape = torch.Size((shape,) if isinstance(shape, int) else shape)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x / self.scale).flatten(x.ndim - len(self.event_shape))
        volume = z.shape[-1] * (0.5 * math.log(2.0 * math.pi) + self.scale.log())
        return -0.5 * z.square().sum(-1) - volume

    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        key = _random.keys(seed, count, self.scale.device, _random.BASE)
        steps = torch.zeros(1, dtype=torch.int64, device=self.scale.device)
        draw = _random.normal(key, steps, self.event_shape.numel(), self.scale.dtype)
        return self.scale * draw.reshape(count, *self.event_shape)


class Flow(nn.Module):
    """A base distribution and dynamics that carry it to data.

    Data at t = 0, noise at the dynamics' horizon. A coupling stack, a continuous normalizing
    flow and the probability flow of a diffusion are all this one class.

        log p(x) = log p_base(y(T)) - l(T),    (y, l) solved from (x, 0) at t0 to T
        x = y(t0),                             y solved from y(T) ~ base down to t0

    Args:
        base: of the noise, such as ``Normal(64)``.
        dynamics: a ``Map``, an ODE, a CDE or a probability flow.
        solver: how it is integrated; by default as ``solve`` would.
        t0: where data stands; a little above 0 for a diffusion whose score blows up there.
        divergence: ``Exact()`` by default, ``Hutchinson(n)`` for many dimensions (its draws come
            from ``generator``).

    Quacks like ``torch.distributions``: ``log_prob``, ``sample``, ``rsample``, ``event_shape``.
    """

    def __init__(
        self,
        base: Base,
        dynamics: Dynamics,
        solver: Solver | None = None,
        *,
        t0: float = 0.0,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__()
        self.base, self.dynamics, self.t0 = base, dynamics, t0
        self.solver = solver or Solver()
        self.density = log_density(dynamics, divergence) if divergence else log_density(dynamics)

    @property
    def event_shape(self) -> torch.Size:
        return self.base.event_shape

    def log_prob(self, x: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
        """Log-density in nats of x, ``(..., *event_shape)``; differentiable.

        Raises:
            ValueError: where x does not end with the event's shape.
        """
        event = self.event_shape
        if x.shape[x.ndim - len(event) :] != event:
            raise ValueError(f"x ends with the event's shape {tuple(event)}; got {tuple(x.shape)}")
        batch = x.shape[: x.ndim - len(event)]
        flat = x.reshape(-1, *event)
        start = flat, flat.new_zeros(len(flat))
        end = self.dynamics.horizon
        z, change = self.solver.solve(
            self.density, start, self.t0, end, args=args, generator=generator
        ).y1
        return (self.base.log_prob(z) - change).reshape(batch)

    def rsample(
        self,
        sample_shape: tuple[int, ...] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Samples ``(*sample_shape, *event_shape)`` that carry gradients to the parameters.

        Args:
            sample_shape: how many.
            args: further inputs of the dynamics.
            generator: from which one seed is drawn; or
            seed: an int, or one a sample, ``(count,)``: sample i is then the same in any batch.
        """
        z = self._noise(sample_shape, generator, seed)
        x = self.solver.solve(self.dynamics, z, self.dynamics.horizon, self.t0, args=args).y1
        return x.reshape(*sample_shape, *self.event_shape)

    @torch.no_grad()
    def sample(
        self,
        sample_shape: tuple[int, ...] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """``rsample`` without gradients."""
        return self.rsample(sample_shape, *args, generator=generator, seed=seed)

    def sample_and_log_prob(
        self,
        sample_shape: tuple[int, ...] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities, from one solve."""
        z = self._noise(sample_shape, generator, seed)
        start = z, self.base.log_prob(z)
        x, density = self.solver.solve(
            self.density, start, self.dynamics.horizon, self.t0, args=args, generator=generator
        ).y1
        return x.reshape(*sample_shape, *self.event_shape), density.reshape(sample_shape)

    def _noise(
        self,
        sample_shape: tuple[int, ...],
        generator: torch.Generator | None,
        seed: int | Tensor | None,
    ) -> Tensor:
        if seed is None:
            if generator is None:
                raise TypeError("sampling needs its randomness: generator=... or seed=...")
            seed = _random.draw_seed(generator)
        return self.base.sample(math.prod(sample_shape), seed)


def bits_per_dim(log_prob: Tensor, dims: int, levels: int) -> Tensor:
    """Bits a dimension of data of ``levels`` integer values, dequantised by uniform noise.

    For x = (v + u) / levels, v in 0 .. levels - 1 and u uniform on [0, 1):
    -log p(x) / (dims ln 2) + log2(levels). An upper bound of the discrete cross-entropy.

    Args:
        log_prob: of x, in nats.
        dims: components of one sample.
        levels: number of values.

    Source: Theis et al. 2016, arXiv 1511.01844.
    """
    return -log_prob / (dims * math.log(2.0)) + math.log2(levels)
