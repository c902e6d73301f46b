"""Steps taken at once: what Eager comes to, in fewer evaluations one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import (
    RK4,
    AsynchronousLeapfrog,
    DPMSolverPP,
    Euler,
    ExponentialEuler,
    Heun,
    Integrator,
    Kvaerno3,
    StepDoubling,
)
from flowsde.paths import EDM, VP, uniform_lambda

from .systems import DEVICE, Mixture, catalogue, suited

MIXTURE = Mixture.two()
ONE_STEP = [
    m for m in [*catalogue(integrators, Integrator), StepDoubling(), DPMSolverPP(1)]
    if m.static and not m.remembers
]  # fmt: skip


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y.roll(1, -1)) + torch.cos(t).reshape(-1, *[1] * (y.ndim - 1))


def both(dynamics: fs.Dynamics, y0: Any, *times: Any, picard: fs.Picard, **more: Any) -> Any:
    """Eager's solution and Picard's."""
    return [
        fs.solve(dynamics, y0, *times, executor=executor, **more)
        for executor in (fs.Eager(), picard)
    ]


@pytest.mark.parametrize("method", ONE_STEP, ids=str)
def test_without_tolerance_it_is_eager(method: Integrator) -> None:
    """Whatever the method, windows that do not divide the steps, and noise."""
    dynamics, y0 = suited(method, field, torch.randn(3, 2))
    dynamics.batched_time = True
    more = {} if dynamics.noise is None else {"path": fs.Brownian(1)}
    plain, found = both(
        dynamics, y0, 0.2, 1.0, picard=fs.Picard(4, 0.0), integrator=method,
        stepping=fs.Fixed(steps=7), **more,
    )  # fmt: skip
    torch.testing.assert_close(found.y1, plain.y1, rtol=1e-12, atol=1e-12)
    assert found.stats.attempts <= 7
    assert found.stats.accepted == 7


SPANS: dict[fs.Schedule, tuple[float, float]] = {VP(): (0.99, 1e-2), EDM(20.0): (20.0, 0.02)}


@torch.no_grad()
@pytest.mark.parametrize("schedule", SPANS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_in_fewer_rounds(eta: float, schedule: fs.Schedule) -> None:
    """On the flow and on the reverse SDE, whose noise is the same: within a few tolerances."""
    dynamics = fs.LinearSDE(schedule).reverse_sde(MIXTURE.denoiser(schedule), eta)
    grid, tolerance = uniform_lambda(schedule, *SPANS[schedule], 100), 1e-3
    x = torch.randn(6, 2) * schedule.sigma(SPANS[schedule][0])
    plain, found = both(
        dynamics, x, *SPANS[schedule], picard=fs.Picard(40, tolerance),
        integrator=ExponentialEuler(), stepping=fs.Grid(grid),
        **({"path": fs.Brownian(0)} if eta else {}),
    )  # fmt: skip
    assert float((found.y1 - plain.y1).abs().max()) < 10 * tolerance
    assert found.stats.evaluations == found.stats.attempts < 40
    assert plain.stats.evaluations == 100


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_of_one_is_a_step(window: int) -> None:
    """One sweep a step; a window beyond the grid; spans and grids of each sample's own; pytrees."""
    ode, y0 = (
        fs.ODE(lambda t, y: (field(t, y[1]), field(t, y[0])), batched_time=True),
        torch.ones(2, 3),
    )
    ends = torch.tensor([1.0, 0.7])
    plain, found = both(
        ode, (y0, 2.0 * y0), 0.0, ends, picard=fs.Picard(window, 0.0), integrator=Heun(),
        stepping=fs.Fixed(steps=5),
    )  # fmt: skip
    torch.testing.assert_close(found.y1, plain.y1, rtol=1e-12, atol=1e-12)
    assert found.stats.accepted.tolist() == [5, 5]
    assert found.stats.attempts == 5 or window > 1


