"""Stochastic solves: strong orders, replay, and the marginals of both reversals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import _random, integrators
from flowsde.integrators import EulerMaruyama, Heun, ReversibleHeun, StochasticHeun
from flowsde.integrators.stochastic import Stochastic
from flowsde.paths import uniform_lambda

from .systems import DEVICE, SCHEDULES, Mixture, catalogue, generator, increments, slope

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


# --- Brownian motion ------------------------------------------------------------------------------


def test_normals_are_normal() -> None:
    """Moments within five standard errors, Kolmogorov-Smirnov at level 1e-4, no correlations."""
    n = 200_000
    key = _random.keys(11, 1000, DEVICE, _random.BROWNIAN)
    draws = _random.normal(key, torch.arange(20), 10, torch.float64).flatten().cpu()
    assert abs(float(draws.mean())) < 5 / math.sqrt(n)
    assert abs(float(draws.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(draws.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    ordered = torch.special.ndtr(draws.sort().values)
    ranks = torch.arange(n, device="cpu") / n
    assert float((ordered - ranks).abs().max()) < 2.23 / math.sqrt(n)
    table = draws.reshape(20, 1000, 10)
    for a, b in (
        (table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table[..., 1:], table[..., :-1]),
    ):  # fmt: skip
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_signs_are_fair() -> None:
    key = _random.keys(2, 100, DEVICE, _random.PROBE)
    signs = _random.rademacher(key, torch.arange(10), 100, torch.float64)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())


@given(seed=st.integers(0, 2**63 - 1), count=st.integers(2, 6), steps=st.integers(1, 7))
def test_replay_and_batch_invariance(seed: int, count: int, steps: int) -> None:
    """The same seed gives the same path; a sample's own seed, whatever the batch around it."""
    sde, y0 = fs.LinearSDE(fs.paths.VP()), torch.randn(count, 3)

    def run(y: Tensor, path: fs.Brownian) -> Tensor:
        return fs.solve(
            sde, y, 0.1, 0.9, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=steps), path=path
        ).y1

    assert torch.equal(run(y0, fs.Brownian(seed)), run(y0, fs.Brownian(seed)))
    assert not torch.equal(run(y0, fs.Brownian(seed)), run(y0, fs.Brownian(seed ^ 1)))
    seeds = torch.arange(count) + seed % 1000
    whole = run(y0, fs.Brownian(seeds))
    for i in range(count):
        assert torch.equal(run(y0[i : i + 1], fs.Brownian(seeds[i : i + 1])), whole[i : i + 1])
    order = torch.randperm(count)
    assert torch.equal(run(y0[order], fs.Brownian(seeds[order])), whole[order])


@given(seed=st.integers(0, 1000), pieces=st.integers(1, 8))
def test_coarse_increments_are_sums_of_fine_ones(seed: int, pieces: int) -> None:
    y, times = torch.zeros(3, 2), torch.linspace(0.0, 2.0, 4 * pieces + 1)
    fine = increments(fs.Brownian(seed, times), times.tolist(), y)
    coarse = increments(fs.Brownian(seed, times), times[::4].tolist(), y)
    for n in range(pieces):
        total = sum(fine(4 * n + i) for i in range(4))
        assert torch.allclose(coarse(n), total, atol=1e-14)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 9))
def test_a_path_run_back_takes_back_its_increments(seed: int, steps: int) -> None:
    y = torch.zeros(3, 2)
    for grid in ([n / steps for n in range(steps + 1)], [n**2 / steps for n in range(steps + 1)]):
        up = increments(fs.Brownian(seed), grid, y)
        down = increments(fs.Brownian(seed), grid[::-1], y)
        for n in range(steps):
            assert torch.equal(down(steps - 1 - n), -up(n))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, y = torch.linspace(0.0, 1.0, 12).tolist(), torch.zeros(5, 3)
    whole = increments(fs.Brownian(1), grid, y)
    monkeypatch.setattr("flowsde.paths.brownian._CHUNK", 30)
    parts = increments(fs.Brownian(1), grid, y)
    for n in (0, 10, 3, 4, 5, 10, 0):
        assert torch.equal(whole(n), parts(n))


def test_streams_of_one_seed_are_apart() -> None:
    draws = [
        _random.normal(_random.keys(5, 400, DEVICE, s), torch.arange(5), 10, torch.float64)
        for s in (_random.BROWNIAN, _random.PROBE, _random.BASE)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((draws[a] * draws[b]).mean())) < 5 / math.sqrt(20_000)


def test_a_generator_is_consumed_once_and_decides() -> None:
    sde, y = fs.LinearSDE(fs.paths.VP()), torch.zeros(4, 2)

    def run(g: torch.Generator) -> Tensor:
        return fs.solve(
            sde, y, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=5), generator=g
        ).y1

    assert torch.equal(run(generator(1)), run(generator(1)))
    g = generator(1)
    assert not torch.equal(run(g), run(g))


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
