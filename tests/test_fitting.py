"""Fitted solvers: better than where they start, on other noises too, and kept in files."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.fitting import Nonstationary, distill_solver, frontier, optimize_grid
from flowsde.integrators import (
    DDIM,
    RK4,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMHeun,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    UniPC,
)
from flowsde.integrators.exponential import Exponential
from flowsde.paths import EDM, VE, VP, FlowMatching, karras, quadratic, uniform, uniform_lambda

from .systems import Mixture, catalogue, generator

SPANS: dict[fs.Schedule, tuple[float, float]] = {VP(): (1.0, 1e-2), EDM(20.0): (20.0, 0.02)}
SAMPLERS = [
    *(m for m in catalogue(integrators, Exponential) if not isinstance(m, EDMHeun)),
    DPMSolverPP(3, start=2), DPMSolver(3), UniPC(3, start=3), ExponentialAdams(3, dual=True),
]  # fmt: skip


def flow(schedule: fs.Schedule) -> Any:
    return fs.LinearSDE(schedule).probability_flow(Mixture.two().denoiser(schedule))


@functools.cache
def starts(schedule: fs.Schedule, seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """Noises, and where their trajectories end."""
    t0, t1 = SPANS[schedule]
    x = torch.randn(count, 2, generator=generator(seed)) * schedule.sigma(t0)
    with torch.no_grad():
        tight = fs.Adaptive(1e-9, 1e-9)
        end = fs.solve(
            flow(schedule), x, t0, t1, integrator=integrators.Dopri8(), stepping=tight
        ).y1
    return x, end


@torch.no_grad()
def error(schedule: fs.Schedule, method: Any, grid: fs.Grid, seed: int) -> float:
    x, end = starts(schedule, seed)
    y = fs.solve(flow(schedule), x, *SPANS[schedule], integrator=method, stepping=grid).y1
    return float((y - end).square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("schedule", SPANS, ids=str)
@pytest.mark.parametrize("method", SAMPLERS, ids=str)
def test_every_sampler_is_a_table(method: Any, schedule: fs.Schedule) -> None:
    """Not fitted at all, the table takes the integrator's steps, with as many evaluations."""
    (x, _), (t0, t1) = starts(schedule, 0), SPANS[schedule]
    dynamics, grid = flow(schedule), fs.Grid(uniform_lambda(schedule, t0, t1, 5))
    rough = fs.Solver(integrator=method, stepping=grid)
    fitted = distill_solver(dynamics, [fs.Solver(method, grid)], x[:2], fine=rough, iterations=0)
    known = fs.solve(dynamics, x, t0, t1, integrator=method, stepping=grid)
    found = fitted.solver.solve(dynamics, x, t0, t1)
    assert found.stats.evaluations == known.stats.evaluations
    torch.testing.assert_close(found.y1, known.y1, rtol=1e-11, atol=1e-11)


def test_a_fit_starts_where_there_is_no_signal() -> None:
    """At alpha = 0, as those of flow matching do, at times that its clock has no numbers for."""
    schedule = FlowMatching()
    dynamics, x = flow(schedule), torch.randn(64, 2, generator=generator(0))
    other, t1 = torch.randn(64, 2, generator=generator(1)), 1e-2
    starts = [fs.Solver(m, fs.Grid(quadratic(1.0, t1, 4))) for m in (UniPC(), DPMSolverPP())]
    fitted = distill_solver(dynamics, starts, x, iterations=16)
    with torch.no_grad():
        tight = fs.Solver(integrators.Dopri8(), fs.Adaptive(1e-9, 1e-9))
        ends = [s.solve(dynamics, other, 1.0, t1).y1 for s in (tight, fitted.solver, *starts)]
    errors = [float((end - ends[0]).square().mean()) for end in ends[1:]]
    assert errors[0] < 0.25 * min(errors[1:])


@pytest.mark.parametrize("schedule", SPANS, ids=str)
def test_fitting_helps_on_other_noises(schedule: fs.Schedule) -> None:
    (x, _), (t0, t1), steps = starts(schedule, 0), SPANS[schedule], 4
    dynamics, method = flow(schedule), UniPC()
    usual = error(schedule, method, fs.Grid(uniform_lambda(schedule, t0, t1, steps)), 1)
    grid = optimize_grid(dynamics, method, steps, x, t0, t1, iterations=8)
    assert not grid.grid.requires_grad
    better = error(schedule, method, grid, 1)
    assert better < 0.9 * usual
    fitted = distill_solver(dynamics, [fs.Solver(method, grid)], x, iterations=16)
    assert not fitted.table.requires_grad
    assert error(schedule, fitted, fitted.grid, 1) < 0.5 * better


def test_the_cheapest_reaches_its_error_on_other_noises() -> None:
    """And nothing cheaper among all that was tried does."""
    schedule, wanted = EDM(20.0), 0.065
    (x, end), (t0, t1) = starts(schedule, 0, 128), SPANS[schedule]
    methods, counts = [DDIM(), DPMSolverPP(), EDMHeun(), UniPC(3)], range(4, 9)
    grids = [functools.partial(make, schedule, t0, t1) for make in (uniform_lambda, karras)]
    fine = fs.Solver(integrators.Dopri8(), fs.Adaptive(1e-7, 1e-7))
    found = frontier(flow(schedule), methods, counts, x, t0, t1, grids=grids, fine=fine)
    pick = found.cheapest(wanted)
    assert error(schedule, pick.integrator, pick.grid, 1) < wanted
    for method, n, grid in itertools.product(methods, counts, grids):
        cost = 2 * n if isinstance(method, EDMHeun) else n
        if cost < pick.evaluations:
            assert error(schedule, method, fs.Grid(grid(n)), 1) > wanted, (method, n)
    costs, errors = zip(*((t.evaluations, t.error) for t in found.trials), strict=True)
    assert list(costs) == sorted(set(costs))
    assert list(errors) == sorted(set(errors), reverse=True)
    y = pick.solver.solve(flow(schedule), x, t0, t1).y1
    assert float((y - end).square().mean().sqrt()) == pytest.approx(pick.error, rel=1e-4)


