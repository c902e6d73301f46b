"""Dynamics in discrete time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._state import State
from .base import Dynamics

__all__ = ["Chain", "Composed", "Inverse", "Map"]


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
    """A chain whose steps invert: one step, where it does not say otherwise."""

    def __len__(self) -> int:
        return 1

    @abstractmethod
    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]: ...

    @abstractmethod
    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        """y_k from y_{k+1}, and the log-determinant of that inverse, ``(batch,)``."""

    @torch.no_grad()
    def start(self, y: State, *args: Any) -> State:
        """Sets what data should set before training (``ActNorm``) from one batch of it.

        Returns:
            What the map makes of the batch.
        """
        return _run(self, y, args, inverse=False)[0]


class Composed(Map):
    """Layers one after the other; step k is layer k.

    Args:
        layers: maps of one step each, or of several, taken as one.
    """

    def __init__(self, layers: Iterable[Map]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.random = any(layer.random for layer in self._maps())

    def __len__(self) -> int:
        return len(self.layers)

    def _maps(self) -> list[Map]:
        return list(self.layers)  # type: ignore[arg-type]

    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return _run(self.layers[k], y, args, inverse=False)

    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return _run(self.layers[k], y, args, inverse=True)

    def start(self, y: State, *args: Any) -> State:
        for layer in self._maps():
            y = layer.start(y, *args)
        return y

    def prepare(self, y0: State, seed: int | None) -> Composed:
        """Each layer with a seed of its own."""
        if not self.random or seed is None:
            return self
        layers = self._maps()
        return Composed(layer.prepare(y0, _fork(seed, i)) for i, layer in enumerate(layers))


class Inverse(Map):
    """A map taken backwards: its step k undoes the last step but k.

    Args:
        map: such as a masked autoregressive one, whose inverse samples in one pass; ``start`` sets
            nothing in it.
    """

    def __init__(self, map: Map) -> None:
        super().__init__()
        self.map = map
        self.random = map.random

    def __len__(self) -> int:
        return len(self.map)

    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return self.map.unstep(len(self) - 1 - k, y, *args)

    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        return self.map.step(len(self) - 1 - k, y, *args)

    def prepare(self, y0: State, seed: int | None) -> Inverse:
        return Inverse(self.map.prepare(y0, seed)) if self.random else self


def _run(
    layer: nn.Module, y: State, args: tuple[Any, ...], *, inverse: bool
) -> tuple[State, Tensor]:
    """All steps of a map."""
    assert isinstance(layer, Map)
    order = range(len(layer))
    total: Tensor | None = None
    for i in reversed(order) if inverse else order:
        y, ladj = (layer.unstep if inverse else layer.step)(i, y, *args)
        total = ladj if total is None else total + ladj
    assert total is not None, "a map has a step or more"
    return y, total


def _fork(seed: int, index: int) -> int:
    """The seed of a part, however deep parts are nested: a step of a congruential generator."""
    return (seed * 6364136223846793005 + 2 * index + 1) % 2**63
