"""Networks whose outputs see the earlier inputs only."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from .zeroed import zeroed

__all__ = ["MaskedMLP"]


class _MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        mask = before <= after[:, None]
        self.register_buffer("mask", mask.to(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class MaskedMLP(nn.Sequential):
    """A dense network of x ``(batch, dim)`` whose outputs for component i see x_0 .. x_{i-1} alone.

    Of rectified units, as in the paper; zero at the start.

    Args:
        dim: components of x.
        count: outputs of a component; the result is ``(batch, count * dim)``, each of the count for
            all components, one after the other.
        width, depth: of the hidden layers.
        condition: size of a further input, after x, that every output sees.

    Raises:
        ValueError: on layers too narrow to hand on every component.

    Source: Germain et al. 2015, "MADE", arXiv 1502.03509.
    """

    def __init__(
        self, dim: int, count: int, width: int = 64, depth: int = 2, condition: int = 0
    ) -> None:
        # a unit of degree m sees x_0 .. x_m; of degree -1 what is given beside x, alone
        least = -1 if condition or dim == 1 else 0
        span = dim - 1 - least
        if width < span:
            raise ValueError(f"width is {span} or more, one unit a component; got {width}")
        hidden = torch.arange(width) % span + least
        inputs = torch.cat((torch.arange(dim), torch.full((condition,), -1)))
        outputs = torch.arange(dim).repeat(count) - 1
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([inputs, *[hidden] * depth, outputs]):
            layers += [_MaskedLinear(before, after), nn.ReLU()]
        zeroed(layers[-2])
        super().__init__(*layers[:-1])
