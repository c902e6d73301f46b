"""What flow matching trains: an SDE beside the ODE, pairs for another round, a measure of bends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .. import _random
from .._batch import shared
from .._scalar import Scalar, expand
from .._state import check_like, squared
from ..dynamics.base import Dynamics, Noise
from ..dynamics.differential import ODE
from ..flow import Flow
from ..paths.interpolant import Interpolant

__all__ = ["StochasticInterpolant", "reflow", "straightness"]


@final
class StochasticInterpolant(Dynamics):
    """dx = (velocity + eta^2 s^2 / (2 gamma) denoiser) dt + eta s dW, from noise down to data.

    s is the interpolant's ``bridge``, gamma its deviation at t, and -denoiser / gamma the score.
    Every eta has the interpolant's marginals: 0 is the ODE, 1 has the bridge's own diffusion, so
    that with a ``Sinkhorn(2 * s**2)`` coupling it is the Schroedinger bridge.

    Args:
        velocity: E[dx_t/dt | x_t], the dynamics that ``FlowMatching`` trained.
        denoiser: E[z | x_t], trained beside it.
        interpolant: the one that they were trained on.
        eta: how much noise.

    Solve it from a little under the horizon to a little above 0: gamma is 0 at both.

    Raises:
        ValueError: on an interpolant without a bridge, eta < 0, or a span that runs up or touches
            an end.

    Source: Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797; Tong et al. 2023,
    arXiv 2307.03672.
    """

    def __init__(
        self,
        velocity: Dynamics,
        denoiser: Callable[..., Tensor],
        interpolant: Interpolant,
        eta: float = 1.0,
    ) -> None:
        super().__init__()
        if not interpolant.bridge:
            raise ValueError("without a bridge there is no z to tell: Interpolant(bridge=s)")
        if eta < 0:
            raise ValueError(f"eta scales noise: eta >= 0; got {eta}")
        self.velocity, self.denoiser, self.interpolant = velocity, denoiser, interpolant
        self.batched_time, self.horizon = velocity.batched_time, interpolant.horizon
        self.eta = float(eta)
        if eta:
            self.noise = Noise("diagonal", additive=True)

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        drift = self.velocity(t, y, *args)
        if not self.eta:
            return drift
        rate = 0.5 * (self.eta * self.interpolant.bridge) ** 2 / self.interpolant.gamma(t)
        noise = check_like(self.denoiser(t, y, *args), y, "the denoiser")
        return drift + expand(rate, y) * noise

    def diffusion(self, t: Tensor, y: Tensor, *args: Any) -> Scalar | None:
        return self.eta * self.interpolant.bridge if self.eta else None

    def check_span(self, t0: float, t1: float) -> None:
        if self.eta and not 0.0 < t1 <= t0 < self.horizon:
            raise ValueError(
                f"the SDE runs down within (0, {self.horizon:g}), where the score is known; got "
                f"{t0:g} to {t1:g}. Such as {0.999 * self.horizon:g} to {0.001 * self.horizon:g}"
            )


@torch.no_grad()
def reflow(flow: Flow, count: int, *args: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs (x0, x1), ``(count, *event_shape)`` each: noise x1, and the data that it flows to.

    Both are states of the dynamics: a flow's ``transform`` is left out, as in its training.

    Flow matching on them, ``FlowMatching(ode, paired=True)``, gives a flow with the same ends and
    straighter paths.

    Args:
        flow: with an ODE that was trained by flow matching.
        count: of pairs.
        args: further inputs of the dynamics: conditions with a row a pair, or ``(1, n)`` for all.
        generator: from which one seed is drawn.

    Source: Liu et al. 2023, arXiv 2209.03003.
    """
    x1 = flow.base.sample(count, _random.draw_seed(generator))
    dynamics = flow.dynamics
    args = shared(args, count)
    return flow.solver.solve(dynamics, x1, dynamics.horizon, flow.t0, args=args).y1, x1


@torch.no_grad()
def straightness(flow: Flow, x1: Tensor, *args: Any) -> Tensor:
    """1/T int |mean velocity - v(t, x_t)|^2 dt of the path that ends in each x1, ``(batch,)``.

    Its mean over noise is the measure of rectified flow: 0 where every path is straight and of
    even speed, so that one Euler step is exact. With the mean velocity (x_T - x_0) / T this is

        1/T int |v|^2 dt - |x_T - x_0|^2 / T^2

    and the integral is solved for beside x, by the flow's own solver.

    Args:
        flow: with an ODE.
        x1: noise, ``(batch, *event_shape)``, such as ``flow.base.sample(1000, seed)``.
        args: further inputs of the dynamics: conditions with a row a path, or ``(1, n)`` for all.

    Source: Liu et al. 2023, arXiv 2209.03003.
    """
    dynamics, args = flow.dynamics, shared(args, len(x1))

    def field(t: Tensor, y: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        velocity = dynamics(t, y[0], *args)
        return velocity, squared(velocity)

    span = dynamics.horizon - flow.t0
    both = ODE(field, batched_time=dynamics.batched_time)
    start = x1, x1.new_zeros(len(x1), dtype=x1.dtype.to_real())
    x0, energy = flow.solver.solve(both, start, dynamics.horizon, flow.t0, args=args).y1
    return -energy / span - squared(x1 - x0) / span**2
