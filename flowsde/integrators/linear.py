"""The linear systems of implicit methods: (I - h J) x = b, a row a sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._scalar import Scalar, whole
from .._state import State, leaves, pullback, tree_map, unflatten, unhooked

__all__ = [
    "GMRES", "Dense", "LinearSolver", "Linearization", "Rows", "Solve", "Traced",
]  # fmt: skip

Solve = Callable[[Tensor], Tensor]


class Rows:
    """A state as a matrix ``(n, d)``: one row a sample, or one row for all."""

    def __init__(self, y: State, count: int) -> None:
        flat = leaves(y)
        self.count = count
        self._shapes = [leaf.shape for leaf in flat]
        self._sizes = [leaf.numel() // max(1, count) for leaf in flat]
        self._dtypes = [leaf.dtype for leaf in flat]
        self._structure = tree_map(lambda leaf: 0, y)
        self.size = sum(self._sizes)

    @property
    def forms(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Of the leaves."""
        return list(zip(self._shapes, self._dtypes, strict=True))

    def flat(self, y: State) -> Tensor:
        """The matrix of a state."""
        return self.join(leaves(y), ())

    def join(self, parts: Sequence[Tensor], lead: tuple[int, ...]) -> Tensor:
        """Leaves with further leading axes, as one ``(*lead, n, d)`` tensor."""
        rows = [
            _shaped(part, (*lead, self.count, size))
            for part, size in zip(parts, self._sizes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def state(self, flat: Tensor) -> State:
        """The state of a matrix."""
        if self._structure == 0:
            return _shaped(flat, self._shapes[0])
        parts = torch.split(flat, self._sizes, -1)
        return unflatten(
            [
                part.reshape(shape).to(dtype)
                for part, shape, dtype in zip(parts, self._shapes, self._dtypes, strict=True)
            ],
            self._structure,
        )


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


class Linearization:
    """The Jacobian J of a field at one state, from the graph between them.

    Args:
        out: the field's value ``(n, d)``, or its ``GradientEdge``.
        y: the leaves of the state, or their edges.
        rows: how the state lies in rows; row b of the value depends on row b of the state alone.
        like: a tensor of their dtype and device.
        count: told of each product, a whole Jacobian counting d.
    """

    def __init__(
        self, out: Any, y: Sequence[Any], rows: Rows,
        like: Tensor, count: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.out, self._y, self.rows, self._count = out, y, rows, count
        self.options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self._constant = isinstance(out, Tensor) and not out.requires_grad

    @classmethod
    def of(
        cls, f: Callable[[State], State], y: State, rows: Rows, count: Callable[[int], None]
    ) -> Linearization:
        """That of f at y, off the record."""
        with torch.enable_grad(), unhooked():
            y = tree_map(lambda leaf: leaf.detach().requires_grad_(), y)
            out = rows.flat(f(y))
        return cls(out, leaves(y), rows, out, count)

    def pull(self, vector: Tensor) -> Tensor:
        """J^T v of ``(n, d)`` vectors."""
        if self._constant:
            return torch.zeros_like(vector)
        self._count(1)
        return self.rows.join(self._backward(vector), ())

    @cached_property
    def matrix(self) -> Tensor:
        """J, ``(n, d, d)``: d products, in one batched pass where the field's backward allows."""
        rows, d = self.rows, self.rows.size
        if self._constant or not d:
            return torch.zeros(rows.count, d, d, **self.options)
        self._count(d)
        basis = torch.eye(d, **self.options)
        probes = basis[:, None].expand(d, rows.count, d)
        try:
            pulled = rows.join(self._backward(probes, is_grads_batched=True), (d,))
        except RuntimeError:  # an operation that torch cannot batch: one pass a component
            pulled = torch.stack([rows.join(self._backward(probe), ()) for probe in probes])
        return pulled.transpose(0, 1)

    def push(self, vector: Tensor) -> Tensor:
        """J v: J^T u is linear in u, and its own backward pass is J."""
        if self._transpose is None:
            return torch.zeros_like(vector)
        self._count(1)
        u, pulled = self._transpose
        (pushed,) = torch.autograd.grad(pulled, u, vector, retain_graph=True, allow_unused=True)
        return torch.zeros_like(vector) if pushed is None else pushed

    @cached_property
    def _transpose(self) -> tuple[Tensor, Tensor] | None:
        if self._constant:
            return None
        u = torch.zeros(self.rows.count, self.rows.size, requires_grad=True, **self.options)
        self._count(1)
        with torch.enable_grad():
            pulled = self.rows.join(self._backward(u, create_graph=True), ())
        return (u, pulled) if pulled.requires_grad else None

    def _backward(self, vector: Tensor, **keywords: Any) -> list[Tensor]:
        found = torch.autograd.grad(
            [self.out], list(self._y), [vector], retain_graph=True, allow_unused=True, **keywords
        )
        lead = vector.shape[:-2]  # a field may leave out part of the state, or all of it
        return [
            vector.new_zeros(*lead, *shape, dtype=dtype) if x is None else x
            for x, (shape, dtype) in zip(found, self.rows.forms, strict=True)
        ]

    def mixes(self) -> bool:
        """Whether a sample's value depends on other samples.

        With r_b a factor of its own for each row, J^T (r v) = r J^T v where the samples are apart.
        """
        n, d = self.rows.count, self.rows.size
        if n < 2 or not d or self._constant or self.options["device"].type == "meta":
            return False
        return bool(_mixing(self.pull, n, d, self.options))


def _mixing(pull: Solve, n: int, d: int, options: dict[str, Any]) -> Tensor:
    factor = 1.0 + torch.arange(n, **options)[:, None] / n
    probe = torch.cos(torch.arange(n * d, **options)).reshape(n, d) + 1.5
    plain, scaled = pull(probe), pull(factor * probe)
    gap = (scaled - factor * plain).abs().amax()
    return gap > 1e3 * torch.finfo(gap.dtype).eps * plain.abs().amax()


class Traced:
    """f at a matrix of rows, in a graph.

    Attributes:
        value: ``(n, d)``.
    """

    def __init__(self, f: Callable[[State], State], flat: Tensor, rows: Rows) -> None:
        self.value, self._pull = pullback(lambda x: rows.flat(f(rows.state(x))), flat)
        self._rows = rows

    def jacobian(self) -> Tensor:
        """``(n, d, d)``."""
        value, d = self.value, self._rows.size
        basis = torch.eye(d, dtype=value.dtype, device=value.device)
        return self._pull(basis[:, None].expand(d, *value.shape)).transpose(0, 1)

    def mixes(self) -> Tensor:
        """Whether a row's value depends on other rows, as ``Linearization`` tells it."""
        options = {"dtype": self.value.dtype, "device": self.value.device}
        if self._rows.count < 2 or not self._rows.size:
            return torch.zeros((), dtype=torch.bool, device=self.value.device)
        n, d = self._rows.count, self._rows.size
        return _mixing(lambda v: self._pull(v[None])[0], n, d, options)


class LinearSolver(ABC):
    """How an implicit method solves (I - h J) x = b for each sample."""

    @abstractmethod
    def inverse(self, at: Linearization, h: Scalar, *, transpose: bool = False) -> Solve:
        """b to x, both ``(n, d)``, at h a scalar or ``(n, 1)``; or the transposed system."""


@dataclass(frozen=True)
class Dense(LinearSolver):
    """The Jacobian of each sample by d vector-Jacobian products, and its LU factors.

    Memory grows with d^2: for small systems, up to some hundreds of components a sample.
    """

    def inverse(self, at: Linearization, h: Scalar, *, transpose: bool = False) -> Solve:
        return self.factored(at.matrix, h, transpose=transpose)

    def factored(self, matrix: Tensor, h: Scalar, *, transpose: bool = False) -> Solve:
        """The same from J itself, ``(n, d, d)``."""
        h = h[..., None] if isinstance(h, Tensor) and h.ndim else h
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        lu, pivots, _ = torch.linalg.lu_factor_ex(eye - h * matrix)

        def solve(b: Tensor) -> Tensor:
            return torch.linalg.lu_solve(lu, pivots, b[..., None], adjoint=transpose)[..., 0]

        return solve


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Restarted GMRES on Jacobian-vector products, no matrix; one Krylov space a sample.

    One host read a product. The solve behind a gradient is carried to rounding.

    Args:
        restart: products between restarts, the Krylov vectors held.
        cycles: restarts allowed.
        tol: residual of one Newton correction, relative to its right-hand side.

    Raises:
        ValueError: on arguments out of range.
        RuntimeError: in the backward pass, if a gradient's system does not converge.

    Source: Saad and Schultz 1986; Knoll and Keyes 2004 on Newton-Krylov methods.
    """

    restart: int = 30
    cycles: int = 5
    tol: float = 1e-3

    def __post_init__(self) -> None:
        if not (whole(self.restart, 1) and whole(self.cycles, 1) and 0 < self.tol < 1):
            raise ValueError(
                "GMRES takes whole restart >= 1 and cycles >= 1, and 0 < tol < 1; got "
                f"{self.restart}, {self.cycles} and {self.tol}"
            )

    def inverse(self, at: Linearization, h: Scalar, *, transpose: bool = False) -> Solve:
        product = at.pull if transpose else at.push

        def matrix(v: Tensor) -> Tensor:
            return v - h * product(v)

        def solve(b: Tensor) -> Tensor:
            if not transpose:
                return self._solve(matrix, b, self.tol)[0]
            eps = torch.finfo(b.dtype).eps
            x, residual = self._solve(matrix, b, eps**0.8)
            size = torch.linalg.vector_norm(b, dim=-1)
            if bool((residual > eps**0.5 * size).any()):
                raise RuntimeError(
                    "GMRES did not solve the linear system of a gradient: raise its restart or "
                    "cycles, take smaller steps, or use linear=Dense()"
                )
            return x

        return solve

    def _solve(self, matrix: Solve, b: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """x and the size of its residual, row by row."""
        x, residual = torch.zeros_like(b), b
        goal = tol * torch.linalg.vector_norm(b, dim=-1)
        for cycle in range(self.cycles):
            if cycle:
                residual = b - matrix(x)
            correction, left = _cycle(matrix, residual, goal, min(self.restart, b.shape[-1]))
            x = x + correction
            if b.is_meta or not bool((left > goal).any()):
                break
        return x, left


def _cycle(matrix: Solve, b: Tensor, goal: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One cycle: Arnoldi's basis by modified Gram-Schmidt, its least squares by Givens rotations.

    A row that is done goes on with vectors of zero, which change nothing.
    """
    size = torch.linalg.vector_norm(b, dim=-1)
    basis = [_unit(b, torch.where(size > goal, size, 0.0))]
    columns: list[list[Tensor]] = []
    turns: list[tuple[Tensor, Tensor]] = []
    sides = [size]
    for j in range(count):
        w = matrix(basis[j])
        noise = 8.0 * torch.finfo(w.dtype).eps * torch.linalg.vector_norm(w, dim=-1)
        column = []
        for v in basis:
            column.append((v * w).sum(-1))
            w = w - column[-1][:, None] * v
        below = torch.linalg.vector_norm(w, dim=-1)
        below = torch.where(below <= noise, 0.0, below)
        basis.append(_unit(w, below))
        for i, (c, s) in enumerate(turns):
            upper, lower = column[i], column[i + 1]
            column[i], column[i + 1] = c * upper + s * lower, c * lower - s * upper
        length = torch.hypot(column[j], below)
        still = length == 0
        c = torch.where(still, 1.0, column[j] / length)
        s = torch.where(still, 0.0, below / length)
        column[j] = torch.where(still, 1.0, length)
        turns.append((c, s))
        columns.append(column)
        sides[j:] = [c * sides[j], -s * sides[j]]
        live = sides[-1].abs() > goal
        if not b.is_meta and not bool(live.any()):
            break
        basis[-1] = basis[-1] * live[:, None]
    x = torch.zeros_like(b)
    for j in reversed(range(len(columns))):
        weight = sides[j] / columns[j][j]
        x = x + weight[:, None] * basis[j]
        for i in range(j):
            sides[i] = sides[i] - weight * columns[j][i]
    return x, sides[-1].abs()


def _unit(v: Tensor, size: Tensor) -> Tensor:
    """v over its size; nothing where that is zero."""
    return torch.where((size > 0)[:, None], v / torch.where(size > 0, size, 1.0)[:, None], 0.0)
