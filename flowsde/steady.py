"""Where a system comes to rest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._once import once
from ._random import widest
from ._state import State, batch_size, describe, leaves, transformed, tree_map
from .dynamics.base import Dynamics
from .dynamics.discrete import Chain
from .dynamics.field import Field
from .errors import NotSettled
from .events import Event
from .integrators.linear import Linearization, Rows
from .solution import Solution, Status
from .solve import Solver
from .stepping import Adaptive

__all__ = ["steady_state"]


def steady_state(
    dynamics: Dynamics,
    y0: State,
    *,
    args: tuple[Any, ...] = (),
    t0: float = 0.0,
    t1: float = 1e3,
    solver: Solver = Solver(),
    tol: float = 1.0,
) -> Solution:
    """The state y* with f(y*, args) = 0 to which y0 moves, for an autonomous field.

        dy*/dargs = -J^-1 df/dargs,    J = df/dy at y*

    Integrates, without a graph, until the drift is small; Newton steps then polish the state
    and carry the gradient, which knows nothing of the way. First derivatives only: a second one
    raises. The Jacobian is dense, one a sample: the field treats the samples of a batch
    independently.

    Args:
        dynamics: an ``ODE``, or other dynamics without noise; its parameters are differentiated.
        y0: batch first, of one real dtype; not differentiated, since y* does not change with it.
        args: further arguments of f, differentiated.
        t0, t1: the span within which to settle.
        solver: how to integrate; by default ``Adaptive``, per sample where f takes batched time.
        tol: settled is norm(f / (atol + rtol |y|)) <= tol, a rate, with the tolerances and the norm
            of the solver's ``Adaptive`` (of the default one where it steps otherwise).

    Returns:
        A ``Solution`` whose ``y1`` is y*, and ``t1`` the time at which it settled.

    Raises:
        ValueError: on tol <= 0, or a state that is not batch first.
        TypeError: on dynamics with noise, maps and chains of them; on a field in which samples
            depend on each other at y*; in ``torch.inference_mode()`` and within ``torch.func``'s
            transformations.
        NotSettled: where the drift was not small by t1, or was where no rest is isolated: J has no
            inverse, as in systems that conserve something. With ``throw=False``, a sample's status,
            and the state as it was integrated.

    Source: Bai, Kolter and Koltun 2019, arXiv 1909.01377.
    """
    if not tol > 0:
        raise ValueError(f"tol is > 0; got {tol}")
    if torch.is_inference_mode_enabled():
        raise TypeError("a steady state needs autograd: use torch.no_grad(), not inference_mode()")
    if transformed():
        raise TypeError(
            "a steady state takes gradients of its own, which torch.func does not see: use "
            "torch.autograd.grad"
        )
    if isinstance(dynamics, Chain) or dynamics.noise is not None:
        why = "has noise: give ODE(sde.f)" if dynamics.noise else "moves in discrete steps"
        raise TypeError(f"a steady state is one of a field; {type(dynamics).__name__} {why}")
    batch = batch_size(y0)
    dtypes = {leaf.dtype for leaf in leaves(y0)}
    if batch is None or len(dtypes) > 1 or any(dtype.is_complex for dtype in dtypes):
        raise ValueError(
            f"a steady state is batch first, of one real dtype; got {describe(y0)}. Give the parts "
            "of a complex one with torch.view_as_real"
        )
    stepping = solver.stepping or Adaptive(per_sample=dynamics.batched_time)
    measure = stepping if isinstance(stepping, Adaptive) else Adaptive()

    def speed(t: Tensor, y: State, *args: Any) -> Tensor:
        return measure.measure(dynamics(t, y, *args), y) / tol - 1.0

    with torch.no_grad():
        field = Field(dynamics, args, y0)
        resting = speed(field.time(t0), y0, *args) <= 0.0  # from the start: there is no crossing
        wide = widest(resting.device)
        ends = torch.full_like(resting, t1, dtype=wide).masked_fill(resting, t0)
        event = Event(speed, direction=-1)
        solver = replace(solver, stepping=stepping)
        found = solver.solve(dynamics, y0, t0, ends, args=args, events=event)
        settled = speed(field.time(found.t1), found.y1, *args) <= 1e-6
        settled = settled.expand(batch)
    found.y1, isolated = _newton(field, found.t1, found.y1, settled, measure)
    found.stats.evaluations += field.evaluations
    found.stats.products += field.products
    return _judged(found, settled, isolated, solver.throw)


def _newton(
    field: Field, t: Any, y: State, settled: Tensor, measure: Adaptive
) -> tuple[State, Tensor]:
    """y - J^-1 f(y) where settled: once for the state, once more for its derivative.

    And where that is a rest apart from others: the Jacobian has an inverse, and a step that goes
    beyond the tolerances makes the drift smaller. Elsewhere y stays as it is.
    """
    rows = Rows(y, len(settled))
    drift = partial(field.drift, t)

    def size(x: State) -> Tensor:
        scaled = rows.flat(tree_map(torch.div, x, measure.scale(start)))
        return scaled.square().mean(1).sqrt()

    start = tree_map(torch.detach, y)
    before = moved = torch.zeros(len(settled), device=settled.device)
    for step in range(2):
        y = tree_map(torch.detach, y)
        at = Linearization.of(drift, y, rows, field.count)
        if at.mixes():
            raise TypeError(
                "the field takes the samples of the batch together: put what belongs together in "
                "one sample, y0[None], or fix what they share in args"
            )
        slope = drift(y)
        with torch.no_grad():
            now = size(slope)
            apart = settled & _regular(at.matrix)
            if step:
                apart = apart & ((now <= 0.1 * before) | (moved <= 1.0))
                y = rows.state(torch.where(apart[:, None], rows.flat(y), rows.flat(start)))
        still = torch.eye(rows.size, **at.options)
        jacobian = torch.where(apart[:, None, None], at.matrix, still)
        shift = _Newton.apply(  # type: ignore[no-untyped-call]
            torch.where(apart[:, None], rows.flat(slope), 0.0), jacobian
        )
        before, moved = now, size(rows.state(shift.detach()))
        y = rows.state(rows.flat(y) + shift)
    return y, apart


def _regular(jacobian: Tensor) -> Tensor:
    """Whether each of these matrices has an inverse, whatever the scales of rows and columns."""
    if not jacobian.numel():
        return torch.ones(len(jacobian), dtype=torch.bool, device=jacobian.device)
    for axis in (2, 1):
        largest = jacobian.abs().amax(axis, keepdim=True)
        jacobian = jacobian / torch.where(largest > 0.0, largest, 1.0)
    values = torch.linalg.svdvals(torch.nan_to_num(jacobian, posinf=0.0, neginf=0.0))
    least = 10.0 * jacobian.shape[-1] * torch.finfo(jacobian.dtype).eps
    return values[:, -1] > least * values[:, 0]


class _Newton(torch.autograd.Function):
    """-J^-1 f with J held: its derivative is that of the root, and has none itself."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, jacobian: Tensor) -> Tensor:
        ctx.save_for_backward(slope, jacobian)
        return -torch.linalg.solve(jacobian, slope)

    @staticmethod
    @once("a steady state has first derivatives only")
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        _, jacobian = ctx.saved_tensors
        return -torch.linalg.solve(jacobian.mT, cotangent), None


def _judged(found: Solution, settled: Tensor, isolated: Tensor, throw: bool) -> Solution:
    """The solution with the status of those that arrived at t1 without settling, or settled where
    nothing sets one rest apart from others.
    """
    if found.success and not bool(isolated.all()):
        status = torch.as_tensor(found.status, device=settled.device)
        late = torch.where(isolated, status, int(Status.UNSETTLED))
        found.status = late if isinstance(found.status, Tensor) else Status.UNSETTLED
        found.message = (
            f"{int((~settled).sum())} of {len(settled)} samples had not settled by t1: give a "
            "later t1 or a larger tol; the system may circle, drift or diverge"
        )
        if bool(settled.all()):
            found.message = (
                f"{int((~isolated).sum())} of {len(settled)} samples came to rest where the "
                "Jacobian has no inverse, so that their rest hangs on the way there, and has no "
                "derivative by args alone: eliminate what the system conserves, or give a smaller "
                "tol, if it only slows down there"
            )
        if throw:
            raise NotSettled(found.message, found)
    return found
