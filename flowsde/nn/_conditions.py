"""What a network is told beside its sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["joined"]


def joined(x: Tensor, args: tuple[Any, ...], size: int, dim: int = -1) -> Tensor:
    """x and its conditions side by side: vectors ``(..., n + size)``, or with dim=1 images
    ``(batch, n + size, *space)``.

    Args:
        x: samples.
        args: conditions: alike but for their own number, ``(batch, m)`` of images, which is spread
            over the space, or a number for all samples.
        size: how many numbers they are for each sample.
        dim: the axis.

    Raises:
        ValueError: where they are not so many.
    """
    if not args and not size:
        return x
    parts = [_beside(c, x, dim) for c in args]
    given = sum(part.shape[dim] for part in parts)
    if given != size:
        shapes = [tuple(c.shape) if isinstance(c, Tensor) else c for c in args]
        raise ValueError(
            f"the network was made for conditions of {size} numbers a sample; got {given}, of "
            f"{shapes}: give as many, or make it with condition={given}"
        )
    return torch.cat((x, *parts), dim)


def _beside(condition: Any, x: Tensor, dim: int) -> Tensor:
    """The condition, spread over the space of x."""
    if not isinstance(condition, Tensor) or condition.ndim == 0:
        shared = torch.as_tensor(condition, dtype=x.dtype, device=x.device)
        return shared.expand(*(1 if i == dim % x.ndim else n for i, n in enumerate(x.shape)))
    if condition.ndim == x.ndim:
        return condition
    space = x.shape[2:]
    if condition.ndim != 2 or dim != 1:
        raise ValueError(
            f"a condition is (batch, n) numbers; got {tuple(condition.shape)}: of labels give "
            "one_hot(labels, classes).float(), of one number a sample c[:, None], and c[None] of "
            "numbers that all samples share"
        )
    return condition.reshape(*condition.shape, *(1,) * len(space)).expand(-1, -1, *space)
