"""RealNVP: a stack of affine couplings is a Map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics.discrete import Composed, Map
from ..nn import MLP

__all__ = ["AffineCoupling", "coupling_stack"]


class AffineCoupling(Map):
    """y_a = x_a, y_b = exp(s(x_a)) x_b + m(x_a), with log-determinant sum s.

    Args:
        mask: ``(dim,)`` booleans, True for the components a that stay.
        width, depth: of the network that gives s and m.
        condition: size of a further input ``(batch, condition)``, 0 for none.
        bound: of ``|s|``.
        dropout: on the hidden layers.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """

    kept: Tensor
    moved: Tensor
    places: Tensor

    def __init__(
        self,
        mask: Tensor,
        width: int = 64,
        depth: int = 2,
        condition: int = 0,
        bound: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mask.dtype != torch.bool or mask.ndim != 1 or mask.all() or not mask.any():
            raise ValueError("mask is a 1-d boolean tensor with both values in it")
        kept, moved = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        sizes = [len(kept) + condition, *[width] * depth, 2 * len(moved)]
        self.net = MLP(sizes, lambda: nn.Sequential(nn.SiLU(), nn.Dropout(dropout)))
        self.bound, device = bound, next(self.net.parameters()).device
        self.register_buffer("kept", kept.to(device))
        self.register_buffer("moved", moved.to(device))
        self.register_buffer("places", torch.cat((kept, moved)).argsort().to(device))
        last = self.net[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return 1

    def _law(self, a: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """s and m."""
        raw, shift = self.net(torch.cat((a, *args), dim=-1)).chunk(2, dim=-1)
        return self.bound * torch.tanh(raw / self.bound), shift

    def _halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[:, self.kept], y[:, self.moved]

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), dim=-1)[:, self.places]

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = self._halves(y)
        log_scale, shift = self._law(a, args)
        return self._join(a, log_scale.exp() * b + shift), log_scale.sum(-1)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = self._halves(y)
        log_scale, shift = self._law(a, args)
        return self._join(a, (b - shift) * (-log_scale).exp()), -log_scale.sum(-1)


def coupling_stack(
    dim: int,
    depth: int = 8,
    width: int = 64,
    *,
    generator: torch.Generator,
    condition: int = 0,
    dropout: float = 0.0,
) -> Composed:
    """Couplings over random halves, each followed by one over the other half; identity at first.

    Args:
        dim: components of a sample, at least 2.
        depth: number of couplings.
        width: of their networks.
        generator: for the halves.
        condition: size of a further input, given as ``args``.
        dropout: in the networks.
    """
    layers = []
    for i in range(depth):
        if i % 2 == 0:
            mask = torch.zeros(dim, dtype=torch.bool, device=generator.device)
            order = torch.randperm(dim, generator=generator, device=generator.device)
            mask[order[: dim // 2]] = True
        layers.append(
            AffineCoupling(mask if i % 2 == 0 else ~mask, width, 2, condition, dropout=dropout)
        )
    return Composed(layers)
