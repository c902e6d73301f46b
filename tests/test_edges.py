"""Edges that a reader of the code fell over: each of these was once wrong."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributions import ComposeTransform

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.dynamics import Data, Langevin, NoisePrediction, VPrediction, clip
from flowsde.fitting import optimize_grid
from flowsde.integrators import (
    DDIM,
    ETDRK4,
    GMRES,
    RK4,
    Adams,
    AsynchronousLeapfrog,
    Dopri5,
    Dopri8,
    DPMSolver,
    DPMSolverPP,
    EDMHeun,
    EulerMaruyama,
    ExponentialAdams,
    ExponentialEuler,
    Heun,
    KenCarp3,
    Kvaerno3,
    Kvaerno5,
    Milstein,
    NinomiyaNinomiya,
    PredictorCorrector,
    ReversibleRK,
    StepDoubling,
    StochasticHeun,
    TorchDiffEq,
    Tsit5,
    UniPC,
)  # fmt: skip
from flowsde.interop import FlowDistribution, FlowTransform
from flowsde.models import (
    InvertibleResidual,
    RationalQuadraticSpline,
    RouletteLogDet,
    Sylvester,
    straightness,
)  # fmt: skip
from flowsde.nn import LipschitzMLP, UNet
from flowsde.objectives.matching import _posterior_mean
from flowsde.paths import (
    EDM,
    VP,
    BrownianTree,
    Cosine,
    FlowMatching,
    Interpolant,
    Linear,
    OptimalTransport,
    Sinkhorn,
    uniform,
)  # fmt: skip
from flowsde.series import Series
from flowsde.stepping import max_norm, rms_norm

from .systems import generator
from .test_adjoint import assert_same

ODE = fs.ODE(lambda t, y: -y, batched_time=True)


def reverse(eta: float = 1.0) -> fs.Dynamics:
    return fs.LinearSDE(VP()).reverse_sde(fs.Denoiser(lambda t, x: 0.5 * x, VP(), Data()), eta)


# --- times in float32 -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("per_sample", [False, True])
def test_times_given_in_float32_lose_nothing(end: float, per_sample: bool) -> None:
    torch.set_default_dtype(torch.float32)
    times, y0 = torch.linspace(0.0, end, 5), torch.ones(3, 1)
    stepping = fs.Adaptive(1e-5, 1e-6, per_sample=per_sample)
    sol = fs.solve(ODE, y0, 0.0, end, save_at=times, stepping=stepping, dense=True)
    assert sol.ts is not None
    assert len(sol.ts) == 5
    assert torch.allclose(sol.ys[:, 0, 0], (-times).exp(), rtol=1e-4)
    assert torch.allclose(sol.ys[-1], sol.y1)
    at = torch.full((3,), end) if per_sample else torch.tensor(end)
    assert torch.allclose(sol(at), sol.y1)
    back = fs.solve(ODE, y0, end, 0.0, save_at=times.flip(0), stepping=stepping)
    assert len(back.ts) == 5  # type: ignore[arg-type]
    for beyond in (2.0 * end, -end):
        with pytest.raises(ValueError, match="outside"):
            sol(torch.full((3,), beyond) if per_sample else beyond)


def test_learned_and_per_sample_grids_in_float32_end_where_the_solve_does() -> None:
    torch.set_default_dtype(torch.float32)
    grid = torch.linspace(0.0, 0.7, 8)
    rows = grid[:, None].expand(8, 3)
    for g in (grid.clone().requires_grad_(), rows):
        sol = fs.solve(
            ODE, torch.ones(3, 1), 0.0, 0.7, integrator=Heun(), save_at=[0.35, 0.7],
            stepping=fs.Grid(g),
        )  # fmt: skip
        assert sol.ys.shape == (2, 3, 1)
        assert bool(torch.isfinite(sol.ys).all())
    end = torch.tensor(0.7, requires_grad=True)
    sol = fs.solve(ODE, torch.ones(3, 1), 0.0, end, save_at=[0.7])
    assert len(sol.ys) == 1
    path = fs.Brownian(0, torch.linspace(0.0, 1.0, 101))
    sde = fs.LinearSDE(VP())
    assert fs.solve(sde, torch.ones(3, 1), integrator=EulerMaruyama(), path=path,
                    stepping=fs.Fixed(steps=10)).success  # fmt: skip


def test_a_saved_start_differentiates_by_its_time() -> None:
    at = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    sol = fs.solve(ODE, torch.ones(1, 1), 0.0, 1.0, save_at=at, stepping=fs.Adaptive(1e-9, 1e-9))
    (g,) = torch.autograd.grad(sol.ys.sum(), [at])
    assert torch.allclose(g, -(-at.detach()).exp(), atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
@pytest.mark.parametrize("method", [Tsit5(), Dopri8()], ids=str)
def test_rejected_rows_do_not_poison_gradients(adjoint: fs.Adjoint, method: Any) -> None:
    """An attempt that leaves the field's domain is rejected, and its Jacobian with it."""
    found = []
    for per_sample in (False, True):
        a = torch.tensor(1.0, requires_grad=True)
        ode = fs.ODE(lambda t, y, a=a: -a * torch.sqrt(y), batched_time=True)
        stepping = fs.Adaptive(1e-8, 1e-8, per_sample=per_sample, dt0=10.0)
        y0 = torch.tensor([[1.0], [2.0]])
        y1 = fs.solve(ode, y0, 0.0, 1.5, stepping=stepping, adjoint=adjoint, integrator=method).y1
        (g,) = torch.autograd.grad(y1.sum(), [a])
        found.append(float(g))
    exact = -(1.5 * (1 - 0.75) + 1.5 * (math.sqrt(2) - 0.75))
    assert found[0] == pytest.approx(exact, rel=1e-5)
    assert found[1] == pytest.approx(exact, rel=1e-5)


def test_stochastic_grids_differentiate_as_finite_differences_say() -> None:
    def end(grid: Tensor, method: Any, dynamics: fs.Dynamics, t0: float, t1: float) -> Tensor:
        return fs.solve(
            dynamics, torch.ones(1, 1), t0, t1, integrator=method, stepping=fs.Grid(grid),
            path=fs.Brownian(3),
        ).y1.sum()  # fmt: skip

    still = fs.SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y), noise="diagonal",
                   additive=True, batched_time=True)  # fmt: skip
    for method, dynamics, times in (
        (ExponentialEuler(), reverse(), [0.9, 0.5, 0.1]), (EulerMaruyama(), still, [0.0, 0.5, 1.0]),
    ):  # fmt: skip
        grid = torch.tensor(times, requires_grad=True)
        (g,) = torch.autograd.grad(end(grid, method, dynamics, times[0], times[-1]), [grid])
        step = torch.tensor([0.0, 1e-6, 0.0])
        with torch.no_grad():
            values = [end(grid + s, method, dynamics, times[0], times[-1]) for s in (step, -step)]
        assert float(g[1]) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-5)


def test_a_learned_rate_is_a_parameter() -> None:
    ode = fs.ODE(lambda t, y: 0.0 * y, linear=nn.Parameter(torch.tensor(-1.0)))
    assert len(list(ode.parameters())) == 1
    y = {"a": torch.ones(2), "b": torch.ones(3)}
    made = fs.ODE(lambda t, y: {k: 0.0 * v for k, v in y.items()}, linear=-1.0)
    for method in (Tsit5(), ExponentialEuler()):
        y1 = fs.solve(made, y, integrator=method, stepping=fs.Fixed(steps=40)).y1
        assert torch.allclose(y1["b"], torch.full((3,), math.exp(-1)), atol=1e-6)


def test_checkpointed_catches_noise_in_small_states() -> None:
    drop = nn.Dropout(0.5)
    y0 = torch.full((4,), 1e-3, requires_grad=True)
    sol = fs.solve(fs.ODE(lambda t, y: drop(y)), y0, integrator=RK4(), stepping=fs.Fixed(steps=20),
                   adjoint=fs.Checkpointed())  # fmt: skip
    with pytest.raises(RuntimeError, match="did not repeat itself"):
        (sol.y1 * sol.y1).sum().backward()


# --- rows -----------------------------------------------------------------------------------------


def test_rows_with_nothing_to_do() -> None:
    """A row of zero length is done at birth, whatever its field; noise has nothing to add."""
    ode = fs.ODE(lambda t, y: -y / t[:, None], batched_time=True)
    sol = fs.solve(
        ode, torch.ones(2, 1), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]),
        stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True),
    )  # fmt: skip
    assert sol.success
    assert torch.allclose(sol.y1, torch.tensor([[0.5], [1.0]]), atol=1e-4)
    y = fs.solve(
        reverse(), torch.ones(2, 1), torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.5]),
        integrator=ExponentialEuler(), stepping=fs.Fixed(steps=3), generator=generator(),
    ).y1  # fmt: skip
    assert float(y[1, 0]) == 1.0


def test_rows_of_noise_run_one_way() -> None:
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: 1.0, noise="diagonal", additive=True,
                 batched_time=True)  # fmt: skip
    with pytest.raises(TypeError, match="one direction"):
        fs.solve(sde, torch.zeros(2, 1), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]),
                 integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4),
                 path=fs.Brownian(0))  # fmt: skip
    with pytest.raises(TypeError, match="shares"):
        fs.solve(sde, torch.zeros(2, 1), 0.0, torch.ones(2), integrator=EulerMaruyama(),
                 stepping=fs.Fixed(steps=4),
                 path=fs.Brownian(0, torch.linspace(0.0, 1.0, 5)))  # fmt: skip


