"""Continuous flows: fields that know their trace, penalties, layers, and the ends of their time."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives
from flowsde.integrators import Dopri5, Euler, ReversibleRK, Tsit5

from .systems import generator

TIGHT = fs.Solver(Tsit5(), fs.Adaptive(1e-9, 1e-9))
FEW = fs.Solver(Tsit5(), fs.Fixed(steps=3))  # for what is equal step by step
VECTORS: dict[str, Callable[[int], fs.Dynamics]] = {
    "cnf": lambda dim: models.cnf(dim, 8, 2),
    "shallow": lambda dim: models.cnf(dim, 8, 1),
    "planar": lambda dim: models.planar_cnf(dim, 6, 8),
    "learned end": lambda dim: fs.learn_horizon(models.cnf(dim, 8, 2), 1.3),
    "planar, learned end": lambda dim: fs.learn_horizon(models.planar_cnf(dim, 6, 8), 0.7),
}


def away(dynamics: fs.Dynamics, seed: int = 0, std: float = 0.6) -> fs.Dynamics:
    """The same with weights that make it bend."""
    torch.manual_seed(seed)
    for p in dynamics.parameters():
        if p.ndim:
            nn.init.normal_(p, std=std)
    return dynamics


def vectors(name: str, dim: int) -> fs.Dynamics:
    return away(VECTORS[name](dim))


def images(std: float = 0.3) -> fs.Dynamics:
    return away(models.cnf((2, 3, 4), 5, 2), std=std)


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_a_fields_own_trace_is_the_exact_one(name: str, dim: int, shared: bool) -> None:
    """Its value, its trace, and their gradients by x, t and the parameters."""
    made, x = vectors(name, dim), torch.randn(4, dim, requires_grad=True)
    t = torch.tensor(0.3) if shared else torch.linspace(0.1, 0.9, 4)
    t.requires_grad_()
    own = made.traced()
    assert own is not None
    wanted, found = [x, t, *made.parameters()], []
    for value, trace in (own(t, x), fs.Exact()(lambda v: made(t, v), x)):
        assert value.shape == x.shape
        assert trace.shape == (4,)
        loss = (value.sin().sum(-1) * trace.cos()).sum()
        found.append([value, trace, *torch.autograd.grad(loss, wanted, materialize_grads=True)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name", VECTORS)
def test_the_density_takes_the_fields_own_trace(name: str) -> None:
    """By default, and needs no autograd then; the exact one gives the same."""
    made, start = vectors(name, 2), (torch.randn(5, 2), torch.zeros(5))
    with torch.inference_mode():
        own = FEW.solve(fs.log_density(made), start).y1
    with torch.no_grad():
        exact = FEW.solve(fs.log_density(made, fs.Exact()), start).y1
    assert torch.allclose(own[0], exact[0], atol=1e-12)
    assert torch.allclose(own[1], exact[1], atol=1e-12)


@pytest.mark.parametrize("name", [*VECTORS, "images"])
def test_forward_then_back_is_the_identity(name: str) -> None:
    made = images() if name == "images" else vectors(name, 3)
    x = torch.randn(4, 2, 3, 4) if name == "images" else torch.randn(4, 3)
    with torch.no_grad():
        z, change = TIGHT.solve(fs.log_density(made), (x, torch.zeros(4)), 0.0, 1.0).y1
        back, rest = TIGHT.solve(fs.log_density(made), (z, change), 1.0, 0.0).y1
    assert not torch.allclose(z, x, atol=1e-2)
    assert torch.allclose(back, x, atol=1e-7)
    assert torch.allclose(rest, torch.zeros(4), atol=1e-7)


@pytest.mark.parametrize("name", ["planar", "learned end"])
def test_densities_integrate_to_one(name: str) -> None:
    flow = fs.Flow(fs.Normal(2), vectors(name, 2), fs.Solver(Tsit5(), fs.Adaptive(1e-5, 1e-5)))
    with torch.no_grad():
        samples, n = flow.sample((300,), generator=generator()), 120
        low, high = samples.amin(0) - 2.5, samples.amax(0) + 2.5
        a, b = (torch.linspace(float(x), float(y), n) for x, y in zip(low, high, strict=True))
        density = flow.log_prob(torch.cartesian_prod(a, b)).exp().reshape(n, n)
        mass = float(torch.trapezoid(torch.trapezoid(density, b), a))
    assert mass == pytest.approx(1.0, abs=5e-3)


def test_the_density_of_images_is_slogdet() -> None:
    made, x = images(), torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        change = TIGHT.solve(fs.log_density(made), (x, torch.zeros(1))).y1[1]
    jacobian = torch.autograd.functional.jacobian(lambda v: TIGHT.solve(made, v).y1, x)
    truth = torch.linalg.slogdet(jacobian.reshape(24, 24))[1]
    assert float(-change) == pytest.approx(float(truth), abs=1e-6)


def test_images_take_estimates_and_times_of_their_own() -> None:
    flow = fs.Flow(fs.Normal((2, 3, 4)), images(), divergence=fs.HutchPlusPlus(2))
    x, density = flow.sample_and_log_prob((3,), seed=2, generator=generator(1))
    assert torch.allclose(flow.log_prob(x, generator=generator(1)), density, atol=1e-2)
    x, ends = x.detach(), torch.tensor([0.5, 1.0, 0.8])
    whole = TIGHT.solve(flow.dynamics, x, 0.0, ends).y1
    for i, end in enumerate(ends.tolist()):
        alone = TIGHT.solve(flow.dynamics, x[i : i + 1], 0.0, end).y1
        assert torch.allclose(whole[i : i + 1], alone, atol=1e-7)


def test_a_traced_field_is_checked() -> None:
    with pytest.raises(ValueError, match="one part"):
        fs.ODE(lambda t, y: y, linear=-1.0, traced=lambda t, y: (y, y[:, 0]))
    with pytest.raises(TypeError, match="callable"):
        fs.ODE(lambda t, y: y, traced=2.0)  # type: ignore[arg-type]
    wrong = fs.ODE(lambda t, y: y, traced=lambda t, y: (y, y))
    with pytest.raises(TypeError, match="vector field"):
        fs.solve(fs.log_density(wrong), (torch.ones(3, 2), torch.zeros(3)))
    with pytest.raises(ValueError, match="hidden layers"):
        models.cnf(2, depth=0)


def test_copies_know_their_own_trace() -> None:
    flow, x = fs.Flow(fs.Normal(2), vectors("planar, learned end", 2)), torch.randn(3, 2)
    before = flow.log_prob(x).detach()
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other.log_prob(x), before)
        for p in other.parameters():
            nn.init.constant_(p, 0.1)
        assert not torch.allclose(other.log_prob(x), before)
    assert torch.equal(flow.log_prob(x), before)


# --- gradients ------------------------------------------------------------------------------------


DENSITIES: dict[str, Callable[[fs.Dynamics], fs.Dynamics]] = {
    "own trace": fs.log_density,
    "exact": lambda d: fs.log_density(d, fs.Exact()),
    "hutchinson": lambda d: fs.log_density(d, fs.Hutchinson()),
    "hutch++": lambda d: fs.log_density(d, fs.HutchPlusPlus(1)),
    "penalties": lambda d: fs.regularize(fs.log_density(d, fs.Hutchinson(2))),
}


def slopes(name: str, adjoint: fs.Adjoint, integrator: Any) -> list[Tensor]:
    """Gradients of a loss of all that the density carries, by x and the parameters."""
    made = DENSITIES[name](vectors("learned end", 3))
    torch.manual_seed(1)
    x = torch.randn(4, 3, requires_grad=True)
    start: Any = (x, torch.zeros(4))
    start = made.enter(start) if isinstance(made, fs.transforms.Regularized) else start
    end = fs.solve(
        made, start, integrator=integrator, stepping=fs.Adaptive(1e-5, 1e-5), adjoint=adjoint,
        generator=generator(),
    ).y1  # fmt: skip
    loss = sum(leaf.sin().sum() for leaf in torch.utils._pytree.tree_leaves(end))
    return list(torch.autograd.grad(loss, [x, *made.parameters()]))


@pytest.mark.parametrize("name", DENSITIES)
def test_every_adjoint_gives_the_likelihoods_gradient(name: str) -> None:
    direct = slopes(name, fs.Direct(), Dopri5())
    assert all(bool(g.abs().sum() > 0) for g in direct)
    for a, b in zip(direct, slopes(name, fs.Checkpointed(), Dopri5()), strict=True):
        assert torch.equal(a, b)
    reversible = ReversibleRK(Dopri5())
    pairs = zip(
        slopes(name, fs.Direct(), reversible), slopes(name, fs.Reversible(), reversible),
        strict=True,
    )  # fmt: skip
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    if name != "hutch++":  # which holds its sketch constant, and so is no field's derivative
        for a, b in zip(direct, slopes(name, fs.Backsolve(), Dopri5()), strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("density", [True, False])
def test_a_learned_end_is_that_end(density: bool) -> None:
    """Solves reach T, and the gradient by it is that of finite differences."""
    inner = vectors("cnf", 2)
    made, x = fs.learn_horizon(inner, 1.7), torch.randn(3, 2)
    start: Any = (x, torch.zeros(3)) if density else x

    def end(dynamics: fs.Dynamics, t1: float) -> Tensor:
        solved = TIGHT.solve(fs.log_density(dynamics) if density else dynamics, start, 0.0, t1).y1
        return solved[1] if density else solved[:, 0]

    assert torch.allclose(end(made, 1.0), end(inner, 1.7), atol=1e-7)
    (root,) = (p for name, p in made.named_parameters() if name == "root")
    (found,) = torch.autograd.grad(end(made, 1.0).sum(), root)
    h, ends = 1e-4, []
    for sign in (1.0, -1.0):
        ends.append(float(end(inner, (float(root.detach()) + sign * h) ** 2).detach().sum()))
    assert float(found) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_learned_ends_refuse() -> None:
    sde = fs.SDE(lambda t, y: y, lambda t, y: y, noise="diagonal")
    with pytest.raises(TypeError, match="ODE"):
        fs.learn_horizon(sde)
    with pytest.raises(ValueError, match="T > 0"):
        fs.learn_horizon(models.cnf(2), 0.0)
    assert fs.learn_horizon(fs.ODE(lambda t, y: y)).traced() is None


# --- penalties ------------------------------------------------------------------------------------


def test_penalties_of_a_linear_field_are_closed_forms() -> None:
    """dy/dt = A y: k is the integral of |A e^(At) y0|^2, r that of |A^3 e^(At) y0|^2, and j is
    |A|_F^2 (t1 - t0).
    """
    matrix, x = 0.5 * torch.randn(3, 3), torch.randn(4, 3)
    made = fs.ODE(lambda t, y: y @ matrix.T)
    dense = fs.regularize(fs.log_density(made, fs.Exact()), taylor=3)
    (y, change), k, j, r = TIGHT.solve(dense, dense.enter((x, torch.zeros(4))), 0.2, 1.5).y1
    nodes = torch.linspace(0.0, 1.3, 401)
    ways = torch.linalg.matrix_exp(nodes[:, None, None] * matrix) @ x.T
    speeds = (matrix @ ways).square().sum(1)
    jerks = (matrix @ matrix @ matrix @ ways).square().sum(1)
    weights = torch.ones(401).index_fill(0, torch.arange(1, 400, 2), 4.0)
    weights = weights.index_fill(0, torch.arange(2, 400, 2), 2.0) * (1.3 / 400 / 3)
    assert torch.allclose(k, weights @ speeds, atol=1e-7)
    assert torch.allclose(r, weights @ jerks, atol=1e-7)
    assert torch.allclose(j, 1.3 * matrix.square().sum().expand(4), atol=1e-7)
    assert torch.allclose(change, -1.3 * matrix.trace().expand(4), atol=1e-7)
    assert torch.allclose(y, ways[-1].T, atol=1e-7)
    back = TIGHT.solve(dense, ((y, change), k, j, r), 1.5, 0.2).y1
    assert all(torch.allclose(c, torch.zeros(4), atol=1e-7) for c in back[1:])


def test_penalties_stand_alone_too() -> None:
    made, x = vectors("planar", 3), torch.randn(4, 3)
    with torch.no_grad():
        plain = fs.regularize(made, divergence=fs.Exact())
        z, k, j = FEW.solve(plain, plain.enter(x)).y1
        both = fs.regularize(fs.log_density(made))
        (y, _), k2, j2 = FEW.solve(both, both.enter((x, torch.zeros(4)))).y1
        energy = fs.regularize(made, jacobian=False)
        assert not energy.random
        _, k3 = FEW.solve(energy, energy.enter(x)).y1
        only = fs.regularize(made, kinetic=False)
        _, j4 = FEW.solve(only, only.enter(x), generator=generator()).y1
    assert torch.allclose(z, y, atol=1e-12)
    assert torch.allclose(k, k2, atol=1e-12)
    assert torch.allclose(k, k3, atol=1e-12)
    assert torch.allclose(j, j2, atol=1e-12)
    assert j4.shape == (4,)
    assert bool((j4 > 0).all())


@pytest.mark.parametrize("shared", [True, False])
def test_the_taylor_penalty_sees_time_and_has_gradients(shared: bool) -> None:
    """d^2y/dt^2 by differences along the solution, and the gradient of its square by those."""
    made, x = vectors("cnf", 2), torch.randn(4, 2)
    dense = fs.regularize(made, kinetic=False, jacobian=False, taylor=2)
    t = torch.tensor(0.4) if shared else torch.linspace(0.2, 0.8, 4)
    h = 1e-4

    def change(sign: float) -> Tensor:
        near = TIGHT.solve(made, x, t, t + sign * h).y1
        return made(t + sign * h, near)

    bend = (change(1.0) - change(-1.0)) / (2 * h)
    found = dense(t, dense.enter(x))[1]
    assert torch.allclose(found, bend.square().sum(-1), rtol=1e-5)
    weight = next(made.parameters())
    (slope,) = torch.autograd.grad(found.sum(), weight)
    way = torch.randn_like(weight)
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight.add_(way, alpha=sign * h)
            ends.append(dense(t, dense.enter(x))[1].sum())
            weight.sub_(way, alpha=sign * h)
    assert float((slope * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("penalties", [False, True])
def test_penalties_share_the_evaluation_and_the_pass(penalties: bool) -> None:
    """One evaluation of the field and one backward pass, with penalties as without; once a solve
    one more looks whether samples stand apart.
    """
    calls, passes = [], []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        k = torch.tanh(y) * y.sum(-1, keepdim=True)
        k.register_hook(passes.append)
        return k

    made: Any = fs.log_density(fs.ODE(f), fs.Hutchinson())
    start: Any = (torch.randn(4, 3), torch.zeros(4))
    if penalties:
        made = fs.regularize(made)
        start = made.enter(start)
    keywords: dict[str, Any] = {"integrator": Euler(), "stepping": fs.Fixed(steps=5)}
    sol = fs.solve(made, start, generator=generator(), **keywords)
    assert len(calls) == len(passes) - 1 == sol.stats.evaluations == 5


def test_penalties_refuse() -> None:
    sde = fs.SDE(lambda t, y: y, lambda t, y: y, noise="diagonal")
    with pytest.raises(TypeError, match="drift"):
        fs.regularize(sde)
    with pytest.raises(TypeError, match="drift"):
        fs.regularize(models.realnvp(2, 1, 4, generator=torch.Generator("cpu")))
    with pytest.raises(ValueError, match="several"):
        fs.regularize(models.cnf(2), kinetic=False, jacobian=False)
    with pytest.raises(ValueError, match=">= 2"):
        fs.regularize(models.cnf(2), taylor=1)
    with pytest.raises(TypeError, match="enter"):
        fs.solve(fs.regularize(models.cnf(2), jacobian=False), torch.ones(3, 2))
    with pytest.raises(TypeError, match="has its divergence"):
        fs.regularize(fs.log_density(models.cnf(2)), divergence=fs.Exact())
    pair = fs.regularize(fs.ODE(lambda t, y: y))
    with pytest.raises(TypeError, match="tensor"):
        pair.enter((torch.ones(2, 1), torch.ones(2, 1)))


def test_likelihood_is_trained_with_its_penalties() -> None:
    flow = fs.Flow(fs.Normal(2), vectors("cnf", 2), FEW, divergence=fs.Exact())
    x = torch.randn(5, 2)
    dense = fs.regularize(flow.density)
    _, k, j = FEW.solve(dense, dense.enter((x, torch.zeros(5)))).y1
    for kinetic, jacobian in ((0.1, 0.0), (0.0, 0.2), (0.1, 0.2), (0.0, 0.0)):
        objective = objectives.MaximumLikelihood(flow, kinetic, jacobian)
        loss = objective(x, generator=generator())
        truth = (kinetic * k + jacobian * j - flow.log_prob(x)).mean()
        assert torch.allclose(loss, truth, atol=1e-12)
        assert len(list(objective.parameters())) == len(list(flow.parameters()))
    with pytest.raises(ValueError, match=">= 0"):
        objectives.MaximumLikelihood(flow, -1.0)
    with pytest.raises(TypeError, match="Flow"):
        objectives.MaximumLikelihood(nn.Linear(2, 2), 1.0)


def test_penalties_make_flows_cheaper() -> None:
    """A few steps of descent on the kinetic energy alone lower it, and the norm."""
    made, x = vectors("cnf", 2), torch.randn(32, 2)
    dense = fs.regularize(fs.log_density(made, fs.Exact()))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    costs = []
    for _ in range(12):
        _, k, j = fs.solve(
            dense, dense.enter((x, torch.zeros(32))), integrator=Euler(), stepping=fs.Fixed(steps=4)
        ).y1
        costs.append((float(k.detach().mean()), float(j.detach().mean())))
        optimizer.zero_grad()
        (k + j).mean().backward()
        optimizer.step()
    assert costs[-1][0] < 0.8 * costs[0][0]
    assert costs[-1][1] < 0.8 * costs[0][1]


# --- neural ODEs ----------------------------------------------------------------------------------


def test_a_residual_stack_is_eulers_method_to_the_bit() -> None:
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(5)
    )
    x = torch.randn(4, 3, requires_grad=True)
    z = x
    for block in blocks:
        z = z + block(z)
    layer = models.NeuralODE(
        fs.ODE(lambda t, y: blocks[int(t)](y)), solver=fs.Solver(Euler(), fs.Fixed(dt=1.0))
    )
    layer.dynamics.horizon = 5.0
    solved = layer(x)
    assert torch.equal(solved, z)
    wanted = [x, *blocks.parameters()]
    pairs = zip(
        torch.autograd.grad(solved.square().sum(), wanted),
        torch.autograd.grad(z.square().sum(), wanted), strict=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


def test_augmented_trajectories_may_cross() -> None:
    """x to -x, which no flow of the line can be: half a turn of the plane."""
    turn = fs.ODE(lambda t, z: math.pi * torch.stack((-z[:, 1], z[:, 0]), -1))
    x = torch.linspace(-1.0, 1.0, 5)[:, None]
    z = models.NeuralODE(turn, extra=1, solver=TIGHT)(x)
    assert torch.allclose(z, torch.cat((-x, torch.zeros(5, 1)), 1), atol=1e-7)


def test_layers_augment_images_by_channels_and_save() -> None:
    layer = models.NeuralODE(images(), extra=1)
    x = torch.randn(3, 1, 3, 4)
    assert layer(x).shape == (3, 2, 3, 4)
    solution = layer.solve(x, save_at=torch.tensor([0.0, 0.5]))
    assert solution.ys.shape == (2, 3, 2, 3, 4)
    assert torch.equal(solution.ys[0, :, :1], x)
    assert not bool(solution.ys[0, :, 1:].any())
    plain = models.NeuralODE(vectors("cnf", 3))
    assert torch.equal(plain.enter(x[:, 0, :, 0]), x[:, 0, :, 0])
    with pytest.raises(ValueError, match="extra"):
        models.NeuralODE(images(), extra=-1)
