"""How steps are run."""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _random
from ._graph import Calls, Graph, as_input, of_sizes
from ._increment import Increment, Source
from ._leap import Leap, look, tried
from ._loop import Loop
from ._save import SaveEnd
from ._scalar import Scalar, forwarding, whole
from ._state import State, batch_size, describe, unhooked
from ._sweep import Sweeps
from .dynamics.base import Dynamics
from .dynamics.field import MIXED, Field
from .integrators.base import Carry, Integrator, Step
from .integrators.interpolation import Interpolation
from .integrators.newton import Implicit, Solved
from .stepping import Adaptive

__all__ = ["Compiled", "Eager", "Executor", "Picard"]


class Executor(ABC):
    """How the steps of a solve are run."""

    @abstractmethod
    def prepare(self, loop: Loop, dynamics: Dynamics) -> None:
        """Tells the loop how to take steps. ``dynamics`` is what ``solve`` was given: the same
        from one solve to the next, which what it is ``prepared`` to be need not be.
        """

    def normal(self, key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Draws the numbers of a path over many steps: see ``_random.normal``."""
        return _random.normal(key, steps, size, dtype)


@dataclass(frozen=True)
class Eager(Executor):
    """One operation after the other, times as host floats where the batch shares them."""

    def prepare(self, loop: Loop, dynamics: Dynamics) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Compiled(Executor):
    """Steps as graphs of ``torch.compile``: all of a solve in one, several, or each with its error.

    Of a solve of which nobody wants more than the end (no ``save_at``, dense output, events,
    progress bar, ``step_at`` or ``jump_at``) given steps are taken up to 8 at a time, noise and
    times being inputs of one graph, with gradients under ``Direct`` too. Without gradients
    (``torch.no_grad``) all steps of an adaptive solve, and on a CPU all given ones, are a
    ``torch.while_loop`` within one graph. Any other solve calls one graph a step. A virtual tree,
    as under chosen steps, is asked within the graph; the numbers of a path over given steps are
    drawn by a graph of their own. All of them serve all steps and all
    later solves: other values of states, parameters, arguments, times and noise are seen; other
    shapes, dtypes or attributes of the field compile again. Results are those of ``Eager`` to
    rounding. Forward-mode derivatives run eagerly.

    The first solve compiles: seconds to minutes, once for each field, integrator and tolerances,
    with gradients and without. Keep the object (or the ``Solver`` that holds it) and the dynamics:
    what was compiled lives as long as both. Within one solve a field whose first two steps found
    nothing changed but tensors is taken not to change otherwise. What a field does beside its value
    (it counts its calls, it prints) it does while it is compiled alone, and hooks that are put on
    it later are not seen, as under ``torch.compile``. Gradients are first derivatives: to
    differentiate them again raises a RuntimeError.

    Args:
        backend: as ``torch.compile`` takes it.
        options: those of the backend, as ``torch.compile`` takes them; of inductor's they stand
            before its own choices here: ``{"inplace_buffers": False}``, without which gradients of
            torch 2.13 can be wrong, and on a CPU ``{"cpp_wrapper": True}``, which spares Python
            between the kernels. There ``{"cpp.use_decompose_tanh": True}`` makes the compiler's
            tanh as fast as the eager one, to float32's rounding but not near zero.

    Raises:
        TypeError: on an integrator whose steps are not all of one kind (multistep, maps and chains,
            engines from outside), on an implicit one with ``GMRES()``, and on dynamics that take
            derivatives of a field otherwise than densities by ``Exact()`` or ``Hutchinson()`` do
            (``HutchPlusPlus()``, costates, conversions).
    """

    backend: Any = "inductor"
    options: Mapping[str, Any] | None = None
    _made: weakref.WeakKeyDictionary[nn.Module, dict[Any, Graph]] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )
    _drawn: dict[Any, Calls] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.backend, self.options)  # what was compiled stays where it is

    def prepare(self, loop: Loop, dynamics: Dynamics) -> None:
        loop.integrator.check_graph()
        if dynamics.pulls:
            raise TypeError(
                f"{type(dynamics).__name__} takes derivatives of its field in a way that torch."
                "compile does not trace: use executor=Eager(), or for a density Exact(), "
                "Hutchinson(n) or the field's own divergence, ODE(f, traced=...)"
            )
        if forwarding():
            return  # a compiled graph would drop the tangents
        source = None if loop.noise is None else loop.noise.traced()
        graph = functools.partial(self._graph, loop, dynamics, source is None)
        within = loop.dense or loop.watch is not None or loop.saver.times is not None
        solving = graph(_solved) if isinstance(loop.integrator, Implicit) else None
        loop.stepper = _Steps(loop, graph(_whole if within else _end), solving, source, within)
        if Leap.suits(loop, source):
            loop.leap = Leap(loop, graph, source)

    def normal(self, key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        form = len(key), len(steps) > 1, size, dtype, key.device
        if len(steps) > 1:
            torch._dynamo.mark_dynamic(steps, 0)
        if form not in self._drawn:
            graph = Graph(_normal, self.backend, self.options)
            self._drawn[form] = Calls(graph, size, dtype)
        found: Tensor = self._drawn[form](key, steps)
        return found

    def _graph(
        self, loop: Loop, dynamics: Dynamics, given: bool, function: Callable[..., Any]
    ) -> Graph:
        """That of a function, for a method, tolerances and increments that are given or drawn."""
        graphs = self._made.setdefault(dynamics.anchor, {})
        stepping = loop.stepping if isinstance(loop.stepping, Adaptive) else None
        key = type(dynamics), function, loop.integrator, stepping and stepping.terms, given
        if key not in graphs:
            graphs[key] = Graph(function, self.backend, self.options)
        return graphs[key]


@dataclass(frozen=True)
class Picard(Executor):
    """Given steps in parallel: all of a window in one call of the field, until they agree.

        x_{i+1} <- x_{i+1} + sum_{j <= i} (step_j(x_j) - x_{j+1})

    The first state of the window is right after one sweep, the k-th after k sweeps, and on smooth
    problems many at once; the window then moves on behind those whose starts have settled. So a
    solve takes fewer evaluations one after the other than it has steps, each of a batch that is
    up to ``window`` times as large; ``stats.evaluations`` counts them, ``stats.attempts`` the
    sweeps. The noise is that of ``Eager``, and so is the end: to rounding with tolerance 0, else as
    near as the dynamics keeps states that are off by the tolerance. Gradients are those of the
    sweeps.

    Rows must not depend on each other, and are repeated with args of as many rows.

    Args:
        window: steps taken at once, >= 1.
        tolerance: the change of a state in one sweep, root mean square over the components of each
            sample, at which it counts as settled.

    Raises:
        ValueError: on a window or a tolerance out of range.
        TypeError: on chosen steps, methods whose steps depend on more than their start (multistep,
            reversible) or are not all of one kind, fields of shared time, states without a batch,
            probes that belong to rows; where more than the end is wanted (``save_at``, dense
            output, events); on adjoints that take single steps.

    Source: Shih et al. 2023, "Parallel sampling of diffusion models", arXiv 2305.16317; Song et al.
    2021, "Accelerating feedforward computation via parallel nonlinear equation solving".
    """

    window: int = 16
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not whole(self.window, 1) or not self.tolerance >= 0.0:
            raise ValueError(
                f"Picard takes a whole window >= 1 and tolerance >= 0; got {self.window} and "
                f"{self.tolerance}"
            )

    def prepare(self, loop: Loop, dynamics: Dynamics) -> None:
        name = type(loop.integrator).__name__
        if not loop.integrator.static or loop.integrator.remembers:
            raise TypeError(
                f"a step of {name} is no function of its start alone, as steps taken at once must "
                "be: use DDIM(), DPMSolver(), Heun() or EulerMaruyama(), or executor=Eager()"
            )
        if isinstance(loop.stepping, Adaptive):
            raise TypeError("Picard takes given steps at once: give Fixed(...) or Grid(...)")
        if not dynamics.batched_time:
            raise TypeError(
                f"Picard asks for many times at once, which this {type(dynamics).__name__} was not "
                "declared to take: give ODE(f, batched_time=True) if f does"
            )
        if batch_size(loop.y0) is None:
            raise TypeError(f"Picard needs a batch-first state; got {describe(loop.y0)}")
        if loop.dense or loop.watch is not None or not isinstance(loop.saver, SaveEnd):
            raise TypeError(
                "Picard gives the end alone: leave out save_at, dense and events, or use "
                "executor=Eager()"
            )
        if dynamics.random and loop.field.dynamics.select(torch.arange(0)) is None:
            raise TypeError(
                "this solve has drawn probes for each row, and its field was not declared to take "
                "any rows: give ODE(f, rowwise=True), or an exact divergence"
            )
        loop.stepper = _refuse
        loop.leap = Sweeps(loop, self.window, self.tolerance)


def _refuse(*_: Any) -> Step:
    raise TypeError("Picard takes no single steps, as this adjoint wants: use adjoint=Direct()")


def _normal(size: int, dtype: torch.dtype, key: Tensor, steps: Tensor) -> Tensor:
    return _random.normal(key, steps, size, dtype)


class _Steps:
    """The steps of one solve, each of them a call of one graph."""

    def __init__(
        self, loop: Loop, graph: Graph, solving: Graph | None, source: Source | None, within: bool
    ) -> None:
        stepping = loop.stepping if isinstance(loop.stepping, Adaptive) else None
        self._fixed = loop.integrator, stepping, loop.field, source
        self._graph, self._iterating, self._within = graph, solving, within
        self._inputs = loop.noise if source is None else None
        self._begin()

    def _begin(self) -> None:
        iterating = self._iterating
        self._calls = Calls(self._graph, *self._fixed)
        self._solving = None if iterating is None else Calls(iterating, *self._fixed)

    def __call__(
        self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry, /
    ) -> Step:
        dw = None if self._inputs is None else self._inputs(n, t0, t1)
        before, mixed = loop.field.evaluations, loop.field.mixes
        if loop.integrator.static:
            cost = self._cost(loop, n, t0, t1, y, carry)
        try:
            found = self._taken(as_input(t0, y), as_input(t1, y), y, dw, carry)
        except torch._dynamo.exc.TorchDynamoException as error:
            if loop.integrator.static:
                raise
            raise TypeError(
                f"this field does not go into one graph, as the iterations of "
                f"{type(loop.integrator).__name__} need: use executor=Eager(), or leave out what "
                "the compiler does not take (branches on values, print, item(), BatchNorm in "
                "training; for torch.autograd.grad take torch.func.grad)"
            ) from error
        if found is None:
            loop.field.evaluations = before
            return loop.step(n, t0, t1, y, carry)
        step = found if self._within else _End(loop, n, t0, t1, y, carry, found)
        if loop.integrator.static:
            loop.field.evaluations = before + cost
        elif step.spent is not None:  # else it was taken eagerly, and has counted
            loop.field.evaluations = before
            loop.field.spend(step.spent)
        if loop.field.mixes and not mixed:  # gradients of all samples together, from here on
            span = t1 - t0
            if isinstance(span, Tensor) and span.ndim:
                raise TypeError(MIXED)
            self._begin()
            return self(loop, n, t0, t1, y, carry)
        return step

    def _taken(self, t0: Tensor, t1: Tensor, y: State, dw: Increment | None, carry: Carry) -> Any:
        """What the graphs return; None where the compiler, beyond its limits, makes none."""
        if self._solving is None:
            return self._calls(t0, t1, y, dw, carry, None)
        off = of_sizes((y, carry))
        if not torch.is_grad_enabled():
            return self._calls(t0, t1, off[0], dw, off[1], None)
        with torch.no_grad(), unhooked():
            solved = self._solving(t0, t1, off[0], dw, off[1])
        return solved and self._calls(t0, t1, y, dw, carry, solved)

    def _cost(self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry) -> int:
        """Evaluations in a step from such a state: one is taken to count them."""
        costs = self._graph.costs
        kind = look((y, carry))
        if kind not in costs:
            costs[kind] = tried(loop, n, t0, t1, y, carry)[1]
        return costs[kind] or 0


class _End(Step):
    """A step of which a graph gave the end alone; the rest is worked out again if asked for."""

    __slots__ = ("_taken",)

    def __init__(
        self, loop: Loop, n: int, t0: Scalar, t1: Scalar, y: State, carry: Carry, found: Any
    ) -> None:
        y1, carry1, size, spent = found
        super().__init__(y1, carry1)
        self.size, self.spent = size, spent
        self._taken = loop, n, t0, t1, y, carry

    def _again(self) -> Step:
        loop, *taken = self._taken
        with loop.field.aside():
            return loop.step(*taken)

    def error(self) -> State:
        return self._again().error()

    def interpolation(self) -> Interpolation | None:
        return self._again().interpolation()

    def dense(self, theta: Scalar) -> State:
        return self._again().dense(theta)


def _solved(
    _flowsde_method: Implicit, _flowsde_stepping: Adaptive | None, field: Field,
    source: Source | None, t0: Tensor, t1: Tensor, y: State, dw: Increment | None, carry: Carry,
) -> Any:  # fmt: skip
    """What a step's iterations come to; ``source`` in the place of ``dw``, or ``dw`` itself."""
    dw = dw if source is None else source(0, t0, t1)
    return _flowsde_method.step(field, t0, t1, y, dw, carry).solved


def _whole(
    _flowsde_method: Any, _flowsde_stepping: Adaptive | None, field: Field,
    source: Source | None, t0: Tensor, t1: Tensor, y: State, dw: Increment | None, carry: Carry,
    solved: Solved | None,
) -> Step:  # fmt: skip
    """A step with its error's norm, by what its iterations came to, if another graph took them."""
    dw = dw if source is None else source(0, t0, t1)
    taken = field, t0, t1, y, dw, carry
    step: Step = (
        _flowsde_method.step(*taken) if solved is None
        else _flowsde_method.recorded(*taken, solved)
    )  # fmt: skip
    step.size, step.solved = _size(_flowsde_stepping, step, y), None
    return step


def _end(
    _flowsde_method: Integrator, _flowsde_stepping: Adaptive | None, field: Field,
    source: Source | None, t0: Tensor, t1: Tensor, y: State, dw: Increment | None, carry: Carry,
    solved: Solved | None,
) -> tuple[State, Carry, Tensor | None, Tensor | None]:  # fmt: skip
    """Of the same, what the next step needs."""
    step = _whole(_flowsde_method, None, field, source, t0, t1, y, dw, carry, solved)
    return step.y1, step.carry, _size(_flowsde_stepping, step, y), step.spent


def _size(stepping: Adaptive | None, step: Step, y: State) -> Tensor | None:
    if stepping is None:
        return None
    with torch.no_grad():
        return stepping.measure(step.error(), y, step.y1)
