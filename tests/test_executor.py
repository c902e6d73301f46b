"""Compiled steps: one graph, the results and gradients of Eager to rounding."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import AsynchronousLeapfrog, Bosh3, EulerMaruyama, Integrator
from flowsde.integrators.base import Engine

from .systems import catalogue, suited
from .test_adjoint import Net, assert_same, gradients, measure

ADJOINTS = [fs.Direct(), fs.Checkpointed(), fs.Reversible(), fs.Backsolve()]
STATIC = [m for m in catalogue(integrators, Integrator) if m.static]


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


def graphs() -> tuple[fs.Compiled, Any]:
    """An executor that traces as the compiler would, runs eagerly, and counts its graphs."""
    counter = torch._dynamo.testing.CompileCounter()
    return fs.Compiled(backend=counter), counter  # type: ignore[arg-type]


@pytest.mark.parametrize("method", STATIC, ids=str)
def test_every_static_method_is_one_graph(method: Integrator) -> None:
    net = Net(3)
    dynamics, y0 = suited(method, net, torch.randn(4, 3))
    executor, counter = graphs()
    found = []
    for run in (fs.Eager(), executor):
        with torch.no_grad():
            sol = fs.solve(
                dynamics, y0, 0.2, 1.0, integrator=method, stepping=fs.Fixed(steps=6), executor=run,
                path=fs.Brownian(0) if dynamics.noise is not None else None,
            )  # fmt: skip
        found.append((torch.utils._pytree.tree_leaves(sol.y1), sol.stats.evaluations))
    assert_same(found[1][0], found[0][0], 1e-12)
    assert found[1][1] == found[0][1]
    assert counter.frame_count <= 2  # methods with a history have a first step of their own


@pytest.mark.parametrize("per_sample", [False, True])
def test_adaptive_solves_share_one_graph(per_sample: bool) -> None:
    """All steps, a second solve, other tolerances' objects and other contents: no new graph."""
    net = Net()
    net.late.data.zero_()  # its jump would make the results hang on rounding
    dynamics = fs.ODE(net, batched_time=True)
    executor, counter = graphs()
    for seed in range(3):
        torch.manual_seed(seed)
        y0 = torch.randn(4, 3)
        sols = []
        for run in (fs.Eager(), executor):
            with torch.no_grad():
                sols.append(fs.solve(
                    dynamics, y0, 0.0, 1.0 + seed, executor=run, save_at=[0.3, 0.9],
                    stepping=fs.Adaptive(1e-7, 1e-7, per_sample=per_sample),
                ))  # fmt: skip
        assert_same([sols[1].y1, sols[1].ys], [sols[0].y1, sols[0].ys], 1e-10)
        assert sols[1].stats.evaluations == sols[0].stats.evaluations
    assert counter.frame_count == 1


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("stepping", [fs.Fixed(steps=8), fs.Adaptive(1e-3, 1e-3)], ids=["f", "a"])
def test_gradients_of_compiled_steps(adjoint: fs.Adjoint, stepping: fs.Stepping) -> None:
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    net.late.data.zero_()
    dynamics, found = fs.ODE(net), []
    for run in (fs.Eager(), fs.Compiled(backend="aot_eager")):
        sol = fs.solve(
            dynamics, y0, 0.1, 0.9, integrator=AsynchronousLeapfrog(), stepping=stepping,
            adjoint=adjoint, executor=run, save_at=[0.5, 0.9],
        )  # fmt: skip
        found.append(gradients(measure(sol), [y0, net.w, net.b]))
    assert_same(found[1], found[0], 1e-9)


def test_inductor_agrees() -> None:
    """The real compiler, forward and back, with noise as an input."""
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    executor, found = fs.Compiled(), []
    sde = fs.SDE(net, lambda t, y: 0.2 + 0.1 * y, noise="diagonal")
    ode = fs.ODE(net)
    for run in (fs.Eager(), executor):
        a = fs.solve(ode, y0, integrator=Bosh3(), executor=run).y1
        b = fs.solve(
            sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=5), path=fs.Brownian(3),
            executor=run,
        ).y1  # fmt: skip
        found.append([a, b, *gradients((a * b).sum(), [y0, net.w])])
    assert_same(found[1], found[0], 1e-10)


def test_steps_of_more_than_one_kind_are_refused() -> None:
    field = fs.ODE(lambda t, y: -y)
    for method in catalogue(integrators, Integrator):
        if not method.static and not isinstance(method, integrators.Iterate):
            dynamics, y0 = suited(method, lambda t, y: -y, torch.ones(2, 2))
            with pytest.raises(TypeError, match=r"Eager\(\)"):
                fs.solve(
                    dynamics, y0, integrator=method, executor=fs.Compiled(),
                    stepping=None if isinstance(method, Engine) else fs.Fixed(steps=3),
                    path=None if dynamics.noise is None else fs.Brownian(0),
                )  # fmt: skip
    with pytest.raises(TypeError, match=r"Compiled\(\)"):
        fs.solve(field, torch.ones(2), executor="compiled")


def test_a_graph_lives_as_long_as_its_dynamics() -> None:
    executor, _ = graphs()
    dynamics = fs.ODE(lambda t, y: -y)
    fs.solve(dynamics, torch.ones(2, 2), stepping=fs.Fixed(steps=3), executor=executor)
    assert len(executor._made) == 1
    del dynamics
    gc.collect()
    assert len(executor._made) == 0


def test_other_batches_and_late_branches_compile_again_and_agree() -> None:
    """A changed batch size is a new graph, not an error; so is a branch that the field takes."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y if y.shape[0] < 4 else -2.0 * y

    dynamics = fs.ODE(f)
    executor, _ = graphs()
    for batch in (3, 5, 3, 8):
        y1 = fs.solve(
            dynamics, torch.ones(batch, 2), stepping=fs.Fixed(steps=20), executor=executor
        ).y1
        rate = -1.0 if batch < 4 else -2.0
        assert_same([y1], [torch.full((batch, 2), rate).exp()], 1e-6)
