"""Per-sample time: every sample as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import RK4, ExplicitRK, Tsit5

from .systems import catalogue, generator


def field(t: Tensor, y: Tensor) -> Tensor:
    """Rates that differ a hundredfold between samples."""
    t = t if t.ndim == 0 else t[:, None]
    return torch.stack((y[:, 1], -(y[:, 2] ** 2) * y[:, 0] + t.cos().expand(len(y), 1)[:, 0],
                        0.0 * y[:, 2]), 1)  # fmt: skip


ODE = fs.ODE(field, batched_time=True)


def start(count: int = 4) -> Tensor:
    rates = torch.logspace(0, 1.5, count)
    return torch.stack((torch.ones(count), torch.zeros(count), rates), 1)


ADAPTIVE = [m for m in catalogue(integrators, ExplicitRK) if m.error_order and m.order > 2]


@pytest.mark.parametrize("method", ADAPTIVE, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_equals_solving_each_alone(method: ExplicitRK, backward: bool) -> None:
    y0 = start()
    t0 = torch.tensor([0.0, 0.3, 0.1, 0.0])
    t1 = torch.tensor([2.0, 1.1, 2.1, 0.4])
    if backward:
        t0, t1 = t1, t0
    save = t0[:, None] + (t1 - t0)[:, None] * torch.tensor([0.0, 0.37, 0.5, 1.0])
    stepping = fs.Adaptive(1e-6, 1e-6, per_sample=True)
    whole = fs.solve(ODE, y0, t0, t1, integrator=method, stepping=stepping, save_at=save)
    for i in range(4):
        alone = fs.solve(
            fs.ODE(field), y0[i : i + 1], float(t0[i]), float(t1[i]), integrator=method,
            stepping=fs.Adaptive(1e-6, 1e-6), save_at=save[i],
        )  # fmt: skip
        # step sizes agree to rounding; the fast sample turns through 66 radians
        assert float((whole.y1[i] - alone.y1[0]).abs().max()) < 1e-9
        assert float((whole.ys[:, i] - alone.ys[:, 0]).abs().max()) < 1e-9
        assert int(whole.stats.accepted[i]) == alone.stats.accepted
        assert int(whole.stats.rejected[i]) == alone.stats.rejected
    assert whole.ts is not None
    assert torch.allclose(whole.ts, save.T, atol=1e-15)
    assert whole.success


@given(
    seed=st.integers(0, 1000), count=st.integers(1, 5), length=st.floats(0.05, 3.0),
    tolerance=st.sampled_from([1e-3, 1e-6]),
)  # fmt: skip
def test_no_sample_feels_the_others(seed: int, count: int, length: float, tolerance: float) -> None:
    torch.manual_seed(seed)
    y0 = torch.randn(count, 3)
    stepping = fs.Adaptive(tolerance, tolerance, per_sample=True)
    whole = fs.solve(ODE, y0, 0.0, length, stepping=stepping)
    order = torch.randperm(count)
    mixed = fs.solve(ODE, y0[order], 0.0, length, stepping=stepping)
    assert torch.allclose(mixed.y1, whole.y1[order], atol=1e-12, rtol=1e-12)
    first = fs.solve(ODE, y0[:1], 0.0, length, stepping=stepping)
    assert torch.allclose(first.y1, whole.y1[:1], atol=1e-12, rtol=1e-12)


def test_given_steps_over_spans_of_each_ones_own() -> None:
    y0, t1 = start(), torch.tensor([2.0, 1.0, 0.5, 0.0])
    whole = fs.solve(ODE, y0, 0.0, t1, integrator=RK4(), stepping=fs.Fixed(steps=40))
    grid = torch.linspace(0, 1, 41)[:, None] ** 2 * t1[:3]
    rows = fs.solve(ODE, y0[:3], 0.0, t1[:3], integrator=RK4(), stepping=fs.Grid(grid))
    for i in range(3):
        alone = fs.solve(
            fs.ODE(field), y0[i : i + 1], 0.0, float(t1[i]), integrator=RK4(),
            stepping=fs.Fixed(steps=40),
        )  # fmt: skip
        assert torch.allclose(whole.y1[i], alone.y1[0], atol=1e-12)
        assert torch.allclose(rows.y1[i], alone.y1[0], atol=1e-2)
    assert torch.equal(whole.y1[3], y0[3])


def test_dense_output_of_each_ones_own() -> None:
    y0, t1 = start(), torch.tensor([2.0, 1.0, 0.5, 1.5])
    sol = fs.solve(ODE, y0, 0.0, t1, stepping=fs.Adaptive(1e-9, 1e-9, per_sample=True), dense=True)
    at = 0.61 * t1
    saved = fs.solve(
        ODE, y0, 0.0, t1, stepping=fs.Adaptive(1e-9, 1e-9, per_sample=True), save_at=at[:, None]
    )
    assert torch.allclose(sol(at), saved.ys[0], atol=1e-12)


def test_one_failing_sample_does_not_stop_the_others() -> None:
    """y' = y^2 blows up at 1 / y0; the rest arrive, and say so."""
    ode = fs.ODE(lambda t, y: y.square(), batched_time=True)
    y0 = torch.tensor([[0.5], [2.0], [0.25]])
    sol = fs.solve(
        ode, y0, 0.0, 1.0, stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True), throw=False,
        save_at=[0.2, 0.9],
    )  # fmt: skip
    assert sol.status.tolist()[0] == sol.status.tolist()[2] == fs.Status.SUCCESS
    assert sol.status[1] != fs.Status.SUCCESS
    exact = 1.0 / (1.0 / y0 - 1.0)
    assert torch.allclose(sol.y1[[0, 2]], exact[[0, 2]], rtol=1e-4)
    assert bool(torch.isnan(sol.ys[1, 1]).all())
    assert float(sol.ys[0, 1, 0]) == pytest.approx(1 / 0.3, rel=1e-4)
    assert float(sol.t1[1]) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(fs.SolveError, match="1 of 3 samples"):
        fs.solve(ode, y0, 0.0, 1.0, stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True))


