"""Simulated bridges, against Brownian motion, Ornstein-Uhlenbeck and known transition densities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import EulerMaruyama, StochasticHeun

T1, SIZE = 1.5, 0.7


def linear(rate: float, level: float) -> fs.SDE:
    return fs.SDE(
        lambda t, y: rate * (y - level), lambda t, y: torch.full_like(y, SIZE), noise="diagonal",
        additive=True,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, -1.3, 0.6])
def test_bridges_of_linear_processes_are_exact(rate: float) -> None:
    """Means and variances at three times, within four standard errors of 4000 paths."""
    level, y0, end, count = 0.3, -0.5, 1.1, 4000
    made = fs.bridge(linear(rate, level), torch.tensor([end]), T1, rate=rate, level=level)
    times = torch.tensor([0.3, 0.8, 1.2])
    found = fs.solve(
        made, made.enter(torch.full((count, 1), y0)), 0.0, 1.2, integrator=StochasticHeun(),
        stepping=fs.Fixed(steps=32), save_at=times, path=fs.Brownian(2),
    )  # fmt: skip
    ys, weights = made.leave(found.ys)
    assert float(weights.abs().max()) < 1e-12

    def s(x: float) -> float:
        return math.sinh(rate * x) / rate if rate else x

    for t, y in zip(times.tolist(), ys[..., 0], strict=True):
        part = s(T1 - t) / s(T1)
        mean = level + part * (y0 - level) + s(t) / s(T1) * (end - level)
        variance = SIZE**2 * s(t) * part
        assert abs(float(y.mean()) - mean) < 4 * math.sqrt(variance / count)
        assert abs(float(y.var()) / variance - 1.0) < 4 * math.sqrt(2.0 / count)


@pytest.mark.parametrize("rate", [0.0, -1.3, 0.6])
def test_the_auxiliary_density_is_the_processes_own(rate: float) -> None:
    end, y0, t = torch.tensor([1.1, -0.2]), torch.randn(5, 2), 0.4
    made = fs.bridge(linear(rate, 0.3), end, T1, rate=rate, level=0.3)
    left = T1 - t
    mean = 0.3 + math.exp(rate * left) * (y0 - 0.3)
    growth = math.expm1(2 * rate * left) / (2 * rate) if rate else left
    law = torch.distributions.Normal(mean, SIZE * math.sqrt(growth))
    assert torch.allclose(made.log_prob(t, y0), law.log_prob(end).sum(-1))
    assert torch.allclose(made.log_prob(torch.tensor(t), y0), law.log_prob(end).sum(-1))


def ratio(made: Any, y0: float, steps: int) -> Tensor:
    z0 = made.enter(torch.full((3000, 1), y0))
    end = fs.solve(
        made, z0, 0.0, made.t1, integrator=EulerMaruyama(),
        stepping=fs.Grid(made.times(0.0, steps)), path=fs.Brownian(5),
    ).y1  # fmt: skip
    y, weight = made.leave(end)
    assert float((y - made.end).std()) < 3.0 / steps  # all arrive
    return (weight + made.log_prob(0.0, z0[:, :1])).exp()


def test_weights_give_the_transition_density_of_a_nonlinear_drift() -> None:
    """dy = tanh(y) dt + dW: p = N(v - u; 0, t) cosh(v) / cosh(u) e^(-t/2)."""
    u, v = 0.2, 1.0
    sde = fs.SDE(
        lambda t, y: torch.tanh(y), lambda t, y: torch.ones_like(y), noise="diagonal", additive=True
    )
    truth = math.exp(-((v - u) ** 2) / 2 - 0.5) / math.sqrt(2 * math.pi)
    truth *= math.cosh(v) / math.cosh(u)
    for rate in (0.0, 0.5):
        found = ratio(fs.bridge(sde, torch.tensor([v]), 1.0, rate=rate), u, 100)
        error = float(found.std()) / math.sqrt(len(found))
        assert error < 0.02 * truth
        assert abs(float(found.mean()) - truth) < 4 * error


def test_weights_give_the_transition_density_of_multiplicative_noise() -> None:
    """dy = a y dt + b y dW: log-normal."""
    a, b, u, v = 0.3, 0.4, 1.0, 1.3
    sde = fs.SDE(lambda t, y: a * y, lambda t, y: b * y, noise="diagonal")
    law = torch.distributions.LogNormal(math.log(u) + a - b * b / 2, b)
    truth = float(law.log_prob(torch.tensor(v)).exp())
    found = ratio(fs.bridge(sde, torch.tensor([v]), 1.0), u, 200)
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.03 * truth
    assert abs(float(found.mean()) - truth) < 4 * error


def test_what_does_not_fit_is_refused_with_the_cure() -> None:
    end = torch.zeros(2)
    scalar = fs.SDE(lambda t, y: y, lambda t, y: y, noise="scalar")
    read = fs.SDE(lambda t, y: y, lambda t, y: y, noise="diagonal", stratonovich=True)
    for sde in (scalar, read):
        with pytest.raises(TypeError, match="diagonal"):
            fs.bridge(sde, end, 1.0)
    fs.bridge(fs.to_ito(read), end, 1.0)
    made = fs.bridge(linear(0.0, 0.0), end, 1.0)
    with pytest.raises(ValueError, match="ends at"):
        fs.solve(
            made, torch.zeros(1, 3), 0.0, 2.0, integrator=EulerMaruyama(),
            stepping=fs.Fixed(steps=2), path=fs.Brownian(0),
        )  # fmt: skip


def test_a_level_moves_with_its_bridge() -> None:
    sde = fs.SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y), noise="diagonal")
    made = fs.bridge(sde, torch.zeros(2), 1.0, rate=-1.0, level=torch.zeros(2)).to("meta")
    assert made.level.device == made.end.device == torch.device("meta")
