"""Estimates of the error at the end: of the method's order, and near the true one."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import models
from flowsde.accuracy import log_prob_with_error, solve_with_error
from flowsde.integrators import (
    DDIM,
    RK4,
    SEEDS,
    Dopri8,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    ExponentialEuler,
    Heun,
    Integrator,
    UniPC,
)
from flowsde.models import Dequantize
from flowsde.paths import EDM, VP, karras, uniform_lambda

from .systems import Mixture, generator, slope

MIXTURE = Mixture.two()
METHODS: list[tuple[Integrator, int]] = [
    (DDIM(), 1), (DPMSolverPP(3, start=2), 3), (UniPC(), 3), (RK4(), 4),
]  # fmt: skip


@functools.cache
def starts(schedule: fs.Schedule, t0: float, t1: float) -> tuple[fs.Dynamics, Tensor, Tensor]:
    """The mixture's flow, noises, and where they end."""
    flow = fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))
    x = schedule.sigma(t0) * torch.randn(20, 2, generator=generator())
    tight = fs.Adaptive(1e-10, 1e-10)
    return flow, x, fs.solve(flow, x, t0, t1, integrator=Dopri8(), stepping=tight).y1


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


@torch.no_grad()
@pytest.mark.parametrize(("method", "order"), METHODS, ids=str)
def test_estimates_fall_at_the_order(method: Integrator, order: int) -> None:
    schedule, span, counts = VP(), (0.6, 0.3), [32, 64]
    (flow, x, truth), found = starts(schedule, *span), []
    for n in counts:
        grid = fs.Grid(uniform_lambda(schedule, *span, n))
        sol, error = solve_with_error(flow, x, *span, integrator=method, stepping=grid)
        found.append(float(error.median()))
    assert abs(slope(found, counts) - order) < 0.5, found
    assert 0.7 < found[-1] / float(rms(sol.y1 - truth).median()) < 1.5


@torch.no_grad()
@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=str)
def test_estimates_tell_the_error_of_samples(method: Integrator) -> None:
    """All the way from noise to data: of nine samples in ten to a factor of four."""
    schedule, span = EDM(20.0), (20.0, 0.02)
    flow, x, truth = starts(schedule, *span)
    sol, error = solve_with_error(
        flow, x, *span, integrator=method, stepping=fs.Grid(karras(schedule, *span, 32))
    )  # fmt: skip
    true = rms(sol.y1 - truth)
    assert 0.5 < float((error / true).median()) < 2.0
    assert float(((error / true).log2().abs() < 2.0).double().mean()) > 0.9


def test_it_is_solve_for_half_as_many_evaluations_again() -> None:
    flow, x, _ = starts(VP(), 0.6, 0.3)
    keywords: dict[str, Any] = {"integrator": DPMSolverPP(), "stepping": fs.Fixed(steps=8)}
    plain = fs.solve(flow, x, 0.6, 0.3, **keywords)
    sol, error = solve_with_error(flow, x, 0.6, 0.3, **keywords)
    assert torch.equal(sol.y1, plain.y1)
    assert (plain.stats.evaluations, sol.stats.evaluations) == (8, 12)
    assert error.shape == (len(x),)


@torch.no_grad()
@pytest.mark.parametrize("method", [EulerMaruyama(), ExponentialEuler()], ids=str)
def test_errors_of_paths(method: Integrator) -> None:
    """With noise, beside a fine solve on the same path; from a generator too."""
    schedule, x = VP(), torch.randn(40, 2)
    sde = fs.LinearSDE(schedule).reverse_sde(MIXTURE.denoiser(schedule))
    times = torch.linspace(0.9, 0.1, 20 * 8 + 1)
    path, keywords = fs.Brownian(1, times), {"integrator": method}
    truth = fs.solve(sde, x, 0.9, 0.1, path=path, stepping=fs.Grid(times), **keywords).y1
    sol, error = solve_with_error(
        sde, x, 0.9, 0.1, path=path, stepping=fs.Grid(times[::8]), **keywords
    )  # fmt: skip
    assert 1 / 3 < float(rms(error) / rms(rms(sol.y1 - truth))) < 3.0
    drawn, again = (
        solve_with_error(sde, x, 0.9, 0.1, stepping=fs.Fixed(steps=20), **more, **keywords)
        for more in ({"generator": generator(2)}, {"path": fs.Brownian(3)})
    )
    assert 0.5 < float(rms(drawn[1]) / rms(again[1])) < 2.0


