"""Convolutional networks of (t, x), for images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import softplus

from .mlp import TimeGates

__all__ = ["ConvConcatSquash"]


class ConvConcatSquash(nn.Module):
    """3x3 convolutions, gated and shifted by time channel by channel, softplus between them.

    Args:
        channels: of the input ``(batch, channels, height, width)``, of hidden layers, of the
            output.

    Source: Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        pairs = itertools.pairwise(channels)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.gates = TimeGates(channels[1:])

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for i, (layer, (scale, shift)) in enumerate(zip(self.layers, self.gates(t), strict=True)):
            h = softplus(x) if i else x
            x = layer(h) * scale[..., None, None] + shift[..., None, None]
        return x
