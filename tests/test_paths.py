"""Parametrizations and controls."""

from __future__ import annotations

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
from flowsde.paths import Linear, Schedule

from .systems import EVERY_SCHEDULE, catalogue


def predictions() -> list[Prediction]:
    from flowsde import dynamics

    made = catalogue(dynamics, Prediction)
    return [*made, EDMPrediction(torch.tensor([0.3, 0.9]))]


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
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
