"""A small U-Net for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .embedding import FourierTime

__all__ = ["UNet"]


class _Residual(nn.Module):
    """Two 3x3 convolutions with group norm, shifted and scaled by time between them."""

    def __init__(self, enter: int, leave: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.GroupNorm(min(8, enter), enter), nn.GroupNorm(8, leave)))
        self.first = nn.Conv2d(enter, leave, 3, padding=1)
        self.second = nn.Conv2d(leave, leave, 3, padding=1)
        self.film, self.dropout = nn.Linear(time, 2 * leave), nn.Dropout(dropout)
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(functional.silu(self.norms[0](x)))
        scale, shift = self.film(time)[..., None, None].chunk(2, dim=-3)
        h = self.norms[1](h) * (1.0 + scale) + shift
        return self.skip(x) + self.second(self.dropout(functional.silu(h)))


class UNet(nn.Module):
    """A U-Net of (t, x), x of shape ``(batch, channels, height, width)``; zero at the start.

    Args:
        channels: of the image.
        width: channels of the first level, a multiple of 8.
        levels: each after the first halves the image and doubles the width; the image's sides
            are multiples of 2^(levels - 1).
        dropout: in each block.

    Raises:
        ValueError: from a call, on sides that are not such multiples.

    Source: Ronneberger et al. 2015, arXiv 1505.04597; Ho et al. 2020, arXiv 2006.11239.
    """

    def __init__(
        self, channels: int, width: int = 32, levels: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        time = 4 * width
        widths = [width * 2**i for i in range(levels)]
        self.time = nn.Sequential(FourierTime(32), nn.Linear(33, time), nn.SiLU())
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            _Residual(a, b, time, dropout)
            for a, b in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.middle = _Residual(widths[-1], widths[-1], time, dropout)
        self.up = nn.ModuleList(
            _Residual(2 * b, a, time, dropout)
            for a, b in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        halvings = 2 ** (len(self.down) - 1)
        if x.shape[-2] % halvings or x.shape[-1] % halvings:
            raise ValueError(
                f"the sides of an image are multiples of {halvings}; got {tuple(x.shape[-2:])}: "
                "pad it, or take fewer levels"
            )
        time, h, kept = self.time(t), self.enter(x), []
        for i, block in enumerate(self.down):
            h = block(functional.avg_pool2d(h, 2) if i else h, time)
            kept.append(h)
        h = self.middle(h, time)
        for i in reversed(range(len(self.up))):
            h = self.up[i](torch.cat((h, kept[i]), dim=1), time)
            h = functional.interpolate(h, scale_factor=2.0) if i else h
        return self.leave(functional.silu(h))
