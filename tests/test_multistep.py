"""Adams methods, on the steps that the others fail on: uneven ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde.dynamics.field import Field
from flowsde.integrators import Adams, Dopri5, Tsit5

from .systems import slope

METHODS = [Adams(k) for k in (3, 4, 5, 8)]


def swing(t: Tensor, y: Tensor) -> Tensor:
    return 0.8 * (1.0 + y.square()) * t.cos()


def swung(t: float) -> Tensor:
    return torch.tan(torch.tensor([0.1, -0.2, 0.3]) + 0.8 * math.sin(t))


def uneven(n: int, seed: int, t0: float, t1: float) -> Tensor:
    """Steps whose neighbours differ up to ninefold: eight random ones, over and over."""
    jumps = 0.2 + 1.6 * torch.rand(8, generator=torch.Generator("cpu").manual_seed(seed))
    jumps = jumps.repeat(n // 8 + 1)[:n]
    way = torch.cat((torch.zeros(1), jumps.cumsum(0) / jumps.sum()))
    way[-1] = 1.0
    return t0 + (t1 - t0) * way


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_order_on_a_random_grid(method: Adams, backward: bool) -> None:
    """From the first step: the start is not of lower order. Mean over grids, at all their times."""
    t0, t1 = (1.2, -0.4) if backward else (-0.4, 1.2)
    counts, errors = [48, 64, 96] if method.order == 8 else [32, 64, 128], []
    for n in counts:
        total = 0.0
        for seed in range(4):
            sol = fs.solve(
                fs.ODE(swing), swung(t0), t0, t1, integrator=method, save_at=fs.Steps(),
                stepping=fs.Grid(uneven(n, seed, t0, t1)),
            )  # fmt: skip
            assert sol.ts is not None
            exact = torch.stack([swung(t) for t in sol.ts.tolist()])
            total += float((sol.ys - exact).abs().max())
        errors.append(total)
    assert abs(slope(errors, counts) - method.order) < 0.35, errors


def test_torchdiffeq_is_not_of_fourth_order_there() -> None:
    """What this is measured against, so that the law above is known to be able to fail."""
    from torchdiffeq import odeint

    counts, errors = [24, 48, 96], []
    for n in counts:
        grid = uneven(n, 0, 0.3, 1.9)
        found = odeint(swing, swung(0.3), grid, method="explicit_adams", options={"max_order": 4})
        errors.append(float((found[-1] - swung(1.9)).abs().max()))
    assert slope(errors, counts) < 2.5, errors


@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), t0=st.floats(-2.0, 2.0), length=st.floats(-2.0, 2.0))
def test_polynomials_are_integrated_exactly(
    method: Adams, seed: int, t0: float, length: float
) -> None:
    """dy/dt of degree k - 1: the steps and what lies between them are exact, on any grid."""
    length = math.copysign(max(abs(length), 0.1), length)
    coefficients = torch.randn(method.order, generator=torch.Generator("cpu").manual_seed(seed))

    def exact(t: float) -> float:
        return sum(float(c) * t ** (n + 1) / (n + 1) for n, c in enumerate(coefficients))

    grid = uneven(10, seed, t0, t0 + length)
    sol = fs.solve(
        fs.ODE(lambda t, y: sum(c * t**n for n, c in enumerate(coefficients)) + 0.0 * y),
        torch.zeros(2), t0, t0 + length, integrator=method, dense=True,
        stepping=fs.Grid(grid),
    )  # fmt: skip
    for way in (0.0, 0.3, 0.9):  # of the steps that are its own
        for t in (grid[:-1] + way * grid.diff())[method.order - 2 :].tolist():
            assert float(sol(t)[0]) == pytest.approx(exact(t) - exact(t0), abs=1e-10)
    assert float(sol.y1[0]) == pytest.approx(exact(t0 + length) - exact(t0), abs=1e-10)


@pytest.mark.parametrize("method", [Adams(4), Adams(5)], ids=str)
def test_the_error_estimate_is_the_local_error(method: Adams) -> None:
    """Of the corrector one order lower: their ratio tends to one on uneven times. On a quadrature,
    where what was predicted does not matter."""
    exact = lambda t: torch.tensor([math.sin(3.0 * t) / 3.0])
    scale = torch.tensor([0.0, -0.7, -1.1, -2.0, -2.3, -3.5, -4.0])[: method.order - 1]
    ratios = []
    for h in (0.04, 0.02, 0.01):
        times = (0.5 + h * scale).tolist()
        field = Field(fs.ODE(lambda t, y: (3.0 * t).cos() + 0.0 * y), (), exact(0.5))
        slopes = tuple(torch.tensor([math.cos(3.0 * t)]) for t in times)
        step, lower = (
            m.step(field, 0.5, 0.5 + h, exact(0.5), None, (tuple(times[:k]), slopes[:k]))
            for m, k in ((method, method.order - 1), (Adams(method.order - 1), method.order - 2))
        )
        ratios.append(float((step.error() / (exact(0.5 + h) - lower.y1)).mean()))
    assert abs(ratios[2] - 1.0) < 0.25, ratios
    assert abs(ratios[2] - 1.0) < 0.7 * abs(ratios[0] - 1.0), ratios


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_adaptive_errors_follow_the_tolerance(method: Adams) -> None:
    """Through a sharp turn, where attempts are rejected and the history must not notice."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return 20.0 / (1.0 + (20.0 * (t - 1.0)) ** 2) + 0.0 * y

    exact = 2.0 * math.atan(20.0)
    errors = []
    for tolerance in (1e-4, 1e-7):
        sol = fs.solve(fs.ODE(f), torch.zeros(2), 0.0, 2.0, integrator=method,
                       stepping=fs.Adaptive(0.0, tolerance))  # fmt: skip
        errors.append(float((sol.y1 - exact).abs().max()))
        assert sol.stats.rejected > 0
        assert errors[-1] < 100 * tolerance
    assert errors[1] < errors[0] / 20


