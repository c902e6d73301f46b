"""Edges that a reader of the code fell over: each of these was once wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde.dynamics import Data, VPrediction
from flowsde.integrators import (
    DDIM,
    RK4,
    Dopri8,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialEuler,
    Heun,
    Tsit5,
)  # fmt: skip
from flowsde.paths import VP, Cosine, FlowMatching, Linear

from .systems import generator

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
    sol = fs.solve(fs.ODE(lambda t, y: drop(y)), y0, integrator=RK4(), stepping=fs.Fixed(steps=4),
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
