"""The latent SDE: a prior over paths, and a posterior that shares its noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dynamics.differential import SDE
from ..integrators.stochastic import EulerMaruyama
from ..nn import MLP
from ..solve import Solver
from ..stepping import Fixed
from ..transforms.augmented import Augmented, noise_of
from ._latent import beside, check_noise, divergence, draw, seen_log_prob

__all__ = ["LatentSDE"]


class LatentSDE(nn.Module):
    """Series seen through noise, of a diffusion that is not seen.

        prior        z(t_0) ~ N(m, s^2),       dz = h(t, z) dt + g(z) dW
        posterior    z(t_0) ~ N(m_x, s_x^2),   dz = (h(t, z) + g(z) u(t, z, c_x(t))) dt + g(z) dW
        likelihood   x_i ~ N(W z(t_i) + b, noise^2)

    c_x(t) is what a GRU, run backwards over the series, knows at the first of the times after t,
    together with the time until then. u = k (m - z) pulls to a place m(t, z, c) by k(t, z, c) > 0;
    |u|^2 / 2 over time is what ``path_kl`` of the two gathers.
    ``prior`` and ``posterior`` are SDEs, the latter with the context ``(batch, n, context)`` as its
    argument. A series x is ``(batch, n, channels)`` at the n times, not-a-number where nothing was
    seen.

    Args:
        times: ``(n,)``, increasing; the same for all series, as ``series.Batch.shared`` makes them
            of series at times of their own.
        channels: of a series.
        noise: standard deviation of an observation.
        latent, context, width: sizes of z, of c, and of the networks' hidden layers (a quarter of
            it for g, of which every component has its own).
        solver: of every solve; by default Euler-Maruyama in 100 steps. Give one whose steps meet
            the times, such as ``Grid(times)``, and are short enough for the posterior to steer:
            what one step's noise adds, g sqrt(dt), is well under ``noise``.

    Source: Li et al. 2020, "Scalable gradients for stochastic differential equations", arXiv
    2001.01328.
    """

    times: Tensor

    def __init__(
        self, times: Tensor, channels: int, noise: float, *, latent: int = 4, context: int = 32,
        width: int = 64, solver: Solver = Solver(EulerMaruyama(), Fixed(steps=100)),
    ) -> None:  # fmt: skip
        super().__init__()
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
            raise ValueError("times is (n,), increasing, of two times at least")
        self.register_buffer("times", times)
        self.noise, self.solver = check_noise(noise), solver
        shared = _Diagonal(latent, width // 4)
        self.prior = SDE(_Prior(latent, width), shared, noise="diagonal", batched_time=True)
        drift = _Steered(self.prior, times, latent, context, width)
        self.posterior = SDE(drift, shared, noise="diagonal", batched_time=True)
        self.encoder = nn.GRU(2 * channels + 1, width, batch_first=True)
        known = width + 2 * channels + 1
        self.reader, self.starter = nn.Linear(known, context), nn.Linear(known, 2 * latent)
        self.start = nn.Parameter(torch.zeros(2, latent))  # the prior's m and log s
        self.decoder = nn.Linear(latent, channels)
        nn.init.orthogonal_(self.decoder.weight)  # z starts on the scale of x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(m_x, s_x, c_x): the posterior's start, ``(batch, latent)`` each, and its context."""
        if x.ndim != 3 or x.shape[1] != len(self.times):
            raise ValueError(
                f"a series is (batch, {len(self.times)}, channels), one row a time; got "
                f"{tuple(x.shape)}"
            )
        seen = ~torch.isnan(x)
        gaps = functional.pad(self.times.diff(), (0, 1))[:, None].expand(*x.shape[:2], 1)
        inputs = torch.cat((torch.where(seen, x, 0.0), seen.to(x.dtype), gaps.to(x.dtype)), -1)
        known = torch.cat((self.encoder(inputs.flip(1))[0].flip(1), inputs), -1)
        mean, log_std = self.starter(known[:, 0]).to(x.dtype).chunk(2, -1)
        return mean, log_std.exp(), self.reader(known)

    def elbo(self, x: Tensor, *, generator: torch.Generator, weight: float = 1.0) -> Tensor:
        """A lower bound of log p(x), in one sample ``(batch,)``.

            log p(x | z) - weight (KL(q(z_0) || p(z_0)) + KL(posterior || prior))

        Args:
            generator: of the draws.
            weight: of the divergences; below one while training warms up.
        """
        mean, std, context = self.encode(x)
        both = _WithDivergence(self.posterior)
        start = both.enter(draw(mean, std, generator))
        z, kl = both.leave(self._solve(both, start, self.times, generator, (context,)))
        fit = seen_log_prob(x, self.decoder(z), self.noise)
        return fit - weight * (kl[:, -1] + divergence(mean, std, *self.start))

    def infer(
        self, x: Tensor, *, generator: torch.Generator, times: Tensor | None = None
    ) -> Tensor:
        """What lies under the series: one path a series of the posterior, decoded at its times or
        at others between them, ``(batch, n, channels)``.
        """
        mean, std, context = self.encode(x)
        times = self.times if times is None else times
        if times.ndim != 1:
            raise ValueError(f"times is (n,), the same for all series; got {tuple(times.shape)}")
        start = draw(mean, std, generator)
        return self.decoder(self._solve(self.posterior, start, times, generator, (context,)))

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Series of the prior, ``(count, n, channels)``, without the noise of observation."""
        mean, std = self.start[0].expand(count, -1), self.start[1].exp().expand(count, -1)
        start = draw(mean, std, generator)
        return self.decoder(self._solve(self.prior, start, self.times, generator, ()))

    def _solve(
        self, dynamics: Any, z0: Tensor, times: Tensor, generator: torch.Generator, args: Any
    ) -> Tensor:
        """States at the times, ``(batch, n, ...)``."""
        t0, t1 = float(self.times[0]), float(self.times[-1])
        solution = self.solver.solve(
            dynamics, z0, t0, t1, args=args, save_at=times, generator=generator
        )
        assert isinstance(solution.ys, Tensor)
        return solution.ys.transpose(0, 1)


class _Prior(nn.Module):
    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.net = MLP([latent + 1, width, width, latent], nn.Softplus)

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        return self.net(beside(t, y))


class _Steered(nn.Module):
    """The posterior's drift, h + g u with u = k (m - z): k > 0 and m are a network's."""

    times: Tensor

    def __init__(self, prior: SDE, times: Tensor, latent: int, context: int, width: int) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.prior = prior
        self.net = MLP([latent + 2 + context, width, width, 2 * latent], nn.Softplus)

    def forward(self, t: Tensor, y: Tensor, context: Tensor) -> Tensor:
        return self.steer(t, y, context)[0]

    def steer(self, t: Tensor, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The drift, and u."""
        times = self.times.to(t.dtype)  # t is rounded to it, and so are they
        i = torch.searchsorted(times, t.detach(), right=True).clamp(max=len(times) - 1)
        if t.ndim:
            now = context[torch.arange(len(y), device=y.device), i]
        else:
            now = context.index_select(1, i.reshape(1))[:, 0]
        wait = times[i] - t
        pull, aim = self.net(torch.cat((beside(wait, beside(t, y)), now), -1)).chunk(2, -1)
        control = functional.softplus(pull) * (aim - y)
        return self.prior(t, y) + self.prior.diffusion(t, y) * control, control


class _WithDivergence(Augmented):
    """[z, l] as of ``path_kl``, dl/dt = 1/2 |u|^2, by the control itself: h is evaluated once."""

    def __init__(self, posterior: SDE) -> None:
        super().__init__(posterior, noise_of(posterior))
        drift = posterior.f
        assert isinstance(drift, _Steered)
        self.posterior, self.drift = posterior, drift

    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        drift, control = self.drift.steer(t, y, *args)
        return drift, 0.5 * control.square().sum(-1)

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        return functional.pad(self.posterior.diffusion(t, y[:, :-1]), (0, 1))


class _Diagonal(nn.Module):
    """g_i(y_i) > 0: a network of its own for each component, all in one operation."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift, self.mix = (
            nn.Parameter(torch.empty(latent, width).uniform_(-1.0, 1.0)) for _ in range(3)
        )
        self.level = nn.Parameter(torch.zeros(latent))

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        hidden = functional.softplus(y[..., None] * self.scale + self.shift)
        mixed = (hidden * self.mix).sum(-1) / math.sqrt(self.mix.shape[1])
        return functional.softplus(mixed + self.level)
