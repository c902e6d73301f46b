"""How far the end of a solve, or a density, is from the truth, sample by sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _random
from ._scalar import Scalar
from ._state import State, batch_size, describe, tree_map
from .dynamics.base import Dynamics
from .flow import Flow
from .integrators.base import Integrator
from .integrators.stochastic import Stochastic
from .paths.base import RandomPath
from .paths.brownian import Brownian
from .solution import Solution
from .solve import solve
from .stepping import Given, Grid, Stepping, rms_norm

__all__ = ["log_prob_with_error", "solve_with_error"]


def solve_with_error(
    dynamics: Dynamics,
    y0: State,
    t0: Scalar = 0.0,
    t1: Scalar | None = None,
    *,
    integrator: Integrator,
    stepping: Stepping,
    args: tuple[Any, ...] = (),
    path: RandomPath | None = None,
    generator: torch.Generator | None = None,
    **more: Any,
) -> tuple[Solution, Tensor]:
    """``solve``, and an estimate of how far each sample ended from the truth, ``(batch,)``.

        | y(N steps) - y(N/2 steps) | / (2^p - 1),    root mean square over components

    for a method of order p: Richardson's estimate of the error in the end, whatever the integrator,
    for half as many evaluations again (``stats`` counts them). The second solve goes over every
    other time of the first one, without gradients, on the same path. It is good to a factor of a
    few once the steps are so short that the order shows; with less than about ten of them it may
    say too little. (A sum of embedded estimates knows nothing of what became of an error on the
    way, and is of a lower order than the error.)

    Args:
        dynamics, y0, t0, t1, args: as of ``solve``.
        integrator: any. With noise p is its strong order, and the error that of the path.
        stepping: ``Fixed`` or ``Grid``, of an even number of steps.
        path, generator: as of ``solve``.
        more: further keywords of the first ``solve``.

    Returns:
        Its solution, and the estimates; infinite where the second solve was not finite.

    Raises:
        TypeError: on other steppings, states without a batch, events, methods that draw numbers
            beside their path.
        ValueError: on an odd number of steps.

    Source: Richardson 1911; Hairer, Norsett and Wanner 1993, II.4.
    """
    times = _times(stepping, t0, dynamics.horizon if t1 is None else t1)
    if more.get("events") is not None:
        raise TypeError(
            "the two solves would end, or go on, at times of their own: leave out events, and look "
            "at the error up to a time that they share"
        )
    if batch_size(y0) is None:
        raise TypeError(f"errors are those of samples: give a batch-first y0; got {describe(y0)}")
    draws = integrator.draws(dynamics, y0)
    if draws is not None:
        if draws.extra is not None:
            raise TypeError(
                f"{type(integrator).__name__} draws numbers beside its path, and those of a long "
                "step do not follow from those of short ones: use it without noise"
            )
        if path is None and generator is not None:
            path = Brownian(_random.draw_seed(generator))
        if isinstance(path, Brownian) and path.times is None:
            if times.ndim > 1:
                raise TypeError(
                    "steps of each sample's own and of twice the length share a path at any time: "
                    "give path=BrownianTree(seed, t0, t1)"
                )
            path = replace(path, times=times)
    same: dict[str, Any] = {"integrator": integrator, "args": args, "path": path}
    probes = None if generator is None else generator.clone_state()
    fine = solve(dynamics, y0, t0, t1, stepping=stepping, generator=generator, **same, **more)
    with torch.no_grad():
        rough = solve(
            dynamics, y0, t0, t1, stepping=Grid(times[::2]), generator=probes, throw=False, **same
        )
        gap = rms_norm(tree_map(torch.sub, fine.y1, rough.y1), True)
        gap = torch.where(gap.isfinite(), gap, torch.inf)
    fine.stats.evaluations += rough.stats.evaluations
    return fine, gap / (2.0 ** _order(integrator, dynamics, draws is not None) - 1.0)


def log_prob_with_error(
    flow: Flow, x: Tensor, *args: Any, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A flow's log-density in nats and its standard error, ``(...)`` each, over draws of what is
    random in it: probes of an estimated divergence, the noise of a ``Dequantize``.

        mean_i log p_i(x),    sqrt(var_i log p_i(x) / draws)

    Probes leave the mean where it is. With dequantisation the mean is a lower bound of the log of
    the mass in x's cell (Jensen's inequality). One density after the other is worked out, so that
    without gradients memory does not grow with them.

    Args:
        flow, x, args: as of ``Flow.log_prob``.
        draws: how many, 2 at least.
        generator: of all of them.

    Returns:
        Means, which carry gradients, and standard errors, 0 where nothing is random.

    Raises:
        ValueError: on fewer than two draws.

    Source: Song et al. 2021, arXiv 2011.13456, appendix D.2; Theis, van den Oord and Bethge 2016,
    arXiv 1511.01844, 3.1.
    """
    if draws < 2:
        raise ValueError(f"errors are told by two draws or more; got draws={draws}")
    found = torch.stack([flow.log_prob(x, *args, generator=generator) for _ in range(draws)])
    return found.mean(0), found.detach().std(0) / math.sqrt(draws)


def _times(stepping: Stepping, t0: Scalar, t1: Scalar) -> Tensor:
    """Of an even number of steps."""
    if not isinstance(stepping, Given):
        raise TypeError("errors are told from steps of twice the length: give Fixed or Grid")
    times = [torch.as_tensor(t, dtype=torch.float64).detach() for t in stepping.times(t0, t1)]
    if len(times) % 2 == 0:
        raise ValueError(f"every other one of {len(times) - 1} steps: give an even number of them")
    shape = max((t.shape for t in times), key=len)  # () or (batch,)
    return torch.stack([t.expand(shape) for t in times])


def _order(integrator: Integrator, dynamics: Dynamics, noisy: bool) -> float:
    if isinstance(integrator, Stochastic) and dynamics.noise is not None:
        return integrator.strong_order(dynamics.noise) or 0.5
    return 1.0 if noisy else float(integrator.order)
