"""The weights with which the normals of a virtual Brownian tree make up an increment."""

from __future__ import annotations

import copy
import functools
import math
import operator
from typing import Any

import numpy as np
import torch

from . import levy

__all__ = ["Weights", "weights"]

_EDGE = 0.5 * math.sqrt(3 / 5)
_GAUSS = {  # points and masses on [0, 1], exact up to degree 2n - 1
    1: ((0.5,), (1.0,)),
    2: ((0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)), (0.5, 0.5)),
    3: ((0.5 - _EDGE, 0.5, 0.5 + _EDGE), (5 / 18, 8 / 18, 5 / 18)),
}


@functools.cache
def weights(outputs: int, order: int, depth: int) -> Weights:
    """Made once."""
    return Weights(outputs, order, depth)


class Weights:
    """A function of the ends of an increment, on a root [0, 1].

    Args:
        outputs: 1 for w, 2 for (w, H), 3 for (w, H, K).
        order: of the expansion.
        depth: levels of wavelets.
    """

    def __init__(self, outputs: int, order: int, depth: int) -> None:
        self._form = outputs, order, depth
        self._xp: Any = np
        functionals = levy.FUNCTIONALS[:outputs]
        points, masses = map(np.array, _GAUSS[order])
        inner = (1, 1, 1)  # halves and ends, levels, rows
        self._tables: dict[str, Any] = {
            "scale": 2.0 ** np.arange(depth + 1)[:, None],
            "kinds": np.arange(float(order))[:, None],
            "halves": np.array([0.0, 0.5]).reshape(2, *inner),
            "points": points.reshape(-1, 1, *inner),
            "masses": masses.reshape(-1, 1, *inner),
            "f": _powers(functionals[:, :order].reshape(outputs, 1, 1, 1, *inner, order)),
            "wavelets": _powers(levy.wavelets(order)[:, None, :, None, None, None, :order]),
            "basis": _powers(levy.LEGENDRE[:order, None, None, :order]),
            "edges": np.stack((-functionals[:, 0], functionals.sum(1)), 1)[..., None],
        }

    def on(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """The same function, of tensors."""
        part = copy.copy(self)
        part._xp = torch
        part._tables = {
            name: [torch.as_tensor(x).to(device, dtype) for x in table]
            if isinstance(table, list) else torch.as_tensor(table).to(device, dtype)
            for name, table in self._tables.items()
        }  # fmt: skip
        return part

    def __call__(self, ends: Any) -> tuple[Any, Any]:
        """Weights and nodes.

        Args:
            ends: ``(2, rows)`` places in [0, 1], ascending: an array, or a tensor after ``on``.

        Returns:
            ``(outputs, 2, nodes, rows)`` weights, ``(2, nodes, rows)`` numbers: of the nodes that
            hold either end, which are those of ``at``.
        """
        (outputs, order, depth), xp, rows = self._form, self._xp, ends.shape[-1]
        scale, index, place = self._index(ends)
        inside = (place > 0.0) & (place < 1.0)
        twice = inside[0] & inside[1] & (index[0] == index[1])
        inside = xp.stack((inside[0] & ~twice, inside[1]))  # a node that holds both counts once
        root = self._on_root(ends)[:, None]
        wavelets = self._on_wavelets(ends, (index / scale)[:, :depth]) * inside[:, :depth]
        leaves = self._on_leaves(place[:, -1]) * (ends[1] > ends[0])
        weights = (
            xp.concatenate((root, 0.0 * root), 1),
            xp.moveaxis(wavelets, 1, 2).reshape(outputs, 2, order * depth, rows),
            leaves[:, :, None],
        )
        return xp.concatenate(weights, 2), self._numbers(index)

    def at(self, places: Any) -> Any:
        """The numbers of the nodes that hold these places, ``(k, rows)``: ``(k, nodes, rows)``."""
        return self._numbers(self._index(places)[1])

    def _index(self, places: Any) -> tuple[Any, Any, Any]:
        """Nodes a level, those that hold these places, and where in them; ``(k, levels, rows)``."""
        scale = self._tables["scale"]
        scaled = places[:, None] * scale
        index = self._xp.minimum(self._xp.floor(scaled), scale - 1.0)
        return scale, index, scaled - index

    def _numbers(self, index: Any) -> Any:
        (_, order, depth), xp, kinds = self._form, self._xp, self._tables["kinds"]
        first, (count, _, rows) = order * (self._tables["scale"] + index), index.shape
        inner = (first[:, None, :depth] + kinds[:, None]).reshape(count, order * depth, rows)
        nodes = xp.concatenate((kinds + 0.0 * first[:, :1], inner, first[:, depth:]), 1)
        return xp.asarray(nodes, dtype=xp.int64)

    def _on_root(self, ends: Any) -> Any:
        """By the polynomials over [0, 1]: ``(outputs, order, rows)``."""
        s, h = ends[0], ends[1] - ends[0]
        x, mass = (self._tables[name][:, 0, 0, 0] for name in ("points", "masses"))
        f = _value([p[:, :, 0, 0, 0] for p in self._tables["f"]], x)
        return _total(f * _value(self._tables["basis"], s + h * x) * (mass * h))

    def _on_wavelets(self, ends: Any, start: Any) -> Any:
        """By the wavelets over the nodes that start here: ``(outputs, order, 2, levels, rows)``.

        On either half of a node both factors are polynomials, which a Gauss rule integrates exactly
        over what the step covers of it.
        """
        xp, table, (s, t) = self._xp, self._tables, ends
        width = 1.0 / table["scale"][:-1]
        half, h = 0.5 * width, xp.where(t > s, t - s, 1.0)
        left = start + table["halves"] * width
        low, high = xp.maximum(s, left), xp.minimum(t, left + half)
        length = (high - low).clip(0.0)
        f = _value(table["f"], (low - s) / h + length / h * table["points"])
        psi = _value(table["wavelets"], (low - left) / half + length / half * table["points"])
        return _total(_total(f * psi * (table["masses"] * length))) / width**0.5

    def _on_leaves(self, place: Any) -> Any:
        """By the leaves' own normals: ``(outputs, 2, rows)``, at these places in the two leaves.

        What is left of W's variance beside the polynomials enters at either end of the step.
        """
        _, order, depth = self._form
        bow = place * (1.0 - place)
        terms = (bow, 3.0 * bow**2, 5.0 * (bow * (1.0 - 2.0 * place)) ** 2)
        left = terms[0] - sum(terms[1:order])
        return self._tables["edges"] * (left.clip(0.0) * 2.0**-depth) ** 0.5


def _powers(factors: np.ndarray) -> list[np.ndarray]:
    """The factors of polynomials, which stand along the last axis, by powers."""
    return list(np.moveaxis(factors, -1, 0))


def _value(factors: list[Any], x: Any) -> Any:
    """Polynomials at x."""
    *lower, value = factors
    for factor in reversed(lower):
        value = value * x + factor
    return value


def _total(x: Any) -> Any:
    """The sum over the third axis, in an order that no other axis alters."""
    return functools.reduce(operator.add, (x[:, :, i] for i in range(x.shape[2])))
