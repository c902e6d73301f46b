"""Integrators with the signature of k-diffusion's samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._increment import Increment
from .._scalar import Scalar, to_float
from .._state import State
from ..dynamics.field import Field
from ..dynamics.noising import LinearSDE
from ..integrators.base import Carry, Integrator, Step
from ..paths.base import RandomPath
from ..paths.schedule import EDM
from ..solve import solve
from ..stepping import Grid
from ._landing import Around, land

__all__ = ["Sampler", "as_sampler"]

Callback = Callable[[dict[str, Any]], object]
Seen = tuple[Tensor, Tensor, Tensor]  # sigma, x and the x0 found there


class Sampler(Protocol):
    """What ``as_sampler`` returns."""

    def __call__(
        self, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None, callback: Callback | None = None,
        disable: bool | None = None, *, generator: torch.Generator | None = None,
        path: RandomPath | None = None,
    ) -> Tensor:  # fmt: skip
        """From x, of noise sigmas[0], to the sample of noise sigmas[-1], shaped as x.

        Args:
            model: ``model(x, sigma, **extra_args)`` is x0, sigma of shape ``(batch,)``.
            sigmas: ``(steps + 1,)``, falling; the last one may be 0.
            callback: told after every step of ``x`` at its start, its number ``i``, ``sigma``, and
                ``denoised``, the model's x0 there, at ``sigma_hat``: sigma, or more where the
                integrator has put noise back.
            disable: False shows a bar.
            generator, path: the noise of an integrator that takes any, as in ``solve``.
        """


def as_sampler(integrator: Integrator, eta: float = 0.0) -> Sampler:
    """An integrator as a sampler of k-diffusion's: ``as_sampler(DPMSolverPP())(model, x, sigmas)``.

    No gradient is kept; with ``solve`` on ``EDM()`` it is. The step onto sigma = 0 goes to the
    model's own x0, for those integrators too that need a slope there.

    Args:
        integrator: ``DDIM()`` is Euler's, ``EDMHeun(gamma)`` Heun's with churn, ``DDIM(1.0)`` the
            ancestral one, ``DPMSolverPP()`` DPM-Solver++(2M), with eta its SDE version (whose own
            eta is the square of this one).
        eta: of the reverse SDE that is integrated; 0 is the probability flow.

    Raises:
        TypeError: from the sampler, on noise without a generator or a path.
        ValueError: from the sampler, on sigmas that do not fall.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """

    @torch.no_grad()
    def sample(
        model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None, callback: Callback | None = None,
        disable: bool | None = None, *, generator: torch.Generator | None = None,
        path: RandomPath | None = None,
    ) -> Tensor:  # fmt: skip
        seen: list[Seen] = []

        def network(sigma: Tensor, x: Tensor) -> Tensor:
            x0 = model(x, sigma.expand(len(x)), **(extra_args or {}))
            if callback is not None:
                seen.append((sigma, x, x0))
            return x0

        method = land(integrator)
        if callback is not None:
            method = _Reporting(method, callback, sigmas.tolist(), seen)
        grid = sigmas.double().cpu()
        first, last = float(grid[0]), float(grid[-1])
        if not first > last >= 0.0:
            raise ValueError(f"sigmas fall from noise to data; got {first} to {last}")
        dynamics = LinearSDE(EDM(first)).reverse_sde(network, eta)
        return solve(
            dynamics, x, first, last, integrator=method, stepping=Grid(grid), path=path,
            generator=generator, progress=disable is False,
        ).y1  # fmt: skip

    return sample


@dataclass(frozen=True)
class _Reporting(Around):
    """Tells a callback of every step.

    Args:
        callback: is told.
        sigmas: of the steps.
        seen: what the model has said, in the order of its calls; kept short here.
    """

    callback: Callback
    sigmas: list[float]
    seen: list[Seen]

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        before = len(self.seen)
        step = super().step(field, t0, t1, y, dw, carry)
        # asked at y, perhaps by the step before; else first where noise was put back
        found = [seen for seen in self.seen if seen[1] is y] or self.seen[before:]
        sigma_hat, _, x0 = found[0]
        i, sigma = self.sigmas.index(to_float(t0)), field.time(t0)
        self.callback({"x": y, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": x0})
        del self.seen[:-1]
        return step
