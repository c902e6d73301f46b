"""The driver of a differential equation."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["Path"]


class Path(ABC):
    """A control X(t) that drives ``dy = f(t, y) dX(t)``."""

    @abstractmethod
    def evaluate(self, t: Tensor) -> Tensor:
        """X(t), shape ``(batch, channels)``, for a 0-d or ``(batch,)`` time."""

    @abstractmethod
    def derivative(self, t: Tensor) -> Tensor:
        """dX/dt at t, shape ``(batch, channels)``."""

    @property
    @abstractmethod
    def knots(self) -> Tensor:
        """Times at which the path is not smooth."""