def test_empty_batches_and_empty_requests() -> None:
    for per_sample in (False, True):
        stepping = fs.Adaptive(per_sample=per_sample)
        if not per_sample:
            assert fs.solve(ODE, torch.ones(0, 2), stepping=stepping).y1.shape == (0, 2)
        sol = fs.solve(ODE, torch.ones(2, 2), stepping=stepping, save_at=[])
        assert len(sol.ts) == 0  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="save_at"):
            fs.solve(ODE, torch.ones(2, 2), stepping=stepping, save_at=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one each"):
        fs.solve(ODE, torch.ones(4, 1), integrator=RK4(),
                 stepping=fs.Grid(torch.linspace(0, 1, 5)[:, None].expand(5, 3)))  # fmt: skip


@torch.no_grad()
def test_empty_batches_of_diffusion() -> None:
    flow, x = reverse(0.0), torch.ones(0, 2)
    base, steps = fs.Normal(2), fs.Fixed(steps=3)
    density = fs.Flow(base, flow, fs.Solver(DPMSolverPP(), steps), t0=1e-2)
    assert density.log_prob(x).shape == (0,)
    for dynamics, method, executor in (
        (flow, DDIM(), fs.Picard()), (flow, UniPC(3), fs.Eager()), (flow, EDMHeun(), fs.Eager()),
        (reverse(1.0), PredictorCorrector(EulerMaruyama()), fs.Eager()),
    ):  # fmt: skip
        y = fs.solve(
            dynamics, x, 0.9, 0.1, integrator=method, stepping=steps, executor=executor,
            path=fs.Brownian(0) if dynamics.noise is not None else None,
        ).y1  # fmt: skip
        assert y.shape == (0, 2)


def test_times_that_a_schedule_does_not_have() -> None:
    for schedule, t0, t1 in ((VP(), 1.0, -0.1), (Cosine(), 1.5, 0.1)):
        flow = fs.LinearSDE(schedule).probability_flow(lambda t, x: 0.0 * x)
        with pytest.raises(ValueError, match="its times are those of"):
            fs.solve(flow, torch.ones(2, 1), t0, t1, integrator=DDIM(), stepping=fs.Fixed(steps=2))


# --- shapes and kinds -----------------------------------------------------------------------------


def test_general_noise_and_controls_do_not_conjugate_or_mix_axes() -> None:
    keywords: dict[str, Any] = {
        "integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=1), "path": fs.Brownian(0),
    }  # fmt: skip
    z = torch.zeros(1, 1, dtype=torch.complex128)
    turn = torch.full((1, 1, 1), 1j)
    general = fs.SDE(lambda t, y: 0 * y, lambda t, y: turn, noise="general", noise_size=1)
    scalar = fs.SDE(lambda t, y: 0 * y, lambda t, y: turn[0], noise="scalar")
    assert torch.equal(fs.solve(general, z, **keywords).y1, fs.solve(scalar, z, **keywords).y1)
    path = Linear(torch.tensor([0, 1]), torch.tensor([[[0.0], [1.0]]]))
    assert torch.allclose(fs.solve(fs.CDE(lambda t, y: turn, path), z).y1, torch.full((1, 1), 1j))
    assert float(path.evaluate(torch.tensor(0.5))) == 0.5
    wide = Linear(torch.tensor([0.0, 1.0]), torch.tensor([[[0.0], [1.0]], [[0.0], [5.0]]]))
    y1 = fs.solve(fs.CDE(lambda t, y: torch.ones(2, 2, 1, 1), wide), torch.zeros(2, 2, 1)).y1
    assert torch.allclose(y1[:, :, 0], torch.tensor([[1.0, 1.0], [5.0, 5.0]]))


def test_ddims_noise_needs_a_noised_state() -> None:
    keywords: dict[str, Any] = {
        "integrator": DDIM(0.5), "stepping": fs.Fixed(steps=3), "generator": generator(),
    }  # fmt: skip
    start = torch.ones(2, 1), torch.zeros(2)
    with pytest.raises(TypeError, match="noised"):
        fs.solve(fs.log_density(reverse(0.0)), start, 0.9, 0.1, **keywords)
    with pytest.raises(TypeError, match="noised"):
        fs.solve(fs.ODE(lambda t, y: y, linear=-1.0), torch.ones(2, 1), **keywords)


class Loose(fs.Map):
    """A map whose step returns what it is told to."""

    def __init__(self, ladj: Any) -> None:
        super().__init__()
        self.ladj = ladj

    def __len__(self) -> int:
        return 1

    def step(self, k: int, y: Tensor, *args: Any) -> Any:
        return 2 * y if self.ladj is None else (2 * y, self.ladj)

    def unstep(self, k: int, y: Tensor, *args: Any) -> Any:
        return y / 2, -self.ladj


def test_outputs_are_checked_wherever_they_come_from() -> None:
    with pytest.raises(TypeError, match="state, log-determinant"):
        fs.solve(Loose(None), torch.ones(3, 2))
    with pytest.raises(TypeError, match="log-determinant"):
        fs.solve(fs.log_density(Loose(torch.zeros(3, 1))), (torch.ones(3, 1), torch.zeros(3)))
    with pytest.raises(TypeError, match="pair"):
        fs.solve(fs.log_density(Loose(torch.zeros(3))), torch.ones(5, 3, 2))
    narrow = fs.LinearSDE(VP()).probability_flow(lambda t, x: x[:, :1])
    with pytest.raises(TypeError, match="the network"):
        fs.solve(narrow, torch.ones(3, 4), 0.9, 0.1)
    for name, value in (("args", torch.ones(1, 2)), ("adjoint", "direct"), ("executor", "eager"),
                        ("path", "junk")):  # fmt: skip
        with pytest.raises(TypeError, match=name):
            fs.solve(ODE, torch.ones(3, 2), **{name: value})
    with pytest.raises(TypeError, match="leave out path"):
        fs.solve(ODE, torch.ones(3, 2), path=fs.Brownian(0))
    sde = fs.SDE(lambda t, y: y, lambda t, y: 1.0, noise="diagonal")
    with pytest.raises(TypeError, match="structure"):
        fs.solve(sde, {"a": torch.ones(2), "b": torch.ones(2)}, integrator=EulerMaruyama(),
                 stepping=fs.Fixed(steps=2), path=fs.Brownian(0))  # fmt: skip


def test_inference_mode_is_refused_where_autograd_is_needed() -> None:
    flow = fs.Flow(fs.Normal(2), ODE)
    with torch.inference_mode(), pytest.raises(TypeError, match="no_grad"):
        flow.log_prob(torch.ones(3, 2))


# --- ends of schedules ----------------------------------------------------------------------------


def test_cosine_runs_from_its_own_end_in_float32() -> None:
    torch.set_default_dtype(torch.float32)
    assert float(Cosine().alpha(torch.tensor(1.0))) == 0.0
    denoiser = fs.Denoiser(lambda t, x: 0 * x, Cosine(), VPrediction())
    flow = fs.LinearSDE(Cosine()).probability_flow(denoiser)
    for method in (DDIM(), DPMSolverPP()):
        y = fs.solve(flow, torch.ones(2, 2), 1.0, 0.0, integrator=method,
                     stepping=fs.Fixed(steps=4)).y1  # fmt: skip
        assert bool(torch.isfinite(y).all())


def test_spans_that_cannot_work_are_refused() -> None:
    fixed = fs.Fixed(steps=3)
    for method in (DDIM(), DPMSolverPP()):
        with pytest.raises(ValueError, match="no noise"):
            fs.solve(reverse(0.0), torch.ones(2, 1), 0.0, 1.0, integrator=method, stepping=fixed)
    with pytest.raises(ValueError, match="down to data"):
        fs.solve(reverse(), torch.ones(2, 1), 0.1, 0.9, integrator=EulerMaruyama(), stepping=fixed,
                 generator=generator())  # fmt: skip
    assert FlowMatching().alpha(1.0) == 0.0


def test_a_number_keeps_its_precision() -> None:
    end = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor(1.0, dtype=torch.float32)
    assert fs.solve(fs.ODE(lambda t, y: -y), y0, 0.0, end).y1.dtype == torch.float32


@pytest.mark.parametrize(
    ("adjoint", "method"),
    [
        (fs.Backsolve(), RK4()), (fs.Reversible(), ReversibleRK()), (fs.Checkpointed(), RK4()),
        (fs.Direct(), RK4()),
    ],
    ids=["back", "rev", "check", "direct"],
)  # fmt: skip
def test_parameters_changed_before_the_way_back_are_told(adjoint: Any, method: Any) -> None:
    net = nn.Linear(2, 2)
    y1 = fs.solve(
        fs.ODE(lambda t, y, w: torch.tanh(y @ w)), torch.ones(3, 2), args=(net.weight,),
        integrator=method, stepping=fs.Fixed(steps=5), adjoint=adjoint,
    ).y1  # fmt: skip
    with torch.no_grad():
        net.weight.add_(1e-6)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        y1.square().sum().backward()


def test_reversible_refuses_what_it_would_drop() -> None:
    t1 = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with pytest.raises(TypeError, match="each sample's own"):
        fs.solve(
            fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(3, 1), 0.0, t1,
            integrator=ReversibleRK(), adjoint=fs.Reversible(),
        )  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 1e-9, -1e-3, 0.3, -2.0])
@pytest.mark.parametrize("method", [ExponentialEuler(), ETDRK4()], ids=["euler", "etdrk4"])
def test_a_learned_rate_near_nothing(rate: float, method: Any) -> None:
    """y' = lambda y + 1 from 0, one step: y = (e^lambda - 1) / lambda."""
    linear = nn.Parameter(torch.tensor(rate))
    y1 = fs.solve(
        fs.ODE(lambda t, y: torch.ones_like(y), linear=linear), torch.zeros(1, 1),
        integrator=method, stepping=fs.Fixed(steps=1),
    ).y1  # fmt: skip
    y1.sum().backward()
    terms = [rate**n / math.factorial(n + 1) for n in range(30)]
    slopes = [n * rate ** (n - 1) / math.factorial(n + 1) for n in range(1, 30)]
    assert y1.item() == pytest.approx(sum(terms), rel=1e-14)
    assert linear.grad is not None
    assert linear.grad.item() == pytest.approx(sum(slopes), rel=1e-12)


def test_differentiable_ends_are_not_rounded() -> None:
    ode, stepping = fs.ODE(lambda t, y: torch.cos(t) * y), fs.Adaptive(1e-10, 1e-10)
    end = torch.tensor(10.0, dtype=torch.float32, requires_grad=True)
    found = fs.solve(ode, torch.ones(1), 0.0, end, stepping=stepping).y1
    assert torch.allclose(found, torch.tensor([math.exp(math.sin(10.0))]), rtol=1e-8)


def test_an_event_hides_no_nan() -> None:
    ode = fs.ODE(lambda t, y: torch.stack([torch.ones_like(y[0]), 1e6 * y[1] ** 2]))
    with pytest.raises(fs.NonFiniteState):
        fs.solve(
            ode, torch.tensor([0.0, 1.0]), 0.0, 10.0, stepping=fs.Fixed(steps=50),
            integrator=RK4(), events=fs.Event(lambda t, y: y[0] - 5.0),
        )  # fmt: skip


def test_a_first_step_is_never_nothing() -> None:
    steep = fs.ODE(lambda t, y: torch.exp(y))
    with pytest.raises(fs.NonFiniteState, match="t = 0"):
        fs.solve(steep, torch.tensor([85.0], dtype=torch.float32))
    with pytest.raises(ValueError, match="dt_max"):
        fs.Adaptive(dt_max=0.0)


def test_a_grid_ends_where_the_solve_does_however_late() -> None:
    grid = torch.tensor([1e6, 1e6 + 3, 1e6 + 6])
    with pytest.raises(ValueError, match="t1"):
        fs.solve(
            fs.ODE(lambda t, y: -y), torch.ones(1), 1e6, 1e6 + 2, integrator=RK4(),
            stepping=fs.Grid(grid),
        )  # fmt: skip


@pytest.mark.parametrize("method", [RK4(), Adams(4)], ids=["rk4", "adams"])
def test_an_update_on_a_grid_time_leaves_no_step_of_nothing(method: Any) -> None:
    sol = fs.solve(
        fs.ODE(lambda t, y: torch.ones_like(y)), torch.zeros(1), 0.0, 4.0, integrator=method,
        stepping=fs.Fixed(dt=1.0), save_at=fs.Steps(),
        events=fs.Event(lambda t, y: t - 2.0, update=lambda t, y: y + 100.0),
    )  # fmt: skip
    assert sol.ts is not None
    assert sol.ts.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert isinstance(sol.ys, Tensor)
    assert torch.allclose(sol.ys.flatten(), torch.tensor([0.0, 1.0, 2.0, 103.0, 104.0]))


def test_dense_output_at_times_of_each_sample() -> None:
    sol = fs.solve(
        fs.ODE(lambda t, y: -y, batched_time=True), torch.rand(3, 3), dense=True,
        stepping=fs.Adaptive(per_sample=True), save_at=[0.2, 0.5, 1.0],
    )  # fmt: skip
    assert isinstance(sol.ts, Tensor)
    assert torch.allclose(sol(sol.ts), sol.ys)
    assert torch.equal(sol(torch.tensor([0.1, 0.2])), sol([0.1, 0.2]))
    with pytest.raises(ValueError, match="one a sample"):
        sol(torch.zeros(2, 2))


