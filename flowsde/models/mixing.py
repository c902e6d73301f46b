"""Maps between couplings: they shuffle, mix and scale the rows of a sample's first axis.

Rows are the components of a vector, the channels of an image.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._state import factorable
from ..dynamics.discrete import Map

__all__ = ["ActNorm", "Mixing", "Permutation"]


def _spread(ladj: Tensor, y: Tensor) -> Tensor:
    """The log-determinant ``(batch,)`` of a map of rows, 0-d, that acts at every place."""
    return (ladj * y.shape[2:].numel()).expand(len(y))


def _check_rows(y: Tensor, rows: int) -> None:
    if y.shape[1] != rows:
        raise ValueError(f"the map is of {rows} rows; a sample has shape {tuple(y.shape[1:])}")


def exactly(y: Tensor) -> AbstractContextManager[Any]:
    """No autocast: what multiplies the state, and has to be undone, is of its precision."""
    return nullcontext() if y.is_meta else torch.autocast(y.device.type, enabled=False)


class Permutation(Map):
    """Row i of the result is row ``order[i]``.

    Args:
        order: ``(rows,)``, a permutation; ``torch.randperm(rows, generator=...)`` for a random one,
            ``torch.arange(rows).flip(0)`` for a reversal.
    """

    order: Tensor
    places: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        order = order.cpu()
        places = order.argsort()
        rows = torch.arange(order.numel(), device="cpu").to(order)
        if order.ndim != 1 or not torch.equal(order[places], rows):
            raise ValueError("order is a permutation of 0 .. rows - 1")
        device = torch.get_default_device()
        self.register_buffer("order", order.to(device))
        self.register_buffer("places", places.to(device))

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _check_rows(y, len(self.order))
        return y.index_select(1, self.order), y.new_zeros(len(y))

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        _check_rows(y, len(self.order))
        return y.index_select(1, self.places), y.new_zeros(len(y))


class ActNorm(Map):
    """y = exp(s) x + m, with s and m one number a row.

    The identity until ``start`` sees data: then what leaves it has mean 0 and variance 1 over the
    batch and the places. s and m are parameters like any other, so that checkpoints hold them, and
    no solve changes them.

    Args:
        rows: of a sample's first axis.

    Source: Kingma and Dhariwal 2018, "Glow", arXiv 1807.03039.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(rows))
        self.shift = nn.Parameter(torch.zeros(rows))

    def _law(self, y: Tensor) -> tuple[Tensor, Tensor]:
        _check_rows(y, len(self.shift))
        shape = (-1, *(1,) * (y.ndim - 2))
        return self.log_scale.reshape(shape), self.shift.reshape(shape)

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._law(y)
        return log_scale.exp() * y + shift, _spread(self.log_scale.sum(), y)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._law(y)
        return (y - shift) * (-log_scale).exp(), _spread(-self.log_scale.sum(), y)

    @torch.no_grad()
    def start(self, y: Tensor, *args: Any) -> Tensor:
        rows = y.transpose(0, 1).flatten(1)
        if rows.shape[1] < 2:
            raise ValueError("a mean and a variance need a batch of two samples or more")
        _check_rows(y, len(self.shift))
        log_scale = -0.5 * rows.var(1).clamp(min=torch.finfo(y.dtype).eps).log()
        self.log_scale.copy_(log_scale)
        self.shift.copy_(-rows.mean(1) * log_scale.exp())
        return self.step(0, y)[0]


class Mixing(Map):
    """y = P L (U + diag(exp(s))) x on the rows: L unit lower, U strictly upper triangular.

    On images a 1x1 convolution. The log-determinant is sum(s) at every place; the inverse takes two
    triangular solves. At first L = 1, U = 0, s = 0: a random permutation P.

    Args:
        rows: of a sample's first axis.
        generator: for P.

    Source: Kingma and Dhariwal 2018, "Glow", arXiv 1807.03039; Oliva et al. 2018, arXiv 1801.09819.
    """

    order: Tensor

    def __init__(self, rows: int, *, generator: torch.Generator) -> None:
        super().__init__()
        order = torch.randperm(rows, generator=generator, device=generator.device)
        self.register_buffer("order", order.to(torch.get_default_device()))
        self.log_scale = nn.Parameter(torch.zeros(rows))
        self.triangles = nn.Parameter(torch.zeros(rows, rows))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """P L and U + diag(exp(s)), transposed: they act on rows from the right."""
        lower = self.triangles.tril(-1)
        lower = lower + torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        upper = self.triangles.triu(1) + self.log_scale.exp().diag()
        return lower.mT, upper.mT

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        with exactly(y):
            weight = (upper @ lower).index_select(1, self.order)
            mixed = functional.linear(y.movedim(1, -1), weight.mT).movedim(-1, 1)
        return mixed, _spread(self.log_scale.sum(), y)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        rows = y.index_select(1, self.order.argsort()).movedim(1, -1)
        wide = factorable(y.dtype)
        lower, upper, flat = (x.to(wide) for x in (lower, upper, rows.reshape(-1, len(lower))))
        flat = torch.linalg.solve_triangular(
            lower, flat, upper=True, left=False, unitriangular=True
        )
        flat = torch.linalg.solve_triangular(upper, flat, upper=False, left=False).to(y.dtype)
        return flat.reshape(rows.shape).movedim(-1, 1), _spread(-self.log_scale.sum(), y)
