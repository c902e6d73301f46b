"""What a step of a stochastic method asks of its Brownian path, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from ._scalar import Scalar
from ._state import State

__all__ = ["Draws", "Increment", "Levy", "Source"]

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
    """

    w: State
    h: State | None = None
    k: State | None = None
    z: State | None = None
    halves: tuple[Increment, Increment] | None = None


@dataclass(frozen=True)
class Draws:
    """What one step takes of its path.

    Args:
        shapes: a state shaped as W.
        levy: ``"W"``, ``"H"`` for the space-time Levy area too, ``"K"`` for both.
        extra: a state shaped as the further normals z, batch first; None for none.
        halves: whether the increments over the two halves of the step are wanted.
    """

    shapes: State
    levy: Levy = "W"
    extra: State | None = None
    halves: bool = False


class Source(Protocol):
    """One solve's view of a path: a pure function, so that steps can be taken again."""

    def __call__(self, n: int, t0: Scalar, t1: Scalar) -> Increment:
        """The increment of step n, from t0 to t1."""

    def select(self, rows: Tensor) -> Source:
        """The source of these rows of the batch alone."""
