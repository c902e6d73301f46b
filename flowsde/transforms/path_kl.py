"""How far two laws of paths are apart, and the weights that lead from one to the other."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from .._state import State
from ..dynamics.base import Dynamics, Noise
from ..dynamics.differential import SDE
from .augmented import Augmented, fill, noise_of

__all__ = ["girsanov", "path_kl"]


def path_kl(posterior: Dynamics, prior: Dynamics) -> Augmented:
    """Dynamics of [y, l]: the posterior's paths, and the divergence from the prior they gather.

        dl/dt = 1/2 |u|^2,    u = g^-1 (f_posterior - f_prior)

    so that E[l(t1)] = KL(posterior || prior) of the paths between, given where they start. The two
    share their diffusion g; u is a quotient for diagonal noise, the pseudo-inverse's for the
    others. Both take the same ``args``; the state is ``(batch, d)``:

        both = path_kl(posterior, prior)
        y, kl = both.leave(solve(both, both.enter(y0), ...).y1)

    Where the divergence is infinite (the diffusions differ, or the drifts do where g does not
    reach), so is l, and the solve ends as ``NonFiniteState``. Where both name the same function g
    it is evaluated once.

    Raises:
        TypeError: on dynamics without noise, or whose noise is declared otherwise.

    Source: Girsanov 1960; Li et al. 2020, arXiv 2001.01328, section 5.
    """
    return _PathKL(posterior, prior)


def girsanov(posterior: Dynamics, prior: Dynamics) -> Augmented:
    """Dynamics of [y, l]: the posterior's paths, and the log-weight l = log dP/dQ of the prior's
    law P of paths over the posterior's law Q.

        dl = -1/2 |u|^2 dt - u . dW,    u = g^-1 (f_posterior - f_prior)

    E[exp(l) F(y)] over the posterior's paths is E[F(y)] over the prior's, and E[-l] is
    ``path_kl``. W is the path that drives y, so the noise is scalar where that of y is, and general
    otherwise, of d Brownian motions for diagonal noise. See ``path_kl`` for the rest.

    Raises:
        TypeError: on dynamics without noise, whose noise is declared otherwise, or is read in the
            sense of Stratonovich.

    Source: Girsanov 1960.
    """
    noise = noise_of(posterior)
    if not noise.ito and not noise.additive:
        raise TypeError(
            "a log-weight is an Ito integral: girsanov(to_ito(posterior), to_ito(prior)), and "
            "to_stratonovich of the whole for a Stratonovich integrator"
        )
    return _Girsanov(posterior, prior)


class _Pair(Augmented):
    """Two SDEs with one diffusion."""

    whitens = True

    def __init__(self, posterior: Dynamics, prior: Dynamics) -> None:
        noise = noise_of(posterior)
        if noise_of(prior) != noise:
            raise TypeError(
                "the posterior and the prior share one diffusion, declared alike; got "
                f"{noise} and {prior.noise}"
            )
        super().__init__(posterior, noise)
        self.posterior, self.prior, self._kind = posterior, prior, noise.kind
        self.batched_time = posterior.batched_time and prior.batched_time
        self.random = posterior.random or prior.random
        self._shared = isinstance(posterior, SDE) and isinstance(prior, SDE) and (
            posterior.g is prior.g or posterior.g == prior.g  # bound methods are equal, not one
        )  # fmt: skip

    def check_span(self, t0: float, t1: float) -> None:
        super().check_span(t0, t1)
        self.posterior.check_span(t0, t1)
        self.prior.check_span(t0, t1)

    def hint(self, t: float) -> str:
        return self.posterior.hint(t) or (
            ". The divergence is infinite where the diffusions of posterior and prior differ, or "
            "their drifts do where the noise does not reach: give both the same function g"
        )

    def _diffusion(self, dynamics: Dynamics, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        g = dynamics.diffusion(t, y, *args)
        return g if self._kind == "general" else fill(g, y)

    def _compare(
        self, t: Tensor, y: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior's drift, g, and u of shape ``(batch, m)``."""
        drift, g = self.posterior(t, y, *args), self._diffusion(self.posterior, t, y, args)
        gap = drift - self.prior(t, y, *args)
        if self._kind == "diagonal":
            u = _quotient(gap, g)
        else:
            u = _solve(gap, g if self._kind == "general" else g[..., None])
        if not self._shared:
            same = torch.isclose(g, self._diffusion(self.prior, t, y, args)).flatten(1).all(1)
            u = torch.where(same[:, None], u, torch.inf)
        return drift, g, u


def _quotient(gap: Tensor, g: Tensor) -> Tensor:
    """gap / g; nothing where both vanish, infinite where g alone does."""
    stuck = g == 0
    limit = torch.where(gap == 0, 0.0, torch.inf).to(gap.dtype)
    return torch.where(stuck, limit, gap / torch.where(stuck, 1.0, g))


def _solve(gap: Tensor, g: Tensor) -> Tensor:
    """The least u with g u = gap, g of shape ``(batch, d, m)``; infinite where there is none."""
    u = (torch.linalg.pinv(g) @ gap[..., None])[..., 0]
    rest = gap - (g @ u[..., None])[..., 0]
    size = torch.linalg.vector_norm(gap, dim=-1)
    slack = torch.finfo(gap.dtype).eps ** 0.5
    missed = torch.linalg.vector_norm(rest, dim=-1) > slack * size
    return torch.where(missed[:, None], torch.inf, u)


@final
class _PathKL(_Pair):
    def prepare(self, y0: State, seed: int | None) -> _PathKL:
        y = self.state(y0)
        return _PathKL(self.posterior.prepare(y, seed), self.prior.prepare(y, seed))

    def select(self, index: Tensor) -> Dynamics | None:
        posterior, prior = self.posterior.select(index), self.prior.select(index)
        return None if posterior is None or prior is None else _PathKL(posterior, prior)

    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        drift, _, u = self._compare(t, y, args)
        return drift, 0.5 * u.square().sum(-1)

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        g = self._diffusion(self.posterior, t, y[:, :-1], args)
        return functional.pad(g, (0, 0, 0, 1) if self._kind == "general" else (0, 1))


@final
class _Girsanov(_Pair):
    def __init__(self, posterior: Dynamics, prior: Dynamics, size: int = 0) -> None:
        super().__init__(posterior, prior)
        assert self.noise is not None
        scalar = self._kind == "scalar"
        self.noise = Noise(
            "scalar" if scalar else "general", size=None if scalar else self.noise.size or size
        )  # fmt: skip

    def prepare(self, y0: State, seed: int | None) -> _Girsanov:
        y = self.state(y0)
        posterior, prior = self.posterior.prepare(y, seed), self.prior.prepare(y, seed)
        return _Girsanov(posterior, prior, y.shape[1])  # diagonal noise: a motion a component

    def drift_and_rate(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        drift, _, u = self._compare(t, y, args)
        return drift, -0.5 * u.square().sum(-1)

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        _, g, u = self._compare(t, y[:, :-1], args)
        if self._kind == "scalar":
            return torch.cat((g, -u), -1)
        matrix = torch.diag_embed(g) if self._kind == "diagonal" else g
        return torch.cat((matrix, -u[:, None]), -2)