def test_probes_are_those_of_one_solve() -> None:
    density = fs.log_density(fs.ODE(lambda t, y: torch.sin(y)), fs.Hutchinson())
    start = torch.randn(5, 2), torch.zeros(5)
    errors = [
        solve_with_error(
            density, start, integrator=RK4(), stepping=fs.Fixed(steps=n), generator=generator()
        )[1]
        for n in (4, 8)
    ]
    assert bool((errors[1] < errors[0] / 6).all())


def test_what_cannot_be_told() -> None:
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2, 1)
    sde = fs.LinearSDE(VP()).reverse_sde(lambda t, x: x)
    two: dict[str, Any] = {"stepping": fs.Fixed(steps=2)}
    for start, keywords, kind, cure in (
        (y0, {"stepping": fs.Adaptive()}, TypeError, "Fixed or Grid"),
        (y0, {"stepping": fs.Fixed(steps=3)}, ValueError, "even number"),
        (y0[0, 0], two, TypeError, "batch-first"),
    ):  # fmt: skip
        with pytest.raises(kind, match=cure):
            solve_with_error(ode, start, integrator=Heun(), **keywords)
    with pytest.raises(TypeError, match="beside its path"):
        solve_with_error(sde, y0, 0.9, 0.1, integrator=SEEDS(2), path=fs.Brownian(0), **two)
    with pytest.raises(TypeError, match="randomness"):
        solve_with_error(sde, y0, 0.9, 0.1, integrator=EulerMaruyama(), **two)
    steep = fs.ODE(lambda t, y: torch.where(y < -1.0, -torch.inf, -6.0 * y))
    _, error = solve_with_error(
        steep, torch.tensor([[1.0], [0.1]]), integrator=Euler(), stepping=fs.Fixed(steps=4)
    )  # fmt: skip
    assert error.isinf().tolist() == [True, False]


@torch.no_grad()
def test_errors_of_estimated_likelihoods() -> None:
    """Off by so much, over probes: of many samples the mean square of error / estimate is 1 within
    a tenth (a t law's of 15 degrees of freedom is 15/13). Nothing random, no error.
    """
    flow, base = fs.LinearSDE(VP()).probability_flow(MIXTURE.denoiser(VP())), fs.Normal(2)
    solver, x = fs.Solver(DPMSolverPP(), fs.Fixed(steps=8)), MIXTURE.sample(1500, 1)
    exact = fs.Flow(base, flow, solver, t0=1e-2)
    noisy = fs.Flow(base, flow, solver, divergence=fs.Hutchinson(), t0=1e-2)
    truth, none = log_prob_with_error(exact, x, draws=2, generator=generator(0))
    assert not none.any()
    mean, error = log_prob_with_error(noisy, x, draws=16, generator=generator(1))
    assert mean.shape == error.shape == (1500,)
    ratio = float(((mean - truth) / error).square().mean())
    assert abs(ratio - 15.0 / 13.0) < 0.2
    with pytest.raises(ValueError, match="two draws"):
        log_prob_with_error(noisy, x, draws=1, generator=generator(0))


@torch.no_grad()
def test_errors_over_dequantisation() -> None:
    """The mean over u of the density of v + u is known: off by the error that is told."""
    v = torch.randint(0, 4, (1500, 1), generator=generator(0)).double()
    flow = fs.Flow(fs.Normal(1), models.Standardize(1), transform=Dequantize(4))
    mean, error = log_prob_with_error(flow, v, draws=16, generator=generator(1))
    square = ((v + 1.0) ** 3 - v**3)[:, 0] / 3.0 / 16.0  # the mean of ((v + u) / 4)^2
    truth = -0.5 * square - 0.5 * math.log(2.0 * math.pi) - math.log(4.0)
    assert abs(float(((mean - truth) / error).square().mean()) - 15.0 / 13.0) < 0.2


def test_errors_are_not_told_across_events() -> None:
    with pytest.raises(TypeError, match="leave out events"):
        solve_with_error(
            fs.ODE(lambda t, y: -y), torch.ones(2, 1), 0.0, 1.0, integrator=RK4(),
            stepping=fs.Fixed(steps=20), events=fs.Event(lambda t, y: y.mean() - 0.9),
        )  # fmt: skip
