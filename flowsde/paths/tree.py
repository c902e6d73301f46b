"""Brownian motion at any times: a virtual tree, of which nothing is kept but a seed."""

from __future__ import annotations

import copy
import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _random
from .._increment import Draws, Increment, Levy, Source
from .._scalar import Scalar, maximum, minimum, moving, where
from .._state import State
from . import levy
from .base import RandomPath
from .nodes import Weights, weights
from .normals import Law, Normals

__all__ = ["DEPTH", "BrownianTree", "Queries"]

DEPTH = 20  # levels by default: leaves are a millionth of the span
_DEEPEST = 28  # numbers of nodes stay below the counters' 2^31
_WORDS = {torch.float64: torch.int64, torch.float32: torch.int32}


@dataclass(frozen=True, eq=False)
class BrownianTree(RandomPath):
    """W(t) at any t between t0 and t1, the same whatever the steps that a solve takes.

    Unlike ``Brownian(seed)``, which is defined on the grid of its solve, it is one path for solves
    with any steps, fixed or adaptive, within [t0, t1], in either direction.

    Args:
        seed: as for ``Brownian``.
        t0, t1: the span, t0 < t1. Another span is another path.
        tol: the length of a leaf; by default 2^-20 of the span. What holds beyond it and below
            is said of ``Queries``.
        levy: what the path carries, ``"W"``, ``"H"`` or ``"K"``; None for what the solve asks.
            Paths that carry more are other paths, and cost more: name it where methods that need
            different things are to follow one path.
        antithetic, correlation: as for ``Brownian``.

    Raises:
        ValueError: on a span or tolerance out of range; from the solve, when it leaves the span.
        TypeError: from the solve, when its method needs more than the path carries.
    """

    seed: int | Tensor
    t0: float
    t1: float
    tol: float | None = None
    levy: Levy | None = field(default=None, kw_only=True)
    antithetic: bool = field(default=False, kw_only=True)
    correlation: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        Law(self.seed, self.antithetic, self.correlation)
        for name in ("t0", "t1", "tol"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.ndim == 0 and not moving(value):
                object.__setattr__(self, name, float(value))
            elif value is not None and not isinstance(value, numbers.Real):
                raise TypeError(f"{name} of a tree is a number, without a gradient; got {value!r}")
        if not -math.inf < self.t0 < self.t1 < math.inf:
            raise ValueError(f"a tree spans t0 < t1, both finite; got {self.t0} and {self.t1}")
        if self.levy not in (None, *levy.ORDER):
            raise ValueError(f"levy is 'W', 'H', 'K' or None; got {self.levy!r}")
        if self.tol is not None and not 0.0 < self.tol <= self.t1 - self.t0:
            raise ValueError(f"tol is the length of a leaf, within the span; got {self.tol}")
        if self._depth > _DEEPEST:
            raise ValueError(
                f"tol is at least 2^-{_DEEPEST} of the span; got {self.tol}: give a larger "
                "tol or a shorter span"
            )

    @property
    def _depth(self) -> int:
        if self.tol is None:
            return DEPTH
        return math.ceil(math.log2((self.t1 - self.t0) / self.tol) - 1e-9)

    def bind(self, grid: Sequence[Scalar], draws: Draws) -> Source:
        return self.tree(grid[0], grid[-1], draws)

    def tree(self, t0: Scalar, t1: Scalar, draws: Draws) -> Source:
        slack = 1e-9 * (self.t1 - self.t0)
        for t in (t0, t1):
            low, high = (float(v) for v in torch.as_tensor(t).detach().aminmax())
            if low < self.t0 - slack or high > self.t1 + slack:
                raise ValueError(
                    f"the solve reaches t = {low if low < self.t0 else high}, outside the span of "
                    f"its path: give BrownianTree(seed, t0, t1) all of it"
                )
        order = levy.ORDER[self.levy or draws.levy]
        if order < levy.ORDER[draws.levy]:
            raise TypeError(
                f"the method needs {draws.levy} and its path carries {self.levy}: give "
                f"BrownianTree(..., levy={draws.levy!r})"
            )
        law = Law(self.seed, self.antithetic, self.correlation)
        return Queries(law, draws, order, self.t0, self.t1 - self.t0, self._depth)


class Queries(Source):
    """One solve's view of a Brownian motion on a span: the increment over any of its intervals.

    The white noise dW is expanded in polynomials over the span and, level by level, in wavelets
    over intervals halved again and again, each with independent normals of its own: the expansion
    of degree 0 gives W on its dyadic points, of degree 1 and 2 also H and K over its dyadic
    intervals. An increment is a sum over the nodes in which one of its ends lies, with weights
    that depend on the times only; a node's normals are a function of the seed and its number. So
    queries have no order, and nothing need be kept (the last query's nodes are, where the batch
    shares its times, to save time).

    Inside a leaf, an interval of the last level, W is the polynomial with the leaf's w, H and K,
    and one normal more that makes its variance that of Brownian motion. Increments of W between
    times in different leaves, or on the ends of leaves, have the exact joint law; so have all of
    W, H and K on the ends of leaves; H and K elsewhere up to (leaf / step)^2. Increments are
    additive to rounding, whatever the times.

    Args:
        law: of the path.
        draws: what the solve asks for.
        order: of the expansion, 1 for W, 2 for H, 3 for K. The order decides the path: W of one
            order is not W of another.
        start, span: of the root, floats or ``(batch,)``.
        depth: the number of times that the root is halved.
    """

    def __init__(
        self, law: Law, draws: Draws, order: int, start: Scalar, span: Scalar, depth: int
    ) -> None:
        self._normals = Normals(law, draws.shapes)
        self._extra = None if draws.extra is None else Normals(law, draws.extra, correlated=False)
        self._draws = draws
        self._weights = weights(levy.ORDER[draws.levy], order, depth)
        self._start, self._span = start, span
        self._traced = False
        self._forget()

    def _forget(self) -> None:
        self._places: dict[int, int] = {}  # of the nodes' numbers that are held
        self._held = torch.empty(0)
        self._key = self._normals.keys(_random.TREE)

    def select(self, rows: Tensor) -> Queries:
        """The view of these rows of the batch alone."""
        part = copy.copy(self)
        part._normals = self._normals.select(rows)
        part._extra = None if self._extra is None else self._extra.select(rows)
        part._start, part._span = (
            x[rows] if isinstance(x, Tensor) else x for x in (self._start, self._span)
        )
        part._forget()
        return part

    def traced(self) -> Queries:
        """The same with nothing but tensors, which every query draws anew, in one pass."""
        device = self._key.device
        part = copy.copy(self)
        part._start, part._span = (
            torch.as_tensor(x, dtype=_random.widest(device), device=device)
            for x in (self._start, self._span)
        )
        part._weights_of_rows = self._weights_of_rows
        part._traced = True
        return part

    @functools.cached_property
    def _weights_of_rows(self) -> Weights:
        device = self._key.device
        return self._weights.on(device, _random.widest(device))

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        return self.walk(n, t0, t1, self.at(t0))[0]

    def at(self, t: Scalar) -> Tensor | None:
        """The normals of the nodes that hold t, of a traced source: they are half of a query."""
        if not self._traced:
            return None
        place: Any = self._place(t)
        return self._drawn(self._weights_of_rows.at(place[None])[0])

    def walk(
        self, n: int, t0: Scalar, t1: Scalar, here: Tensor | None
    ) -> tuple[Increment, Tensor | None]:
        z = None if self._extra is None else self._further(self._extra, t0, t1)
        if not self._draws.halves:
            parts, there = self._parts(t0, t1, here)
            return self._increment(parts)._replace(z=z), there
        mid = 0.5 * (t0 + t1)
        before, middle = self._parts(t0, mid, here)
        after, there = self._parts(mid, t1, middle)
        halves = self._increment(before), self._increment(after)
        whole = self._increment(levy.compose(before, after))
        return whole._replace(z=z, halves=halves), there

    def _increment(self, parts: Sequence[Tensor]) -> Increment:
        return Increment(*(self._normals.shape(x) for x in parts))

    def _further(self, extra: Normals, t0: Scalar, t1: Scalar) -> State:
        """Normals for the step between these times, which say nothing of other steps."""
        key = extra.keys(_random.EXTRA)
        wide = _random.widest(key.device)
        for t in (minimum(t0, t1), maximum(t0, t1)):
            bits = torch.as_tensor(t + 0.0, dtype=wide, device=key.device)  # no zero is negative
            key = _random.keys_of(key ^ bits.view(_WORDS[wide]), _random.EXTRA)
        return extra.shape(_random.normal(key, key.new_zeros(1), extra.size, extra.dtype)[0])

    def _parts(
        self, t0: Scalar, t1: Scalar, here: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """w, H and K over the step, each ``(rows, size)``; what there is at its end."""
        start: Any = self._place(t0)
        end: Any = self._place(t1)
        there = None
        if here is not None:
            parts, there, turn = self._taken(start, end, here)
        elif isinstance(start, Tensor) or isinstance(end, Tensor):
            parts, turn = self._by_row(start + 0.0 * end, end + 0.0 * start)
        else:
            parts, turn = self._shared(start, end)
        odd = True, False, True
        return [x * turn if o else x for o, x in zip(odd, parts, strict=False)], there

    def _shared(self, start: float, end: float) -> tuple[Tensor, Scalar]:
        """w, H and K of the step turned upwards, and the sign of what is odd in time."""
        ends = np.array([[min(start, end)], [max(start, end)]])
        values, nodes = self._weights(ends)
        numbers = self._numbers(nodes.ravel().tolist())
        flat = torch.from_numpy(values.reshape(len(values), -1, 1))
        return _by_halves(self._weighed(flat, numbers)), _sign(start, end)

    def _by_row(self, start: Tensor, end: Tensor) -> tuple[Tensor, Scalar]:
        """The same."""
        values, nodes = self._weights_of_rows(_upwards(start, end))
        numbers = self._normal(nodes.flatten(0, 1))
        terms = self._weighed(values.flatten(1, 2), numbers)
        return _by_halves(terms), _sign(start, end).to(numbers)

    def _taken(self, start: Tensor, end: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Scalar]:
        """The same, given what there is at the start; what there is at the end."""
        values, nodes = self._weights_of_rows(_upwards(start, end))
        turned = start > end
        there = self._drawn(torch.where(turned, nodes[0], nodes[1]))
        values = torch.where(turned, values.flip(1), values)
        numbers = torch.cat((here, there), 1).transpose(0, 1)
        terms = self._weighed(values.flatten(1, 2), numbers)
        return terms.sum(1), there, _sign(start, end).to(numbers)

    def _weighed(self, values: Tensor, numbers: Tensor) -> Tensor:
        """``(outputs, nodes, rows, size)``."""
        return (values.to(numbers) * self._span**0.5)[..., None] * numbers

    def _drawn(self, nodes: Tensor) -> Tensor:
        """``(rows, nodes, size)`` normals of these, ``(nodes, rows)``."""
        return self._normal(nodes).transpose(0, 1).contiguous()

    def _normal(self, nodes: Tensor) -> Tensor:
        """``(nodes, rows, size)``."""
        return _random.normal(self._key, nodes, self._normals.size, self._normals.dtype)

    def _place(self, t: Scalar) -> Scalar:
        """The time as a part of the span, 0 to 1."""
        if isinstance(t, Tensor):
            if t.requires_grad:
                raise TypeError(
                    "a Brownian path on a tree has no derivative by the times of its increments: "
                    "detach t0 and t1, or give Brownian(seed) and steps known beforehand"
                )
            t = t.reshape(-1) if t.ndim or self._traced else float(t)
        still = self._span <= 0.0
        return where(still, 0.0, (t - self._start) / where(still, 1.0, self._span))

    def _numbers(self, nodes: list[int]) -> Tensor:
        """``(nodes, rows, size)``: those held, and those of new nodes, drawn in one go."""
        new = [node for node in dict.fromkeys(nodes) if node not in self._places]
        if new:
            steps = torch.tensor(new, dtype=torch.int64, device=self._key.device)
            drawn = self._normal(steps)
            held = len(self._held)
            self._held = torch.cat((self._held, drawn)) if held else drawn
            self._places |= {node: held + i for i, node in enumerate(new)}
        rows = torch.tensor([self._places[node] for node in nodes], device=self._key.device)
        self._held = self._held.index_select(0, rows)
        self._places = {node: i for i, node in enumerate(nodes)}
        return self._held


def _upwards(start: Tensor, end: Tensor) -> Tensor:
    return torch.stack((torch.minimum(start, end), torch.maximum(start, end)))


def _sign(start: Any, end: Any) -> Any:
    if not isinstance(start, Tensor):
        return 1.0 if start <= end else -1.0
    return torch.where(start <= end, 1.0, -1.0)[:, None]


def _by_halves(x: Tensor) -> Tensor:
    """The sum over the second axis, in place, in an order that no other axis alters, as ``sum``
    does not promise: the second half is added to the first, again and again.
    """
    while (count := x.shape[1]) > 1:
        rest = x[:, -(count // 2) :]
        x[:, : count // 2].add_(rest)
        x = x[:, : -(count // 2)]
    return x[:, 0]
