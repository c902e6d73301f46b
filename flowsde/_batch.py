"""Batches of samples, and the conditions that come with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._state import leaves, tree_map

__all__ = ["conditions", "rows", "shared", "spread"]


def conditions(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The batch shape of conditions: ``(batch,)``, or ``()`` where no tensor has rows.

    Raises:
        ValueError: where they have different numbers of rows, other than one.
    """
    sizes = {len(x) for x in leaves(args) if isinstance(x, Tensor) and x.ndim}
    several = sizes - {1}
    if len(several) > 1:
        raise ValueError(f"conditions have a row each, of one number; got {sorted(sizes)} rows")
    return (several.pop() if several else 1,) if sizes else ()


def rows(
    x: Tensor, event: torch.Size, args: tuple[Any, ...]
) -> tuple[Tensor, tuple[Any, ...], torch.Size]:
    """x as ``(count, *event)``, args with as many rows, and the batch shape that x had with them.

    Raises:
        ValueError: where x does not end with the event's shape, or conditions do not fit.
        TypeError: where x is not a tensor of floating point.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a tensor; got {type(x).__name__}: give torch.as_tensor(x)")
    split = x.ndim - len(event)
    if split < 0 or x.shape[split:] != event:
        raise ValueError(f"x ends with the event's shape {tuple(event)}; got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"densities are of floating point; got {x.dtype}: give x.float()")
    given = conditions(args)
    try:
        batch = torch.broadcast_shapes(x.shape[:split], given)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not broadcast with {given[0]} conditions: give one, "
            f"or (..., {given[0]}, *event_shape). One condition of n numbers is (1, n)"
        ) from None
    flat = x.expand(*batch, *event).reshape(-1, *event)
    return flat, spread(args, len(flat)), batch


def shared(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Arguments, of which conditions of one row, ``(1, n)``, are repeated to as many rows."""

    def repeat(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != 1:
            return x
        return x.expand(count, *x.shape[1:])

    return tree_map(repeat, args)


def spread(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Conditions repeated to as many rows."""

    def repeat(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == count:
            return x
        return x.expand(count // len(x), *x.shape).flatten(0, 1)

    return tree_map(repeat, args)
