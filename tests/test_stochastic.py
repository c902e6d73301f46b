"""Stochastic solves: replay, and the marginals of both reversals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics import UnderdampedLangevin
from flowsde.integrators import EulerMaruyama, Heun, Milstein, StochasticHeun
from flowsde.integrators.stochastic import Stochastic
from flowsde.paths import uniform_lambda

from .systems import SCHEDULES, Mixture, admits, catalogue, generator

METHODS = catalogue(integrators, Stochastic)


# --- marginals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_simulated_noising_has_the_kernels_moments(schedule: fs.Schedule) -> None:
    sde, count, end = fs.LinearSDE(schedule), 20_000, 0.7 * schedule.horizon
    start = 0.0
    x0 = torch.full((count, 1), 1.3)
    sol = fs.solve(
        sde, x0, start, end, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=400),
        path=fs.Brownian(0),
    )  # fmt: skip
    mean, std = sde.marginal(end, x0)
    extra = schedule.sigma(start) ** 2 * (schedule.alpha(end) / schedule.alpha(start)) ** 2
    std = math.sqrt(std**2 - extra)
    assert abs(float(sol.y1.mean() - mean.mean())) < 5 * std / math.sqrt(count) + 0.01 * std
    assert float(sol.y1.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * count) + 0.01)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_both_reversals_recover_the_mixture(schedule: fs.Schedule, eta: float) -> None:
    """From the exact law at t, with the exact score: weights, means and spread at data."""
    mixture, count = Mixture.two(), 8000
    t0, t1 = 0.8 * schedule.horizon, 0.003
    alpha, sigma = schedule(t0)
    noised = alpha * mixture.sample(count, 1) + sigma * torch.randn(count, 2, generator=generator())
    process, steps = fs.LinearSDE(schedule), 150
    times = uniform_lambda(schedule, t0, t1, steps)
    dynamics = process.reverse_sde(mixture.denoiser(schedule), eta)
    method = StochasticHeun() if eta else Heun()
    path = fs.Brownian(2) if eta else None
    with torch.no_grad():
        x = fs.solve(
            dynamics, noised, t0, t1, integrator=method, stepping=fs.Grid(times), path=path
        ).y1
    right = x[:, 0] > -0.25
    error = 4 * math.sqrt(0.21 / count)
    assert float(right.double().mean()) == pytest.approx(0.7, abs=error + 0.005)
    spread = math.hypot(mixture.std, schedule.sigma(t1))
    for mask, mean in ((~right, mixture.means[0]), (right, mixture.means[1])):
        assert torch.allclose(x[mask].mean(0), mean, atol=0.04)
        assert torch.allclose(x[mask].std(0), torch.full((2,), spread), atol=0.03)


def _system(method: Stochastic) -> tuple[fs.Dynamics, Any]:
    """Dynamics that the method admits, with noise that depends on the state where it can."""

    def spread(t: Any, y: Any) -> Any:
        return 0.4 * torch.cos(y)

    def drift(t: Any, y: Any) -> Any:
        return -y

    y0 = torch.full((3, 2), 0.8)
    for more in ({}, {"stratonovich": True}, {"additive": True}, {"linear": -1.0}):
        g = (lambda t, y: 0.4 + 0.0 * y) if "additive" in more else spread
        sde = fs.SDE(drift, g, noise="diagonal", batched_time=True, **more)  # type: ignore[arg-type]
        if admits(method, sde):
            return sde, y0
    return UnderdampedLangevin(drift, batched_time=True), (y0, y0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_of_no_length_stands_still(method: Stochastic) -> None:
    """Nothing is divided by its steps."""
    dynamics, y0 = _system(method)
    if not admits(method, dynamics):
        pytest.skip("a method for another structure")
    start = torch.utils._pytree.tree_map(lambda x: x.clone().requires_grad_(), y0)
    y1 = fs.solve(
        dynamics, start, 0.0, torch.tensor([0.3, 0.0, 0.1]), integrator=method,
        stepping=fs.Fixed(steps=3), path=fs.Brownian(3),
    ).y1  # fmt: skip
    leaves = torch.utils._pytree.tree_leaves
    for x0, x1 in zip(leaves(start), leaves(y1), strict=True):
        assert torch.equal(x1[1], x0[1])
    grads = torch.autograd.grad(sum(x[1].sum() for x in leaves(y1)), leaves(start))
    assert all(torch.equal(g[1], torch.ones_like(g[1])) for g in grads)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_one_column_commutes_with_itself() -> None:
    sde = fs.SDE(
        lambda t, y: -y, lambda t, y: torch.cos(y)[..., None], noise="general", noise_size=1
    )
    diagonal = fs.SDE(lambda t, y: -y, lambda t, y: torch.cos(y), noise="diagonal")
    y1, same = (
        fs.solve(
            d, torch.ones(3, 1), integrator=Milstein(), stepping=fs.Fixed(steps=8),
            path=fs.Brownian(0),
        ).y1
        for d in (sde, diagonal)
    )  # fmt: skip
    assert torch.allclose(y1, same)


def test_additive_noise_of_a_pytree() -> None:
    sde = fs.SDE(
        lambda t, y: {"a": -y["a"], "b": -y["b"]},
        lambda t, y: {"a": torch.ones_like(y["a"]), "b": 0.5 * torch.ones_like(y["b"])},
        noise="diagonal", additive=True,
    )  # fmt: skip
    y0 = {"a": torch.zeros(5000, 2), "b": torch.zeros(5000)}
    for method in (m for m in METHODS if admits(m, sde)):
        y1 = fs.solve(
            sde, y0, 0.0, 3.0, integrator=method, stepping=fs.Fixed(steps=60), path=fs.Brownian(0)
        ).y1
        variance = (1 - math.exp(-6.0)) / 2
        assert float(y1["a"].var()) == pytest.approx(variance, rel=0.06)
        assert float(y1["b"].var()) == pytest.approx(variance / 4, rel=0.1)
