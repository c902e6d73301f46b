"""What a failing solve raises: one typed error that carries the partial solution and the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .solution import Solution

__all__ = ["MaxStepsReached", "NonFiniteState", "NotSettled", "SolveError", "StepUnderflow"]


class SolveError(RuntimeError):
    """A solve that ended before its end time. ``solution`` holds what was computed so far."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.solution)


class MaxStepsReached(SolveError):
    """``max_steps`` attempts were used up before ``t1``."""


class NonFiniteState(SolveError):
    """The field or the state left the finite numbers."""


class NotSettled(SolveError):
    """A search for a steady state ended where the drift is not small, or no rest is isolated."""


class StepUnderflow(SolveError):
    """The controller asked for a step too small to advance the time."""