def test_tolerances_of_rows_follow_them() -> None:
    """Rows that have ended are left out, with their tolerances."""
    ends, atol = torch.tensor([0.1, 1.0, 5.0, 9.0]), 10.0 ** -torch.arange(4.0, 8.0)[:, None]
    for method in (Tsit5(), Kvaerno3()):
        found = [
            fs.solve(
                fs.ODE(lambda t, y: -y, batched_time=True, rowwise=rowwise), torch.ones(4, 1), 0.0,
                ends, stepping=fs.Adaptive(1e-3, atol, per_sample=True), integrator=method,
            ).y1 for rowwise in (True, False)
        ]  # fmt: skip
        assert torch.allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("norm", [rms_norm, max_norm])
@pytest.mark.parametrize("method", [Tsit5(), Kvaerno3()], ids=["explicit", "implicit"])
def test_no_samples_at_all(norm: Any, method: Any) -> None:
    for per_sample in (True, False):
        stepping = fs.Adaptive(per_sample=per_sample, norm=norm)
        ode = fs.ODE(lambda t, y: -y, batched_time=True)
        y1 = fs.solve(ode, torch.ones(0, 2), integrator=method, stepping=stepping).y1
        assert y1.shape == (0, 2)


def test_errors_travel() -> None:
    """Between processes."""
    with pytest.raises(fs.StepUnderflow) as caught:
        fs.solve(fs.ODE(lambda t, y: y * y), torch.ones(2), 0.0, 2.0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert torch.equal(again.solution.y1, caught.value.solution.y1)


def test_torchdiffeqs_failure_is_a_status() -> None:
    blows = fs.ODE(lambda t, y: y * y)
    sol = fs.solve(blows, torch.ones(2), 0.0, 2.0, integrator=TorchDiffEq(), throw=False)
    assert sol.status is fs.Status.UNDERFLOW


def test_a_steady_state_of_mixed_samples_is_refused() -> None:
    ode = fs.ODE(lambda t, y: 0.5 * y.roll(1, 0) - y + 1.0)
    with pytest.raises(TypeError, match="together"):
        fs.steady_state(ode, torch.zeros(3, 1))


@pytest.mark.parametrize("method", [Kvaerno5(), Kvaerno3(linear=GMRES())], ids=str)
def test_implicit_gradients_where_samples_mix_after_the_start(method: Any) -> None:
    def f(t: Tensor, y: Any, c: Tensor) -> Any:
        share = c * t.reshape(-1, 1).sin() * y["a"].mean()
        return {k: (share - 1.0) * x for k, x in y.items()}

    ode, y0 = fs.ODE(f, batched_time=True), {"a": torch.rand(3, 2), "b": torch.rand(3, 1)}

    def loss(c: Tensor, adjoint: fs.Adjoint = fs.Direct()) -> Tensor:
        y1 = fs.solve(
            ode, y0, 0.0, 2.0, args=(c,), integrator=method, stepping=fs.Fixed(steps=4),
            adjoint=adjoint,
        ).y1  # fmt: skip
        return y1["a"][0].sum() + y1["b"].square().sum()

    c = torch.tensor(0.7, requires_grad=True)
    assert torch.autograd.gradcheck(loss, c)
    ways = [loss(c, adjoint) for adjoint in (fs.Direct(), fs.Checkpointed())]
    one, other = (torch.autograd.grad(way, c)[0] for way in ways)
    assert one == other
    with pytest.raises(TypeError, match="mixes the samples"):
        fs.solve(
            ode, y0, args=(c,), integrator=method,
            stepping=fs.Adaptive(per_sample=True),
        )  # fmt: skip


@pytest.mark.parametrize("which", ["y0", "args", "t1"])
def test_implicit_methods_refuse_forward_mode(which: str) -> None:
    ode = fs.ODE(lambda t, y, a: -a * y**3)

    def end(x: Tensor) -> Tensor:
        y0, a, t1 = torch.ones(2, 1), torch.ones(()), torch.ones(())
        y0, a, t1 = {"y0": (x + y0, a, t1), "args": (y0, x, t1), "t1": (y0, a, x)}[which]
        return fs.solve(
            ode, y0, 0.0, t1, args=(a,), integrator=Kvaerno3(), stepping=fs.Fixed(steps=2)
        ).y1

    one = torch.ones(())
    with pytest.raises(TypeError, match=r"torch\.autograd\.grad"):
        torch.func.jvp(end, (one,), (one,))
    with pytest.raises(TypeError, match=r"torch\.autograd\.grad"), forward_ad.dual_level():
        end(forward_ad.make_dual(one, one))


def test_event_times_refuse_forward_mode() -> None:
    fall = fs.ODE(lambda t, y: torch.stack((y[1], -9.81 + 0.0 * y[1])))
    ground = fs.Event(lambda t, y: y[0])
    end = lambda h: fs.solve(fall, torch.stack((h, 0.0 * h)), 0.0, 5.0, events=ground,
                             stepping=fs.Fixed(steps=9)).y1  # fmt: skip
    with pytest.raises(TypeError, match="differentiated forwards"):
        torch.func.jvp(end, (torch.tensor(2.0),), (torch.ones(()),))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("when", [-1.0, 0.5])
def test_an_event_that_is_no_number_says_so(batched: bool, when: float) -> None:
    """From the start, and from some time on; a state that is not finite is told as such."""
    low = lambda t, y: torch.where(t > when, torch.nan, y.amin(-1) if batched else y.min())
    stepping = fs.Adaptive(per_sample=batched)
    with pytest.raises(ValueError, match="not a number"):
        fs.solve(ODE, torch.ones(2, 1), stepping=stepping, events=fs.Event(low))
    burst = fs.ODE(lambda t, y: y / (t < 0.5), batched_time=True)
    watch = fs.Event(lambda t, y: y.sum() - 9.0)
    with pytest.raises(fs.NonFiniteState):
        fs.solve(burst, torch.ones(2, 1), stepping=fs.Fixed(steps=4), events=watch)


def test_an_observer_of_what_updates_sees_each_crossing_once() -> None:
    fall = fs.ODE(lambda t, y: torch.stack((y[1], -9.81 + 0.0 * y[1])))
    bounce = fs.Event(lambda t, y: y[0], update=lambda t, y: torch.stack((y[0], -0.9 * y[1])))
    seen = fs.Event(lambda t, y: y[0], terminal=False)
    for events in ([bounce, seen], [seen, bounce]):
        found = fs.solve(fall, torch.tensor([2.0, 0.0]), 0.0, 3.0, events=events).events
        assert found is not None
        assert len(found.ts[0]) == 3
        assert torch.equal(found.ts[0], found.ts[1])


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(), fs.Backsolve()], ids=str)
def test_a_save_time_that_is_an_end_moves_with_it(adjoint: fs.Adjoint) -> None:
    """dy(t1)/dt1 = f, and the state at the start does not change with the start."""
    y0 = torch.tensor([[0.3], [0.5]])
    t0, t1 = torch.tensor(0.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    f = lambda t, y: y.sin() + t
    ys = fs.solve(
        fs.ODE(f), y0, t0, t1, stepping=fs.Fixed(steps=40), adjoint=adjoint, save_at=[0.0, 0.5, 1.0]
    ).ys
    (by_start,) = torch.autograd.grad(ys[0].sum(), t0, retain_graph=True)
    (by_end,) = torch.autograd.grad(ys[2].sum(), t1)
    assert float(by_start) == pytest.approx(0.0, abs=1e-12)
    assert float(by_end) == pytest.approx(float(f(t1, ys[2]).detach().sum()), rel=1e-6)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(), fs.Backsolve()], ids=str)
