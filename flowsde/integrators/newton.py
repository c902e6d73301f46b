"""Newton's iteration for the stages of implicit methods, a row a sample."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .._increment import Increment
from .._once import once
from .._random import widest
from .._scalar import Scalar, still
from .._state import State, batch_size, dual, leaves, tree_map, unhooked
from ..dynamics.field import MIXED, Field
from ..stepping import Adaptive, Norm, max_norm, rms_norm
from .base import Carry, Integrator, Step
from .linear import Dense, Linearization, LinearSolver, Rows, Solve, Traced

__all__ = ["Equations", "Implicit", "Newton", "Past", "PerRow", "Solved", "count_rows"]

PerRow = Any  # an array of one number a row: of numpy's on the host, of torch's in a graph


def count_rows(field: Field, t: Scalar, y: State) -> int:
    """How many samples the state holds."""
    size = batch_size(y)
    if field.mixes or size is None:
        return 1
    own = isinstance(t, Tensor) and t.ndim > 0
    return size if own or any(leaf.ndim > 1 for leaf in leaves(y)) else 1


class Equations(Protocol):
    """What of an implicit method Newton's iteration needs to know."""

    @property
    def newton(self) -> int:
        """Corrections allowed."""

    @property
    def linear(self) -> LinearSolver:
        """What solves for them."""

    @property
    def gamma(self) -> float:
        """The part of a step that stands before the slope that is solved for."""

    @property
    def stepping(self) -> Adaptive | None:
        """The tolerances; None on given steps."""

    def stiff(self, field: Field) -> Callable[[Scalar, State], State]:
        """What is solved for."""

    def linearize(self, field: Field, t: Scalar, y: State) -> Linearization:
        """Its Jacobian at y, off the record."""


class Past(NamedTuple):
    """What the stages of a step leave to the next one, and to the step.

    Attributes:
        expected: the part of a correction that is expected to be left after it.
        lost: which rows were not solved, though finite.
        spent: what a step tells as ``spent``, where the field does not count it.
    """

    expected: PerRow
    lost: PerRow
    spent: Tensor | None = None


class Solved(NamedTuple):
    """What the iterations of a step came to: the slopes of its stages, off the record."""

    slopes: list[State]
    past: Past


class Newton:
    """The implicit equations of one step's stages, k = g(t, start + h k), row by row."""

    past: Past

    def __init__(self, method: Equations, field: Field, dt: Scalar, y: State, rows: Rows) -> None:
        self._method, self._field, self._y, self._rows = method, field, y, rows
        self._stiff = method.stiff(field)
        self._own = isinstance(dt, Tensor) and dt.ndim > 0
        self._h = self._column(dt * method.gamma)
        self._still = still(self._h)
        with torch.no_grad():
            self._scale = self._tolerance(y)
            self._sizes = rows.flat(y).abs() if method.stepping is None else None

    def solve(self, t: Scalar, start: State, guess: State, past: Past) -> tuple[State, Past]:
        """The k of one stage, from a guess."""
        raise NotImplementedError

    def _column(self, h: Scalar) -> Scalar:
        """h ready to multiply ``(n, d)`` rows."""
        if not isinstance(h, Tensor):
            return h
        h = h.to(leaves(self._y)[0].dtype)
        return h[:, None] if self._own else h

    def _tolerance(self, y: State) -> State:
        """What of a correction is tolerated; on given steps the rounding of a leaf's numbers."""
        stepping = self._method.stepping

        def scale(leaf: Tensor) -> Tensor:
            eps = torch.finfo(leaf.dtype).eps
            if stepping is None:
                return torch.full_like(leaf, eps)
            return 0.01 * stepping.scale(leaf) + 8.0 * eps * leaf.abs()

        return tree_map(scale, y)

    def _size(self, correction: Tensor, r: Tensor, k: Tensor) -> Tensor:
        """Norm of a correction of r + h k over what is tolerated, ``(n,)`` or ``(1,)``."""
        stepping = self._method.stepping
        if self._sizes is not None:  # what is near 0 counts by the largest of its row, or by 1
            peaks = [max_norm(x, True) for x in (self._sizes, r, self._still * k)]
            eps, ways = self._rows.flat(self._scale), torch.maximum(*peaks[1:])
            least = torch.maximum(peaks[0], ways) + torch.finfo(ways.dtype).tiny
            fine = eps**0.8 * (self._sizes + least.clamp(max=1.0)[:, None])
            parts = correction / (fine + 8.0 * eps * ways[:, None])
            return rms_norm(parts, True)
        assert stepping is not None
        # where the batch shares its steps, one number for all will do
        norm: Norm = stepping.length if stepping.per_sample else stepping.norm
        scaled = tree_map(torch.div, self._rows.state(correction), self._scale)
        whole = self._rows.count == 1 and not self._own
        return torch.as_tensor(norm(scaled, not whole)).reshape(-1)

    def _judge(
        self, size: PerRow, before: PerRow, active: PerRow, expected: PerRow, full: bool
    ) -> tuple[PerRow, PerRow, PerRow]:
        """Which rows are done and which diverge, by their corrections' sizes and those before;
        and what part of a correction is expected to be left after it.

        Args:
            full: whether the Jacobian is that of the last guess.
        """
        where = torch.where if isinstance(size, Tensor) else np.where
        rate = size / before
        diverges, least = ~(size < math.inf), 1e-8
        if self._method.stepping is not None:
            diverges = diverges | (rate > 2.0)
        else:  # a long way, on which two corrections may be far apart by chance
            least = 0.1
            diverges = diverges & full  # else Newton's own iteration is still to come
        rate = rate.clip(least, 0.99)  # never at its end before rounding is met
        expected = where(active & (before < math.inf), rate / (1.0 - rate), expected)
        return active & (expected * size <= 1.0), diverges, expected


