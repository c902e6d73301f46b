"""Each component moves by a law that the components before it give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dynamics.discrete import Map
from ..nn import MaskedMLP
from ..nn._conditions import joined
from .elementwise import Elementwise

__all__ = ["Autoregressive"]


class Autoregressive(Map):
    """y_i = law(x_i; network(x_0 .. x_{i-1})), on vectors.

    ``step``, the direction of densities, is one pass of the network. ``unstep`` takes ``dim``
    passes, and so does its gradient, which is exact: each pass settles one component more. To
    sample fast and find densities slowly, take the ``Inverse``.

    Args:
        dim: components of a sample.
        law: an ``Elementwise``.
        width, depth: of the masked network.
        condition: size of a further input ``(batch, condition)``, given as ``args``; 0 for none.

    Source: Papamakarios et al. 2017, "Masked autoregressive flow", arXiv 1705.07057; its inverse is
    Kingma et al. 2016, arXiv 1606.04934.
    """

    def __init__(
        self, dim: int, law: Elementwise, width: int = 64, depth: int = 2, condition: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.law, self.condition = dim, law, condition
        self.net = MaskedMLP(dim, law.count, width, depth, condition)

    def _params(self, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        out = self.net(joined(x, args, self.condition)).to(x.dtype)
        return torch.unflatten(out, 1, (self.law.count, self.dim))

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        y, ladj = self.law.forward(y, self._params(y, args))
        return y, ladj.sum(-1)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        for _ in range(self.dim):
            x, ladj = self.law.inverse(y, self._params(x, args))
        return x, ladj.sum(-1)
