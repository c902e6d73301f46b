"""How steps are run."""

from __future__ import annotations

import types
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._increment import Increment
from ._loop import Loop
from ._scalar import Scalar
from ._state import State, leaves
from .dynamics.base import Dynamics
from .dynamics.field import Field
from .integrators.base import Carry, Integrator, Step
from .stepping import Adaptive

__all__ = ["Compiled", "Eager", "Executor"]

Advance = Callable[[int, Scalar, Scalar, State, Carry], Step]


class Executor(ABC):
    """How the steps of a solve are run."""

    @abstractmethod
    def prepare(self, loop: Loop) -> Advance:
        """The function that takes the loop's steps."""


@dataclass(frozen=True)
class Eager(Executor):
    """One operation after the other, times as host floats where the batch shares them."""

    def prepare(self, loop: Loop) -> Advance:
        return loop.step


@dataclass(frozen=True, eq=False)
class Compiled(Executor):
    """Each step, with its error norm, as one graph of ``torch.compile``, for all steps.

    Times are inputs of the graph, and so is the noise. The first step compiles: seconds to minutes,
    once for each field, integrator and tolerances, with gradients and without; it is taken once
    more beforehand, to count its calls of the field. Keep the object (or the ``Solver`` that holds
    it) and the dynamics: what was compiled lives as long as both. Results are those of ``Eager`` to
    rounding.

    Args:
        backend: as ``torch.compile`` takes it.

    Raises:
        TypeError: on an integrator whose steps are not all of one kind (implicit, multistep, maps
            and chains, engines from outside).
    """

    backend: str = "inductor"
    _made: weakref.WeakKeyDictionary[Dynamics, dict[Any, _Graph]] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    def prepare(self, loop: Loop) -> Advance:
        if not loop.integrator.static:
            raise TypeError(
                f"{type(loop.integrator).__name__} takes steps of more than one kind, which one "
                "graph does not hold: use executor=Eager(), or an explicit method such as Tsit5()"
            )
        adaptive = loop.stepping if isinstance(loop.stepping, Adaptive) else None
        graphs = self._made.setdefault(loop.field.dynamics, {})
        key = loop.integrator, adaptive and (
            adaptive.rtol, adaptive.atol, adaptive.norm, adaptive.per_sample
        )  # fmt: skip
        if key not in graphs:
            graphs[key] = _Graph(self.backend, adaptive)
        graph = graphs[key]

        def advance(n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> Step:
            dw = None if loop.noise is None else loop.noise(n, t0, t1)
            return graph(loop.integrator, loop.field, t0, t1, y, dw, carry)

        return advance


class _Graph:
    """One compiled step."""

    def __init__(self, backend: str, adaptive: Adaptive | None) -> None:
        own = types.FunctionType(_advance.__code__.replace(), _advance.__globals__)
        with _quiet():
            self._compiled = torch.compile(own, backend=backend)  # a cache of its own
        self._adaptive = adaptive
        self._calls: dict[Any, int] = {}  # of the field in a step, for each kind of step

    def __call__(
        self, integrator: Integrator, field: Field, t0: Scalar, t1: Scalar, y: State,
        dw: Increment | None, carry: Carry,
    ) -> Step:  # fmt: skip
        inputs = integrator, self._adaptive, field, _tensor(t0, y), _tensor(t1, y), y, dw, carry
        tensors = [x for x in leaves((y, carry)) if isinstance(x, Tensor)]
        roles = [(x.requires_grad, x.is_leaf) for x in tensors]  # each is traced by itself
        kind, before = (torch.is_grad_enabled(), *roles), field.evaluations
        if kind in self._calls:
            field.evaluations += self._calls[kind]
            return self._compiled(*inputs)
        with torch.no_grad():
            _advance(*inputs)
        self._calls[kind] = field.evaluations - before
        with _quiet():
            return self._compiled(*inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the compiler says of itself is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _advance(
    integrator: Integrator, adaptive: Adaptive | None, field: Field, t0: Tensor, t1: Tensor,
    y: State, dw: Increment | None, carry: Carry,
) -> Step:  # fmt: skip
    step = integrator.step(field, t0, t1, y, dw, carry)
    if adaptive is not None:
        with torch.no_grad():
            step.size = adaptive.measure(step.error(), y, step.y1)
    return step


def _tensor(t: Scalar, y: State) -> Tensor:
    """A time as an input of a graph."""
    if isinstance(t, Tensor):
        return t.contiguous()
    device = leaves(y)[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((), t, dtype=wide, device=device)