class _Eager(Newton):
    """The same, one operation after the other, with gradients."""

    def __init__(self, method: Equations, field: Field, t0: Scalar, dt: Scalar, y: State) -> None:
        at = field.once(t0, y, lambda: method.linearize(field, t0, y))
        super().__init__(method, field, dt, y, at.rows)
        with torch.no_grad():
            self._inverse = method.linear.inverse(at, self._still)
        self.past = Past(np.ones(at.rows.count), np.zeros(at.rows.count, dtype=bool))
        self._mixes: bool | None = None
        self._dual = False  # whether forward-mode differentiation follows the field

    def solve(self, t: Scalar, start: State, guess: State, past: Past) -> tuple[State, Past]:
        with unhooked():
            k, past, recorded = self._iterate(t, start, guess, past)
        if dual((t, start, self._h)) or self._dual:
            raise TypeError(
                "an implicit equation is not differentiated forwards: take gradients backwards "
                "(torch.autograd.grad), or an explicit integrator"
            )
        found = self._rows.state(k)
        if torch.is_grad_enabled() and (
            recorded or _asks(start) or any(_asks(x) for x in (t, self._h))
        ):
            found = self._attach(t, start, found)
        return found, past

    def _iterate(
        self, t: Scalar, start: State, guess: State, past: Past
    ) -> tuple[Tensor, Past, bool]:
        """Simplified Newton; and whether the field itself asks for gradients.

        Which rows go on is the host's to decide, and a matter of a few numbers there.
        """
        rows, t, h = self._rows, still(t), self._still
        r, k = rows.flat(start).detach(), rows.flat(guess).detach()
        active, (expected, lost, _) = np.ones(rows.count, dtype=bool), past
        solved, before, recorded = ~active, np.full(1, math.inf), False
        given, inverse = self._method.stepping is None, self._inverse
        for n in range(self._method.newton):
            full = given and n > 2
            if full and n == 3:  # the guess was bad: Newton's own iteration, from start
                k = _put(active, torch.zeros_like(k), k)
                before, expected = np.full(1, math.inf), np.ones(rows.count)
            state = rows.state(_ahead(r, h, k))
            if full:
                at = self._method.linearize(self._field, t, state)
                value, inverse = at.out.detach(), self._method.linear.inverse(at, h)
            else:
                value = rows.flat(self._stiff(t, state))
                recorded = recorded or value.requires_grad
                self._dual = self._dual or dual(value)
            with torch.no_grad():
                delta = inverse(value - k)
                k = _put(active, k + delta, k)
                if k.is_meta:
                    return k, past, recorded
                size = self._size(h * delta, r, k).numpy(force=True)
            with np.errstate(all="ignore"):  # what is not finite is told by the step
                done, diverges, expected = self._judge(size, before, active, expected, full)
            solved, active, before = solved | done, active & ~done & ~diverges, size
            if not active.any():
                break
        past = Past(_eased(expected), lost | (~solved & np.isfinite(size)))
        return _put(solved, k, torch.full_like(k, torch.nan)), past, recorded

    def _attach(self, t: Scalar, start: State, k: State) -> State:
        """One recorded correction, whose backward is the implicit function theorem.

        dk = (I - h J)^-1 dg at the solution, J from the recorded graph itself. All samples are one
        row where they depend on each other there, though they did not at the start of the solve.
        """
        rows, own, inverse, count = self._rows, self._rows, self._inverse, self._field.count
        flat = own.flat(k)
        state = own.state(own.flat(start) + self._h * flat)
        state = tree_map(lambda x: x if x.requires_grad else x.requires_grad_(), state)
        value = own.flat(self._stiff(t, state))
        if not value.requires_grad:
            return k
        edges = [get_gradient_edge(leaf) for leaf in leaves(state)]
        if self._mixes is None:  # looked for once a step
            self._mixes = Linearization(get_gradient_edge(value), edges, own, flat, count).mixes()
        if self._mixes:
            if self._own:
                raise TypeError(MIXED)
            rows = Rows(self._y, 1)
            value, flat = (rows.flat(own.state(x)) for x in (value, flat))

            def inverse(b: Tensor) -> Tensor:
                return rows.flat(own.state(self._inverse(own.flat(rows.state(b)))))

        h = torch.as_tensor(self._still, dtype=flat.dtype, device=flat.device)
        at = partial(Linearization, get_gradient_edge(value), edges, rows, count=count)
        correct: Callable[..., Tensor] = _Correction.apply
        return rows.state(flat + correct(value - flat, h, at, inverse, self._method.linear))


