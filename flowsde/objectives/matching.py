"""Training a continuous flow without solving it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _random
from .._scalar import Scalar, expand, whole
from .._state import check_like
from ..bases import Base
from ..dynamics.base import Dynamics
from ..paths.couplings import Coupling, Independent
from ..paths.interpolant import Interpolant
from .score_matching import TimeLaw, UniformTime, squares

__all__ = ["FlowMatching"]

_MARGIN = 1e-5  # of the horizon: at its ends rates are infinite, VP's sigma's and the bridge's


class FlowMatching(nn.Module):
    """E | f(t, x_t, *args) - dx_t/dt |^2 over an interpolant x_t, the mean over components.

    Trains an ODE to carry data at t = 0 to noise, or to whatever the source is, at the horizon:
    its least is at E[dx_t/dt | x_t], whose flow has the interpolant's marginals at all times.
    Where the interpolant has a bridge, each batch is taken with z and with -z: apart, the bridge's
    infinite rates at its ends would give gradients of infinite variance.

        FlowMatching(ode)                                                         flow matching
        FlowMatching(ode, coupling=OptimalTransport())                            minibatch OT
        FlowMatching(ode, points=n)                                               stable targets
        FlowMatching(ode, Interpolant(bridge=s), coupling=Sinkhorn(2 * s**2), denoiser=d)
                                                                   Schroedinger bridge matching
        FlowMatching(ode, paired=True), called with the pairs of ``reflow``       rectified flow

    Args:
        dynamics: dx/dt = f(t, x, *args); takes ``(batch,)`` times.
        interpolant: the straight line by default.
        source: of x1: a ``Base``, or samples ``(n, ...)`` of which rows are drawn; standard normal
            by default.
        coupling: which x1 goes with which x0; independent by default.
        times: law of t, uniform by default.
        denoiser: trained beside the dynamics where there is a bridge: d(t, x, *args), E[z | x_t],
            by E |d - z|^2. See ``models.StochasticInterpolant``.
        paired: whether batches bring their own x1, ``objective(x0, x1, *args, generator=)``.
        points: of how many of a batch's rows paths are drawn. The target there is dx_t/dt's mean
            given x_t, over the whole batch as if it were all of the data: a little off, by less the
            larger the batch, and of far less variance than one row's own where rows lie close to
            each other, as in few dimensions. From standard normal noise, without conditions. None
            for all rows, each with its own target.

    Raises:
        TypeError: on dynamics that take no batched time, or a bare schedule; from a call, on
            conditions beside ``points``, pairs without x1, data of half precision with a bridge.
        ValueError: on a denoiser without a bridge, a source beside pairs, dynamics that end at
            another time than the interpolant (``ode.horizon = T``), ``points`` beside anything that
            makes x1 other than independent and normal; from a call, on a batch of fewer rows than
            ``points``.

    Source: Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003; Albergo, Boffi
    and Vanden-Eijnden 2023, arXiv 2303.08797; Tong et al. 2023, arXiv 2302.00482 and 2307.03672;
    stable targets, Xu, Tong and Jaakkola 2023, arXiv 2302.00670.
    """

    samples: Tensor | None

    def __init__(
        self,
        dynamics: Dynamics,
        interpolant: Interpolant | None = None,
        *,
        source: Base | Tensor | None = None,
        coupling: Coupling | None = None,
        times: TimeLaw | None = None,
        denoiser: Callable[..., Tensor] | None = None,
        paired: bool = False,
        points: int | None = None,
    ) -> None:
        super().__init__()
        if not dynamics.batched_time:
            raise TypeError("flow matching draws a time a sample: ODE(f, batched_time=True)")
        interpolant = interpolant or Interpolant()
        if not isinstance(interpolant, Interpolant):
            raise TypeError(f"a schedule has an interpolant: Interpolant({interpolant})")
        self.dynamics, self.interpolant = dynamics, interpolant
        if denoiser is not None and not interpolant.bridge:
            raise ValueError("without a bridge there is no z to tell: Interpolant(bridge=s)")
        if paired and source is not None:
            raise ValueError("pairs bring their x1: leave out source, or paired=True")
        if points is not None:
            if not whole(points, 1):
                raise ValueError(f"points are a whole number >= 1 of a batch's rows; got {points}")
            known = source is None and isinstance(coupling, Independent | None)
            if paired or not known or interpolant.bridge:
                raise ValueError(
                    "the mean target of a batch is known for independent normal noise: leave out "
                    "source, coupling, bridge and paired, or points"
                )
        if float(dynamics.horizon) != float(interpolant.horizon):
            raise ValueError(
                f"the interpolant ends at {interpolant.horizon:g}, the dynamics, and with them a "
                f"Flow of them, at {dynamics.horizon:g}: set dynamics.horizon to the former"
            )
        if not isinstance(source, Base | Tensor | None):
            raise TypeError(
                f"source is a Base or samples (n, ...); got {type(source).__name__}: give "
                "torch.as_tensor(samples), or Componentwise(law, ...) of torch.distributions"
            )
        self.points = points
        self.coupling, self.denoiser, self.paired = coupling or Independent(), denoiser, paired
        horizon = interpolant.horizon
        self.times = times or UniformTime(_MARGIN * horizon, (1.0 - _MARGIN) * horizon)
        self.base = source if isinstance(source, Base) else None
        samples = source if isinstance(source, Tensor) else None
        self.register_buffer("samples", samples, persistent=False)

    def forward(self, x0: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        if self.points is not None:
            return self._typical(x0, self.points, args, generator)
        if self.interpolant.bridge and x0.is_floating_point() and x0.dtype.itemsize < 4:
            raise TypeError(
                f"a bridge's rates at its ends are beyond {x0.dtype}: give x.float() (the network "
                "may autocast)"
            )
        if self.paired:
            if not args:
                raise TypeError("pairs bring their x1: objective(x0, x1, *args, generator=)")
            x1, *rest = args
            args = tuple(rest)
        else:
            x1 = self._draw(x0, generator)
        x1 = check_like(x1, x0, "the source")
        x1 = x1[self.coupling(x0, x1, *args, generator=generator)]
        t = self.times.sample(len(x0), x0, generator)
        if not self.interpolant.bridge:
            return self._loss(t, x0, x1, None, args)
        z = _normal(x0, generator)
        return 0.5 * (self._loss(t, x0, x1, z, args) + self._loss(t, x0, x1, -z, args))

    def _typical(
        self, data: Tensor, points: int, args: tuple[Any, ...], generator: torch.Generator
    ) -> Tensor:
        """The loss on paths from the first rows, whose ends are moved, x_t held, to their means."""
        if args:
            raise TypeError("rows of other conditions have other targets: leave out points")
        if len(data) < points:
            raise ValueError(f"{points} points are rows of a batch; got one of {len(data)}")
        x0 = data[:points]
        x1, t = _normal(x0, generator), self.times.sample(points, x0, generator)
        with torch.no_grad():
            alpha, sigma = self.interpolant.schedule(t)
            mean = _posterior_mean(alpha, sigma, self.interpolant.point(t, x0, x1), data)
            x1 = x1 + expand(alpha / sigma, x1) * (x0 - mean)
        return self._loss(t, mean, x1, None, args)

    def _draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        """As many x1 as there are x0."""
        if self.base is not None:
            return self.base.sample(len(x0), _random.draw_seed(generator))
        if self.samples is None:
            return _normal(x0, generator)
        size = (len(x0),)
        rows = torch.randint(len(self.samples), size, generator=generator, device=x0.device)
        return self.samples[rows]

    def _loss(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None, args: tuple[Any, ...]
    ) -> Tensor:
        x = self.interpolant.point(t, x0, x1, z)
        shown = t if self.dynamics.precise_time else t.to(x.dtype.to_real())
        velocity = check_like(self.dynamics(shown, x, *args), x, "the field")
        loss = squares(velocity - self.interpolant.velocity(t, x0, x1, z)).mean()
        if self.denoiser is None or z is None:
            return loss
        noise = check_like(self.denoiser(shown, x, *args), x, "the denoiser")
        return loss + squares(noise - z).mean()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _posterior_mean(alpha: Scalar, sigma: Scalar, x: Tensor, data: Tensor) -> Tensor:
    """E[x0 | alpha x0 + sigma x1 = x], where x0 is each of the data as likely as any other."""
    if x.is_complex():  # either part of a complex normal has half of its variance
        parts = torch.view_as_real(x), torch.view_as_real(data)
        return torch.view_as_complex(_posterior_mean(alpha, sigma * 0.5**0.5, *parts))
    rows, point = data.reshape(len(data), -1), x.reshape(len(x), -1)
    centre = rows.mean(0)  # about it, few digits of the squares are lost
    near = (rows - centre).to(_random.widest(x.device))
    a, s = (torch.as_tensor(w).to(near).reshape(-1, 1) for w in (alpha, sigma))
    left = torch.cat((a / s**2 * (point - a * centre), -0.5 * (a / s) ** 2), 1)
    logits = left @ torch.cat((near, near.square().sum(1, keepdim=True)), 1).mT
    logits -= logits.amax(1, keepdim=True)
    weights = logits.to(torch.promote_types(rows.dtype, torch.float32))
    weights = weights.clamp_(min=-60.0).exp_()  # below, numbers without all their digits are slow
    mean = (weights @ near.to(weights.dtype)) / weights.sum(1, keepdim=True)
    return (centre + mean.to(x.dtype)).view_as(x)
