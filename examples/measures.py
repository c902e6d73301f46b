"""How far samples are from those that they should be like."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(
    x: Tensor, y: Tensor, generator: torch.Generator, directions: int = 256
) -> float:
    """The root of the mean over directions u of W2(u . x, u . y)^2; x and y are ``(count, d)``.

    Two samples of one law are not at 0: give that reading beside it.

    Source: Bonneel et al. 2015.
    """
    if x.shape != y.shape:
        raise ValueError(f"as many of each, alike; got {tuple(x.shape)} and {tuple(y.shape)}")
    shape = x.shape[1], directions
    u = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
    u = u / torch.linalg.vector_norm(u, dim=0)
    gaps = (x @ u).sort(0).values - (y @ u).sort(0).values
    return float(gaps.square().mean().sqrt())
