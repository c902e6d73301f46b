"""Schedules, grids and controls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import paths
from flowsde.dynamics import EDMPrediction, NoisePrediction, Prediction, Score
from flowsde.dynamics.denoiser import Point
from flowsde.integrators import Tsit5
from flowsde.paths import Linear, Schedule, karras, uniform, uniform_lambda

from .systems import SCHEDULES, catalogue


def test_every_schedule_is_tested() -> None:
    assert {type(s) for s in catalogue(paths, Schedule)} == {type(s) for s in SCHEDULES}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@given(part=st.floats(0.01, 0.98))
def test_schedules(schedule: Schedule, part: float) -> None:
    """Floats and tensors agree; rates are derivatives; the inverse inverts."""
    t = part * schedule.horizon
    wide = torch.tensor([t], requires_grad=True)
    for name in ("alpha", "sigma", "dalpha", "dsigma", "half_log_snr", "diffusion"):
        function = getattr(schedule, name)
        assert isinstance(function(t), float)
        assert float(function(wide).detach()) == pytest.approx(function(t), rel=1e-12, abs=1e-14)
    for name in ("alpha", "sigma"):
        (rate,) = torch.autograd.grad(getattr(schedule, name)(wide), wide, allow_unused=True)
        found = getattr(schedule, "d" + name)(t)
        assert found == pytest.approx(float(rate), rel=1e-9, abs=1e-12)
    lam = schedule.half_log_snr(t)
    assert schedule.time(lam) == pytest.approx(t, rel=1e-8)
    assert float(schedule.time(torch.tensor(lam))) == pytest.approx(t, rel=1e-8)
    alpha, sigma = schedule(t)
    assert lam == pytest.approx(math.log(alpha / sigma), rel=1e-9, abs=1e-9)
    squared = 2 * sigma**2 * (schedule.dsigma(t) / sigma - schedule.dalpha(t) / alpha)
    assert schedule.diffusion(t) ** 2 == pytest.approx(squared, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_noise_grows_and_ends_are_named(schedule: Schedule) -> None:
    times = torch.linspace(0.0, schedule.horizon, 200)
    lam = schedule.half_log_snr(times)
    assert bool((lam.diff() < 0).all())
    assert math.isfinite(float(schedule.diffusion(0.0)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@given(steps=st.integers(1, 60), up=st.booleans())
def test_grids(schedule: Schedule, steps: int, up: bool) -> None:
    ends = (0.01, 0.9 * schedule.horizon)
    t0, t1 = ends if up else ends[::-1]
    for grid in (
        uniform(t0, t1, steps), uniform_lambda(schedule, t0, t1, steps),
        karras(schedule, t0, t1, steps),
    ):  # fmt: skip
        assert len(grid) == steps + 1
        assert (float(grid[0]), float(grid[-1])) == (t0, t1)
        assert bool(((grid.diff() > 0) if up else (grid.diff() < 0)).all())
    lam = schedule.half_log_snr(uniform_lambda(schedule, t0, t1, steps))
    assert torch.allclose(lam.diff(), lam.diff().mean(), rtol=1e-6)


def test_karras_is_the_papers() -> None:
    """Equation 5 of Karras et al. 2022 at sigma = t."""
    i, n = torch.arange(18), 18
    paper = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(karras(paths.EDM(), 80.0, 0.002, n - 1), paper)


def predictions() -> list[Prediction]:
    from flowsde import dynamics

    made = catalogue(dynamics, Prediction)
    return [*made, EDMPrediction(torch.tensor([0.3, 0.9]))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@given(part=st.floats(0.05, 0.95), seed=st.integers(0, 100))
def test_parametrizations_round_trip(schedule: Schedule, part: float, seed: int) -> None:
    torch.manual_seed(seed)
    x0, eps = torch.randn(3, 2), torch.randn(3, 2)
    t = torch.tensor(part * schedule.horizon)
    at = Point.at(schedule, t, x0)
    x = at.alpha * x0 + at.sigma * eps
    velocity = at.dalpha * x0 + at.dsigma * eps
    for prediction in predictions():
        output = prediction.target(at, x0, eps)
        scale = 1e-9 * (1 + float(at.sigma / at.alpha) ** 2)
        assert torch.allclose(prediction.data(at, x, output), x0, atol=scale)
        assert torch.allclose(prediction.eps(at, x, output), eps, atol=1e-8)
        assert torch.allclose(prediction.velocity(at, x, output), velocity, atol=1e-7, rtol=1e-7)


def test_limits_where_noise_or_signal_is_gone() -> None:
    schedule, x = paths.FlowMatching(), torch.randn(4, 2)
    for prediction in predictions():
        for t, gone in ((0.0, False), (1.0, True)):
            at = Point.at(schedule, torch.tensor(t), x)
            if gone and prediction.needs_signal:
                continue
            network = torch.zeros_like(x)
            assert bool(torch.isfinite(prediction.data(at, x, network)).all()), prediction
    assert {type(p) for p in predictions() if p.needs_signal} == {
        NoisePrediction, Score, EDMPrediction,
    }  # fmt: skip


def test_preconditioned_gaussian_is_exact() -> None:
    """A network that says nothing leaves the posterior mean of a Gaussian."""
    spread = torch.tensor([0.3, 1.7])
    denoiser = fs.Denoiser(lambda t, x: torch.zeros_like(x), paths.VP(), EDMPrediction(spread))
    t, x = torch.tensor([0.2, 0.6, 0.9]), torch.randn(3, 2)
    alpha, sigma = (v[:, None] for v in paths.VP()(t))
    exact = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x
    assert torch.allclose(denoiser(t, x), exact)
    score = -x / (alpha**2 * spread**2 + sigma**2)
    assert torch.allclose(denoiser.score(t, x), score)
    assert torch.allclose(denoiser.noise(t, x), -sigma * score)


# --- controls -------------------------------------------------------------------------------------


def linear_field(a: Tensor) -> Any:
    return lambda t, y: torch.einsum("ijc,bj->bic", a, y)


def test_a_cde_with_a_linear_field_is_a_product_of_exponentials() -> None:
    times = torch.tensor([0.0, 0.4, 1.0, 1.5])
    values, a, y0 = torch.randn(3, 4, 2), 0.5 * torch.randn(2, 2, 2), torch.randn(3, 2)
    path = Linear(times, values)
    sol = fs.solve(
        fs.CDE(linear_field(a), path, batched_time=True), y0, 0.0, 1.5,
        stepping=fs.Adaptive(1e-10, 1e-10), integrator=Tsit5(),
    )  # fmt: skip
    expected = y0
    for jump in values.diff(dim=1).unbind(1):
        move = torch.linalg.matrix_exp(torch.einsum("ijc,bc->bij", a, jump))
        expected = torch.einsum("bij,bj->bi", move, expected)
    assert torch.allclose(sol.y1, expected, atol=1e-7)
    assert torch.equal(path.knots, times)
    assert torch.allclose(path.evaluate(torch.tensor(0.4)), values[:, 1])


def test_a_cde_does_not_feel_the_clock() -> None:
    """Re-timing the path leaves the end where it was."""
    values, a, y0 = torch.randn(3, 4, 2), 0.5 * torch.randn(2, 2, 2), torch.randn(3, 2)
    ends = []
    for times in (torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0.2, 2.5, 3.0])):
        cde = fs.CDE(linear_field(a), Linear(times, values))
        ends.append(fs.solve(cde, y0, 0.0, 3.0, stepping=fs.Adaptive(1e-10, 1e-10)).y1)
    assert torch.allclose(ends[0], ends[1], atol=1e-7)


def test_torchcdes_paths_are_accepted() -> None:
    import torchcde

    times = torch.linspace(0.0, 1.0, 5)
    values, a, y0 = torch.randn(3, 5, 2), 0.5 * torch.randn(2, 2, 2), torch.randn(3, 2)
    theirs = torchcde.LinearInterpolation(values, t=times)
    ends = [
        fs.solve(fs.CDE(linear_field(a), p), y0, stepping=fs.Adaptive(1e-9, 1e-9)).y1
        for p in (theirs, Linear(times, values))
    ]
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


def test_controls_refuse_wrong_data() -> None:
    with pytest.raises(ValueError, match="increasing"):
        Linear(torch.tensor([0.0, 0.0]), torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="values"):
        Linear(torch.tensor([0.0, 1.0]), torch.zeros(1, 3, 1))
    path = Linear(torch.tensor([0.0, 1.0]), torch.zeros(1, 2, 2))
    with pytest.raises(TypeError, match="channels"):
        fs.solve(fs.CDE(lambda t, y: y, path), torch.ones(1, 2))
