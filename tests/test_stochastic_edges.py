"""Edges of stochastic solves that a reader of the code fell over: each of these was once wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde.accuracy import solve_with_error
from flowsde.integrators import (
    EulerMaruyama,
    Milstein,
    ReversibleHeun,
    StepDoubling,
    StochasticHeun,
)  # fmt: skip

STEPS = {"stepping": fs.Fixed(steps=4), "path": fs.Brownian(0)}


@pytest.mark.parametrize("integrator", [Milstein(), StepDoubling(Milstein())])
def test_scalar_states_keep_their_precision(integrator: fs.Integrator) -> None:
    seen = set()

    def drift(t: Tensor, y: Tensor) -> Tensor:
        seen.add(y.dtype)
        return -y

    sde = fs.SDE(drift, lambda t, y: 0.3 * y + 0.2, noise="diagonal")
    sol = fs.solve(sde, torch.tensor(0.7, dtype=torch.float32), integrator=integrator, **STEPS)
    assert seen == {torch.float32}
    assert sol.y1.dtype == torch.float32


def test_scalar_states_learn_additive_noise() -> None:
    sigma = torch.tensor(0.3, requires_grad=True)
    y1 = {}
    for additive in (False, True):
        sde = fs.SDE(
            lambda t, y: -y, lambda t, y: sigma * torch.ones_like(y), noise="diagonal",
            additive=additive,
        )  # fmt: skip
        y1[additive] = fs.solve(sde, torch.tensor(0.7), integrator=EulerMaruyama(), **STEPS).y1
    assert torch.equal(y1[False], y1[True])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "autocast"])
def test_diagonal_noise_is_diagonal_in_half_precision(cast: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    dtype = torch.float32 if cast else torch.bfloat16
    y0, net = torch.randn(64, 3).to(dtype), net.to(dtype)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: net(y[..., None])[..., 0], noise="diagonal")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        sol = fs.solve(fs.to_stratonovich(sde), y0, integrator=StochasticHeun(), **STEPS)
    assert sol.success


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_one_stray_component_is_seen(size: int) -> None:
    for i in range(size):
        for j in range(size):
            unit = torch.zeros(size, size)
            unit[i, j] = 1e-6
            sde = fs.SDE(lambda t, y: -y, lambda t, y, a=unit: y + y @ a, noise="diagonal")
            kept = (fs.to_stratonovich(sde), torch.ones(2, size))
            if i == j:
                assert fs.solve(*kept, integrator=StochasticHeun(), **STEPS).success
            else:
                with pytest.raises(TypeError, match="depends on other components"):
                    fs.solve(*kept, integrator=StochasticHeun(), **STEPS)


def test_a_tree_takes_times_as_tensors() -> None:
    ts = torch.linspace(0.0, 1.0, 5)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y, noise="diagonal")
    ends = [
        fs.solve(
            sde, torch.ones(1, 3), ts[0], ts[-1], integrator=EulerMaruyama(),
            stepping=fs.Fixed(steps=2), path=fs.BrownianTree(0, *span),
        ).y1
        for span in ((ts[0], ts[-1]), (0.0, 1.0))
    ]  # fmt: skip
    assert torch.equal(*ends)
    for wrong in (ts, ts[1].clone().requires_grad_()):
        with pytest.raises(TypeError, match="t0 of a tree is a number"):
            fs.BrownianTree(0, wrong, 1.0)


class Pull(nn.Module):
    """A parameter of which no product is saved as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 0.02))

    def pull(self, t: Tensor, y: Tensor) -> Tensor:
        return -y + (-self.w) * torch.sin(5.0 * y)


def test_checkpoints_see_that_closures_changed() -> None:
    model = Pull()
    sde = fs.SDE(model.pull, lambda t, y: 0.3 * y, noise="diagonal")
    sol = fs.solve(
        sde, torch.ones(4, 3), integrator=EulerMaruyama(), stepping=fs.Fixed(steps=64),
        path=fs.Brownian(0), adjoint=fs.Checkpointed(),
    )  # fmt: skip
    with torch.no_grad():
        model.w.add_(1e-4)
    with pytest.raises(RuntimeError, match="changed in place after the solve"):
        sol.y1.sum().backward()


def test_checkpoints_do_not_look_behind_y0() -> None:
    before = torch.full((3,), 0.5, requires_grad=True)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y, noise="diagonal")
    sol = fs.solve(
        sde, before + torch.ones(4, 3), integrator=EulerMaruyama(), stepping=fs.Fixed(steps=64),
        path=fs.Brownian(0), adjoint=fs.Checkpointed(),
    )  # fmt: skip
    with torch.no_grad():
        before.add_(1.0)  # a sum needs it not
    sol.y1.sum().backward()
    assert before.grad is not None


def test_checkpoints_of_carried_states_sum_in_order() -> None:
    sde = fs.SDE(
        lambda t, y: -torch.sin(y), lambda t, y: 0.3 * torch.sin(y) + 0.2, noise="diagonal",
        stratonovich=True,
    )  # fmt: skip

    def slope(adjoint: fs.Adjoint) -> Tensor:
        y0 = torch.linspace(-1.0, 2.0, 24, dtype=torch.float32).reshape(8, 3).requires_grad_()
        sol = fs.solve(
            sde, y0, integrator=ReversibleHeun(), stepping=fs.Fixed(steps=40), path=fs.Brownian(0),
            adjoint=adjoint,
        )  # fmt: skip
        return torch.autograd.grad(sol.y1.square().sum(), y0)[0]

    assert torch.equal(slope(fs.Direct()), slope(fs.Checkpointed()))


def test_errors_of_samples_with_spans_of_their_own() -> None:
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y, noise="diagonal", batched_time=True)
    given = (sde, torch.ones(2, 1), 0.0, torch.tensor([1.0, 2.0]))
    steps = {"integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=4)}
    with pytest.raises(TypeError, match="BrownianTree"):
        solve_with_error(*given, path=fs.Brownian(0), **steps)
    sol, error = solve_with_error(*given, path=fs.BrownianTree(0, 0.0, 2.0), **steps)
    own, gap = solve_with_error(
        sde, torch.ones(2, 1), 0.0, 1.0, path=fs.BrownianTree(0, 0.0, 2.0), **steps
    )
    assert torch.allclose(sol.y1[0], own.y1[0])
    assert float(error[0]) == pytest.approx(float(gap[0]))
