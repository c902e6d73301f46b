"""Maps of low rank, whose determinants are small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dynamics.discrete import Map
from .mixing import exactly

__all__ = ["Planar", "Sylvester"]

_LEAST = 1e-3  # of the slope 1 + r s along a direction that the map moves


def _root(r: Tensor, s: Tensor, shift: Tensor, target: Tensor) -> Tensor:
    """The v at which v + r tanh(s v + shift) = target, where r s > -1: it grows with v.

    Halving finds it to rounding; two steps of Newton polish it and carry its derivatives, the first
    three of which are exact, since what they start from is wrong by no more than rounding.
    """
    with torch.no_grad():
        low, high = target - r.abs(), target + r.abs()
        for _ in range(1 - round(math.log2(torch.finfo(target.dtype).eps))):
            middle = 0.5 * (low + high)
            above = middle + r * torch.tanh(s * middle + shift) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        v = 0.5 * (low + high)
    for _ in range(2):
        h = torch.tanh(s * v + shift)
        v = v - (v + r * h - target) / (1.0 + r * s * (1.0 - h * h))
    return v


class Planar(Map):
    """y = x + u tanh(w . x + b), with log-determinant log(1 + w . u (1 - tanh^2)), on vectors.

    u is kept where w . u > -1, so that the map inverts: by a scalar root. The identity at first.

    Args:
        dim: components of a sample.

    Source: Rezende and Mohamed 2015, arXiv 1505.05770, appendix A.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.push = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def _law(self) -> tuple[Tensor, Tensor]:
        """u, and w . u."""
        w, raw = self.weight, self.push @ self.weight
        product = functional.softplus(raw + math.log(math.expm1(1.0 - _LEAST))) - 1.0 + _LEAST
        square = w.square().sum().clamp(min=torch.finfo(w.dtype).tiny)
        return self.push + (product - raw) / square * w, product

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            u, product = self._law()
            h = torch.tanh(y @ self.weight + self.bias)
        return y + h[:, None] * u, torch.log1p(product * (1.0 - h * h))

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            u, product = self._law()
            v = _root(product, torch.ones_like(product), self.bias, y @ self.weight)
        h = torch.tanh(v + self.bias)
        return y - h[:, None] * u, -torch.log1p(product * (1.0 - h * h))


class Sylvester(Map):
    """y = x + Q R tanh(S Q^T x + b), with log-determinant sum_i log(1 + r_ii s_ii (1 - tanh^2)).

    Q has orthonormal columns, R and S are upper triangular with diagonals in (-1, 1), so that the
    map inverts: by one scalar root a column, last to first. The identity at first. On vectors.

    Args:
        dim: components of a sample.
        rank: columns of Q, at most ``dim``.

    Source: van den Berg et al. 2018, "Sylvester normalizing flows", arXiv 1803.05649.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        if not 0 < rank <= dim:
            raise ValueError(f"rank is 1 to dim = {dim}; got {rank}")
        self.basis = nn.Parameter(torch.randn(dim, rank))
        self.outer = nn.Parameter(torch.zeros(rank, rank))
        self.inner = nn.Parameter(torch.randn(rank, rank) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(rank))

    def _law(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, R, S."""
        wide = torch.promote_types(self.basis.dtype, torch.float32)  # LAPACK has no half precision
        q, rest = torch.linalg.qr(self.basis.to(wide))
        q = q * rest.diagonal().sign()  # Gram and Schmidt's signs, which do not jump
        return q.to(self.basis), self._triangle(self.outer), self._triangle(self.inner)

    @staticmethod
    def _triangle(raw: Tensor) -> Tensor:
        return raw.triu(1) + ((1.0 - _LEAST) * raw.diagonal().tanh()).diag()

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            q, r, s = self._law()
            h = torch.tanh(y @ q @ s.mT + self.bias)
            return y + h @ (q @ r).mT, self._ladj(r, s, h)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            q, r, s = self._law()
            h = self._solve(r, s, (y @ q).unbind(-1))
            return y - h @ (q @ r).mT, -self._ladj(r, s, h)

    def _solve(self, r: Tensor, s: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """h = tanh(S v + b) at the v with v + R h = target: by substitution from the last."""
        v: list[Tensor] = []  # of the columns from i + 1 on
        h: list[Tensor] = []
        for i in reversed(range(len(r))):
            shift, target = self.bias[i], targets[i]
            for j in range(len(v)):
                shift = shift + s[i, i + 1 + j] * v[j]
                target = target - r[i, i + 1 + j] * h[j]
            v.insert(0, _root(r[i, i], s[i, i], shift, target))
            h.insert(0, torch.tanh(s[i, i] * v[0] + shift))
        return torch.stack(h, -1)

    @staticmethod
    def _ladj(r: Tensor, s: Tensor, h: Tensor) -> Tensor:
        return torch.log1p(r.diagonal() * s.diagonal() * (1.0 - h * h)).sum(-1)
