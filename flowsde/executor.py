"""How steps are run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from .integrators.base import Step

__all__ = ["Eager", "Executor"]


class Executor(ABC):
    """How the steps of a solve are run."""

    @abstractmethod
    def prepare(self, advance: Callable[..., Step]) -> Callable[..., Step]:
        """The step function to call in the place of ``advance``."""


@dataclass(frozen=True)
class Eager(Executor):
    """One operation after the other, times as host floats where the batch shares them."""

    def prepare(self, advance: Callable[..., Step]) -> Callable[..., Step]:
        return advance
