"""Maps of low rank, whose determinants are small."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._state import factorable
from ..dynamics.discrete import Map
from ..nn._conditions import joined
from ..nn.zeroed import zeroed
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


class _Amortised(Map):
    """A map whose numbers are its own and, with a condition, a linear map of that, 0 at first."""

    def __init__(self, condition: int, **own: Tensor) -> None:
        super().__init__()
        self.condition, self._names = condition, list(own)
        for name, start in own.items():
            self.register_parameter(name, nn.Parameter(start))
        size = sum(start.numel() for start in own.values())
        self.amortise = zeroed(nn.Linear(condition, size)) if condition else None

    def _numbers(self, y: Tensor, args: tuple[Any, ...]) -> list[Tensor]:
        """They, in their order; with a condition each sample's, ``(batch, *shape)``."""
        own: list[Tensor] = [getattr(self, name) for name in self._names]
        told = joined(y[:, :0], args, self.condition)
        if self.amortise is None:
            return own
        more = self.amortise(told.to(own[0])).split([x.numel() for x in own], -1)
        return [x + part.reshape(-1, *x.shape) for x, part in zip(own, more, strict=True)]


def _times(v: Tensor, matrix: Tensor) -> Tensor:
    """v matrix of vectors ``(batch, n)``, by one matrix or one a sample."""
    return v @ matrix if matrix.ndim == 2 else (v.unsqueeze(-2) @ matrix).squeeze(-2)


class Planar(_Amortised):
    """y = x + u tanh(w . x + b), with log-determinant log(1 + w . u (1 - tanh^2)), on vectors.

    u is kept where w . u > -1, so that the map inverts: by a scalar root. The identity at first.

    Args:
        dim: components of a sample.
        condition: size of a further input ``(batch, condition)``, given as ``args``, of which u, w
            and b are linear functions; 0 for none.

    Source: Rezende and Mohamed 2015, arXiv 1505.05770, appendix A.
    """

    def __init__(self, dim: int, condition: int = 0) -> None:
        super().__init__(
            condition, weight=torch.randn(dim) / math.sqrt(dim), push=torch.zeros(dim),
            bias=torch.zeros(()),
        )  # fmt: skip

    def _law(self, y: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, w . u, w . y and b."""
        w, push, b = self._numbers(y, args)
        raw = (push * w).sum(-1)
        product = functional.softplus(raw + math.log(math.expm1(1.0 - _LEAST))) - 1.0 + _LEAST
        square = w.square().sum(-1).clamp(min=torch.finfo(w.dtype).tiny)
        u = push + ((product - raw) / square)[..., None] * w
        return u, product, (y * w).sum(-1), b

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            u, product, side, b = self._law(y, args)
            h = torch.tanh(side + b)
        return y + h[:, None] * u, torch.log1p(product * (1.0 - h * h))

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            u, product, side, b = self._law(y, args)
            v = _root(product, torch.ones_like(product), b, side)
        h = torch.tanh(v + b)
        return y - h[:, None] * u, -torch.log1p(product * (1.0 - h * h))


class Sylvester(_Amortised):
    """y = x + Q R tanh(S Q^T x + b), with log-determinant sum_i log(1 + r_ii s_ii (1 - tanh^2)).

    Q has orthonormal columns, R and S are upper triangular with diagonals in (-1, 1), so that the
    map inverts: by one scalar root a column, last to first. The identity at first. On vectors.

    Args:
        dim: components of a sample.
        rank: columns of Q, at most ``dim``.
        condition: size of a further input ``(batch, condition)``, given as ``args``, which moves
            all of these numbers; 0 for none.

    Source: van den Berg et al. 2018, "Sylvester normalizing flows", arXiv 1803.05649.
    """

    def __init__(self, dim: int, rank: int, condition: int = 0) -> None:
        if not 0 < rank <= dim:
            raise ValueError(f"rank is 1 to dim = {dim}; got {rank}")
        super().__init__(
            condition, basis=torch.randn(dim, rank), outer=torch.zeros(rank, rank),
            inner=torch.randn(rank, rank) / math.sqrt(rank), bias=torch.zeros(rank),
        )  # fmt: skip

    def _law(self, y: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, R, S, b."""
        basis, outer, inner, bias = self._numbers(y, args)
        q, rest = torch.linalg.qr(basis.to(factorable(basis.dtype)))
        q = q * _diagonal(rest).sign().unsqueeze(-2)  # Gram and Schmidt's signs, which do not jump
        return q.to(basis), self._triangle(outer), self._triangle(inner), bias

    @staticmethod
    def _triangle(raw: Tensor) -> Tensor:
        return raw.triu(1) + ((1.0 - _LEAST) * _diagonal(raw).tanh()).diag_embed()

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            q, r, s, b = self._law(y, args)
            h = torch.tanh(_times(_times(y, q), s.mT) + b)
            return y + _times(h, (q @ r).mT), self._ladj(r, s, h)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            q, r, s, b = self._law(y, args)
            h = self._solve(r, s, b, _times(y, q))
            return y - _times(h, (q @ r).mT), -self._ladj(r, s, h)

    def _solve(self, r: Tensor, s: Tensor, b: Tensor, targets: Tensor) -> Tensor:
        """h = tanh(S v + b) at the v with v + R h = target: by substitution from the last."""
        v: list[Tensor] = []  # of the columns from i + 1 on
        h: list[Tensor] = []
        for i in reversed(range(r.shape[-1])):
            shift, target = b[..., i], targets[..., i]
            for j in range(len(v)):
                shift = shift + s[..., i, i + 1 + j] * v[j]
                target = target - r[..., i, i + 1 + j] * h[j]
            own = s[..., i, i]
            v.insert(0, _root(r[..., i, i], own, shift, target))
            h.insert(0, torch.tanh(own * v[0] + shift))
        return torch.stack(h, -1)

    @staticmethod
    def _ladj(r: Tensor, s: Tensor, h: Tensor) -> Tensor:
        return torch.log1p(_diagonal(r) * _diagonal(s) * (1.0 - h * h)).sum(-1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
