"""Convolutional networks, for images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import softplus

from ._conditions import joined
from .mlp import TimeGates
from .zeroed import zeroed

__all__ = ["ConvConcatSquash", "ConvNet"]


class ConvConcatSquash(nn.Module):
    """3x3 convolutions, gated and shifted by time channel by channel, softplus between them.

    Args:
        channels: of the input ``(batch, channels, height, width)``, of hidden layers, of the
            output.
        condition: size of a further input ``(batch, condition)``, the same at every place; 0 for
            none.

    Source: Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """

    def __init__(self, channels: Sequence[int], condition: int = 0) -> None:
        super().__init__()
        self.condition = condition
        pairs = itertools.pairwise([channels[0] + condition, *channels[1:]])
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.gates = TimeGates(channels[1:])

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        x = joined(x, args, self.condition, 1)
        for i, (layer, (scale, shift)) in enumerate(zip(self.layers, self.gates(t), strict=True)):
            h = softplus(x) if i else x
            x = layer(h) * scale[..., None, None] + shift[..., None, None]
        return x


class ConvNet(nn.Sequential):
    """Convolutions 3x3, 1x1, 3x3 with SiLU between them; zero at the start.

    Args:
        inputs, width, outputs: channels of images ``(batch, inputs, height, width)``, of the
            hidden layers, and of the result.

    Source: Kingma and Dhariwal 2018, "Glow", arXiv 1807.03039.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 1), nn.SiLU(),
            zeroed(nn.Conv2d(width, outputs, 3, padding=1)),
        )  # fmt: skip
