"""Features of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["FourierTime"]


class FourierTime(nn.Module):
    """t, and the sines and cosines of it at frequencies in geometric progression.

    Args:
        width: number of features, even.
        highest: the greatest angular frequency; the least is pi / 4.

    ``(…)`` times give ``(…, width + 1)`` features.
    """

    frequencies: Tensor

    def __init__(self, width: int, highest: float = 16.0 * math.pi) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width is even; got {width}")
        low, high = math.log(math.pi / 4), math.log(highest)
        self.register_buffer("frequencies", torch.linspace(low, high, width // 2).exp())

    def forward(self, t: Tensor) -> Tensor:
        angle = t[..., None] * self.frequencies
        return torch.cat((t[..., None], angle.sin(), angle.cos()), dim=-1)