def test_a_grid_fits_any_dynamics() -> None:
    """A pulse: the steps go where it is, and what the search leaves is never worse."""

    class Pulse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(40.0))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y * (-self.rate * (t - 0.2).square()).exp()

    field, y0, errors = Pulse(), torch.ones(3, 2), []
    grid = optimize_grid(fs.ODE(field), RK4(), 4, y0, 0.0, 2.0, iterations=12)
    assert field.rate.grad is None
    with torch.no_grad():
        tight = fs.solve(fs.ODE(field), y0, 0.0, 2.0, stepping=fs.Adaptive(1e-12, 1e-12)).y1
        for times in (uniform(0.0, 2.0, 4), grid.grid):
            y = fs.solve(fs.ODE(field), y0, 0.0, 2.0, integrator=RK4(), stepping=fs.Grid(times)).y1
            errors.append(float((y - tight).abs().max()))
    assert errors[1] < 0.1 * errors[0], errors


def test_gradients_of_times_and_tables() -> None:
    """Times and weights are differentiated through the solve, as finite differences say."""
    schedule = VP()
    (x, _), (t0, t1) = starts(schedule, 0), SPANS[schedule]
    grid = fs.Grid(uniform_lambda(schedule, t0, t1, 3))
    first = distill_solver(flow(schedule), [fs.Solver(DPMSolverPP(), grid)], x[:2], iterations=0)

    def end(inner: Tensor, table: Tensor) -> Tensor:
        times = torch.cat([first.times[:1], inner, first.times[-1:]])
        fitted = Nonstationary(times, table)
        return fitted.solver.solve(flow(schedule), x[:2], t0, t1).y1

    inputs = first.times[1:-1].clone().requires_grad_(), first.table.clone().requires_grad_()
    assert torch.autograd.gradcheck(end, inputs, rtol=1e-5, atol=1e-6)


def test_files(tmp_path: Path) -> None:
    schedule = EDM(20.0)
    (x, _), (t0, t1) = starts(schedule, 0), SPANS[schedule]
    grid = fs.Grid(uniform_lambda(schedule, t0, t1, 4))
    fitted = distill_solver(flow(schedule), [fs.Solver(DPMSolver(), grid)], x[:2], iterations=1)
    fitted.save(tmp_path / "solver.pt")
    read = Nonstationary.load(tmp_path / "solver.pt")
    assert read.dual
    assert torch.equal(read.times, fitted.times)
    assert torch.equal(read.table, fitted.table)
    read.solver.solve(flow(schedule), x, t0, t1)
    with pytest.raises(ValueError, match="another schedule"):
        read.solver.solve(flow(VE()), x, t0, t1)
    assert [path.name for path in tmp_path.iterdir()] == ["solver.pt"]
    grid.save(tmp_path / "grid.pt")
    assert torch.equal(fs.Grid.load(tmp_path / "grid.pt").grid, grid.grid)


def test_errors_carry_the_cure() -> None:
    schedule = EDM(20.0)
    (x, _), (t0, t1), dynamics = starts(schedule, 0), SPANS[schedule], flow(schedule)
    grid = fs.Grid(uniform_lambda(schedule, t0, t1, 3))
    with pytest.raises(ValueError, match="twice at one time"):
        distill_solver(dynamics, [fs.Solver(EDMHeun(), grid)], x[:2])
    with pytest.raises(TypeError, match="UniPC"):
        distill_solver(dynamics, [fs.Solver(Heun(), grid)], x[:2])
    with pytest.raises(TypeError, match="probability_flow"):
        distill_solver(dynamics, [fs.Solver(DDIM(eta=1.0), grid)], x[:2])
    with pytest.raises(TypeError, match="probability_flow"):
        distill_solver(fs.ODE(lambda t, y: -y, linear=-1.0), [fs.Solver(DDIM(), grid)], x[:2])  # type: ignore[arg-type]
    reverse = fs.LinearSDE(schedule).reverse_sde(Mixture.two().denoiser(schedule))
    with pytest.raises(TypeError, match="probability_flow"):
        optimize_grid(reverse, EulerMaruyama(), 3, x[:2], t0, t1)
    with pytest.raises(TypeError, match="probability_flow"):
        frontier(dynamics, [UniPC(), DDIM(eta=1.0)], [3], x[:2], t0, t1)
    rough = fs.Solver(UniPC(), grid)
    with pytest.raises(ValueError, match="allow more steps"):
        frontier(dynamics, [DDIM()], [2], x[:2], t0, t1, fine=rough).cheapest(1e-6)
    huge = fs.ODE(lambda t, y: 1e200 * y * y)
    with pytest.raises(ValueError, match="no trial is finite"):
        frontier(
            huge, [RK4()], [2], x[:2], 0.0, 1.0, fine=fs.Solver(RK4(), fs.Fixed(2), throw=False)
        )
    fitted = distill_solver(dynamics, [fs.Solver(DPMSolverPPSingle(), grid)], x[:2], iterations=0)
    with pytest.raises(ValueError, match=r"fitted\.grid"):
        fs.solve(dynamics, x, t0, t1, integrator=fitted, stepping=grid)
    with pytest.raises(TypeError, match="save_at"):
        fitted.solver.solve(dynamics, x, t0, t1, save_at=[1.0])
    with pytest.raises(ValueError, match="table of shape"):
        Nonstationary(fitted.times, fitted.table[1:])