def test_a_rejected_attempt_leaves_no_trace() -> None:
    """The accepted grid, taken verbatim, gives the same bits."""
    keywords: dict[str, Any] = {"integrator": Adams(), "save_at": fs.Steps()}
    ode = fs.ODE(lambda t, y: -80.0 * (t - 1.0) / (0.01 + (t - 1.0) ** 2) * y * 0.05)
    sol = fs.solve(ode, torch.ones(2), 0.0, 2.0, stepping=fs.Adaptive(1e-6, 1e-6), **keywords)
    assert sol.stats.rejected > 0
    again = fs.solve(ode, torch.ones(2), 0.0, 2.0, stepping=fs.Grid(sol.ts), **keywords)
    assert torch.equal(again.ys, sol.ys)


def test_it_calls_the_field_less_than_runge_kutta_does() -> None:
    """Where the solution is smooth: its reason to be."""
    counts = []
    for method in (Adams(5), Tsit5(), Dopri5()):
        sol = fs.solve(
            fs.ODE(lambda t, y: torch.stack((y[1], -y[0].sin()))), torch.tensor([1.0, 0.0]), 0.0,
            40.0, integrator=method, stepping=fs.Adaptive(1e-7, 1e-7),
        )  # fmt: skip
        counts.append(sol.stats.evaluations)
    assert counts[0] < min(counts[1:]), counts


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
def test_grids_and_states_differentiate(adjoint: fs.Adjoint) -> None:
    y0 = torch.tensor([0.1, -0.3], requires_grad=True)
    inner = uneven(7, 1, 0.0, 1.0)[1:-1].requires_grad_()

    def end(y: Tensor, times: Tensor) -> Tensor:
        g = torch.cat((torch.zeros(1), times, torch.ones(1)))
        return fs.solve(
            fs.ODE(swing), y, 0.0, 1.0, integrator=Adams(4), stepping=fs.Grid(g), adjoint=adjoint
        ).y1

    assert torch.autograd.gradcheck(end, (y0, inner))


def test_what_it_cannot_do_is_refused_at_the_door() -> None:
    calls = []
    ode = fs.ODE(lambda t, y: calls.append(1) or -y, batched_time=True)
    y0 = torch.ones(3, 1)
    for more in (
        {"stepping": fs.Adaptive(per_sample=True)},
        {"stepping": fs.Fixed(steps=5), "t1": torch.rand(3) + 1.0},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="share its time"):
            fs.solve(ode, y0, **{"t0": 0.0, "t1": 1.0, "integrator": Adams(), **more})
    assert not calls
    for order in (2, 9):
        with pytest.raises(ValueError, match="orders 3 to 8"):
            Adams(order)