class _InGraph(Newton):
    """The same within a graph of torch.compile."""

    def __init__(self, method: Equations, field: Field, t0: Scalar, dt: Scalar, y: State) -> None:
        super().__init__(method, field, dt, y, Rows(y, count_rows(field, t0, y)))

    def _linearized(self, t: Scalar, flat: Tensor) -> tuple[Traced, Solve]:
        at, linear = Traced(partial(self._stiff, t), flat, self._rows), self._method.linear
        assert isinstance(linear, Dense)
        return at, linear.factored(at.jacobian(), self._still)


class _Traced(_InGraph):
    """Without gradients: iterations are loops."""

    def __init__(self, method: Equations, field: Field, t0: Scalar, dt: Scalar, y: State) -> None:
        super().__init__(method, field, t0, dt, y)
        rows, device = self._rows, leaves(y)[0].device
        _, self._inverse = self._linearized(t0, rows.flat(y))
        self.past = Past(
            torch.ones(rows.count, dtype=widest(device), device=device),
            torch.zeros(rows.count, dtype=torch.bool, device=device),
            torch.tensor([1, rows.size, 0], device=device),
        )

    def solve(self, t: Scalar, start: State, guess: State, past: Past) -> tuple[State, Past]:
        """The same. What it leaves is returned: the compiler loses what is set beside a loop."""
        rows, h, method = self._rows, self._still, self._method
        r, k = rows.flat(start), rows.flat(guess)

        def below(most: int) -> Callable[..., Tensor]:
            return lambda n, k, solved, active, *_: active.any() & (n < most)

        def correct(
            anew: bool, value: Tensor, inverse: Solve, n: Tensor, k: Tensor, solved: Tensor,
            active: Tensor, before: Tensor, expected: Tensor,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            delta = inverse(value - k)
            k = torch.where(active[:, None], k + delta, k)
            size = self._size(h * delta, r, k).to(before).expand_as(before).clone()
            done, diverges, expected = self._judge(size, before, active, expected, anew)
            return n + 1, k, solved | done, active & ~done & ~diverges, size, expected

        def simple(n: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            value = rows.flat(self._stiff(t, rows.state(r + h * k)))
            return correct(False, value, self._inverse, n, k, *rest)

        def full(n: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            at, inverse = self._linearized(t, r + h * k)
            return correct(True, at.value, inverse, n, k, *rest)

        expected, lost, spent = past
        assert spent is not None
        active, n = torch.ones_like(lost), torch.zeros_like(spent[0])
        before = torch.full_like(expected, math.inf)
        loop: Callable[..., Any] = torch.while_loop
        most, given = method.newton, method.stepping is None
        first = below(min(3, most) if given else most)
        marks = loop(first, simple, (n, k.clone(), ~active, active, before, expected))
        n, k, solved, active, size, expected = marks
        products = torch.zeros_like(n)
        if given and most > 3:  # the guess was bad: Newton's own iteration, from start
            k = torch.where(active[:, None], 0.0, k)
            fresh = before.clone(), torch.ones_like(expected)
            n, k, solved, _, size, expected = loop(
                below(most), full, (n, k, solved, active, *fresh)
            )
            products = (n - marks[0]) * rows.size
        past = Past(
            _eased(expected), lost | (~solved & (size < math.inf)),
            spent + torch.stack((n, products, torch.zeros_like(n))),
        )  # fmt: skip
        return rows.state(torch.where(solved[:, None], k, torch.nan)), past


class _Known(_InGraph):
    """With gradients, where another graph has solved the equations: no loops."""

    def __init__(
        self, method: Equations, field: Field, t0: Scalar, dt: Scalar, y: State, solved: Solved
    ) -> None:
        super().__init__(method, field, t0, dt, y)
        self._slopes, self.past = iter(solved.slopes), solved.past
        self._looked = False  # whether samples depend on each other by now

    def solve(self, t: Scalar, start: State, guess: State, past: Past) -> tuple[State, Past]:
        """The slope with one correction, recorded: by the Jacobian at the solution, as gradients
        are by the implicit function theorem.
        """
        rows, k = self._rows, next(self._slopes)
        flat = rows.flat(k)
        state = rows.flat(start) + self._h * flat
        value = rows.flat(self._stiff(t, rows.state(state)))
        if not value.requires_grad:
            return k, past
        assert past.spent is not None
        spent = past.spent + torch.tensor([1, rows.size, 0], device=flat.device)
        with torch.no_grad():
            at, inverse = self._linearized(still(t), state.detach())
            if not self._looked:
                no = torch.zeros_like(spent[0])
                spent = spent + torch.stack((no, no + 2, at.mixes().to(no)))
                self._looked = True
        return rows.state(flat + inverse(value - flat)), past._replace(spent=spent)


class Implicit(Integrator):
    """A method whose stages are solutions of equations.

    Where steps are graphs and gradients are recorded, one graph finds the solutions, which steps
    tell as ``solved``, and another one takes the step with them: of loops there are no gradients.
    """

    static = False

    @property
    @abstractmethod
    def equations(self) -> Equations:
        """What is solved."""

    @abstractmethod
    def through(
        self, newton: Newton, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None,
        carry: Carry,
    ) -> Step:  # fmt: skip
        """The step, by what solves its equations."""

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        kind = _Traced if torch.compiler.is_compiling() else _Eager
        newton = kind(self.equations, field, t0, t1 - t0, y)
        return self.through(newton, field, t0, t1, y, dw, carry)

    def recorded(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry,
        solved: Solved,
    ) -> Step:  # fmt: skip
        """The same step within a graph, its equations solved, with gradients."""
        if not torch.compiler.is_compiling():  # the compiler has its limits, and calls it as it is
            return self.step(field, t0, t1, y, dw, carry)
        newton = _Known(self.equations, field, t0, t1 - t0, y, solved)
        return self.through(newton, field, t0, t1, y, dw, carry)

    @staticmethod
    def told(step: Step, slopes: list[State], past: Past, others: int = 0) -> Step:
        """The step, with what it took where a graph takes it; ``others`` are evaluations beside
        the equations.
        """
        if past.spent is not None:
            step.spent = past.spent + torch.tensor([others, 0, 0], device=past.spent.device)
            step.solved = Solved(slopes, past)
        return step


def _eased(expected: PerRow) -> PerRow:
    """What is expected of the next stage's first correction."""
    return (expected**0.8).clip(0.01)


def _asks(x: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(x))


def _put(chosen: NDArray[np.bool_], rows: Tensor, others: Tensor) -> Tensor:
    """Of these rows the chosen ones, in the place of others."""
    if chosen.all():
        return rows
    return torch.where(torch.from_numpy(chosen).to(rows.device)[:, None], rows, others)


def _ahead(r: Tensor, h: Scalar, k: Tensor) -> Tensor:
    """r + h k."""
    return r + h * k if isinstance(h, Tensor) else torch.add(r, k, alpha=h)


class _Correction(torch.autograd.Function):
    """(I - h J)^-1 residual: by the step's own factors forwards, where it is nearly nothing, and
    by the Jacobian at the solution backwards.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, h: Tensor, at: Callable[..., Linearization], inverse: Solve,
        linear: LinearSolver,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(h, residual)  # unpacked first: checkpointed steps are taken again
        ctx.at, ctx.linear = at, linear
        return inverse(residual)

    @staticmethod
    @once("implicit integrators give first derivatives only, explicit ones all")
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None, None]:
        h, _ = ctx.saved_tensors
        solve = ctx.linear.inverse(ctx.at(like=cotangent), h, transpose=True)
        return solve(cotangent), None, None, None, None
