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
    seen = ~torch.isnan(x)
    error = (torch.where(seen, x, 0.0) - mean) / noise
    log_prob = -0.5 * error.square() - log(noise) - 0.5 * math.log(2.0 * math.pi)
    return torch.where(seen, log_prob, 0.0).sum((1, 2))


def beside(t: Tensor, y: Tensor) -> Tensor:
    """(y, t), for a 0-d or ``(batch,)`` time."""
    return torch.cat((y, t.expand(len(y))[:, None]), -1)
