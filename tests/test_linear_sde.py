"""SDEs with a linear part, which exponential integrators solve exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    DPMSolverPP,
    EulerMaruyama,
    ExponentialEuler,
    Increment,
    Integrator,
    StochasticHeun,
)  # fmt: skip

from .systems import slope

LEVEL, SIGMA = 0.4, 0.7


def ornstein_uhlenbeck(rate: float | Tensor) -> fs.SDE:
    """dy = (rate y + LEVEL) dt + SIGMA dW."""
    return fs.SDE(
        lambda t, y: torch.full_like(y, LEVEL), lambda t, y: SIGMA, noise="diagonal",
        additive=True, linear=rate, batched_time=True,
    )  # fmt: skip


def moments(rate: float, t: float) -> tuple[float, float, float]:
    """Growth, mean from zero, and variance of that process after t."""
    growth = math.exp(rate * t)
    mean = LEVEL * (math.expm1(rate * t) / rate if rate else t)
    return growth, mean, SIGMA**2 * (math.expm1(2 * rate * t) / (2 * rate) if rate else t)


@pytest.mark.parametrize("rate", [-200.0, -3.0, 0.0, 0.8])
@pytest.mark.parametrize("method", [ExponentialEuler(), DPMSolverPP()], ids=str)
def test_an_ornstein_uhlenbeck_process_is_exact_in_law(method: Integrator, rate: float) -> None:
    """A step is affine in the state and in W: its law is read off, and is that of the process."""
    h = 0.3
    y, w = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    for dynamics in (ornstein_uhlenbeck(rate), ornstein_uhlenbeck(torch.tensor([rate]))):
        field = Field(dynamics, (), y)
        y1 = method.step(field, 0.0, h, y, Increment(w), method.init(field, 0.0, y)).y1[:, 0]
        growth, mean, variance = moments(rate, h)
        assert float(y1[1] - y1[0]) == pytest.approx(growth, rel=1e-12, abs=1e-15)
        assert float(y1[0]) == pytest.approx(mean, rel=1e-12)
        assert float((y1[2] - y1[0]) ** 2 * h) == pytest.approx(variance, rel=1e-12)


def test_samples_have_the_law_too() -> None:
    """One step for each sample's own span, against five standard errors."""
    count, spans = 40_000, torch.tensor([0.2, 1.5])
    y1 = fs.solve(
        ornstein_uhlenbeck(-3.0), torch.full((count, 1), 1.3), 0.0, spans.repeat(count // 2),
        integrator=ExponentialEuler(), stepping=fs.Fixed(steps=1), path=fs.Brownian(0),
    ).y1  # fmt: skip
    for i, t in enumerate(spans.tolist()):
        growth, mean, variance = moments(-3.0, t)
        part = y1[i::2, 0]
        error = 5 * math.sqrt(variance / len(part))
        assert float(part.mean()) == pytest.approx(growth * 1.3 + mean, abs=error)
        assert float(part.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / len(part)))


def test_a_rate_for_each_component() -> None:
    rates = torch.tensor([-2.0, 0.0, 0.5])
    y, w = torch.randn(4, 3), torch.randn(4, 3)

    def step(rate: float | Tensor, y: Tensor, w: Tensor) -> Tensor:
        field = Field(ornstein_uhlenbeck(rate), (), y)
        return ExponentialEuler().step(field, 0.0, 0.5, y, Increment(w), None).y1

    whole = step(rates, y, w)
    for i, rate in enumerate(rates.tolist()):
        assert torch.allclose(whole[:, i : i + 1], step(rate, y[:, i : i + 1], w[:, i : i + 1]))


@pytest.mark.parametrize("additive", [True, False])
def test_strong_order_where_more_is_not_linear(additive: bool) -> None:
    """1 for additive noise, 1/2 else; the slope's own standard error below 0.05."""
    count, groups, steps, fine = 1000, 10, [8, 16, 32, 64], 1024
    sde = fs.SDE(
        lambda t, y: (y + t).cos(), lambda t, y: 0.5 if additive else 0.8 * (2.0 * y).sin(),
        noise="diagonal", additive=additive, linear=-1.0,
    )  # fmt: skip
    path = fs.Brownian(1, torch.linspace(0.0, 1.0, fine + 1))

    def run(method: Integrator, n: int) -> Tensor:
        stepping, y0 = fs.Fixed(steps=n), torch.ones(count, 1)
        return fs.solve(sde, y0, integrator=method, stepping=stepping, path=path).y1

    truth = run(StochasticHeun() if additive else EulerMaruyama(), fine)
    gaps = torch.stack([(run(ExponentialEuler(), n) - truth).square() for n in steps])
    parts = gaps.reshape(len(steps), groups, -1).mean(2)
    slopes = torch.tensor([slope(column.tolist(), steps) / 2 for column in parts.T])
    assert float(slopes.std()) / math.sqrt(groups) < 0.05
    declared = 1.0 if additive else 0.5
    assert abs(slope(gaps.mean((1, 2)).tolist(), steps) / 2 - declared) < 0.15


def test_other_methods_see_the_sum() -> None:
    """The drift with the linear part in its own slot is the drift with it inside."""
    inside = fs.SDE(lambda t, y: LEVEL - 3.0 * y, lambda t, y: SIGMA, noise="diagonal")
    ends = [
        fs.solve(
            sde, torch.ones(5, 2), integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4),
            path=fs.Brownian(0),
        ).y1
        for sde in (ornstein_uhlenbeck(-3.0), inside)
    ]  # fmt: skip
    assert torch.allclose(*ends)


def test_gradients_reach_the_rate() -> None:
    rate = torch.nn.Parameter(torch.tensor(-1.2))
    sde = fs.SDE(lambda t, y: y.sin(), lambda t, y: 0.3 * y, noise="diagonal", linear=rate)
    assert list(sde.parameters()) == [rate]

    def end(value: Tensor) -> Tensor:
        with torch.no_grad():
            rate.copy_(value)
        return fs.solve(
            sde, torch.ones(3, 1), integrator=ExponentialEuler(), stepping=fs.Fixed(steps=3),
            path=fs.Brownian(2),
        ).y1.sum()  # fmt: skip

    end(torch.tensor(-1.2)).backward()
    assert rate.grad is not None
    with torch.no_grad():
        difference = (end(torch.tensor(-1.2 + 1e-6)) - end(torch.tensor(-1.2 - 1e-6))) / 2e-6
    assert float(rate.grad) == pytest.approx(float(difference), rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="real"):
        ornstein_uhlenbeck(torch.tensor(1j))
    sde = fs.SDE(lambda t, y: y, lambda t, y: y, noise="diagonal", stratonovich=True, linear=-1.0)
    with pytest.raises(TypeError, match="as Ito does"):
        fs.solve(
            sde, torch.ones(2, 1), integrator=ExponentialEuler(), stepping=fs.Fixed(steps=2),
            path=fs.Brownian(0),
        )  # fmt: skip
