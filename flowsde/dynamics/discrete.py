"""Dynamics in discrete time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._state import State
from .base import Dynamics

__all__ = ["Chain", "Composed", "Map"]


class Chain(Dynamics):
    """Steps k = 0 .. K - 1, each y_{k+1} = step(k, y_k); may change the state's shape."""

    @abstractmethod
    def __len__(self) -> int:
        """K."""

    @abstractmethod
    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor | None]:
        """y_{k+1} and log |det dy_{k+1}/dy_k| of shape ``(batch,)``, None if it has none."""

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return float(len(self))

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        """Raises: a chain has no drift."""
        raise TypeError(f"{type(self).__name__} moves in discrete steps: integrate with Iterate()")


class Map(Chain):
    """A chain whose steps invert."""

    @abstractmethod
    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]: ...

    @abstractmethod
    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        """y_k from y_{k+1}, and the log-determinant of that inverse, ``(batch,)``."""


class Composed(Map):
    """Layers one after the other; step k is layer k.

    Args:
        layers: maps of one step each, or of several, taken as one.
    """

    def __init__(self, layers: Iterable[Map]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return self._run(self.layers[k], y, args, inverse=False)

    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return self._run(self.layers[k], y, args, inverse=True)

    @staticmethod
    def _run(
        layer: nn.Module, y: State, args: tuple[Any, ...], *, inverse: bool
    ) -> tuple[State, Tensor]:
        assert isinstance(layer, Map)
        order = range(len(layer))
        ladjs = []
        for i in reversed(order) if inverse else order:
            y, ladj = (layer.unstep if inverse else layer.step)(i, y, *args)
            ladjs.append(ladj)
        return y, torch.stack(ladjs).sum(0)