@pytest.mark.parametrize("stepping", [fs.Fixed(steps=3), fs.Adaptive()], ids=["fixed", "adaptive"])
def test_a_span_of_nothing_has_a_slope_too(adjoint: fs.Adjoint, stepping: fs.Stepping) -> None:
    y0, t1 = torch.rand(2, 3), torch.tensor(0.5, requires_grad=True)
    sol = fs.solve(
        fs.ODE(lambda t, y: -t * y), y0, 0.5, t1, stepping=stepping, adjoint=adjoint, save_at=[0.5]
    )
    assert torch.equal(sol.y1, y0)
    assert torch.equal(sol.ys[0], y0)
    (g,) = torch.autograd.grad(sol.y1.sum(), t1)
    assert float(g) == pytest.approx(-0.5 * float(y0.sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_given_steps_only(dtype: torch.dtype) -> None:
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2, 3, dtype=dtype)
    assert fs.solve(ode, y0, stepping=fs.Fixed(steps=4)).y1.dtype == dtype
    for state in (y0, {"a": y0.double(), "b": y0}):
        with pytest.raises(TypeError, match=r"y0\.float\(\)"):
            fs.solve(fs.ODE(lambda t, y: y), state)


def test_tolerances_are_numbers_of_the_state() -> None:
    free = torch.tensor(1e-3, requires_grad=True)
    for name, value in (
        ("rtol", math.inf), ("atol", math.nan), ("dt0", math.inf), ("pcoeff", math.nan),
        ("rtol", free), ("atol", torch.tensor([1e-3, 0.0])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            fs.Adaptive(**{name: value})
    for shape in ((5,), (3, 1), (1, 2, 1)):
        with pytest.raises(ValueError, match="broadcast"):
            fs.solve(ODE, torch.ones(2, 4), stepping=fs.Adaptive(atol=torch.full(shape, 1e-6)))


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_at_rest_from_the_start_is_settled_then(batched: bool) -> None:
    decay = fs.ODE(lambda t, y: 1.0 - y, batched_time=batched)
    sol = fs.steady_state(decay, torch.ones(2, 1), t0=2.0)
    assert float(torch.as_tensor(sol.t1).max()) == 2.0
    assert torch.equal(sol.y1, torch.ones(2, 1))
    assert sol.stats.evaluations < 6


def timed(mode: fs.Adjoint, method: Any, which: str, x: Tensor) -> Tensor:
    """A loss of the end and of saved states, two of them at grid times, moved by x."""
    y0, a = torch.full((2, 1), 0.8), torch.tensor(0.7)
    t0, t1, at = torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.3, 0.6, 0.8])
    grid = torch.linspace(0.0, 1.0, 6)
    given = {"y0": y0, "a": a, "t0": t0, "t1": t1, "at": at, "grid": grid[1:-1]}
    given[which] = given[which] + x
    stepping: fs.Stepping = fs.Fixed(steps=5)
    if which == "grid":
        stepping = fs.Grid(torch.cat((grid[:1], given["grid"], grid[-1:])))
    sol = fs.solve(
        fs.ODE(lambda t, y, a: -a * y**3 + torch.sin(2.0 * t)), given["y0"], given["t0"],
        given["t1"], args=(given["a"],), integrator=method, stepping=stepping, adjoint=mode,
        save_at=given["at"],
    )  # fmt: skip
    return sol.y1.sum() + 2.0 * sol.ys.sum()


@pytest.mark.parametrize("which", ["y0", "a", "t0", "t1", "at", "grid"])
@pytest.mark.parametrize(
    "mode", [fs.Direct(), fs.Checkpointed(), fs.Reversible()], ids=lambda x: type(x).__name__
)
def test_what_is_saved_at_a_step_end_stays_where_that_moves(mode: fs.Adjoint, which: str) -> None:
    """All that a solve may be differentiated by, backwards and forwards, against differences; of
    steps taken back against Direct, since their dense output has kinks.
    """
    x, zero, one = torch.zeros((), requires_grad=True), torch.zeros(()), torch.ones(())
    method = ReversibleRK(RK4()) if isinstance(mode, fs.Reversible) else RK4()
    run = lambda x: timed(mode, method, which, x)
    expected = (run(1e-6 * one) - run(-1e-6 * one)) / 2e-6
    if isinstance(mode, fs.Reversible):
        (expected,) = torch.autograd.grad(timed(fs.Direct(), method, which, x), x)
    found = [torch.autograd.grad(run(x), x)[0]]
    with forward_ad.dual_level():
        found.append(forward_ad.unpack_dual(run(forward_ad.make_dual(zero, one))).tangent)
    transforms = {
        "jvp": lambda: torch.func.jvp(run, (zero,), (one,))[1],
        "jacfwd": lambda: torch.func.jacfwd(run)(zero), "grad": lambda: torch.func.grad(run)(zero),
    }  # fmt: skip
    for transform in transforms.values():
        if isinstance(mode, fs.Direct):
            found.append(transform())
        else:
            with pytest.raises(TypeError, match="Direct"):
                transform()
    for value in found:
        assert torch.allclose(value, expected, atol=1e-7)


# --- a review of the engine -----------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_jumps_are_times_of_double_precision(per_sample: bool, kind: torch.dtype) -> None:
    """Whatever the default: a pulse between two of them is not lost, nor are steps rejected."""

    def pulse(t: Tensor, y: Tensor) -> Tensor:
        t = t[:, None] if t.ndim else t
        return torch.where((t > 0.3) & (t < 0.3 + 1e-8), 1e8, 0.0).to(y) * torch.ones_like(y)

    torch.set_default_dtype(kind)
    sol = fs.solve(
        fs.ODE(pulse, batched_time=True), torch.zeros(2, 1, dtype=torch.float64), 0.0, 1.0,
        stepping=fs.Adaptive(per_sample=per_sample, jump_at=[0.3, 0.3 + 1e-8]),
    )  # fmt: skip
    assert torch.allclose(sol.y1, torch.ones_like(sol.y1), atol=1e-6)
    assert int(torch.as_tensor(sol.stats.rejected).sum()) == 0


@pytest.mark.parametrize(("span", "kind"), [(1e-9, torch.float32), (1e-15, torch.float64)])
def test_saved_times_of_short_spans_are_their_own(span: float, kind: torch.dtype) -> None:
    times = torch.linspace(0.0, span, 11, dtype=kind)
    ode = fs.ODE(lambda t, y: torch.ones_like(y) / span)
    sol = fs.solve(ode, torch.zeros(1), 0.0, float(times[-1]), save_at=times)
    assert_same([sol.ys[:, 0]], [times.double() / span], 1e-6)


@pytest.mark.parametrize("ends", [[3.0, 0.2, 0.1], [0.1, 0.2, 3.0]])
def test_tolerances_of_components_are_not_those_of_rows(ends: list[float]) -> None:
    atol, counts = torch.tensor([[1.0], [1e-10]]), []
    for rowwise in (False, True):
        ode = fs.ODE(
            lambda t, y: torch.sin(40 * t)[:, None, None] - y * 0, batched_time=True,
            rowwise=rowwise,
        )  # fmt: skip
        stepping = fs.Adaptive(rtol=1e-10, atol=atol, per_sample=True)
        sol = fs.solve(ode, torch.ones(3, 2, 1), 0.0, torch.tensor(ends), stepping=stepping)
        counts.append(sol.stats.accepted)
    assert torch.equal(*counts)


class Pull(torch.nn.Module):
    """A nonlinear pull towards w, whose rate c is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = torch.nn.Parameter(torch.tensor(1.5)), 5.0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.c * (y - self.w) * (1.0 + y * y)


def pulled(field: Pull, y0: Tensor, adjoint: fs.Adjoint) -> fs.Solution:
    return fs.solve(
        fs.ODE(field), y0, 0.0, 20.0, integrator=RK4(), stepping=fs.Fixed(dt=0.02),
        adjoint=adjoint, save_at=[0.1],
    )  # fmt: skip


def test_checkpointed_keeps_a_start_of_its_own() -> None:
    """And an end: what the caller does to his afterwards changes nothing, or is told."""
    field, found = Pull(), []
    for adjoint in (fs.Direct(), fs.Checkpointed()):
        y0 = torch.ones(3)
        sol = pulled(field, y0, adjoint)
        end = sol.y1.sum()
        y0.add_(0.3)
        with torch.no_grad():
            sol.y1.add_(5.0)
        found.append(torch.autograd.grad(sol.ys.sum(), field.w, retain_graph=True)[0])
        for _ in range(2):
            found.append(torch.autograd.grad(end, field.w, retain_graph=True)[0])
    assert_same(found[3:], found[:3], 1e-12)


def test_checkpointed_meets_the_way_there_even_in_its_middle() -> None:
    field = Pull()
    sol = pulled(field, torch.ones(3), fs.Checkpointed())
    field.c = 4.0
    with pytest.raises(RuntimeError, match="did not repeat itself"):
        torch.autograd.grad(sol.ys.sum(), field.w)


def test_checkpointed_knows_borrowed_parameters() -> None:
    class Model(torch.nn.Module):
        def __init__(self, adjoint: fs.Adjoint) -> None:
            super().__init__()
            self.field, self.adjoint = Pull(), adjoint

        def forward(self, y: Tensor) -> Tensor:
            return pulled(self.field, y, self.adjoint).y1

    given = {"field.w": torch.tensor(1.503, requires_grad=True)}
    y1 = torch.func.functional_call(Model(fs.Checkpointed()), given, (torch.ones(2),))
    with pytest.raises(RuntimeError, match=r"functional_call.*Direct"):
        y1.sum().backward()


def test_checkpointed_takes_inference_tensors() -> None:
    with torch.inference_mode():
        u = torch.ones(3)
    y0 = torch.ones(3, requires_grad=True)
    sol = fs.solve(
        fs.ODE(lambda t, y, u: u - torch.sin(y)), y0, 0.0, 3.0, args=(u,), integrator=RK4(),
        stepping=fs.Fixed(steps=40), adjoint=fs.Checkpointed(),
    )  # fmt: skip
    sol.y1.sum().backward()
    assert y0.grad is not None


@pytest.mark.parametrize("stepping", [fs.Adaptive(per_sample=True), fs.Fixed(steps=5)], ids=str)
def test_samples_that_go_nowhere_have_a_slope(stepping: fs.Stepping) -> None:
    y0 = torch.ones(2, 1)
    for ends in ([0.0, 1.0], [0.0, 0.0]):
        t1 = torch.tensor(ends, requires_grad=True)
        ode = fs.ODE(lambda t, y: 2.0 * y, batched_time=True)
        sol = fs.solve(ode, y0, 0.0, t1, stepping=stepping, integrator=Dopri5())
        (slope,) = torch.autograd.grad(sol.y1.sum(), t1)
        assert_same([slope], [2.0 * sol.y1[:, 0]], 1e-4)
        assert sol.success


@torch.no_grad()
def test_dense_output_begins_at_the_start() -> None:
    """Also where the first attempt came to nothing."""
    ode = fs.ODE(lambda t, y: torch.where(y > 2, torch.nan, 5 * y * (1 - y / 2)), batched_time=True)
    y0 = torch.tensor([[1.9], [1.0]])
    sol = fs.solve(ode, y0, 0.0, 1.0, stepping=fs.Adaptive(per_sample=True, dt0=1.0), dense=True)
    assert torch.equal(sol(0.0), y0)


@pytest.mark.parametrize("jump", [False, True])
def test_a_fresh_start_is_that_of_its_rows(jump: bool) -> None:
    """A method that remembers forgets where a row was hit, and in that row alone."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[:, 1], -3.0 * torch.sin(y[:, 0])), -1)

    y0 = torch.tensor([[1.0, 0.0], [1.5, 0.3], [0.4, 9.0]])
    ode = fs.ODE(f, batched_time=True)

    def run(rows: slice) -> Tensor:
        bound = torch.tensor([0.3, -100.0, -100.0])[rows]
        event = fs.Event(lambda t, y: y[:, 0] - bound, terminal=False, update=lambda t, y: y)
        stepping = fs.Adaptive(1e-4, 1e-4, per_sample=True, jump_at=(1.0,) if jump else ())
        return fs.solve(
            ode, y0[rows], 0.0, 2.0, stepping=stepping, integrator=ReversibleRK(),
            events=None if jump else event,
        ).y1  # fmt: skip

    alone = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    assert_same([run(slice(3))], [alone], 1e-12)


def test_an_engines_ends_may_move_and_its_saved_times_may_not() -> None:
    ode, t1 = fs.ODE(lambda t, y: y), torch.tensor(1.0, requires_grad=True)
    more: dict[str, Any] = {
        "integrator": TorchDiffEq("dopri5"),
        "stepping": fs.Adaptive(1e-9, 1e-9),
    }
    sol = fs.solve(ode, torch.ones(1), 0.0, t1, save_at=[0.5, 1.0], **more)
    (slope,) = torch.autograd.grad(sol.y1.sum(), t1)
    assert float(slope) == pytest.approx(math.e, rel=1e-6)
    with pytest.raises(TypeError, match="detach"):
        fs.solve(
            ode, torch.ones(1), 0.0, 1.0, save_at=torch.tensor([0.5], requires_grad=True), **more
        )


def test_a_solve_that_goes_nowhere_gives_a_state_of_its_own() -> None:
    y0 = torch.ones(2)
    sol = fs.solve(fs.ODE(lambda t, y: y), y0, 0.0, 0.0)
    sol.y1.zero_()
    assert torch.equal(y0, torch.ones(2))


def test_save_times_in_a_list_keep_their_gradients() -> None:
    t = torch.tensor(0.5, requires_grad=True)
    ys = fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), 0.0, 1.0, save_at=[t, 1.0]).ys
    torch.testing.assert_close(torch.autograd.grad(ys[0, 0], t)[0], -torch.exp(-t), rtol=1e-3,
                               atol=0.0)  # fmt: skip


def test_a_step_size_with_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient comes back by dt"):
        fs.Fixed(dt=torch.tensor(0.1, requires_grad=True))


@pytest.mark.parametrize("integrator", [Tsit5(), Kvaerno5()], ids=str)
def test_one_number_for_all_will_do_where_the_batch_shares_its_steps(integrator: Any) -> None:
    y0 = torch.ones(3, 2)
    for norm in (lambda x, per: x.square().mean().sqrt(), lambda x, per: float(x.abs().max())):
        stepping = fs.Adaptive(1e-8, 1e-8, norm=norm)
        end = fs.solve(fs.ODE(lambda t, y: -y), y0, 0.0, 1.0, integrator=integrator,
                       stepping=stepping).y1  # fmt: skip
        torch.testing.assert_close(end, torch.full((3, 2), math.exp(-1.0)), rtol=1e-6, atol=0.0)


