"""How gradients come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ._loop import Loop, Recorder
from ._tape import Tape
from .integrators.base import Engine
from .solution import Solution

__all__ = ["Adjoint", "Checkpointed", "Direct"]


class Adjoint(ABC):
    """How gradients come back through a solve."""

    @abstractmethod
    def run(self, loop: Loop) -> Solution:
        """Runs the loop so that its outputs differentiate in this way."""


@dataclass(frozen=True)
class Direct(Adjoint):
    """Through every operation of the accepted steps: exact, memory grows with the steps."""

    def run(self, loop: Loop) -> Solution:
        return loop.run(Recorder())


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """The same gradient, bit by bit, from recomputed steps.

    Keeps some states on the way and, in the backward pass, takes the steps between them again, with
    the same times and the same noise. What a step saves for its backward is held for a few steps
    at a time; closures, frozen and shared parameters are no different from ``Direct``. The field
    must be deterministic. Beside the saved tensors, the times of all steps and the graph's nodes
    stay.

    Args:
        budget: bytes that saved tensors and kept states may take together, however many steps
            there will be; the least that works is one step and two states. None: a state every 16
            steps and the tensors of 16 steps, each taken again once.

    Raises:
        ValueError: on a budget < 1.
        RuntimeError: in the backward pass, if recomputation does not meet the forward pass.

    Source: Griewank and Walther 2000 (revolve); Wang, Moin and Iaccarino 2009 (steps not known
    beforehand); Chen et al. 2016, arXiv 1604.06174.
    """

    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"Checkpointed(budget) is a number of bytes >= 1; got {self.budget}")

    def run(self, loop: Loop) -> Solution:
        if isinstance(loop.integrator, Engine):
            raise TypeError(
                f"{type(loop.integrator).__name__} takes its own steps, which cannot be taken "
                "again one by one: use adjoint=Direct()"
            )
        if not torch.is_grad_enabled():
            return loop.run(Recorder())
        tape = Tape(self.budget)
        solution = loop.run(tape)
        tape.finish(solution)
        return solution
