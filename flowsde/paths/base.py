"""The drivers of differential equations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .._increment import Draws, Source
from .._scalar import Scalar

__all__ = ["Path", "RandomPath"]


class Path(ABC):
    """A control X(t) that drives ``dy = f(t, y) dX(t)``.

    Attributes:
        causal: whether X, up to arrival i, is made of the first i observations alone.
    """

    causal: bool = False

    @abstractmethod
    def evaluate(self, t: Tensor) -> Tensor:
        """X(t), shape ``(batch, channels)``, for a 0-d or ``(batch,)`` time."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """dX/dt at t, shape ``(batch, channels)``."""

    @property
    @abstractmethod
    def knots(self) -> Tensor:
        """Times at which the path is not smooth, ``(m,)``, its ends among them."""

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last of them."""
        first, last = self.knots.detach()[[0, -1]].tolist()
        return first, last

    @property
    def jumps(self) -> Tensor:
        """The times among them at which dX/dt jumps, for ``Adaptive(jump_at=path.jumps)``."""
        return self.knots

    @property
    def arrivals(self) -> Tensor:
        """Times by which observations are taken in, ``(n,)`` or ``(batch, n)``: what to save at to
        have a state after each.
        """
        return self.knots

    def select(self, index: Tensor) -> Path | None:
        """The paths of these rows of the batch alone; None where that cannot be told."""
        return None


class RandomPath(ABC):
    """A Brownian motion W that drives ``dy = f(t, y) dt + g(t, y) dW``."""

    @abstractmethod
    def bind(self, grid: Sequence[Scalar], draws: Draws) -> Source:
        """The path over the steps of a grid, known beforehand."""

    @abstractmethod
    def tree(self, t0: Scalar, t1: Scalar, draws: Draws) -> Source:
        """The path over any steps between t0 and t1, floats or ``(batch,)``, chosen on the way."""