def test_lists_of_times_are_times() -> None:
    dynamics, y0 = fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(2, 2)
    for times in ([torch.tensor([0.5]), torch.tensor([1.0])], [0.5, torch.tensor([1.0])]):
        ys = fs.solve(dynamics, y0, 0.0, 1.0, save_at=times).ys
        assert ys.shape == (2, 2, 2)
    with pytest.raises(ValueError, match="got a list of shapes"):
        fs.solve(dynamics, y0, 0.0, 1.0, save_at=[0.5, torch.tensor([0.5, 1.0])])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        lambda scaled, per_sample: scaled.abs().amax(-1) if not per_sample else scaled.abs().max(),
        lambda scaled, per_sample: "small",
    ],
)
@pytest.mark.parametrize("integrator", [Tsit5(), Kvaerno3()], ids=str)
def test_a_norm_is_one_number_a_sample(norm: Any, per_sample: bool, integrator: Any) -> None:
    stepping = fs.Adaptive(norm=norm, per_sample=per_sample)
    dynamics = fs.ODE(lambda t, y: -y, batched_time=True)
    with pytest.raises(TypeError, match="is a tensor of shape"):
        fs.solve(dynamics, torch.ones(2, 3), 0.0, 1.0, stepping=stepping, integrator=integrator)
    with pytest.raises(TypeError, match="norm is a callable"):
        fs.Adaptive(norm=None)  # type: ignore[arg-type]


# --- what a second reader of the core fell over ---------------------------------------------------


class Dropped(nn.Module):
    """A field with a draw of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        nn.init.constant_(self.net.weight, 0.5)
        nn.init.ones_(self.net.bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(y), 0.5)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[:, 1], -y[:, 0].sin()), 1)


@pytest.mark.parametrize(
    ("field", "coupling", "dtype"),
    [
        (Dropped(), 0.999, torch.float64),
        (pendulum, 0.8, torch.float32),
        (lambda t, y: 1.0 - y**3, 0.8, torch.float32),
    ],
    ids=["dropout", "rounding", "overflow"],
)
def test_a_way_back_that_does_not_meet_the_start_is_told(
    field: Any, coupling: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    dynamics = fs.ODE(field).to(dtype)
    y0 = torch.tensor([[0.5, 0.3]], dtype=dtype, requires_grad=True)
    end = fs.solve(
        dynamics, y0, 0.0, 3.0, integrator=ReversibleRK(RK4(), coupling),
        stepping=fs.Fixed(steps=300), adjoint=fs.Reversible(),
    ).y1  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Reversible came back .* away from y0"):
        end.sum().backward()


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(), fs.Backsolve()], ids=str)
@pytest.mark.parametrize("stepping", [fs.Fixed(steps=3), fs.Adaptive()], ids=str)
def test_states_saved_on_a_moving_moment_are_finite(stepping: Any, adjoint: Any) -> None:
    t = torch.tensor(1.0, requires_grad=True)
    sol = fs.solve(
        fs.ODE(lambda t, y: -y), torch.ones(2), t, t, save_at=[1.0], stepping=stepping,
        adjoint=adjoint,
    )  # fmt: skip
    assert torch.equal(sol.ys[0], torch.ones(2))


@pytest.mark.parametrize("integrator", [Tsit5(), RK4(), Adams(), Heun()], ids=str)
def test_a_field_that_writes_over_what_it_returned_is_told(integrator: Any) -> None:
    buffer, still = torch.empty(2), torch.ones(2)
    solved = {"integrator": integrator, "stepping": fs.Fixed(steps=4)}
    with torch.no_grad(), pytest.raises(TypeError, match="its clone"):
        fs.solve(fs.ODE(lambda t, y: torch.neg(y, out=buffer)), torch.ones(2), 0.0, 1.0, **solved)
    end = fs.solve(fs.ODE(lambda t, y: still), torch.ones(2), 0.0, 1.0, **solved).y1
    torch.testing.assert_close(end, torch.full((2,), 2.0))  # the same one, left alone, will do


def test_save_times_in_float32_stay_where_they_are() -> None:
    """A few spacings after the start of a late span."""
    at, y0 = torch.tensor([2000.00146484375, 2000.5], dtype=torch.float32), torch.ones(1)
    dynamics, tight = fs.ODE(lambda t, y: -100.0 * (y - 0.0 * t)), fs.Adaptive(1e-10, 1e-10)
    sol = fs.solve(dynamics, y0, 2000.0, 2001.0, save_at=at, stepping=tight)
    assert float(sol.ys[0]) == pytest.approx(math.exp(-100.0 * (float(at[0]) - 2000.0)), rel=1e-8)
    early = torch.tensor([1e-7, 1.0], dtype=torch.float32)
    sol = fs.solve(fs.ODE(lambda t, y: 1e6 + 0.0 * y), y0, 0.0, 1.0, save_at=early)
    assert float(sol.ys[0]) == pytest.approx(1.1, rel=1e-6)


class Scaled(nn.Module):
    """-rate u y."""

    def __init__(self, rate: nn.Parameter) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, t: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return -self.rate * u * y


@pytest.mark.parametrize("adjoint", [fs.Reversible(), fs.Backsolve()], ids=str)
@pytest.mark.parametrize("which", ["y0", "args", "t1"])
def test_adjoints_without_forward_mode_say_so(adjoint: Any, which: str) -> None:
    with forward_ad.dual_level():
        y0, u, t1 = torch.ones(2), torch.tensor(1.0), torch.tensor(1.0)
        made = {"y0": y0, "args": u, "t1": t1}
        made[which] = forward_ad.make_dual(made[which], torch.ones_like(made[which]))
        rate = nn.Parameter(torch.ones(()))
        with pytest.raises(TypeError, match="no forward mode"):
            fs.solve(
                fs.ODE(Scaled(rate)), made["y0"], 0.0, made["t1"], args=(made["args"],),
                integrator=ReversibleRK(RK4()), stepping=fs.Fixed(steps=5), adjoint=adjoint,
            )  # fmt: skip


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("start", [1.7e12, -1.7e12, 0.0])
def test_a_first_step_is_long_enough_to_be_felt(start: float, per_sample: bool) -> None:
    dynamics = fs.ODE(lambda t, y: 1.0 - y, batched_time=True)
    stepping = fs.Adaptive(per_sample=per_sample)
    sol = fs.solve(dynamics, torch.zeros(1, 1), start, start + 10.0, stepping=stepping)
    assert float(sol.y1) == pytest.approx(1.0 - math.exp(-10.0), abs=1e-4)
    assert int(sol.stats.attempts) < 100


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_step_is_below_the_least_but_the_last(per_sample: bool) -> None:
    dynamics = fs.ODE(lambda t, y: (3.0 * t * t).cos().reshape(-1, 1) + 0.0 * y, batched_time=True)
    stepping = fs.Adaptive(1e-3, 1e-3, dt_min=0.05, per_sample=per_sample)
    sol = fs.solve(dynamics, torch.ones(1, 1), 0.0, 1.0, stepping=stepping, save_at=fs.Steps())
    widths = sol.ts.diff(dim=0)
    assert float(widths[widths > 0][:-1].min()) >= 0.05 - 1e-12  # a rejected one stands still
    with pytest.raises(fs.StepUnderflow):
        fs.solve(dynamics, torch.ones(1, 1), 0.0, 3.0, stepping=fs.Adaptive(1e-9, 1e-9, dt_min=0.2))


def test_a_dict_may_come_back_in_any_order() -> None:
    y0 = {"q": torch.ones(2), "p": torch.zeros(2)}
    end = fs.solve(fs.ODE(lambda t, s: {"p": -s["q"], "q": s["p"]}), y0, 0.0, 1.0).y1
    assert list(end) == ["q", "p"]
    torch.testing.assert_close(end["q"], torch.full((2,), math.cos(1.0)), rtol=1e-4, atol=0.0)
    with pytest.raises(TypeError, match="own structure"):
        fs.solve(fs.ODE(lambda t, s: {"q": s["p"]}), y0, 0.0, 1.0)


def test_samples_that_an_event_ended_ran_no_further() -> None:
    dynamics = fs.ODE(lambda t, y: torch.ones_like(y), batched_time=True)
    level = torch.tensor([0.1, 5.0])
    sol = fs.solve(
        dynamics, torch.zeros(2, 1), 0.0, torch.ones(2), stepping=fs.Fixed(steps=100), max_steps=50,
        throw=False, events=fs.Event(lambda t, y: y[:, 0] - level),
    )  # fmt: skip
    assert sol.status.tolist() == [int(fs.Status.EVENT), int(fs.Status.MAX_STEPS)]
    assert 10 <= int(sol.stats.accepted[0]) <= 11
    assert int(sol.stats.accepted[1]) >= 49


def test_one_grid_for_all_serves_times_of_each_its_own() -> None:
    dynamics = fs.ODE(lambda t, y: -y * (t[:, None] if t.ndim else t), batched_time=True)
    y0, at = torch.ones(3, 2), torch.tensor([0.13, 0.57, 0.7, 0.99])
    grid = fs.Grid(torch.linspace(0.0, 1.0, 11))
    one = fs.solve(dynamics, y0, 0.0, 1.0, stepping=grid, save_at=at).ys
    each = fs.solve(dynamics, y0, 0.0, 1.0, stepping=grid, save_at=at.expand(3, -1)).ys
    torch.testing.assert_close(one, each, rtol=1e-13, atol=0.0)
    steps = fs.solve(dynamics, y0, 0.0, torch.ones(3), stepping=grid, save_at=fs.Steps())
    assert steps.ts.shape == (11, 3)


def test_small_things_of_times() -> None:
    """Numbers of NumPy, no times at all, a batch of nobody, and the way done in both directions."""
    dynamics = fs.ODE(lambda t, y: -y, batched_time=True)
    sol = fs.solve(dynamics, torch.ones(2, 1), np.int64(0), np.float32(1.0), dense=True)
    assert float(sol.y1[0]) == pytest.approx(math.exp(-1.0), rel=1e-4)
    assert sol([]).shape == (0, 2, 1)
    none = fs.solve(
        dynamics, torch.ones(0, 1), 0.0, 1.0, max_steps=0, throw=False, stepping=fs.Adaptive()
    )
    assert none.status is fs.Status.MAX_STEPS
    told: list[float] = []
    fs.solve(
        dynamics, torch.ones(2, 1), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]),
        stepping=fs.Adaptive(dt_max=0.1), progress=lambda done, t, y: told.append(done),
    )  # fmt: skip
    assert told == sorted(told)
    assert 0.0 <= told[0] <= told[-1] == 1.0


def test_an_end_in_float32_leaves_no_sliver() -> None:
    end = torch.tensor(0.3, dtype=torch.float32)
    sol = fs.solve(ODE, torch.ones(1), 0.0, end, stepping=fs.Fixed(dt=0.1), integrator=RK4())
    assert sol.stats.accepted == 3


def test_dense_output_on_a_moving_moment_is_finite() -> None:
    t = torch.tensor(1.0, requires_grad=True)
    sol = fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), t, t, dense=True)
    assert torch.equal(sol(1.0), torch.ones(2))


def test_a_bar_without_tqdm_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), 0.0, 1.0, progress=True)


def test_vmap_over_arguments_cannot_choose_steps_either() -> None:
    def run(u: Tensor) -> Tensor:
        sol = fs.solve(fs.ODE(lambda t, y, u: -u * y), torch.ones(2), 0.0, 1.0, args=(u,))
        assert isinstance(sol.y1, Tensor)
        return sol.y1

    with pytest.raises(TypeError, match="vmap cannot choose steps"):
        torch.func.vmap(run)(torch.ones(3))


# --- what a reader of the SDEs and flows fell over ------------------------------------------------


def crossed(noise: str, **more: Any) -> fs.SDE:
    """Noise of two components, each of which drives the other's."""
    g = lambda t, y: 0.8 * y.flip(-1)
    if noise == "diagonal":
        return fs.SDE(lambda t, y: -y, g, noise="diagonal", **more)
    whole = lambda t, y: torch.diag_embed(g(t, y))
    return fs.SDE(lambda t, y: -y, whole, noise="general", noise_size=2, **more)


