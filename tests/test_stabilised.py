"""Runge-Kutta-Chebyshev: few calls of the field where the spectrum is long and real."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import RKC2, Tsit5

from .systems import slope


def growth(method: RKC2, z: float) -> float:
    """R(z) of one step, through the step itself."""
    sol = fs.solve(fs.ODE(lambda t, y: z * y), torch.ones(1), integrator=method,
                   stepping=fs.Fixed(steps=1))  # fmt: skip
    return float(sol.y1)


@pytest.mark.parametrize("stages", [2, 3, 5, 10, 20])
def test_the_real_stability_interval(stages: int) -> None:
    """|R| <= 1 up to 2/3 (s^2 - 1)(1 - 2/15 2/13), damped inside, and > 1 beyond."""
    method, reach = RKC2(stages), 2 / 3 * (stages**2 - 1) * (1 - 2 / 15 * 2 / 13)
    assert 0.48 * stages**2 < reach < 0.66 * stages**2
    inside = [abs(growth(method, -reach * n / 40)) for n in range(1, 40)]
    assert max(inside) < 1.0
    assert max(inside[len(inside) // 4 :]) < 0.97
    assert abs(growth(method, -(1.5 if stages % 2 else 1.05) * reach)) > 1.0


@pytest.mark.parametrize("stages", [2, 3, 7, 20])
def test_order_for_every_number_of_stages(stages: int) -> None:
    """On a system that knows the time: the nodes matter."""
    counts, errors = [40, 80, 160], []
    for n in counts:
        sol = fs.solve(
            fs.ODE(lambda t, y: 0.8 * (1.0 + y.square()) * t.cos()), torch.tensor([0.1]), 0.0, 1.0,
            integrator=RKC2(stages), stepping=fs.Fixed(steps=n),
        )  # fmt: skip
        errors.append(abs(float(sol.y1) - math.tan(math.atan(0.1) + 0.8 * math.sin(1.0))))
    assert abs(slope(errors, counts) - 2.0) < 0.15, errors


@pytest.mark.parametrize("stages", [2, 5, 20])
def test_the_last_stage_is_of_the_right_moments(stages: int) -> None:
    """R(z) = 1 + z + z^2 / 2 + O(z^3), to rounding."""
    for z in (1e-2, -1e-2):
        assert growth(RKC2(stages), z) == pytest.approx(1.0 + z + z * z / 2, abs=abs(z) ** 3 / 4)


def test_the_heat_equation_costs_less_than_with_tsit5() -> None:
    """u_t = u_xx on 63 inner points: the same answer for a fraction of the calls."""
    dx = 1.0 / 64
    x = torch.arange(1, 64) * dx
    u0 = (math.pi * x).sin() + 0.3 * (5 * math.pi * x).sin()

    def heat(t: Tensor, u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (1, 1))
        return (padded[2:] - 2 * u + padded[:-2]) / dx**2

    def decay(k: int) -> float:
        return math.exp(-0.1 * (2.0 - 2.0 * math.cos(k * math.pi * dx)) / dx**2)

    exact = decay(1) * (math.pi * x).sin() + decay(5) * 0.3 * (5 * math.pi * x).sin()
    counts = []
    for method in (RKC2(20), Tsit5()):
        sol = fs.solve(fs.ODE(heat), u0, 0.0, 0.1, integrator=method,
                       stepping=fs.Adaptive(1e-4, 1e-5))  # fmt: skip
        assert float((sol.y1 - exact).abs().max()) < 1e-3
        counts.append(sol.stats.evaluations)
    assert counts[0] < counts[1] / 2, counts


def test_stages_are_refused_where_there_are_too_few() -> None:
    for stages in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="stages"):
            RKC2(stages)  # type: ignore[arg-type]
