"""From one reading of dW to the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from .._state import State, tree_map
from ..dynamics.base import Dynamics, Noise
from .augmented import noise_of

__all__ = ["to_ito", "to_stratonovich"]


def to_stratonovich(sde: Dynamics) -> Dynamics:
    """The Stratonovich SDE with the solutions of this one.

        f - 1/2 sum_j (dg_j/dy) g_j,    g_j the columns of the diffusion

    One Jacobian-vector product for diagonal noise, whose g_i may depend on y_i alone, and for
    scalar noise; one a column for general noise. An SDE that is read so already, or whose noise is
    additive, is returned as it is.

    Raises:
        TypeError: on dynamics without noise.

    Source: Stratonovich 1966; Kloeden and Platen 1992, section 4.9.
    """
    noise = noise_of(sde)
    return _Converted(sde, noise, -0.5) if noise.ito and not noise.additive else sde


def to_ito(sde: Dynamics) -> Dynamics:
    """The Ito SDE with the solutions of this one: ``to_stratonovich`` taken back.

        f + 1/2 sum_j (dg_j/dy) g_j

    Raises:
        TypeError: on dynamics without noise.
    """
    noise = noise_of(sde)
    return sde if noise.ito or noise.additive else _Converted(sde, noise, 0.5)


@final
class _Converted(Dynamics):
    def __init__(self, sde: Dynamics, noise: Noise, half: float) -> None:
        super().__init__()
        self.sde, self._noise, self._half = sde, noise, half
        self.noise = replace(noise, ito=not noise.ito)
        self.batched_time, self.horizon, self.random = sde.batched_time, sde.horizon, sde.random

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        shift = self._correction(t, y, args)
        return tree_map(lambda f, c: f.add(c, alpha=self._half), self.sde(t, y, *args), shift)

    def diffusion(self, t: Tensor, y: State, *args: Any) -> Any:
        return self.sde.diffusion(t, y, *args)

    def _correction(self, t: Tensor, y: State, args: tuple[Any, ...]) -> State:
        """sum_j (dg_j/dy) g_j."""

        def g(x: State) -> State:
            return self.sde.diffusion(t, x, *args)

        def push(way: State) -> State:
            return torch.func.jvp(g, (y,), (way,))[1]

        if self._noise.kind != "general":
            along = push(tree_map(lambda v, x: v.expand_as(x), g(y), y))
            return tree_map(lambda v, x: v.expand_as(x), along, y)
        matrix, total = g(y), tree_map(torch.zeros_like, y)
        for j in range(self._noise.size or 0):
            along = push(tree_map(lambda v: v[..., j], matrix))  # noqa: B023
            total = tree_map(lambda s, v: s + v[..., j], total, along)  # noqa: B023
        return total

    def prepare(self, y0: State, seed: int | None) -> _Converted:
        sde = self.sde.prepare(y0, seed)
        return _Converted(sde, noise_of(sde), self._half)

    def select(self, index: Tensor) -> Dynamics | None:
        part = self.sde.select(index)
        return None if part is None else _Converted(part, self._noise, self._half)

    def check_span(self, t0: float, t1: float) -> None:
        self.sde.check_span(t0, t1)
