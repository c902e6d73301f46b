"""What a solve held is free when its results are let go, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators, models
from flowsde._loop import Loop
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    GMRES,
    RK4,
    Dopri5,
    DPMSolverPP,
    EulerMaruyama,
    Integrator,
    Iterate,
    Kvaerno3,
    ReversibleRK,
    Tsit5,
)
from flowsde.integrators.base import Engine

from .systems import catalogue, generator, suited


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where loops, fields or tensors are garbage that only a search for cycles finds."""
    for _ in range(3):  # what other tests left
        gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [type(x).__name__ for x in gc.garbage if type(x) in (Loop, Field, Tensor)]
    finally:
        gc.garbage.clear()
        gc.set_debug(0)
        gc.enable()
    assert not left


METHODS = [
    m for m in catalogue(integrators, Integrator) if not isinstance(m, (Engine, Iterate))
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_leave_no_cycles_behind(method: Integrator) -> None:
    w = torch.full((2,), 0.5, requires_grad=True)
    dynamics, y0 = suited(method, lambda t, y: -y * w, torch.ones(3, 2))
    path = fs.Brownian(0) if dynamics.noise is not None else None
    with nothing_left():
        sol = fs.solve(
            dynamics, y0, 0.0, 1.0, integrator=method, stepping=fs.Fixed(steps=4), path=path
        )
        sum(x.sum() for x in torch.utils._pytree.tree_leaves(sol.y1)).backward()
        del sol


def _fails(t: Tensor, y: Tensor) -> Tensor:
    raise ZeroDivisionError


def _network(t: Tensor, y: Tensor) -> Tensor:
    return -y.square() * t[..., None]


ODE, FIXED = fs.ODE(_network, batched_time=True), fs.Fixed(steps=4)
SDE = fs.SDE(_network, lambda t, y: 0.1 * y, noise="diagonal", batched_time=True)
FLOW = fs.LinearSDE(fs.paths.VP()).probability_flow(lambda t, x: 0.5 * x)
SOLVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chosen steps": (ODE, {}),
    "of each sample": (ODE, {"stepping": fs.Adaptive(per_sample=True), "save_at": [0.3]}),
    "saved": (ODE, {"save_at": fs.Steps(), "dense": True}),
    "events": (ODE, {"events": fs.Event(lambda t, y: y[0, 0] - 0.9)}),
    "an event that fails": (ODE, {"events": fs.Event(_fails)}),
    "a field that fails": (fs.ODE(_fails), {}),
    "a solve that fails": (fs.ODE(lambda t, y: 9.0 * y.square()), {}),
    "checkpoints": (ODE, {"adjoint": fs.Checkpointed()}),
    "checkpoints of a budget": (ODE, {"adjoint": fs.Checkpointed(1)}),
    "implicit checkpoints": (ODE, {"adjoint": fs.Checkpointed(), "integrator": Kvaerno3()}),
    "without a matrix": (ODE, {"integrator": Kvaerno3(linear=GMRES())}),
    "backwards": (ODE, {"adjoint": fs.Backsolve()}),
    "steps taken back": (
        ODE,
        {"integrator": ReversibleRK(Tsit5()), "stepping": FIXED, "adjoint": fs.Reversible()},
    ),
    "noise": (SDE, {"integrator": EulerMaruyama(), "stepping": FIXED, "path": fs.Brownian(1)}),
    "a tree": (SDE, {"integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=4),
                     "path": fs.BrownianTree(1, 0.0, 1.0), "adjoint": fs.Checkpointed()}),
    "a sampler": (FLOW, {"integrator": DPMSolverPP(), "stepping": FIXED, "t0": 0.9, "t1": 0.1}),
    "in parallel": (ODE, {"integrator": RK4(), "stepping": FIXED, "executor": fs.Picard()}),
    "in a graph": (
        ODE, {"integrator": RK4(), "stepping": FIXED, "executor": fs.Compiled("aot_eager")}
    ),
    "chosen in a graph": (ODE, {"executor": fs.Compiled("aot_eager")}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVES)
def test_solves_leave_no_cycles_behind(name: str) -> None:
    dynamics, more = SOLVES[name]
    y0 = torch.ones(3, 2, requires_grad=True)

    def run() -> None:
        with suppress(fs.SolveError, ZeroDivisionError):
            sol = fs.solve(dynamics, y0, **{"t0": 0.0, "t1": 1.0, **more})
            (sol.y1.sum() + (0.0 if sol.ys is None else sol.ys.sum())).backward()

    if "executor" in more:
        run()  # the compiler leaves what it likes
    with nothing_left():
        run()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stepping": fs.Adaptive(per_sample=True)},
        {"stepping": FIXED},
        {"stepping": FIXED, "save_at": fs.Steps()},
        {"adjoint": fs.Checkpointed()},
        {"adjoint": fs.Checkpointed(), "stepping": FIXED},
        {"adjoint": fs.Backsolve()},
        {"save_at": torch.linspace(0.0, 4.0, 9)},
        {"events": fs.Event(lambda t, y: y[0, 0] - 0.9, terminal=False)},
    ],
    ids=[
        "chosen",
        "of each sample",
        "given",
        "given, saved",
        "checkpoints",
        "given, checkpoints",
        "backwards",
        "saved",
        "events",
    ],
)
def test_the_stages_of_a_step_are_gone_before_the_next_one(more: dict[str, Any]) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        alive.append(sum(k() is not None for k in made))
        k = torch.sin(9.0 * t).reshape(-1, 1) * y
        made.append(weakref.ref(k))
        return k

    y0 = torch.ones(3, 2, requires_grad="adjoint" in more)
    dynamics = fs.ODE(f, batched_time=True, rowwise=True)
    with torch.set_grad_enabled("adjoint" in more):
        fs.solve(dynamics, y0, 0.0, 4.0, integrator=Dopri5(), **more)
    stages = len(Dopri5.tableau.b)
    assert len(made) > 3 * stages
    assert max(alive) <= stages  # all but the last one, and the solve's first


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.cnf(2),
        lambda: models.realnvp(2, 2, 8, generator=torch.Generator("cpu").manual_seed(0)),
        lambda: models.nsf(2, 2, 8, generator=torch.Generator("cpu").manual_seed(0)),
    ],
    ids=["cnf", "realnvp", "nsf"],
)
def test_flows_leave_no_cycles_behind(build: Callable[[], fs.Dynamics]) -> None:
    flow = fs.Flow(fs.Normal(2), build())
    x = torch.randn(3, 2, generator=generator())
    with nothing_left():
        flow.log_prob(x).sum().backward()
        flow.rsample(4, seed=0).sum().backward()
