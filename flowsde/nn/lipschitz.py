"""Networks that do not stretch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .zeroed import zeroed

__all__ = ["LipSwish", "LipschitzMLP"]


class LipSwish(nn.Module):
    """0.909 x sigmoid(x), whose slope is at most one.

    Source: Chen et al. 2019, arXiv 1906.02735.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0.909 * functional.silu(x)


class LipschitzMLP(nn.Module):
    """A dense network with |f(x) - f(y)| <= bound |x - y|; zero at the start.

    Each of n layers is divided by what its largest singular value exceeds bound^(1/n) by; LipSwish
    stands between them. The value is exact, not a power iteration's: nothing is kept from one call
    to the next, and the bound holds at every one.

    Args:
        sizes: of input, hidden layers and output.
        bound: the Lipschitz constant.

    Source: Behrmann et al. 2019, "Invertible residual networks", arXiv 1811.00995.
    """

    def __init__(self, sizes: Sequence[int], bound: float = 0.9) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"bound is > 0; got {bound}")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.limit, self.activation = bound ** (1.0 / len(self.layers)), LipSwish()
        zeroed(self.layers[-1])

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        x = torch.cat((x, *args), -1)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            x = self.activation(x) if i else x
            wide = torch.promote_types(layer.weight.dtype, torch.float32)  # LAPACK has no half
            norm = torch.linalg.matrix_norm(layer.weight.to(wide), 2).clamp(min=self.limit)
            weight = layer.weight * (self.limit / norm).to(layer.weight)
            x = functional.linear(x, weight, layer.bias)
        return x
