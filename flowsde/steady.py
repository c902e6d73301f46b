"""Where a system comes to rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._state import State, batch_size, describe, leaves, unflatten
from .dynamics.base import Dynamics
from .dynamics.field import Field
from .errors import NotSettled
from .events import Event
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
    and carry the gradient, which knows nothing of the way. First derivatives only. The Jacobian
    is dense, one a sample: the field treats the samples of a batch independently.

    Args:
        dynamics: an ``ODE``, or other dynamics without noise. ``args`` and parameters of f are
            differentiated; y0 is not, since y* does not change with it.
        y0: batch first, of one dtype.
        t0, t1: the span within which to settle.
        solver: how to integrate; by default ``Adaptive``, per sample where f takes batched time.
        tol: settled is norm(f / (atol + rtol |y|)) <= tol, a rate, with the tolerances and the norm
            of the solver's ``Adaptive`` (of the default one where it steps otherwise).

    Returns:
        A ``Solution`` whose ``y1`` is y*, and ``t1`` the time at which it settled.

    Raises:
        ValueError: on tol <= 0, or a state that is not batch first.
        NotSettled: where the drift was not small by t1; with ``throw=False``, a sample's status.

    Source: Bai, Kolter and Koltun 2019, arXiv 1909.01377.
    """
    if not tol > 0:
        raise ValueError(f"tol is > 0; got {tol}")
    batch = batch_size(y0)
    if batch is None or len({leaf.dtype for leaf in leaves(y0)}) > 1:
        raise ValueError(f"a steady state is batch first, of one dtype; got {describe(y0)}")
    stepping = solver.stepping or Adaptive(per_sample=dynamics.batched_time)
    measure = stepping if isinstance(stepping, Adaptive) else Adaptive()

    def speed(t: Tensor, y: State, *args: Any) -> Tensor:
        return measure.measure(dynamics(t, y, *args), y) / tol - 1.0

    with torch.no_grad():
        event = Event(speed, direction=-1)
        solver = replace(solver, stepping=stepping)
        found = solver.solve(dynamics, y0, t0, t1, args=args, events=event)
        field = Field(dynamics, args, y0)
        settled = speed(field.time(found.t1), found.y1, *args) <= 1e-6
        settled = settled.expand(batch)
    found.y1 = _newton(field, found.t1, found.y1, settled)
    return _judged(found, settled, solver.throw)


def _newton(field: Field, t: Any, y: State, settled: Tensor) -> State:
    """y - J^-1 f(y) where settled: once for the state, once more for its derivative."""
    flat = torch.cat([leaf.flatten(1) for leaf in leaves(y)], 1)
    sizes = [leaf[0].numel() for leaf in leaves(y)]
    still = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)

    def state(flat: Tensor) -> State:
        parts = zip(torch.split(flat, sizes, 1), leaves(y), strict=True)
        return unflatten([part.reshape(leaf.shape) for part, leaf in parts], y)

    def drift(flat: Tensor) -> Tensor:
        k = torch.cat([leaf.flatten(1) for leaf in leaves(field.drift(t, state(flat)))], 1)
        return torch.where(settled[:, None], k, 0.0)

    for _ in range(2):
        flat = flat.detach()
        with torch.enable_grad():
            jacobian = _jacobian(drift, flat)
        jacobian = torch.where(settled[:, None, None], jacobian, still)
        flat = flat - torch.linalg.solve(jacobian, drift(flat))
    return state(flat)


def _jacobian(drift: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    """(batch, n, n), one for each sample, by rows."""
    at = flat.clone().requires_grad_()
    rows = [
        torch.autograd.grad(total, at, retain_graph=True, materialize_grads=True)[0]
        for total in drift(at).sum(0)
    ]
    return torch.stack(rows, 1)


def _judged(found: Solution, settled: Tensor, throw: bool) -> Solution:
    """The solution with the status of those that arrived at t1 without settling."""
    if found.success and not bool(settled.all()):
        status = torch.as_tensor(found.status, device=settled.device)
        late = torch.where(settled, status, int(Status.UNSETTLED))
        found.status = late if isinstance(found.status, Tensor) else Status.UNSETTLED
        found.message = (
            f"{int((~settled).sum())} of {len(settled)} samples had not settled by t1: give a "
            "later t1 or a larger tol; the system may circle, drift or diverge"
        )
        if throw:
            raise NotSettled(found.message, found)
    return found