def test_noise_that_is_not_diagonal_is_refused_where_that_counts() -> None:
    y0 = torch.tensor([[1.0, 0.5]]).repeat(3, 1).requires_grad_()
    given: dict[str, Any] = {"path": fs.Brownian(1), "stepping": fs.Fixed(steps=4)}
    chosen = {"path": BrownianTree(1, 0.0, 1.0), "stepping": fs.Adaptive()}
    sde = crossed("diagonal")
    cases = [
        (sde, Milstein(), chosen),
        (sde, EulerMaruyama(), {**given, "adjoint": fs.Backsolve()}),
        (fs.to_stratonovich(sde), StochasticHeun(), given),
    ]
    for dynamics, method, how in cases:
        wrapped = StepDoubling(method) if isinstance(method, Milstein) else method
        with pytest.raises(TypeError, match="depends on other components"):
            fs.solve(dynamics, y0, integrator=wrapped, **how)
    ends = [
        fs.solve(crossed(kind), y0, integrator=EulerMaruyama(), **given).y1
        for kind in ("diagonal", "general")
    ]
    torch.testing.assert_close(*ends)  # given steps need no more
    own = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y.sin(), noise="diagonal")
    before = fs.solve(own, y0, integrator=StepDoubling(Milstein()), **chosen)
    assert (
        before.stats.evaluations
        == fs.solve(own, y0, integrator=StepDoubling(Milstein()), **chosen).stats.evaluations
    )  # the look does not count


@pytest.mark.parametrize("method", [DPMSolver(2), NinomiyaNinomiya()], ids=str)
def test_numbers_beside_a_correlated_path_are_refused(method: Any) -> None:
    sde = fs.SDE(
        lambda t, y: 0.0 * y, lambda t, y: torch.ones_like(y), noise="diagonal", additive=True,
        linear=-1.0, stratonovich=isinstance(method, NinomiyaNinomiya),
    )  # fmt: skip
    path = fs.Brownian(1, correlation=torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    with pytest.raises(TypeError, match="beside W"):
        fs.solve(
            sde, torch.zeros(4, 2), integrator=method, stepping=fs.Fixed(steps=2), path=path
        )  # fmt: skip


def test_matching_and_sampling_are_on_one_span() -> None:
    ode = fs.ODE(lambda t, x: x, batched_time=True)
    with pytest.raises(ValueError, match=r"set dynamics\.horizon"):
        objectives.FlowMatching(ode, Interpolant(EDM(10.0)))
    ode.horizon = 10.0
    assert (
        fs.Flow(fs.Normal(1), ode).dynamics.horizon
        == objectives.FlowMatching(ode, Interpolant(EDM(10.0))).interpolant.horizon
    )


def test_a_mixture_has_a_slope_beside_a_row_of_no_part() -> None:
    rate = nn.Parameter(torch.ones(2))
    law = torch.distributions.Exponential
    parts = [fs.Componentwise(law, rate=rate), fs.Componentwise(law, rate=torch.full((2,), 2.0))]
    found = fs.Mixture(torch.ones(2), parts).log_prob(torch.tensor([[0.5, 0.5], [-1.0, 0.5]]))
    assert float(found[1].detach()) == -math.inf
    (slope,) = torch.autograd.grad(found[0], rate)
    assert bool(torch.isfinite(slope).all())


def test_residual_flows_are_sampled_by_a_seed() -> None:
    torch.manual_seed(0)
    net = LipschitzMLP([2, 8, 2])
    flow = fs.Flow(fs.Normal(2), fs.Composed([InvertibleResidual(net, RouletteLogDet())]))
    one = flow.sample(3, seed=0)
    torch.testing.assert_close(one, flow.sample((3,), generator=generator(4), seed=0))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_what_lapack_does_is_done_in_float32(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    flow = fs.Flow(fs.Normal(4), fs.Composed([Sylvester(4, 2)])).to(kind)
    assert flow.log_prob(torch.randn(3, 4).to(kind)).dtype == kind
    net = LipschitzMLP([4, 8, 4]).to(kind)
    assert net(torch.randn(3, 4).to(kind)).dtype == kind
    y = torch.randn(3, 4).to(kind)
    drift, trace = fs.HutchPlusPlus(2).prepare(y, 0)(lambda x: x.sin(), y)
    assert trace.dtype == drift.dtype == kind


def test_a_law_does_not_expand_to_less() -> None:
    law = FlowDistribution(fs.Flow(fs.Normal(2), fs.Composed([Sylvester(2, 1)])))
    assert law.expand((5,)).expand((2, 5)).batch_shape == (2, 5)
    with pytest.raises(ValueError, match="does not expand"):
        law.expand((5,)).expand((3,))


def test_a_number_s_precision_is_that_of_the_state() -> None:
    force = lambda t, x: -x
    sde = Langevin(force, temperature=torch.tensor(0.5, dtype=torch.float64))
    end = fs.solve(
        sde, torch.ones(2, 2, dtype=torch.float32), integrator=EulerMaruyama(),
        stepping=fs.Fixed(steps=2), path=fs.Brownian(0),
    ).y1  # fmt: skip
    assert end.dtype == torch.float32


def test_an_image_that_does_not_halve_is_refused() -> None:
    net = UNet(1, 8, 3)
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.zeros(1), torch.zeros(1, 1, 30, 30))


@pytest.mark.parametrize(
    "field",
    [
        lambda t, y: y.neg_(),
        lambda t, y: nn.functional.leaky_relu(y, inplace=True),
        lambda t, y: -y * t.mul_(2.0),
    ],
    ids=["state", "activation", "time"],
)
def test_a_field_that_writes_over_its_input_is_refused(field: Any) -> None:
    parts = {"implicit": lambda t, y: 0.0 * y}
    for ode, method in ((fs.ODE(field), RK4()), (fs.ODE(field, **parts), KenCarp3())):
        with pytest.raises(TypeError, match="in place"):
            fs.solve(ode, torch.ones(2, 2), integrator=method, stepping=fs.Fixed(steps=4))


def test_a_part_that_returns_one_buffer_is_refused() -> None:
    buffer = torch.zeros(2, 2)
    ode = fs.ODE(lambda t, y: torch.mul(y, -1.0, out=buffer), implicit=lambda t, y: -y)
    with torch.no_grad(), pytest.raises(TypeError, match="the explicit part returned the same"):
        fs.solve(ode, torch.ones(2, 2), integrator=KenCarp3(), stepping=fs.Fixed(steps=4))


def test_a_budget_holds_steps_that_torch_func_differentiates() -> None:
    found = []
    for adjoint in (fs.Direct(), fs.Checkpointed(2_000)):
        w = nn.Parameter(torch.tensor(0.3))
        sde = fs.SDE(lambda t, y, w: -y, lambda t, y, w: w * y, noise="diagonal")
        y1 = fs.solve(
            sde, torch.ones(3, 2), integrator=Milstein(), stepping=fs.Fixed(steps=50),
            path=fs.Brownian(0), args=(w,), adjoint=adjoint,
        ).y1  # fmt: skip
        y1.sum().backward()
        found.append([w.grad])
    assert_same(found[1], found[0], 1e-12)


class Running(nn.Module):
    """A field with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.norm(y)


@pytest.mark.parametrize("budget", [None, 1])
def test_steps_taken_again_leave_buffers_alone(budget: int | None) -> None:
    torch.manual_seed(0)
    y0, found = torch.randn(5, 2), []
    for adjoint in (fs.Direct(), fs.Checkpointed(budget)):
        field = Running()
        stepping = fs.Fixed(steps=40)
        y1 = fs.solve(fs.ODE(field), y0, integrator=RK4(), stepping=stepping, adjoint=adjoint).y1
        y1.square().sum().backward()
        found.append([*field.buffers(), field.norm.weight.grad])
    assert_same(found[1], found[0], 1e-12)


def test_backsolve_refuses_a_field_that_does_not_repeat_itself() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    ode, y0 = fs.ODE(lambda t, y, n=net: n(y)), torch.ones(3, 2, requires_grad=True)
    ode.net = net
    with pytest.raises(TypeError, match="does not repeat"):
        fs.solve(ode, y0, integrator=RK4(), stepping=fs.Fixed(steps=4), adjoint=fs.Backsolve())


def test_a_cde_runs_along_its_path_and_no_further() -> None:
    times = torch.linspace(0.0, 10.0, 21)
    path = Linear(times, torch.stack((times.sin(), times), -1)[None])
    cde = fs.CDE(lambda t, z: torch.tensor([[[0.0, 1.0]]]), path)
    assert torch.allclose(fs.solve(cde, torch.zeros(1, 1)).y1, torch.tensor([[10.0]]))
    for t0, t1 in ((0.0, 20.0), (-1.0, 5.0), (10.0, -1.0)):
        with pytest.raises(ValueError, match="beyond the path, which runs from 0 to 10"):
            fs.solve(cde, torch.zeros(1, 1), t0, t1)


def test_torchsdes_form_of_scalar_noise_is_taken() -> None:
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y, noise="scalar")
    y0, ends = torch.ones(4, 3), []
    w = torch.randn(4)
    for shape in ((4,), (4, 1)):
        motion = lambda a, b, s=shape: (w * (b - a)).reshape(s)
        ends.append(
            fs.solve(
                sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4), path=motion
            ).y1
        )
    assert torch.equal(*ends)
    with pytest.raises(TypeError, match=r"size=\(4,\)"):
        fs.solve(
            sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4),
            path=lambda a, b: torch.zeros(4, 3),
        )  # fmt: skip


def test_a_seed_may_be_a_tensor_of_one_number() -> None:
    """Which ``torch.vmap`` maps over: as many paths as there are seeds."""
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 * y, noise="diagonal")

    def end(y: Tensor, seed: Any) -> Tensor:
        return fs.solve(
            sde, y, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4), path=fs.Brownian(seed)
        ).y1

    y0 = torch.ones(3, 2, 2)
    mapped = torch.vmap(end)(y0, torch.arange(3))
    assert torch.allclose(mapped, torch.stack([end(y, i) for i, y in enumerate(y0)]))


def test_complex_data_are_matched_by_their_moduli() -> None:
    seen = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.dtype)
        return torch.zeros_like(x)

    torch.manual_seed(0)
    x = torch.randn(64, 2, dtype=torch.complex128)
    loss = objectives.FlowMatching(fs.ODE(field, batched_time=True))(x, generator=generator(1))
    assert seen == [torch.float64]
    assert loss.dtype == torch.float64
    assert loss > 0.0
    flow = objectives.FlowMatching(fs.ODE(field, batched_time=True), Interpolant(bridge=0.5))
    with pytest.raises(TypeError, match=r"x\.float\(\)"):
        flow(torch.randn(8, 2).bfloat16(), generator=generator())


def test_pairs_without_their_noise_are_refused() -> None:
    with pytest.raises(TypeError, match="bring their x1"):
        objectives.FlowMatching(ODE, paired=True)(torch.ones(2, 2), generator=generator())


class Extra(nn.Linear):
    """A module with a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"k": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.k = state["k"]


def test_averages_of_any_module_are_kept_and_found_again() -> None:
    module = Extra(2, 2)
    average = training.EMA(module, 0.9)
    nn.init.ones_(module.weight)
    average.update(module)
    again = training.EMA(Extra(2, 2), 0.9)
    again.load_state_dict(average.state_dict())
    nn.init.zeros_(module.weight)
    for one in (average, again):
        one.update(module)
    torch.testing.assert_close(again.average["weight"], average.average["weight"])
    again.copy_to(module)
    assert module.k == 1
    with pytest.raises(ValueError, match="another module"):
        again.load_state_dict(training.EMA(nn.Linear(2, 2, bias=False)).state_dict())


def test_an_executor_is_pickled_without_its_graphs() -> None:
    executor, y0 = fs.Compiled(backend="eager"), torch.ones(2, 1)
    solver = fs.Solver(Heun(), fs.Fixed(steps=2), executor=executor)
    end = solver.solve(ODE, y0).y1
    again = pickle.loads(pickle.dumps(solver))
    assert again.executor.backend == "eager"
    assert torch.allclose(again.solve(ODE, y0).y1, end)


def test_what_needs_autograd_says_so_in_inference_mode() -> None:
    with torch.inference_mode():
        with pytest.raises(TypeError, match="no_grad"):
            fs.steady_state(fs.ODE(lambda t, y: 1.0 - y, batched_time=True), torch.zeros(2, 2))
        with pytest.raises(TypeError, match="no_grad"):
            objectives.EnergyScore(lambda x: x.square().sum(-1))(torch.ones(2, 2))


def test_a_flow_of_other_parts_is_refused() -> None:
    law = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    for base, dynamics, solver in (
        (law, ODE, None), (fs.Normal(2), lambda t, y: -y, None), (fs.Normal(2), ODE, Tsit5()),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="a Flow's"):
            fs.Flow(base, dynamics, solver)
    with pytest.raises(TypeError, match="Denoiser"):
        clip(lambda t, x: x)


class Steps(nn.Module):
    """A network that keeps the times it was shown."""

    precise_time = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.seen.append(t)
        return 0.5 * x


@pytest.mark.parametrize("kept", [False, True])
def test_networks_may_be_shown_times_that_half_precision_cannot_tell_apart(kept: bool) -> None:
    net, grid = Steps(), torch.linspace(1.0, 0.9, 101)
    denoiser = fs.Denoiser(net, VP(), Data())
    flow = fs.LinearSDE(VP()).probability_flow(clip(denoiser) if kept else denoiser)
    with torch.no_grad():
        end = fs.solve(
            flow, torch.ones(2, 2).bfloat16(), 1.0, 0.9, integrator=DPMSolverPP(),
            stepping=fs.Grid(grid),
        ).y1  # fmt: skip
    assert end.dtype == torch.bfloat16
    assert torch.allclose(torch.stack(net.seen).double(), grid[:-1], atol=1e-6)


def test_a_slope_by_torch_func_is_refused_where_it_is_not_followed() -> None:
    slope = torch.func.grad(lambda v: v.cos().sum())
    ode, y0 = fs.ODE(lambda t, y: slope(y)), torch.ones(2, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"torch\.autograd\.grad"):
        fs.solve(ode, y0, stepping=fs.Fixed(steps=2), adjoint=fs.Checkpointed())


def test_catalogues_come_with_the_package() -> None:
    code = "import flowsde as fs; fs.models.cnf, fs.training.fit, fs.objectives.FlowMatching"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = fs.nothing


@pytest.mark.parametrize("held", [False, True], ids=["parameter", "closure"])
def test_nobody_s_graph_is_none(held: bool) -> None:
    """Of a density, a conversion or a costate: where nothing asks for gradients there is none,
    however it is asked for, and where something does it comes.
    """
    net = nn.Linear(2, 2)
    field = (lambda t, y: net(y).tanh()) if held else Layer(net)
    sde = fs.SDE(field, lambda t, y: 0.3 + 0.1 * y, noise="diagonal", stratonovich=True)
    y, keywords = torch.ones(3, 2), {"integrator": RK4(), "stepping": fs.Fixed(steps=3)}
    for frozen in (True, False):
        net.requires_grad_(not frozen)
        flow = fs.Flow(fs.Normal(2), fs.ODE(field), fs.Solver(**keywords))
        turned = fs.costate(fs.ODE(field))
        noisy = fs.solve(
            fs.to_ito(sde), y, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=3),
            path=fs.Brownian(0),
        ).y1  # fmt: skip
        found = flow.log_prob(y), noisy, *fs.solve(turned, (y, y, ()), **keywords).y1[:2]
        assert [x.requires_grad for x in found] == [not frozen] * 4
        weight = torch.ones(3, 2, requires_grad=True)
        assert fs.solve(turned, (y, weight, ()), **keywords).y1[1].requires_grad


