"""The states between the ends of a step, as sums of states in hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .._scalar import Scalar
from .._state import State, combine, on_device, tree_map

__all__ = ["Interpolation", "hermite", "polynomial"]


@dataclass(frozen=True, eq=False)
class Interpolation:
    """y(theta) = start + sum_j factor_j p_j(theta) vector_j,    p_j(theta) = sum_n c_jn theta^n.

    Args:
        start: the state at theta = 0.
        vectors: states, shaped as the start.
        powers: for each of them c_j1, c_j2, ...: numbers, 0-d or ``(batch,)``.
        factors: one for each: numbers, 0-d or ``(batch,)``.
    """

    start: State
    vectors: Sequence[State]
    powers: Sequence[Sequence[Scalar]]
    factors: Sequence[Scalar]

    def at(self, theta: Scalar) -> State:
        """The state at one place, or ``(batch,)`` at one of each sample's own."""
        total = self.start
        for vector, powers, factor in zip(self.vectors, self.powers, self.factors, strict=True):
            weight: Scalar = 0.0
            for power in reversed(powers):
                weight = (weight + power) * theta
            total = combine(total, weight * factor, ((0, 1.0),), [vector])
        return total

    def many(self, thetas: Tensor) -> State:
        """The states at places ``(n,)``, or ``(n, batch)`` of each sample's own, stacked along the
        first axis: as many operations for all of them as for a few.
        """
        weights = self._weights(thetas)
        return tree_map(lambda *xs: _summed(weights, *xs), self.start, *self.vectors)

    def _weights(self, thetas: Tensor) -> list[Tensor]:
        """Of each vector, ``(n,)`` or ``(n, batch)``."""
        rows = [*zip_longest(*self.powers, fillvalue=0.0), tuple(self.factors)]
        *table, factors = (on_device(row, thetas).movedim(0, -1) for row in rows)
        own = any(row.ndim > 1 for row in (*table, factors))
        places = thetas[:, None, None] if own and thetas.ndim == 1 else thetas[..., None]
        weight: Any = 0.0
        for row in reversed(table):
            weight = (weight + row) * places
        return list((weight * factors).unbind(-1))


def _summed(weights: Sequence[Tensor], start: Tensor, *vectors: Tensor) -> Tensor:
    """start + sum_j weights_j vectors_j, ``(n, *start.shape)``."""
    total = start[None]
    for weight, vector in zip(weights, vectors, strict=True):
        inner = (1,) * (start.ndim + 1 - weight.ndim)
        weight = weight.reshape(*weight.shape, *inner).to(start.dtype.to_real())
        total = torch.addcmul(total, weight, vector)
    return total


def polynomial(
    y0: State, ks: Sequence[State], dense: Sequence[Sequence[float]], dt: Scalar
) -> Interpolation:
    """y0 + dt sum_i b_i(theta) k_i, with b_i(theta) = sum_n dense[i][n] theta^(n+1)."""
    used = [(k, powers) for k, powers in zip(ks, dense, strict=True) if any(powers)]
    vectors, table = zip(*used, strict=True)
    return Interpolation(y0, vectors, table, len(vectors) * [dt])


def hermite(y0: State, y1: State, k0: State, k1: State, dt: Scalar) -> Interpolation:
    """The cubic through both states with both slopes."""
    jump = tree_map(lambda a, b: b - a, y0, y1)
    powers = (0.0, 3.0, -2.0), (1.0, -2.0, 1.0), (0.0, -1.0, 1.0)
    return Interpolation(y0, (jump, k0, k1), powers, (1.0, dt, dt))
