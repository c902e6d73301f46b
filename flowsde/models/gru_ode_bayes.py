"""GRU-ODE-Bayes: a filter of irregular series, whose state moves by a GRU in continuous time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ..dynamics.differential import ODE
from ..integrators.explicit import Midpoint
from ..nn import MLP
from ..solve import Solver
from ..stepping import Fixed
from ._latent import check_channels, check_noise, other_times, own_times
from .latent_ode import ODERNN

__all__ = ["GRUODEBayes"]


class GRUODEBayes(nn.Module):
    """A law of each value of a series, given what was seen before it.

        h(t_0) = 0,    dh/dt = (1 - z) (g - h) between rows
        r, z = sigmoid of affine maps of h,    g = tanh of an affine map of r h
        x_i ~ N(m(h), s(h)^2), channel by channel, of h just before the row
        h = GRU(p, h) at a row, p of values seen, m, s and (x_i - m) / s

    h stays in [-1, 1]. An ``ODERNN`` that tells laws: series are ``(batch, n, channels)``,
    not-a-number where nothing was seen, at increasing times ``(n,)`` or, of their own,
    ``(batch, n)``, none before the start.

    Args:
        channels, width: of the series, and of h.
        noise: standard deviation of an observation, for Bayes' rule: see ``elbo``.
        prepared: features of each channel in p.
        start: the time t_0.
        solver: from one row to the next; its steps are given ones.

    Source: De Brouwer et al. 2019, "GRU-ODE-Bayes", arXiv 1905.12374.
    """

    def __init__(
        self, channels: int, width: int = 50, noise: float = 0.01, *, prepared: int = 4,
        start: float = 0.0, solver: Solver = Solver(Midpoint(), Fixed(steps=4)),
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise, self.start = check_noise(noise), start
        field = ODE(_GRUField(width), batched_time=True, rowwise=True)
        cell = _Update(channels, width, prepared)
        self.filter = ODERNN(channels, width, field, solver, cell)

    def law(self, h: Tensor) -> Normal:
        """Of a row, of h just before it."""
        found: Normal = self.filter.cell.head(h)  # type: ignore[operator]
        return found

    def laws(self, x: Tensor, times: Tensor) -> tuple[Normal, Normal]:
        """Of each row: the law before it was seen, and after, ``(batch, n, channels)``.

        Raises:
            ValueError: on shapes that do not fit, times that do not increase or before the start.
        """
        before, after = self._states(x, self._times(x, times))
        return self.law(before), self.law(after)

    def _times(self, x: Tensor, times: Tensor) -> Tensor:
        """Of each row, of series that are checked."""
        times, weight = own_times(times, x, self.start), self.filter.cell.weight
        assert isinstance(weight, Tensor)
        check_channels(x, len(weight), weight)
        return times

    def log_prob(self, x: Tensor, times: Tensor) -> Tensor:
        """log p(x) = sum_i log p(x_i | rows before), of what was seen, ``(batch,)``."""
        before, _ = self._states(x, self._times(x, times))
        return _seen_sum(x, self._log_probs(x, self.law(before)))

    def elbo(
        self, x: Tensor, times: Tensor, *, generator: torch.Generator | None = None,
        weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """A lower bound of log p(x), ``(batch,)``, to train by with ``objectives.ELBO``.

            log p(x) - weight sum_i KL(N(m, s^2) N(x_i; ., noise^2) || N(m', s'^2))

        (m, s) from before row i, (m', s') from after it: tight where the update is Bayes' rule.

        Args:
            generator: nothing is drawn.
            weight: of the divergences.
        """
        before, after = self.laws(x, times)
        values = torch.where(torch.isnan(x), before.mean, x)
        precision = before.stddev**-2 + self.noise**-2
        mean = (before.mean * before.stddev**-2 + values * self.noise**-2) / precision
        posterior = Normal(mean, precision**-0.5, validate_args=False)
        missed = kl_divergence(posterior, after)
        return _seen_sum(x, self._log_probs(x, before) - weight * missed)

    def predict(self, x: Tensor, times: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at other times, ``(m,)`` or ``(batch, m)``, in any order and
        none before the start: each given the rows up to its time, ``(batch, m, channels)``.
        """
        times, n = self._times(x, times), x.shape[1]
        at = other_times(at, times)
        if not bool((at >= self.start).all()):
            raise ValueError(f"times are numbers from {self.start}, the start, on")
        nothing = x.new_full((*at.shape, x.shape[2]), torch.nan)
        both, order = torch.cat((times, at), 1).sort(dim=1, stable=True)
        place = order[..., None].expand(-1, -1, x.shape[2])
        before, _ = self._states(torch.cat((x, nothing), 1).gather(1, place), both)
        law = self.law(before)
        back = order.argsort(1)[:, n:, None].expand(-1, -1, x.shape[2])
        return law.mean.gather(1, back), law.stddev.gather(1, back)

    def _states(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """h before each row and after it, from the start on."""
        first = torch.full_like(times[:, :1], self.start)
        nothing = torch.full_like(x[:, :1], torch.nan)
        before, after = self.filter.walk(torch.cat((nothing, x), 1), torch.cat((first, times), 1))
        return before[:, 1:], after[:, 1:]

    def _log_probs(self, x: Tensor, law: Normal) -> Tensor:
        found: Tensor = law.log_prob(torch.where(torch.isnan(x), law.mean, x))  # type: ignore[no-untyped-call]
        return found


class _GRUField(nn.Module):
    """(1 - z) (g - h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates, self.candidate = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        reset, keep = self.gates(h).sigmoid().chunk(2, -1)
        return (1.0 - keep) * (self.candidate(reset * h).tanh() - h)


class _Head(nn.Module):
    """The law of a row, of h."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = MLP([width, width, 2 * channels], nn.ReLU)

    def forward(self, h: Tensor) -> Normal:
        mean, log_std = self.net(h).chunk(2, -1)
        return Normal(mean, log_std.exp(), validate_args=False)


class _Update(nn.Module):
    """h after a row, told how far off the law was that the head had for it."""

    def __init__(self, channels: int, width: int, prepared: int) -> None:
        super().__init__()
        self.head = _Head(channels, width)
        self.weight = nn.Parameter(torch.randn(channels, 4, prepared) * 0.5)
        self.bias = nn.Parameter(torch.zeros(channels, prepared))
        self.cell = nn.GRUCell(channels * prepared, width)

    def forward(self, row: Tensor, h: Tensor) -> Tensor:
        (values, seen), law = row.chunk(2, -1), self.head(h)
        error = (values - law.mean) / law.stddev
        told = torch.stack((values, law.mean, law.stddev.log(), error), -1)
        prepared = (torch.einsum("bcf,cfp->bcp", told, self.weight) + self.bias).relu()
        return self.cell((prepared * seen[..., None]).flatten(1), h)


def _seen_sum(x: Tensor, terms: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), 0.0, terms).sum((1, 2))