class Layer(nn.Module):
    """tanh of a layer, as a field."""

    def __init__(self, net: nn.Linear) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y).tanh()


def test_the_times_of_odeint_are_not_taken_for_starts() -> None:
    with pytest.raises(TypeError, match="save_at=ts"):
        fs.solve(ODE, torch.ones(3, 1), torch.linspace(0.0, 1.0, 3))


def test_times_of_a_series_are_finite() -> None:
    for times in ([math.nan], [0.0, math.inf]):
        with pytest.raises(ValueError, match="finite and increasing"):
            Series(torch.tensor(times), torch.zeros(len(times), 1))


def test_noise_declared_additive_is_looked_at() -> None:
    keywords: dict[str, Any] = {
        "integrator": StochasticHeun(), "stepping": fs.Fixed(steps=4), "path": fs.Brownian(0),
    }  # fmt: skip
    y0 = torch.ones(3, 2)
    for kind, g in (
        ("diagonal", lambda t, y: 0.5 * y),
        ("general", lambda t, y: torch.stack((y, 1.0 - y), -1)),
    ):
        size = {"noise_size": 2} if kind == "general" else {}
        sde = fs.SDE(lambda t, y: -y, g, noise=kind, additive=True, **size)
        with pytest.raises(TypeError, match="leave out additive=True"):
            fs.solve(sde, y0, **keywords)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.5 + 0.0 * y, noise="diagonal", additive=True)
    assert fs.solve(sde, y0, **keywords).success


@pytest.mark.parametrize("way", ["normalises", "centres", "attends", "misaligned times"])
def test_a_field_that_mixes_samples_has_no_density_of_each_and_no_times_of_each(way: str) -> None:
    """Each gave numbers: a divergence that left out what samples do to each other, steps that
    depended on who else was still on the way, times that went along the components.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    fields = {
        "normalises": Timeless(net),
        "centres": lambda t, y: y.mean(0) - y,
        "attends": lambda t, y: (y @ y.mT).softmax(-1) @ y - y,
        "misaligned times": lambda t, y: t - y,  # (4,) against (4, 4)
    }
    ode, y = fs.ODE(fields[way], batched_time=True), torch.randn(4, 4)
    own, state = {"stepping": fs.Adaptive(per_sample=True)}, (y, torch.zeros(4))
    density, given = fs.log_density(ode), fs.Fixed(steps=2)
    with pytest.raises(TypeError, match="mixes the samples of its batch"):
        fs.solve(ode, y, **own)
    if way != "misaligned times":
        split = fs.log_density(fs.LinearSDE(VP()).probability_flow(fields[way]))
        for dynamics, integrator in ((density, RK4()), (split, DDIM())):
            with pytest.raises(TypeError, match="a density is that of each"):
                fs.solve(dynamics, state, 0.9, 0.1, integrator=integrator, stepping=given)
    assert fs.solve(ode, y, stepping=given).success
    net.eval()
    if way == "normalises":
        assert fs.solve(ode, y, **own).success
        assert fs.solve(density, state, stepping=given).success
        net.train()
        with pytest.raises(TypeError, match="mixes"):  # it is looked at anew
            fs.solve(ode, y, **own)


def test_networks_that_start_at_zero_are_looked_at_again() -> None:
    """Nothing shows yet that they mix samples."""
    last = nn.Linear(3, 3)
    nn.init.zeros_(last.weight)
    ode = fs.ODE(lambda t, y: last(y.mean(0) - y), batched_time=True)
    y0, own = torch.randn(4, 3), fs.Adaptive(per_sample=True)
    assert fs.solve(ode, y0, stepping=own).success
    nn.init.eye_(last.weight)
    with pytest.raises(TypeError, match="mixes the samples"):
        fs.solve(ode, y0, stepping=own)


class Timeless(nn.Module):
    """A network as a field."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def test_averages_of_infinities_are_they(tmp_path: Any) -> None:
    """A persistent mask of -inf, a mixture's log-weight of 0: ``fit`` left NaN in their place."""
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    average = training.EMA(module, 0.9)
    for _ in range(3):
        average.update(module)
    assert torch.equal(average.average["mask"], module.mask)
    module.mask[0, 1] = 3.0
    average.update(module)
    assert float(average.average["mask"][0, 1]) == 3.0
    kept = average.state_dict()
    module.weight.data += 1.0
    average.update(module)
    assert not torch.equal(kept["average"]["weight"], average.average["weight"])
    with pytest.raises(ValueError, match="of another module"):
        training.EMA(nn.Linear(3, 4)).load_state_dict(training.EMA(nn.Linear(1, 1)).state_dict())


@pytest.mark.parametrize("scale", [3.0, 5.0, 10.0])
def test_steep_splines_invert_in_float32(scale: float) -> None:
    """Of 80,000 points hundreds came back from other bins, or from beyond the span."""
    law, draws = RationalQuadraticSpline(), generator()
    options: dict[str, Any] = {"generator": draws, "dtype": torch.float32}
    params = scale * torch.randn(20_000, law.count, 4, **options)
    y = law.tail * (2.0 * torch.rand(20_000, 4, **options) - 1.0)
    x, ladj = law.inverse(y, params)
    assert float(x.abs().max()) <= law.tail * (1.0 + 1e-6)
    again, back = law.forward(x, params)
    assert float((again - y).abs().max()) < 1e-3
    gaps = (back + ladj).abs()  # where a slope of 1e3 ends within a bin, x's rounding counts
    assert float(gaps.max()) < 0.3
    assert float(gaps.mean()) < 1e-4


def test_complex_data_are_no_labels() -> None:
    x0, x1 = (torch.randn(40, 2, generator=generator()) for _ in range(2))
    x1 = x1 + torch.randn(40, 2, generator=generator(1))
    c0, c1 = (torch.view_as_complex(x)[:, None] for x in (x0, x1))
    for coupling in (OptimalTransport(), Sinkhorn(0.5)):
        real, turned = (coupling(*pair, generator=generator()) for pair in ((x0, x1), (c0, c1)))
        assert torch.equal(real, turned)
    spin = fs.ODE(lambda t, y: 1j * y, batched_time=True)
    flow = fs.Flow(fs.Normal(1), spin, fs.Solver(stepping=fs.Adaptive(1e-8, 1e-8)))
    found = straightness(flow, c0)  # |v| = |x|, and the chord of one radian
    chord = 1.0 - (2.0 * math.sin(0.5)) ** 2
    assert torch.allclose(found, chord * c0[:, 0].abs().square(), atol=1e-6)
    objective = objectives.FlowMatching(spin, points=20)
    assert objective(c0, generator=generator()).isfinite()


def test_posterior_means_of_complex_data() -> None:
    """Those of all rows by their normal laws, of which either part has half of the variance."""
    data = torch.randn(6, 2, dtype=torch.complex128, generator=generator())
    x = torch.randn(4, 2, dtype=torch.complex128, generator=generator(1))
    alpha, sigma = torch.full((4,), 0.6), torch.full((4,), 0.8)
    gaps = (x[:, None] - 0.6 * data).abs().square().sum(-1) / 0.8**2
    expected = gaps.neg().softmax(1).to(data.dtype) @ data
    assert torch.allclose(_posterior_mean(alpha, sigma, x, data), expected)