def test_a_field_that_does_not_take_batched_time_is_refused() -> None:
    y0 = start()
    for keywords in (
        {"stepping": fs.Adaptive(per_sample=True)}, {"t1": torch.ones(4)},
        {"save_at": torch.rand(4, 2).sort().values},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="batched_time"):
            fs.solve(fs.ODE(field), y0, **{"t0": 0.0, "t1": 1.0, **keywords})
    with pytest.raises(ValueError, match="one time a sample"):
        fs.solve(ODE, y0, 0.0, torch.ones(3))


@torch.no_grad()
def test_library_dynamics_take_both() -> None:
    from .systems import SCHEDULES, Mixture

    for schedule in SCHEDULES:
        flow = fs.LinearSDE(schedule).probability_flow(Mixture.two().denoiser(schedule))
        x, t1 = torch.randn(3, 2), torch.tensor([0.5, 0.3, 0.2])
        one = fs.solve(flow, x, 0.9, t1, stepping=fs.Adaptive(1e-8, 1e-8, per_sample=True)).y1
        density = fs.solve(
            fs.log_density(flow), (x, torch.zeros(3)), 0.9, t1,
            stepping=fs.Adaptive(1e-8, 1e-8, per_sample=True),
        ).y1  # fmt: skip
        for i in range(3):
            alone = fs.solve(
                flow, x[i : i + 1], 0.9, float(t1[i]), integrator=Tsit5(),
                stepping=fs.Adaptive(1e-8, 1e-8),
            ).y1  # fmt: skip
            assert torch.allclose(one[i], alone[0], atol=1e-10)
        assert torch.allclose(density[0], one, atol=1e-6)
    assert math.isfinite(float(density[1].sum()))


# --- samples that have ended are left out ---------------------------------------------------------


