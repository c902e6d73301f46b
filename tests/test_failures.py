"""What a failing solve says, and what it hands back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import RK4, Bosh3, Dopri5, Heun, Tsit5

PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])


def stiff(t: Tensor, y: Tensor) -> Tensor:
    """A slow component and one that follows it at rate 2000."""
    return torch.stack((-y[..., 0], 2000.0 * (y[..., 0] - y[..., 1])), -1)


@PER_SAMPLE
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(Heun(), torch.float32), (Bosh3(), torch.float64), (Dopri5(), torch.float64),
     (Tsit5(), torch.float32)],
    ids=str,
)  # fmt: skip
def test_stiffness_is_suspected(
    method: fs.Integrator, per_sample: bool, dtype: torch.dtype
) -> None:
    """And an implicit method named; a fast oscillation and a blow-up are not taken for it."""
    stepping = fs.Adaptive(1e-3, 1e-4, per_sample=per_sample)
    with pytest.raises(fs.MaxStepsReached, match=r"stiffness is likely.*Kvaerno5") as caught:
        fs.solve(fs.ODE(stiff, batched_time=True), torch.ones(2, 2, dtype=dtype), 0.0, 1.0,
                 integrator=method, stepping=stepping, max_steps=150)  # fmt: skip
    assert "component" in str(caught.value)
    circle = fs.ODE(lambda t, y: 300.0 * torch.stack((y[:, 1], -y[:, 0]), 1), batched_time=True)
    blow = fs.ODE(lambda t, y: y.square(), batched_time=True)
    for ode, y0, t1 in ((circle, torch.ones(2, 2), 50.0), (blow, torch.ones(2, 2), 2.0)):
        with pytest.raises(fs.SolveError) as caught:
            fs.solve(ode, y0.to(dtype), 0.0, t1, integrator=method, max_steps=150,
                     stepping=fs.Adaptive(1e-5, 1e-5, per_sample=per_sample))  # fmt: skip
        assert "stiff" not in str(caught.value)


def test_a_healthy_solve_pays_nothing() -> None:
    sol = fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), integrator=RK4(), stepping=fs.Fixed(5))
    assert sol.stats.evaluations == 20
    sol = fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), integrator=Dopri5(),
                   stepping=fs.Adaptive(dt0=0.1))  # fmt: skip
    assert sol.stats.evaluations == 1 + 6 * sol.stats.attempts


@PER_SAMPLE
@pytest.mark.parametrize("kind", [fs.Status.MAX_STEPS, fs.Status.NON_FINITE, fs.Status.UNDERFLOW])
def test_all_that_was_computed_is_handed_back(kind: fs.Status, per_sample: bool) -> None:
    """y1 at t1, the saved times up to there, the counts; t, dt and the worst component told."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        t = t if t.ndim == 0 else t[:, None]
        worst = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        if kind is fs.Status.NON_FINITE:
            return torch.where((t > 0.5) & (worst > 0), torch.nan, -y)
        if kind is fs.Status.UNDERFLOW:
            return torch.where((t > 0.5) & (worst > 0), 1e4, -y)
        return torch.where(worst > 0, -(80.0 * t).sin() - y, -y)

    error = {
        fs.Status.MAX_STEPS: fs.MaxStepsReached, fs.Status.NON_FINITE: fs.NonFiniteState,
        fs.Status.UNDERFLOW: fs.StepUnderflow,
    }[kind]  # fmt: skip
    stepping = fs.Adaptive(
        1e-7, 1e-7, per_sample=per_sample, dt_min=1e-6 if kind is fs.Status.UNDERFLOW else 0.0
    )
    with pytest.raises(error) as caught:
        fs.solve(
            fs.ODE(f, batched_time=True), torch.ones(2, 2), stepping=stepping, dense=True,
            save_at=[0.0, 0.1, 0.9],
            max_steps=40 if kind is fs.Status.MAX_STEPS else 1000,
        )  # fmt: skip
    sol, message = caught.value.solution, str(caught.value)
    assert " with dt = " in message
    assert ("component (1,)" if per_sample else "component (1, 1)") in message
    row = 1
    status = sol.status if not per_sample else sol.status[row]
    assert status == kind
    t1 = float(sol.t1 if not per_sample else sol.t1[row])
    assert f"t = {t1:.9g}" in message
    assert 0.1 < t1 < 0.9
    assert float(sol.y1[row, 0]) == pytest.approx(math.exp(-t1), rel=1e-5)
    assert bool(torch.isfinite(sol.y1).all())
    assert sol.ts is not None
    assert torch.allclose(sol.ys[:2, :, 0], (-sol.ts[:2].reshape(2, -1)).exp(), atol=1e-6)
    if per_sample:
        assert sol.status[0] == fs.Status.SUCCESS
        assert bool(torch.isnan(sol.ys[2, 1]).all())
        assert float(sol.ys[2, 0, 0]) == pytest.approx(math.exp(-0.9), rel=1e-5)
        assert int(sol.stats.accepted[1] + sol.stats.rejected[1]) <= sol.stats.attempts
    else:
        assert len(sol.ts) == 2
        assert sol.stats.accepted + sol.stats.rejected == sol.stats.attempts
        assert torch.allclose(sol(0.1), sol.ys[1], atol=1e-12)


def test_given_steps_hand_back_what_they_reached() -> None:
    ode = fs.ODE(lambda t, y: -y)
    with pytest.raises(fs.MaxStepsReached) as caught:
        fs.solve(ode, torch.ones(2), integrator=RK4(), stepping=fs.Fixed(steps=10), max_steps=5,
                 save_at=[0.2, 0.5, 0.7])  # fmt: skip
    sol = caught.value.solution
    assert sol.t1 == 0.5
    assert sol.ts is not None
    assert sol.ts.tolist() == [0.2, 0.5]
    assert torch.equal(sol.ys[-1], sol.y1)
    assert sol.stats.accepted == sol.stats.attempts == 5