@pytest.mark.parametrize("divergence", [fs.Exact(), fs.Hutchinson(2), fs.HutchPlusPlus(2)], ids=str)
def test_divergences_of_networks_that_torch_cannot_batch(divergence: fs.Divergence) -> None:
    """GroupNorm's second derivatives, of many probes at once."""
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 1))
    density = fs.log_density(fs.ODE(Timeless(net)), divergence)
    y0 = torch.randn(3, 2, 2, 2), torch.zeros(3)
    keywords: dict[str, Any] = {"integrator": RK4(), "stepping": fs.Fixed(steps=2)}
    found = fs.solve(density, y0, generator=generator(), **keywords).y1[1]
    with torch.no_grad():
        plain = fs.solve(density, y0, generator=generator(), **keywords).y1[1]
    assert torch.allclose(found, plain)
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


MAPS = {
    "nice": lambda: models.nice(4, generator=generator()),
    "realnvp": lambda: models.realnvp(4, generator=generator()),
    "nsf": lambda: models.nsf(4, generator=generator()),
    "maf": lambda: models.maf(4),
    "glow": lambda: models.glow((1, 4, 4), 1, 1, 8, generator=generator()),
    "checkerboard": lambda: models.Coupling(
        models.checkerboard((1, 4, 4)), models.Affine(), lambda i, o: nn.Conv2d(i, o, 1)
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_flows_are_built_without_memory(name: str) -> None:
    """On the meta device, to be filled from a checkpoint."""
    with torch.device("meta"):
        made = MAPS[name]()
    assert all(p.is_meta for p in made.parameters())
    real = MAPS[name]()
    made.to_empty(device="cpu")
    made.load_state_dict(real.state_dict())
    for a, b in zip(made.buffers(), real.buffers(), strict=True):
        assert torch.equal(a, b)


def test_maps_of_half_precision() -> None:
    whiten = models.Whiten.of(torch.randn(50, 3)).bfloat16()
    x = torch.randn(4, 3).bfloat16()
    y, ladj = whiten.step(0, x)
    assert y.dtype == ladj.dtype == torch.bfloat16
    assert torch.allclose(whiten.unstep(0, y)[0], x, atol=0.1)
    residual = InvertibleResidual(LipschitzMLP([3, 8, 3])).bfloat16()
    assert residual.step(0, x)[1].dtype == torch.bfloat16


def test_tables_take_no_copies_along() -> None:
    """A device's copy of a table, pickled, was asked again on other devices."""
    table = fs.paths.Discrete.linear()
    t = torch.tensor([0.3])
    table.alpha(t)
    again = pickle.loads(pickle.dumps(table))
    assert set(vars(again)) == {"alphas_cumprod"}
    assert again == table
    assert torch.equal(again.alpha(t), table.alpha(t))
    fresh = fs.paths.Discrete.linear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh.alpha(torch.tensor([0.3]))
    assert torch.equal(fresh.alpha(t), table.alpha(t))


def test_times_of_a_bound_keep_their_digits() -> None:
    """In half precision a thousand of them were half as many."""
    denoiser = fs.Denoiser(lambda t, x: 0.0 * x, VP(), NoisePrediction())
    transition, times = objectives.FixedVariance(denoiser), uniform(1e-3, 1.0, 999)
    for made in (
        objectives.Ancestral(transition, times),
        objectives.VariationalBound(transition, times, fs.Normal(2)),
    ):
        assert torch.equal(made.bfloat16().times, times)
    chain = objectives.Ancestral(transition, times).bfloat16()
    x = torch.randn(2, 2, generator=generator()).bfloat16()
    assert fs.solve(chain, x, generator=generator()).y1.isfinite().all()


def test_transforms_remember_their_last_call() -> None:
    ode, solver = fs.ODE(lambda t, y: -y), fs.Solver(RK4(), fs.Fixed(steps=3))
    transform, x = FlowTransform(ode, solver=solver), torch.randn(3, 2)
    kept = ComposeTransform([transform]).with_cache(1).parts[0]
    assert kept is not transform
    assert kept(x) is kept(x)
    assert torch.equal(kept(x), transform(x))
    assert torch.equal(kept.inv(x), transform.inv(x))
    assert kept.inv.inv is kept
    assert kept.with_cache(1) is kept


def test_training_without_gradients_says_so() -> None:
    flow = fs.Flow(fs.Normal(2), models.cnf(2, 8, 1))
    objective, data = objectives.FlowMatching(flow.dynamics), torch.randn(8, 2)
    keywords: dict[str, Any] = {"steps": 1, "batch_size": 4, "progress": False}
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(RuntimeError, match="outside of no_grad"):
            training.fit(objective, data, seed=0, **keywords)
    linear = fs.LinearSDE(VP()).probability_flow(lambda t, x: 0.5 * x)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference_mode"):
        optimize_grid(linear, DDIM(), 2, data, 1.0, 1e-2)
    assert training.fit(objective, data, seed=2**63, **keywords).losses


def test_costates_with_targets_leave_histories_alone() -> None:
    """What y had come from led to the targets again: -.271 for -.135."""
    rate = torch.tensor(2.0, requires_grad=True)
    turned = fs.costate(fs.ODE(lambda t, y, k: -k * y), (rate,))
    state = torch.tensor([math.exp(-2.0)]), torch.ones(1), (torch.zeros(()),)
    keywords: dict[str, Any] = {"args": (rate,), "stepping": fs.Adaptive(1e-10, 1e-10)}
    with torch.no_grad():
        found = fs.solve(turned, state, 1.0, 0.0, **keywords).y1[2][0]
    assert float(found) == pytest.approx(-math.exp(-2.0), rel=1e-8)
    with pytest.raises(TypeError, match="no_grad"):
        fs.solve(turned, state, 1.0, 0.0, **keywords)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(), fs.Backsolve()], ids=str)
def test_times_on_a_jump_differentiate_on_their_own_side(adjoint: fs.Adjoint) -> None:
    def field(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return torch.where(t < 1.0, k, 3.0 * k) * torch.ones_like(y)

    keywords: dict[str, Any] = {
        "args": (torch.tensor(1.0),), "stepping": fs.Adaptive(jump_at=[1.0]), "adjoint": adjoint,
    }  # fmt: skip
    edge = torch.tensor(1.0, requires_grad=True)
    y1 = fs.solve(fs.ODE(field), torch.zeros(1), 0.0, edge, **keywords).y1.sum()
    assert float(torch.autograd.grad(y1, edge)[0]) == pytest.approx(1.0)
    y1 = fs.solve(fs.ODE(field), torch.zeros(1), edge, 0.0, **keywords).y1.sum()
    assert float(torch.autograd.grad(y1, edge)[0]) == pytest.approx(-1.0)


def test_late_times_are_told_apart() -> None:
    """Seconds since 1970: saved times milliseconds from an end were moved onto it, and dense output
    reached seconds beyond.
    """
    late, rise = 1.7e9, fs.ODE(lambda t, y: torch.ones_like(y))
    after = [0.0, 0.001, 0.003, 0.5, 0.998, 1.0]
    sol = fs.solve(
        rise, torch.zeros(1), late, late + 1.0, save_at=[late + s for s in after], dense=True
    )
    assert torch.allclose(sol.ys[:, 0], torch.tensor(after), atol=1e-6)
    for beyond in (late + 1.9, late - 1.5):
        with pytest.raises(ValueError, match="outside what was solved"):
            sol(beyond)
    assert float(sol(late + 1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("method", [AsynchronousLeapfrog(), ReversibleRK(Heun(), 0.9)], ids=str)
@pytest.mark.parametrize("ends", [False, True])
def test_events_of_others_are_nobodys_steps(method: Any, ends: bool) -> None:
    """Of given steps: those of length zero, that rows take which were not hit, moved them."""

    def swing(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -y[:, 0]], -1)

    phase = torch.linspace(0.0, 6.2, 8)
    y0 = torch.stack([phase.cos(), phase.sin()], -1)
    update = None if ends else lambda t, y: 1.0 * y
    event = fs.Event(lambda t, y: y[:, 0], update=update)

    def end(y: Tensor) -> Tensor:
        return fs.solve(
            fs.ODE(swing, batched_time=True), y, 0.0, torch.full((len(y),), 10.0),
            integrator=method, stepping=fs.Fixed(steps=100), events=event,
        ).y1  # fmt: skip

    alone = torch.cat([end(row[None]) for row in y0])
    assert torch.allclose(end(y0), alone, rtol=1e-12, atol=1e-12)


def test_histories_and_events_of_some_samples_do_not_go_together() -> None:
    ode = fs.ODE(lambda t, y: -y, linear=-1.0, batched_time=True)
    with pytest.raises(TypeError, match="one history for all samples"):
        fs.solve(
            ode, torch.tensor([[1.0], [2.0]]), 0.0, torch.ones(2), stepping=fs.Fixed(steps=10),
            integrator=ExponentialAdams(2), events=fs.Event(lambda t, y: y[:, 0] - 0.9),
        )  # fmt: skip


def test_first_steps_may_be_short_beside_their_span() -> None:
    fast = fs.ODE(lambda t, y: -1e3 * (y - torch.cos(t / 1e11)))
    sol = fs.solve(
        fast, torch.tensor([2.0]), 0.0, 1e13, integrator=Kvaerno5(),
        stepping=fs.Adaptive(1e-6, 1e-8),
    )  # fmt: skip
    assert float(sol.y1) == pytest.approx(math.cos(100.0), abs=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_spans_of_no_length_have_no_derivative_by_saved_times(own: bool) -> None:
    times = torch.ones((2, 2) if own else 2, requires_grad=True)
    ode, start = fs.ODE(lambda t, y: 2.0 + 0.0 * y, batched_time=True), torch.zeros(2, 1)
    end = torch.tensor([1.0, 1.0]) if own else 1.0
    with pytest.raises(ValueError, match=r"detach\(\) save_at"):
        fs.solve(ode, start, 1.0, end, save_at=times)
    assert fs.solve(ode, start, 1.0, end, save_at=times.detach()).success


def test_nothing_saved_is_empty() -> None:
    rise = fs.ODE(lambda t, y: 1.0 + 0.0 * y)
    sol = fs.solve(
        rise, torch.zeros(1), 0.0, 2.0, save_at=[1.5], events=fs.Event(lambda t, y: y[0] - 0.5)
    )
    assert sol.ts.shape == (0,)
    assert sol.ys.shape == (0, 1)
    y0 = torch.ones(2, 1, requires_grad=True)
    sol = fs.solve(fs.ODE(lambda t, y: -y), y0, save_at=[], adjoint=fs.Backsolve())
    (slope,) = torch.autograd.grad(sol.y1.sum(), y0)
    assert torch.allclose(slope, torch.full((2, 1), math.exp(-1.0)), atol=1e-4)


def test_no_number_between_the_ends_of_a_step_is_told() -> None:
    def hole(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((y[0] > 0.3) & (y[0] < 0.6), torch.nan, y[0] - 0.5)

    rise = fs.ODE(lambda t, y: torch.ones_like(y))
    with pytest.raises(ValueError, match="not a number"):
        fs.solve(rise, torch.zeros(1), stepping=fs.Fixed(steps=1), integrator=RK4(),
                 events=fs.Event(hole))  # fmt: skip


def test_no_samples_settle() -> None:
    found = fs.steady_state(fs.ODE(lambda t, y: 1.0 - y, batched_time=True), torch.zeros(0, 2))
    assert found.y1.shape == (0, 2)
