"""Stochastic solves: strong orders, replay, and the marginals of both reversals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import EulerMaruyama, Heun, ReversibleHeun, StochasticHeun
from flowsde.integrators.stochastic import Stochastic
from flowsde.paths import uniform_lambda

from .systems import SCHEDULES, Mixture, catalogue, generator, increments, slope

METHODS = catalogue(integrators, Stochastic)


# --- strong orders --------------------------------------------------------------------------------


def geometric(ito: bool) -> tuple[fs.SDE, Any]:
    """dy = a y dt + b y dW, one Brownian motion a component, and its closed form."""
    a, b = 0.3, 0.8
    dynamics = fs.SDE(
        lambda t, y: a * y, lambda t, y: b * y, noise="diagonal", stratonovich=not ito
    )
    drift = a - 0.5 * b * b if ito else a
    return dynamics, lambda y0, w: y0 * torch.exp(drift + b * w)


def additive() -> tuple[fs.SDE, Any]:
    """dy = -y dt + cos t dW, additive; the reference is the fine path itself."""
    sde = fs.SDE(
        lambda t, y: -y.sin(), lambda t, y: (1.5 + t.cos()) * torch.ones_like(y),
        noise="diagonal", additive=True,
    )  # fmt: skip
    return sde, None


def scalar() -> tuple[fs.SDE, Any]:
    a, b = 0.3, torch.tensor([0.8, -0.5])
    sde = fs.SDE(lambda t, y: a * y, lambda t, y: b * y, noise="scalar", stratonovich=True)
    return sde, lambda y0, w: y0 * torch.exp(a + b * w[:, None])


def general() -> tuple[fs.SDE, Any]:
    """Columns that do not commute."""

    def g(t: Tensor, y: Tensor) -> Tensor:
        zero = torch.zeros_like(y[:, 0])
        return torch.stack(
            (torch.stack((y[:, 1], zero), -1), torch.stack((zero, 0.7 * y[:, 0]), -1)), 1
        )

    return fs.SDE(lambda t, y: -0.2 * y, g, noise="general", noise_size=2), None


CASES = [
    (EulerMaruyama(), *geometric(ito=True)), (StochasticHeun(), *geometric(ito=False)),
    (StochasticHeun(), *scalar()), (EulerMaruyama(), *additive()),
    (StochasticHeun(), *additive()), (EulerMaruyama(), *general()),
    (ReversibleHeun(), *geometric(ito=False)), (ReversibleHeun(), *scalar()),
    (ReversibleHeun(), *additive()),
]  # fmt: skip


def test_every_stochastic_method_is_measured() -> None:
    assert {type(m) for m in METHODS} == {type(case[0]) for case in CASES}


@pytest.mark.parametrize(("method", "sde", "exact"), CASES, ids=lambda v: type(v).__name__)
def test_strong_order(method: Stochastic, sde: fs.SDE, exact: Any) -> None:
    count, fine = 4000, 1024 if exact is None else 256
    times = torch.linspace(0.0, 1.0, fine + 1)
    y0 = torch.ones(count, 2) * torch.tensor([1.0, 0.5])
    path = fs.Brownian(7, times)

    def solve(steps: int) -> Tensor:
        return fs.solve(sde, y0, integrator=method, stepping=fs.Fixed(steps=steps), path=path).y1

    if exact is not None:
        assert sde.noise is not None
        w = increments(path, [0.0, 1.0], sde.noise.shapes(y0))(0)
        truth = exact(y0, w)
    else:
        truth = solve(fine)
    steps = [8, 16, 32, 64]
    errors = [float((solve(n) - truth).square().sum(-1).mean().sqrt()) for n in steps]
    assert sde.noise is not None
    assert abs(slope(errors, steps) - method.strong_order(sde.noise)) < 0.15, errors


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


def test_additive_noise_of_a_pytree() -> None:
    sde = fs.SDE(
        lambda t, y: {"a": -y["a"], "b": -y["b"]},
        lambda t, y: {"a": torch.ones_like(y["a"]), "b": 0.5 * torch.ones_like(y["b"])},
        noise="diagonal", additive=True,
    )  # fmt: skip
    y0 = {"a": torch.zeros(5000, 2), "b": torch.zeros(5000)}
    for method in METHODS:
        y1 = fs.solve(
            sde, y0, 0.0, 3.0, integrator=method, stepping=fs.Fixed(steps=60), path=fs.Brownian(0)
        ).y1
        variance = (1 - math.exp(-6.0)) / 2
        assert float(y1["a"].var()) == pytest.approx(variance, rel=0.06)
        assert float(y1["b"].var()) == pytest.approx(variance / 4, rel=0.1)
