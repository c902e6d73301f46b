"""One step of one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar
from .._state import State, on_device, stack, unstack
from ..dynamics.base import Dynamics, Noise
from ..dynamics.discrete import Chain
from ..dynamics.field import Field
from ..solution import Status
from .interpolation import Interpolation

if TYPE_CHECKING:
    from ..stepping import Stepping

__all__ = ["Carry", "Engine", "Integrator", "ReversibleIntegrator", "SlopeCarrying", "Step"]

Carry = Any
_MANY = 6  # places from which it costs less to work all of them out at once


class Step(ABC):
    """What one attempted step gives: the new state, what the next step starts from, and, worked
    out only when asked for, the error estimate and the states between.

    Attributes:
        size: the norm of the error over the tolerance, where an executor has worked it out.
        spent: evaluations, products and whether samples depended on each other, ``(3,)``, where a
            graph took the step and these depend on its values.
        solved: what its iterations came to, where a graph took it off the record.
        failure: why a step of given length could not be taken at all; the solve ends before it.
    """

    __slots__ = ("_later", "carry", "size", "solved", "spent", "y1")
    failure: tuple[Status, str] | None = None

    def __init__(self, y1: State, carry: Carry = None) -> None:
        self.y1, self.carry = y1, carry
        self.size: Tensor | None = None
        self.spent: Tensor | None = None
        self.solved: Any = None
        self._later: tuple[bool, Any] | None = None

    def later(self, make: Callable[[], Any]) -> Any:
        """What make() returns, made when first asked for; again where that recorded no graph, and
        one is wanted now.
        """
        graph = torch.is_grad_enabled()
        if self._later is None or graph > self._later[0]:
            self._later = graph, make()
        return self._later[1]

    def error(self) -> State:
        """The embedded estimate of the local error, shaped as the state."""
        raise TypeError("this method has no error estimate")

    def fault(self, row: int | None) -> str:
        """Why the error, of this row or of any, is not finite."""
        return "the field is not finite"

    def interpolation(self) -> Interpolation | None:
        """The states between as a sum of states in hand; None where they take more than that, and
        ``dense`` says how they are found.
        """
        return None

    def dense(self, theta: Scalar) -> State:
        """The state at t0 + theta (t1 - t0), to the method's ``dense_order``."""
        found = self.interpolation()
        if found is None:
            raise NotImplementedError(f"{type(self).__name__} gives its interpolation, or dense")
        return found.at(theta)

    def between(self, thetas: Sequence[Scalar]) -> list[State]:
        """The states at places that all samples share, many of them at once."""
        found = self.interpolation() if len(thetas) >= _MANY else None
        if found is None:
            return [self.dense(theta) for theta in thetas]
        return unstack(found.many(on_device(thetas, self.y1)))

    def by_rows(self, thetas: Tensor) -> State:
        """The states at places ``(n, batch)`` of each sample's own, stacked."""
        found = self.interpolation()
        return stack([self.dense(x) for x in thetas]) if found is None else found.many(thetas)


class Integrator(ABC):
    """One step of one method. Frozen data; draws no randomness.

    Attributes:
        order: of convergence; for a stochastic method see ``strong_order``.
        dense_order: of the states between steps.
        error_order: the exponent q of a step's error estimate, O(dt^q); None without one.
        static: whether all steps are the same operations, whatever the values; those of implicit
            methods, which iterate, are not, though a graph may hold them (``check_graph``).
        remembers: whether a step depends on those before it, by more than its start.
        cure: what helps where given steps end in states that are not finite.
    """

    order: int
    dense_order: int
    error_order: float | None = None
    static: bool = True
    remembers: bool = False
    cure: ClassVar[str] = "take smaller steps"

    def check(self, dynamics: Dynamics) -> None:
        """Raises TypeError, with the cure, on dynamics without the structure this needs."""
        name = type(self).__name__
        if isinstance(dynamics, Chain):
            raise TypeError(
                f"{name} integrates continuous time; got the chain {type(dynamics).__name__}. "
                "Use Iterate()"
            )
        if dynamics.noise is not None:
            raise TypeError(
                f"{name} integrates ODEs; got an SDE. Use EulerMaruyama(), or StochasticHeun() "
                "for additive or Stratonovich noise"
            )

    def check_graph(self) -> None:
        """Raises TypeError, with the cure, where torch.compile does not take its steps."""
        if not self.static:
            raise TypeError(
                f"{type(self).__name__} takes steps of more than one kind, which one graph does "
                "not hold: use executor=Eager(), or a method such as Tsit5() or Kvaerno5()"
            )

    def check_own_times(self) -> None:
        """Raises TypeError, with the cure, where samples cannot have times of their own."""

    def bind(self, stepping: Stepping) -> Integrator:
        """The integrator with the tolerances or step sizes that the solve asks for."""
        return self

    def along(self, times: Sequence[Scalar]) -> Integrator:
        """The integrator, told the times of the steps to come, where they are given."""
        return self

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        """What a step takes of a Brownian path; None if it takes none."""
        return None

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        """What the first step starts from."""
        return None

    def exponent(self, dynamics: Dynamics) -> float:
        """The exponent q of the error estimate on this dynamics: what adaptive steps go by.

        Raises TypeError, with the cure, where steps cannot be chosen on the way.
        """
        if self.error_order is None:
            raise TypeError(
                f"{type(self).__name__} has no error estimate to adapt its steps by: use "
                "Fixed(...) or Grid(...), or for an ODE Tsit5(), Dopri5(), Bosh3() or Dopri8()"
            )
        return self.error_order

    def slope(self, carry: Carry) -> State:
        """dy/dt at the start, from the first carry: what the first step's size is chosen by."""
        raise TypeError(f"{type(self).__name__} has no error estimate")

    @abstractmethod
    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        """From y at t0 to t1, in either direction."""


class SlopeCarrying(Integrator):
    """A method whose carry is the slope at the step's start."""

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return field.drift(t, y)

    def slope(self, carry: Carry) -> State:
        return carry


class ReversibleIntegrator(Integrator):
    """A method whose steps can be taken back, exact to rounding: no state need be kept."""

    @abstractmethod
    def unstep(
        self, field: Field, t0: Scalar, t1: Scalar, y1: State, dw: Increment | None, carry: Carry
    ) -> tuple[State, Carry]:
        """The y0 and the carry that ``step`` was given, from the y1 and the carry it returned."""


class Engine(Integrator):
    """A solver from outside: one of its steps spans one save interval, on steps of its own.

    Attributes:
        exact: whether it works in double precision, whatever the state's.
    """

    static = False
    exact: bool = False


def check_noise(integrator: Integrator, dynamics: Dynamics) -> Noise:
    """The dynamics' noise, or a TypeError that names what integrates a system without any."""
    if isinstance(dynamics, Chain):
        raise TypeError(f"{type(integrator).__name__} integrates SDEs; got a chain. Use Iterate()")
    if dynamics.noise is None:
        raise TypeError(
            f"{type(integrator).__name__} integrates SDEs; got {type(dynamics).__name__} without "
            "noise. Use Euler(), Heun() or another ODE integrator"
        )
    return dynamics.noise
