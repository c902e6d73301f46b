"""The latent ODE: series of any times, of one start that an encoder reads out of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .._scalar import Scalar, exp
from ..dynamics.base import Dynamics
from ..dynamics.differential import ODE
from ..integrators.explicit import Dopri5, Midpoint
from ..nn import MLP
from ..solve import Solver
from ..stepping import Adaptive, Fixed
from ..transforms.augmented import Augmented
from ._latent import (
    check_channels,
    check_noise,
    divergence,
    draw,
    other_times,
    own_times,
    seen_log_prob,
    seen_rows,
)  # fmt: skip

__all__ = ["Encoder", "GapGRU", "LatentODE", "ODERNN"]


class Encoder(nn.Module, ABC):
    """What a series tells of one time.

    Attributes:
        width: of what it tells.
    """

    width: int

    @abstractmethod
    def forward(self, x: Tensor, times: Tensor, to: float) -> Tensor:
        """``(batch, width)``, at the time ``to``.

        Args:
            x: ``(batch, n, channels)``, rows in the order in which they are read, not-a-number
                where nothing was seen. Rows of nothing at the end say nothing.
            times: ``(batch, n)`` of the rows, monotone towards ``to``.
        """


class GapGRU(Encoder):
    """A GRU of the values, of which of them were seen, and of the time until the next row.

    Source: Chen et al. 2018, arXiv 1806.07366, section 5.
    """

    def __init__(self, channels: int, width: int = 25) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRU(2 * channels + 1, width, batch_first=True)

    def forward(self, x: Tensor, times: Tensor, to: float) -> Tensor:
        gaps = times.diff(dim=1, append=torch.full_like(times[:, :1], to)).abs()
        inputs = torch.cat((_marked(x), gaps[..., None].to(x.dtype)), -1)
        states = self.cell(inputs)[0]  # of those after a series's last row no use is made
        last = (seen_rows(x) * torch.arange(x.shape[1], device=x.device)).amax(1)
        return states[torch.arange(len(x), device=x.device), last]


class ODERNN(Encoder):
    """A GRU whose state moves by an ODE from one row to the next.

        h(t_0) = 0,    dh/dt = f(t, h) between rows,    h = GRU(x_i, h) where row i was seen

    All samples move at once, each over its own gap.

    Args:
        channels, width: of the series, and of h.
        dynamics: of h; by default a network with one hidden layer. It takes ``(batch,)`` times.
        solver: from one row to the next; its steps are given ones.
        cell: h of (row, h), the row's values next to where they were seen; by default a GRU.

    Source: Rubanova, Chen and Duvenaud 2019, "Latent ODEs for irregularly-sampled time series",
    arXiv 1907.03907.
    """

    def __init__(
        self, channels: int, width: int = 25, dynamics: Dynamics | None = None,
        solver: Solver = Solver(Midpoint(), Fixed(steps=1)), cell: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.solver = width, solver
        self.cell = nn.GRUCell(2 * channels, width) if cell is None else cell
        self.dynamics = _network(width, width) if dynamics is None else dynamics

    def forward(self, x: Tensor, times: Tensor, to: float) -> Tensor:
        h = self.states(x, times)[:, -1]
        return self._move(h, times[:, -1], torch.full_like(times[:, -1], to))

    def states(self, x: Tensor, times: Tensor) -> Tensor:
        """h after each row, ``(batch, n, width)``: of that row and those before it alone."""
        return self.walk(x, times)[1]

    def walk(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """h just before each row and after it, ``(batch, n, width)`` each."""
        if not x.shape[1]:
            raise ValueError("a series has one row at least")
        h, now = x.new_zeros(len(x), self.width), times[:, 0]
        before, after = list[Tensor](), list[Tensor]()
        for row, seen, t in zip(
            _marked(x).unbind(1), seen_rows(x)[..., None].unbind(1), times.unbind(1), strict=True
        ):
            h, now = self._move(h, now, t) if after else h, t
            before.append(h)
            h = torch.where(seen, self.cell(row, h), h)
            after.append(h)
        return torch.stack(before, 1), torch.stack(after, 1)

    def _move(self, h: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        end = self.solver.solve(self.dynamics, h, t0, t1).y1
        assert isinstance(end, Tensor)
        return end


class LatentODE(nn.Module):
    """Series seen through noise, of a path that its start decides.

        prior        z(t_0) ~ N(0, 1),       dz/dt = f(t, z)
        posterior    z(t_0) ~ N(m_x, s_x^2) of an encoder, run backwards over the series
        likelihood   x_i ~ N(decoder(z(t_i)), noise^2)

    A series x is ``(batch, n, channels)``, not-a-number where nothing was seen, at increasing times
    ``(n,)`` or, of its own, ``(batch, n)``, none before the start. However irregular they are, a
    batch is one solve: over the times of all, of which each series gathers its own. What
    ``series.collate`` filled up costs nothing and changes nothing.

    Args:
        channels, latent: sizes of x and z.
        noise: standard deviation of an observation; or, to be learned, a parameter that holds the
            logarithm of it, ``()`` or ``(channels,)``.
        encoder: ``GapGRU(channels)`` by default, or ``ODERNN(channels)``.
        dynamics: of z; by default a network with two hidden layers of 20.
        decoder: from ``(..., latent)`` to ``(..., channels)``; one hidden layer of 20 by default.
        intensity: from ``(..., latent)`` to ``(..., channels)``, the logarithms of rates: where one
            is given, when values are seen is a Poisson process of these, until the last one.
        start: the time t_0.
        solver: of every path.

    Raises:
        ValueError: on shapes that do not fit, times that do not increase or before the start.
        TypeError: on times that require a gradient.

    Source: Chen et al. 2018, "Neural ordinary differential equations", arXiv 1806.07366; Rubanova
    et al. 2019, arXiv 1907.03907.
    """

    def __init__(
        self, channels: int, latent: int, noise: float | nn.Parameter, *,
        encoder: Encoder | None = None, dynamics: Dynamics | None = None,
        decoder: nn.Module | None = None, intensity: nn.Module | None = None, start: float = 0.0,
        solver: Solver = Solver(Dopri5(), Adaptive(1e-3, 1e-4)),
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(noise, nn.Parameter) and noise.shape not in ((), (channels,)):
            raise ValueError(
                f"a learned noise is () or ({channels},), one logarithm a channel; got "
                f"{tuple(noise.shape)}"
            )
        self.channels, self.latent, self.start, self.solver = channels, latent, start, solver
        self.log_noise = noise if isinstance(noise, nn.Parameter) else math.log(check_noise(noise))
        self.encoder = GapGRU(channels) if encoder is None else encoder
        self.starter = nn.Linear(self.encoder.width, 2 * latent)
        self.dynamics = _network(latent, 20, 20) if dynamics is None else dynamics
        self.decoder = MLP([latent, 20, channels], nn.ReLU) if decoder is None else decoder
        self.intensity = intensity

    @property
    def noise(self) -> Scalar:
        """Standard deviation of an observation."""
        return exp(self.log_noise)

    def encode(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(m_x, s_x), ``(batch, latent)`` each: of the rows in which something was seen."""
        times = own_times(times, x, self.start)
        check_channels(x, self.channels, self.starter.weight)
        if not len(x):
            return x.new_zeros(0, self.latent), x.new_ones(0, self.latent)
        if not x.shape[1]:
            raise ValueError("a series has one row at least, if only of not-a-number")
        seen = seen_rows(x)
        order = torch.where(seen, -times, torch.inf).argsort(dim=1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        mine = torch.where(seen, times, self.start)  # rows of nothing wait at the start
        read = self.starter(self.encoder(x[rows, order], mine[rows, order], self.start))
        mean, log_std = read.to(x.dtype).chunk(2, -1)
        return mean, log_std.exp()

    def paths(self, z0: Tensor, times: Tensor) -> Tensor:
        """z of each start at its times ``(batch, n)``, in any order, ``(batch, n, latent)``.

        Every series is kept at the times of all: irregular ones share what times they can.
        """
        return self._solve(self.dynamics, z0, times)

    def _solve(self, dynamics: Dynamics, z0: Tensor, times: Tensor) -> Tensor:
        if times.requires_grad:
            raise TypeError("the times of series carry no gradient: detach() them")
        if not times.numel():
            return z0.new_empty((*times.shape, z0.shape[1]))
        if not bool((times >= self.start).all()):
            raise ValueError(f"times are numbers from {self.start}, the start, on")
        union, place = torch.unique(times, return_inverse=True)
        end = float(union[-1])
        ys = self.solver.solve(dynamics, z0, self.start, end, save_at=union).ys
        assert isinstance(ys, Tensor)
        return ys[place, torch.arange(len(z0), device=z0.device)[:, None]]

    def elbo(
        self, x: Tensor, times: Tensor, given: Tensor | None = None, *,
        generator: torch.Generator, weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """A lower bound of log p(x), in one sample ``(batch,)``.

            log p(x | z) - weight KL(q(z_0) || p(z_0))

        With an intensity log p(x | z) has two terms more, of the times at which values were seen:

            sum_i log lambda(z(t_i)) - integral of lambda(z(t)) dt from t_0 to the last of them

        Args:
            given: what the encoder reads, shaped as x: x, or what was seen of it by a certain time,
                so that the posterior learns to forecast the rest.
            generator: of the draws.
            weight: of the divergence; below one while training warms up.
        """
        if given is not None and given.shape != x.shape:
            raise ValueError(f"given is shaped as x, {tuple(x.shape)}; got {tuple(given.shape)}")
        mean, std = self.encode(x if given is None else given, times)
        at = torch.where(seen_rows(x), times.expand(x.shape[:2]), self.start)
        z0, zero = draw(mean, std, generator), mean.new_zeros(self.latent)
        if self.intensity is None:
            z, fit = self.paths(z0, at), zero.new_zeros(len(x))
        else:
            both = _Counted(self.dynamics, self.intensity)
            z, expected = both.leave(self._solve(both, both.enter(z0), at))
            logs = self.intensity(z)
            if logs.shape != x.shape:
                raise ValueError(
                    f"the intensity has a logarithm for each of the series' {tuple(x.shape)}; got "
                    f"{tuple(logs.shape)}: give it as many outputs as there are channels"
                )
            fit = torch.where(torch.isnan(x), 0.0, logs).sum((1, 2))
            fit = fit - expected.amax(1)
        fit = fit + seen_log_prob(x, self.decoder(z), self.noise)
        return fit - weight * divergence(mean, std, zero, zero)

    def infer(
        self, x: Tensor, times: Tensor, *, generator: torch.Generator, at: Tensor | None = None
    ) -> Tensor:
        """What lies under the series: one path a series of the posterior, decoded at its times or
        at others, between them or beyond, ``(batch, n, channels)``.
        """
        z0 = draw(*self.encode(x, times), generator)
        own = own_times(times, x, self.start)
        return self.decoder(self.paths(z0, own if at is None else other_times(at, own)))

    def sample(self, count: int, times: Tensor, *, generator: torch.Generator) -> Tensor:
        """Series of the prior, ``(count, n, channels)``, without the noise of observation."""
        zero = self.starter.weight.new_zeros(count, self.latent)
        z0 = draw(zero, torch.ones_like(zero), generator)
        return self.decoder(self.paths(z0, times.expand(count, -1)))


class _Counted(Augmented):
    """z, and how many values are to be seen so far: the integral of all rates."""

    def __init__(self, dynamics: Dynamics, intensity: nn.Module) -> None:
        super().__init__(dynamics, None)
        self.dynamics, self.intensity = dynamics, intensity

    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return self.dynamics(t, y), self.intensity(y).exp().sum(-1)


def _network(size: int, *hidden: int) -> ODE:
    """dy/dt = net(y)."""
    field = _Autonomous(MLP([size, *hidden, size]))
    return ODE(field, batched_time=True, rowwise=True)


class _Autonomous(nn.Module):
    """A network of the state alone, as a field."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def _marked(x: Tensor) -> Tensor:
    """Values, zero where nothing was seen, and where something was."""
    seen = ~torch.isnan(x)
    return torch.cat((torch.where(seen, x, 0.0), seen.to(x.dtype)), -1)
