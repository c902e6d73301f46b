"""Layers that start at zero."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["zeroed"]

M = TypeVar("M", bound=nn.Module)


def zeroed(module: M) -> M:
    """The module with every parameter set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
