"""Plain convolutional networks."""

from __future__ import annotations

from torch import nn

from .zeroed import zeroed

__all__ = ["ConvNet"]


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
