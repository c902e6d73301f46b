"""Gradients that have no derivative of their own, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["once", "refused"]

Backward = Callable[..., tuple[Tensor | None, ...]]


def once(cure: str) -> Callable[[Backward], Backward]:
    """Marks a Function's backward as not differentiable, by its inputs or by its cotangents.

    torch's own ``once_differentiable`` refuses the derivative by the cotangents alone; that by the
    inputs it drops without a word. The Function saves tensors through which its inputs are reached.

    Args:
        cure: what the error says.

    Raises:
        RuntimeError: in the backward pass of the backward pass.
    """

    def mark(backward: Backward) -> Backward:
        @wraps(backward)
        def marked(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            causes = (*ctx.saved_tensors, *cotangents)  # raises where one was changed in place
            with torch.no_grad():
                found = backward(ctx, *cotangents)
            if not torch.is_grad_enabled():
                return found
            return tuple(None if x is None else refused(cure, x, *causes) for x in found)

        return marked

    return mark


def refused(cure: str, gradient: Tensor, *causes: Tensor) -> Tensor:
    """The gradient, of which any further one raises: by these, from which it comes, too."""
    refuse: Callable[..., Tensor] = _Refusal.apply
    return refuse(cure, gradient, *causes)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cure: str, value: Tensor, *causes: Tensor) -> Tensor:
        ctx.cure = cure
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise RuntimeError(f"this gradient cannot be differentiated again: {ctx.cure}")