def test_gradients_of_states_parameters_arguments_and_times() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2))

        def forward(self, t: Tensor, y: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(y @ self.w) + t[..., None] * u

    net, found = Net(), []
    y0, u = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    grid = torch.tensor([0.0, 0.1, 0.4, 0.6, 1.0], requires_grad=True)
    for sol in both(
        fs.ODE(net, batched_time=True), y0, 0.0, 1.0, picard=fs.Picard(3, 0.0), integrator=RK4(),
        stepping=fs.Grid(grid), args=(u,),
    ):  # fmt: skip
        found.append(torch.autograd.grad(sol.y1.square().sum(), [y0, u, net.w, grid]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_probes_go_with_their_rows() -> None:
    x = torch.randn(3, 2)
    start, generator = (x, torch.zeros(3)), torch.Generator(DEVICE)
    for rowwise in (True, False):
        ode = fs.ODE(field, batched_time=True, rowwise=rowwise)
        density = fs.log_density(ode, fs.Hutchinson())

        def run(executor: fs.Executor, density: fs.Dynamics = density) -> Any:
            return fs.solve(
                density, start, 0.0, 1.0, integrator=Heun(), stepping=fs.Fixed(steps=5),
                executor=executor, generator=generator.manual_seed(3),
            ).y1  # fmt: skip

        if rowwise:
            torch.testing.assert_close(run(fs.Picard(4, 0.0)), run(fs.Eager()))
        else:
            with pytest.raises(TypeError, match="rowwise"):
                run(fs.Picard())


def test_it_stops_where_it_must() -> None:
    ode = fs.ODE(lambda t, y: 1e200 * y * y, batched_time=True)
    keywords: dict[str, Any] = {
        "integrator": Euler(),
        "stepping": fs.Fixed(steps=6),
        "throw": False,
    }
    for sol in both(ode, torch.ones(2, 1), 0.0, 1.0, picard=fs.Picard(3), **keywords):
        assert sol.status is fs.Status.NON_FINITE
    sol = fs.solve(
        fs.ODE(field, batched_time=True), torch.ones(2, 3), 0.0, 1.0, executor=fs.Picard(2, 0.0),
        max_steps=2, **keywords,
    )  # fmt: skip
    assert sol.status is fs.Status.MAX_STEPS
    assert sol.stats.attempts == 2


def test_what_it_does_not_take_is_refused() -> None:
    y0, flow = torch.randn(2, 2), fs.LinearSDE(VP()).probability_flow(lambda t, x: x)
    ode, fixed = fs.ODE(field, batched_time=True), fs.Fixed(steps=3)
    refused: list[tuple[fs.Dynamics, dict[str, Any], str]] = [
        (flow, {"integrator": DPMSolverPP()}, "start alone"),
        (ode, {"integrator": AsynchronousLeapfrog()}, "start alone"),
        (ode, {"integrator": Kvaerno3()}, "start alone"),
        (ode, {"integrator": Heun(), "stepping": fs.Adaptive()}, "given steps"),
        (fs.ODE(field), {"integrator": Heun()}, "batched_time=True"),
        (ode, {"integrator": Heun(), "save_at": [0.5]}, "end alone"),
        (ode, {"integrator": Heun(), "dense": True}, "end alone"),
        (ode, {"integrator": Heun(), "events": fs.Event(lambda t, y: y[0, 0])}, "end alone"),
    ]  # fmt: skip
    for dynamics, keywords, cure in refused:
        with pytest.raises(TypeError, match=cure):
            fs.solve(
                dynamics, y0, 0.9, 0.1, executor=fs.Picard(), **{"stepping": fixed, **keywords}
            )
    y0 = y0.requires_grad_()
    with pytest.raises(TypeError, match=r"Direct\(\)"):
        fs.solve(
            ode, y0, integrator=Heun(), stepping=fixed, executor=fs.Picard(),
            adjoint=fs.Checkpointed(),
        )  # fmt: skip
    for make in (lambda: fs.Picard(0), lambda: fs.Picard(tolerance=-1.0)):
        with pytest.raises(ValueError, match="window >= 1"):
            make()
