"""What a step of a stochastic method asks of its Brownian path, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _random
from ._scalar import Scalar
from ._state import State, tree_map

__all__ = ["Draws", "Increment", "Levy", "Source", "Whole"]

Levy = Literal["W", "H", "K"]


class Increment(NamedTuple):
    """A Brownian path over one step from t0 to t1 = t0 + h, each part shaped as ``Draws`` says.

    With B(u) = W(t0 + u) - W(t0) - (u/h) w, the bridge that is left of the path:

    Attributes:
        w: W(t1) - W(t0), of variance abs(h).
        h: the space-time Levy area, (1/h) times the integral of B over the step. Independent of w,
            of variance abs(h)/12. None unless asked for.
        k: the space-time-time Levy area, (1/h^2) times the integral of B(u) (h/2 - u). Independent
            of both, of variance abs(h)/720. None unless asked for.
        z: further standard normals, of a shape of the method's own; None unless asked for.
        halves: the increments over the two halves of the step; None unless asked for.
        within: the increment over any part of the step, a function of its ends; None unless asked
            for.
    """

    w: State
    h: State | None = None
    k: State | None = None
    z: State | None = None
    halves: tuple[Increment, Increment] | None = None
    within: Callable[[Scalar, Scalar], Increment] | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Increment:
        """The increment with the function of each tensor in the place of it."""
        w, h, k, z = (None if x is None else tree_map(fn, x) for x in self[:4])
        if self.halves is None:
            return Increment(w, h, k, z)
        first, second = self.halves
        return Increment(w, h, k, z, (first.map(fn), second.map(fn)))

    def unbind(self, count: int) -> list[Increment]:
        """Of a stretch of so many steps, stacked along the first axis, those of each step."""
        parts: list[Iterable[Any]] = [_unbound(x, count) for x in self[:4]]
        if self.halves is not None:
            first, second = self.halves
            parts.append(zip(first.unbind(count), second.unbind(count), strict=True))
        return list(map(Increment, *parts))

    @staticmethod
    def stack(steps: Sequence[Increment]) -> Increment:
        """The stretch that ``unbind`` takes apart."""
        return _joined(steps, torch.stack)

    @staticmethod
    def cat(stretches: Sequence[Increment]) -> Increment:
        """Stretches, one behind the other."""
        return _joined(stretches, torch.cat)


def _joined(parts: Sequence[Increment], join: Callable[[list[Tensor]], Tensor]) -> Increment:
    def leaf(*xs: Tensor) -> Tensor:
        return join(list(xs))

    w, h, k, z = (
        None if xs[0] is None else tree_map(leaf, *xs)
        for xs in list(zip(*parts, strict=True))[:4]
    )  # fmt: skip
    halves = [part.halves for part in parts if part.halves is not None]
    if not halves:
        return Increment(w, h, k, z)
    first, second = (_joined(half, join) for half in zip(*halves, strict=True))
    return Increment(w, h, k, z, (first, second))


def _unbound(stretch: State | None, count: int) -> Sequence[State | None]:
    if stretch is None:
        return [None] * count
    if isinstance(stretch, Tensor):
        return stretch.unbind()
    return [tree_map(itemgetter(i), stretch) for i in range(count)]


@dataclass(frozen=True)
class Draws:
    """What one step takes of its path.

    Args:
        shapes: a state shaped as W.
        levy: ``"W"``, ``"H"`` for the space-time Levy area too, ``"K"`` for both.
        extra: a state shaped as the further normals z, batch first; None for none.
        halves: whether the increments over the two halves of the step are wanted.
        within: whether those over parts of the step that are not known beforehand are.
        normal: what numbers are drawn by, many at a time.
    """

    shapes: State
    levy: Levy = "W"
    extra: State | None = None
    halves: bool = False
    within: bool = False
    normal: _random.Draw = _random.normal


class Source(ABC):
    """One solve's view of a path: a pure function, so that steps can be taken again."""

    @abstractmethod
    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        """The increment of step n, from t0 to t1."""

    @abstractmethod
    def select(self, rows: Tensor) -> Source:
        """The source of these rows of the batch alone."""

    def traced(self) -> Source | None:
        """The same as a graph can hold it: made of tensors, of any times, holding nothing. None
        where increments are to be its inputs.
        """
        return None

    def at(self, t: Tensor) -> Tensor | None:
        """What a traced source takes over from the step that ends at t into the one that starts
        there, batch first; None where there is nothing.
        """
        return None

    def walk(
        self, n: int, t0: Scalar, t1: Scalar, here: Tensor | None
    ) -> tuple[Increment, Tensor | None]:
        """The increment, given what there is at t0; and what there is at t1."""
        return self(n, t0, t1), None

    def several(self, n: int, spans: Sequence[tuple[Scalar, Scalar]]) -> Increment:
        """Those of step n and the next ones, over these spans, stacked along the first axis."""
        return Increment.stack([self(n + i, *span) for i, span in enumerate(spans)])


class Whole(Source):
    """A source of any interval, handed out with each increment: ``Increment.within``."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        return self._source(n, t0, t1)._replace(within=partial(self._source, n))

    def select(self, rows: Tensor) -> Whole:
        """The source of these rows of the batch alone."""
        return Whole(self._source.select(rows))
