"""Couplings: one part of a sample moves by a law that the other part gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics.discrete import Map
from ..nn._conditions import joined
from .elementwise import Elementwise

__all__ = ["Coupling", "checkerboard", "half"]


def half(shape: int | Sequence[int]) -> Tensor:
    """A mask of this shape, True in the first half of the first axis: channels, of an image.

    Raises:
        ValueError: on an axis of fewer than two.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not shape or shape[0] < 2:
        raise ValueError(f"two components or more can be halved; got {shape}")
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")  # read, whatever the default is
    mask[: shape[0] // 2] = True
    return mask


def checkerboard(shape: int | Sequence[int]) -> Tensor:
    """A mask of this shape, True at every other place; the same in all channels of an image."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    parity = torch.zeros((), dtype=torch.int64, device="cpu")
    for size in shape if len(shape) == 1 else shape[1:]:
        parity = parity[..., None] + torch.arange(size, device="cpu")
    return (parity % 2 == 0).expand(shape).clone()


class Coupling(Map):
    """y_a = x_a, y_b = law(x_b; network(x_a)).

    Args:
        mask: booleans shaped as one sample, True for the components a that stay. One that tells
            apart whole rows of the first axis (components of a vector, channels of an image) splits
            the sample there, without a gather where all of a is on one side. Of any other mask the
            network sees, and answers for, the whole sample, with zeros at b.
        law: an ``Elementwise``.
        network: makes, from its numbers of inputs and of outputs along the first axis, the module
            that gives the law's numbers; with zeros at first, the coupling starts as the identity.
        condition: size of a further input of the network, given as ``args``: ``(batch,
            condition)``, or ``(batch, condition, *space)``; 0 for none.

    Raises:
        ValueError: on a mask that is not boolean, or has one value only.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """

    def __init__(
        self,
        mask: Tensor,
        law: Elementwise,
        network: Callable[[int, int], nn.Module],
        condition: int = 0,
    ) -> None:
        super().__init__()
        if mask.dtype != torch.bool or mask.ndim < 1 or mask.all() or not mask.any():
            raise ValueError("mask is a boolean tensor, shaped as one sample, with both values")
        mask = mask.cpu()
        rows = mask.flatten(1)[:, 0] if mask.ndim > 1 else mask
        whole = bool((mask == rows.reshape(-1, *(1,) * (mask.ndim - 1))).all())
        self.law, self.condition = law, condition
        self.sides = _Rows(rows) if whole else _Blend(mask)
        self.net = network(self.sides.seen + condition, law.count * self.sides.moved)
        self.sides.to(torch.get_default_device())

    def _params(self, a: Tensor, args: tuple[Any, ...]) -> Tensor:
        out = self.net(joined(a, args, self.condition, 1)).to(a.dtype)  # under autocast it is not
        return torch.unflatten(out, 1, (self.law.count, self.sides.moved))

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = self.sides.apart(y)
        return self.sides.together(a, *self.law.forward(b, self._params(a, args)))

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = self.sides.apart(y)
        return self.sides.together(a, *self.law.inverse(b, self._params(a, args)))


class _Sides(nn.Module, ABC):
    """How a sample comes apart into a, which stays, and b, which moves.

    Attributes:
        seen, moved: rows of a and of b along the first axis of a sample.
    """

    seen: int
    moved: int

    @abstractmethod
    def apart(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """a and b."""

    @abstractmethod
    def together(self, a: Tensor, b: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """The sample, and the log-determinant ``(batch,)`` from that of each number of b."""


class _Rows(_Sides):
    """Whole rows of the first axis."""

    order: Tensor | None
    places: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.seen, self.moved = int(rows.sum()), int((~rows).sum())
        self.first = bool(rows[0])  # whether a comes first
        order = (rows != self.first).int().argsort(stable=True)
        sorted_ = bool((order.diff() == 1).all())
        self.register_buffer("order", None if sorted_ else order)
        self.register_buffer("places", None if sorted_ else order.argsort())

    def apart(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y if self.order is None else y.index_select(1, self.order)
        if self.first:
            a, b = torch.split(y, [self.seen, self.moved], 1)
        else:
            b, a = torch.split(y, [self.moved, self.seen], 1)
        return a, b

    def together(self, a: Tensor, b: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat((a, b) if self.first else (b, a), 1)
        return y if self.order is None else y.index_select(1, self.places), ladj.flatten(1).sum(-1)


class _Blend(_Sides):
    """Places of any pattern: a is the sample with zeros at b, b the whole sample."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.seen = self.moved = len(mask)
        self.register_buffer("mask", mask)

    def apart(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(self.mask, y, 0.0), y

    def together(self, a: Tensor, b: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.where(self.mask, 0.0, ladj)
        return torch.where(self.mask, a, b), moved.flatten(1).sum(-1)