class Rows:
    """A field that counts the rows it is called with."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        self.rows += len(y)
        k = field(t, y)
        return k if not args else k * args[0]


@pytest.mark.parametrize(
    "adjoint", [fs.Direct(), fs.Checkpointed(300_000), fs.Checkpointed()], ids=str
)
@pytest.mark.parametrize("save", [False, True])
def test_samples_that_have_ended_cost_nothing(adjoint: fs.Adjoint, save: bool) -> None:
    """The same results and gradients, from the rows that were still on their way alone."""
    found, counts = [], []
    spans = torch.linspace(0.1, 1.5, 24)
    at = spans[:, None] * torch.tensor([0.0, 0.4, 0.9, 1.0]) if save else None
    for rowwise in (False, True):
        rows, y0 = Rows(), start(24).requires_grad_()
        t1 = spans.clone().requires_grad_()
        sol = fs.solve(
            fs.ODE(rows, batched_time=True, rowwise=rowwise), y0, 0.0, t1, adjoint=adjoint,
            stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True), save_at=at,
        )  # fmt: skip
        counts.append((rows.rows, sol.stats.evaluations))
        loss = sol.y1.square().sum() + (0.0 if sol.ys is None else sol.ys.sin().sum())
        grads = torch.autograd.grad(loss, [y0, t1])
        found.append([sol.y1, sol.t1, sol.stats.accepted, sol.stats.rejected, sol.status, *grads])
        found[-1] += [] if sol.ys is None else [sol.ys]
    for whole, thinned in zip(*found, strict=True):
        assert torch.allclose(whole.double(), thinned.double(), rtol=1e-12, atol=1e-12)
    assert counts[0][1] == counts[1][1]
    assert counts[1][0] < 0.65 * counts[0][0]


def test_failed_samples_are_left_out_and_named() -> None:
    """One that blows up early is no burden on the others, and keeps its number."""
    rows, count = Rows(), 16
    y0 = torch.ones(count, 1)
    y0[5] = 50.0

    def blows(t: Tensor, y: Tensor) -> Tensor:
        rows.rows += len(y)
        return torch.where(y > 10.0, y * y, -y)

    def run(limit: int) -> fs.Solution:
        return fs.solve(
            fs.ODE(blows, batched_time=True, rowwise=True), y0, 0.0, torch.linspace(1, 20, count),
            stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True), max_steps=limit, throw=False,
        )  # fmt: skip

    sol = run(10_000)
    assert torch.nonzero(sol.status).flatten().tolist() == [5]
    assert "5 UNDERFLOW at t = 0.02" in sol.message
    assert float(sol.t1[5]) == pytest.approx(0.02, abs=1e-4)
    assert rows.rows < 0.6 * count * sol.stats.evaluations
    short = run(16)  # attempts that suffice for the short spans alone
    assert 1 < int((short.status == fs.Status.MAX_STEPS).sum()) < count
    assert "5 MAX_STEPS" in short.message


@pytest.mark.parametrize(
    "keywords", [{"dense": True}, {"save_at": fs.Steps()}, {"args": (torch.ones(24, 1),)}], ids=str
)
def test_rows_stay_where_all_are_needed(keywords: dict[str, object]) -> None:
    rows = Rows()
    sol = fs.solve(
        fs.ODE(rows, batched_time=True, rowwise=True), start(24), 0.0, torch.linspace(0.2, 3.0, 24),
        stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True), **keywords,
    )  # fmt: skip
    look = 24  # at whether samples stand apart
    assert rows.rows == look + 24 * sol.stats.evaluations


def test_rows_stay_where_one_norm_is_that_of_all() -> None:
    """Spans of their own, steps judged together: who has ended is still part of the norm."""
    found = []
    for rowwise in (False, True):
        sol = fs.solve(
            fs.ODE(Rows(), batched_time=True, rowwise=rowwise), start(24), 0.0,
            torch.linspace(0.01, 1.0, 24), stepping=fs.Adaptive(1e-4, 1e-6),
        )  # fmt: skip
        found.append(sol.y1)
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("divergence", [fs.Exact(), fs.Hutchinson(2)], ids=str)
def test_densities_leave_out_samples_that_have_ended(divergence: fs.Divergence) -> None:
    """Probes go with their rows: the same densities from the rows that were on their way alone."""
    count = 24
    found, counts = [], []
    for rowwise in (False, True):
        rows = Rows()
        damped = lambda t, y, rows=rows: rows(t, y) - 0.1 * y.square()
        flow = fs.log_density(fs.ODE(damped, batched_time=True, rowwise=rowwise), divergence)
        sol = fs.solve(
            flow, (start(count), torch.zeros(count)), 0.0, torch.linspace(0.1, 1.5, count),
            stepping=fs.Adaptive(1e-4, 1e-4, per_sample=True), generator=generator(),
        )  # fmt: skip
        found.append(sol.y1)
        counts.append(rows.rows)
    for whole, thinned in zip(*found, strict=True):
        assert torch.allclose(whole, thinned, rtol=1e-12, atol=1e-12)
    assert float(found[0][1].abs().min()) > 1e-2
    assert counts[1] < 0.65 * counts[0]
