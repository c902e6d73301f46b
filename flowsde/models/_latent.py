"""What models of latent paths share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._scalar import Scalar, log


def draw(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """One draw of N(mean, std^2), differentiable by both."""
    return mean + std * torch.randn(
        mean.shape, generator=generator, device=mean.device, dtype=mean.dtype
    )


def divergence(mean: Tensor, std: Tensor, other: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other, exp(log_std)^2)) of diagonal laws, ``(batch,)``."""
    ratio, gap = std / log_std.exp(), (mean - other) / log_std.exp()
    return (0.5 * (ratio.square() + gap.square() - 1.0) - ratio.log()).sum(-1)


def seen_log_prob(x: Tensor, mean: Tensor, noise: Scalar) -> Tensor:
    """log N(x; mean, noise^2) of the values of ``(batch, n, channels)`` that are numbers."""
    if mean.shape != x.shape:
        raise ValueError(
            f"what is decoded has a value for each of the series' {tuple(x.shape)}; got "
            f"{tuple(mean.shape)}: give the decoder as many outputs as there are channels"
        )
    seen = ~torch.isnan(x)
    error = (torch.where(seen, x, 0.0) - mean) / noise
    log_prob = -0.5 * error.square() - log(noise) - 0.5 * math.log(2.0 * math.pi)
    return torch.where(seen, log_prob, 0.0).sum((1, 2))


def beside(t: Tensor, y: Tensor) -> Tensor:
    """(y, t), for a 0-d or ``(batch,)`` time."""
    return torch.cat((y, t.expand(len(y))[:, None]), -1)


def check_noise(noise: float) -> float:
    """The standard deviation of an observation, if it is one."""
    if not 0.0 < noise < math.inf:
        raise ValueError(f"noise is a standard deviation > 0; got {noise}")
    return noise


def seen_rows(x: Tensor) -> Tensor:
    """The rows in which something was seen, ``(batch, n)``."""
    return ~torch.isnan(x).all(-1)


def check_channels(x: Tensor, channels: int, weight: Tensor, more: str = "") -> None:
    """Refuses what a model with such a weight was not made for: ``(..., channels)``."""
    if x.shape[-1] != channels:
        raise ValueError(f"this model was made for {channels} channels; got {x.shape[-1]}{more}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"this model is of {weight.dtype}, its series of {x.dtype}: call model.to(x.dtype)"
        )


def other_times(at: Tensor, times: Tensor) -> Tensor:
    """Times ``(m,)`` or ``(batch, m)`` to be told of, ``(batch, m)``, in the dtype of the own."""
    if at.ndim not in (1, 2) or at.shape[:-1] not in ((), times.shape[:1]):
        raise ValueError(f"at is (m,) or ({len(times)}, m); got {tuple(at.shape)}")
    return at.to(times).expand(len(times), -1)


def own_times(times: Tensor, x: Tensor, start: float) -> Tensor:
    """The times of each series ``(batch, n, channels)``, ``(batch, n)``, in the series' dtype:
    increasing, from the start on.
    """
    if x.ndim != 3 or times.shape not in (x.shape[:2], x.shape[1:2]):
        raise ValueError(
            "series are (batch, n, channels), their times (n,) or (batch, n); got "
            f"{tuple(x.shape)} and {tuple(times.shape)}"
        )
    if bool(x.isinf().any()):
        raise ValueError("values are finite, or not-a-number where none was seen")
    times = times.to(x).expand(x.shape[:2])
    if not bool((times.diff(dim=1) > 0).all() & (times >= start).all()):
        raise ValueError(
            f"the times of a series increase, from {start}, the start, on, in {x.dtype} too: "
            "count them from the first of each series"
        )
    return times
