"""Fields that jump at known times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import Bosh3, Dopri5, Heun, TorchDiffEq

JUMPS = [0.3, 0.71]


def f(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """y' = -a y, plus 5 between the jumps."""
    t = t if t.ndim == 0 else t[:, None]
    on = (t > JUMPS[0]) & (t < JUMPS[1])
    return -a * y + torch.where(on, 5.0, 0.0)


def exact(y0: Tensor, t0: float, t1: float, a: Tensor) -> Tensor:
    ends = sorted([t0, t1])
    times = [t for t in JUMPS if ends[0] < t < ends[1]]
    times = [t0, *(times if t0 < t1 else times[::-1]), t1]
    y = y0
    for s, t in pairwise(times):
        on = 5.0 if JUMPS[0] < (s + t) / 2 < JUMPS[1] else 0.0
        decay = (-a * (t - s)).exp()
        y = y * decay + on * (1.0 - decay) / a
    return y


ODE = fs.ODE(f, batched_time=True)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", [Dopri5(), Heun()], ids=str)
@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
def test_a_known_jump_costs_nothing(
    per_sample: bool, backward: bool, method: Any, adjoint: fs.Adjoint
) -> None:
    """Full accuracy, hardly a step rejected, and the derivatives of the closed form."""
    t0, t1 = (1.0, 0.0) if backward else (0.0, 1.0)
    y0 = torch.tensor([[1.0], [2.0]], requires_grad=True)
    a = torch.tensor(1.3, requires_grad=True)
    tolerance = 1e-9 if method.order > 2 else 1e-4
    given: dict[str, Any] = {"args": (a,), "integrator": method, "adjoint": adjoint}
    plain = fs.Adaptive(tolerance, tolerance, per_sample=per_sample)
    told = fs.Adaptive(tolerance, tolerance, per_sample=per_sample,
                       jump_at=[*JUMPS[::-1], -1.0, 2.0])  # fmt: skip
    blind, sol = (fs.solve(ODE, y0, t0, t1, stepping=s, **given) for s in (plain, told))
    truth = exact(y0, t0, t1, a)
    error = (sol.y1 - truth).detach().abs().max()
    assert float(error) < 20 * tolerance
    rejected, before = (int(torch.as_tensor(s.stats.rejected).max()) for s in (sol, blind))
    assert rejected <= 2
    assert before >= rejected + 4
    ours = torch.autograd.grad(sol.y1.sum(), [y0, a])
    theirs = torch.autograd.grad(truth.sum(), [y0, a])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=500 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_no_stage_looks_across_a_jump(dtype: torch.dtype, backward: bool, per_sample: bool) -> None:
    """Also where the solve starts or ends on it, in the state's own precision."""
    t0, t1 = (0.7, 0.1) if backward else (0.1, 0.7)
    spans: list[tuple[float, float]] = []
    jumps = [0.1, 0.3, 0.7]

    class Watching(Bosh3):
        def step(self, field: Any, t0: Any, t1: Any, *rest: Any) -> Any:
            ends = [field.time(t).reshape(-1)[0].item() for t in (t0, t1)]
            spans.append((min(ends), max(ends)))
            return super().step(field, t0, t1, *rest)

    sol = fs.solve(
        fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(1, 1, dtype=dtype), t0, t1,
        integrator=Watching(), save_at=[t0, 0.3, t1], dense=True,
        stepping=fs.Adaptive(1e-4, 1e-4, jump_at=torch.tensor(jumps), per_sample=per_sample),
    )  # fmt: skip
    rounded = [float(torch.tensor(t, dtype=dtype)) for t in jumps]
    for low, high in spans:
        assert not any(low <= t <= high for t in rounded)
    time = torch.tensor([0.3]) if per_sample else 0.3
    assert torch.allclose(sol(time), sol.ys[1], atol=1e-6)
    assert float(torch.as_tensor(sol.t1).max()) == t1


@pytest.mark.parametrize("per_sample", [False, True])
def test_steps_land_where_they_are_told(per_sample: bool) -> None:
    wanted = torch.tensor([0.9, 0.25, 0.2501, -3.0, 0.6])
    for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
        sol = fs.solve(
            fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(1, 1), t0, t1,
            stepping=fs.Adaptive(step_at=wanted, per_sample=per_sample), save_at=fs.Steps(),
        )  # fmt: skip
        assert sol.ts is not None
        for t in (0.25, 0.2501, 0.6, 0.9):
            assert t in sol.ts.flatten().tolist()
        # a short step to land does not make those after it short
        assert len(sol.ts) < 16
        assert float(sol.y1) == pytest.approx(float(torch.tensor(t0 - t1).exp()), rel=1e-4)


def test_samples_pass_jumps_in_their_own_time() -> None:
    t1 = torch.tensor([0.2, 0.5, 1.0])
    y0, a = torch.ones(3, 1), torch.tensor(1.3)
    sol = fs.solve(ODE, y0, 0.0, t1, args=(a,),
                   stepping=fs.Adaptive(1e-9, 1e-9, per_sample=True, jump_at=JUMPS))  # fmt: skip
    for i in range(3):
        assert float(sol.y1[i]) == pytest.approx(
            float(exact(y0[i], 0.0, float(t1[i]), a)), abs=1e-8
        )


def test_events_and_jumps_together() -> None:
    """An event before the jump, which the step had already reached, brings it back in front."""
    clock = fs.ODE(lambda t, y: torch.where(t < 0.5, 1.0, -2.0) + 0.0 * y)
    event = fs.Event(lambda t, y: y[0] - 0.4, direction=1, update=lambda t, y: y - 0.4)
    for stepping in (fs.Adaptive(dt0=0.5, jump_at=[0.5]), fs.Adaptive(dt0=0.2, jump_at=[0.5])):
        sol = fs.solve(clock, torch.zeros(1), stepping=stepping, events=event, save_at=[0.5])
        assert float(sol.ys[0]) == pytest.approx(0.1, abs=1e-12)
        assert float(sol.y1) == pytest.approx(0.1 - 1.0, abs=1e-12)


def test_times_are_checked() -> None:
    for bad in ([float("nan")], torch.zeros(2, 2), torch.zeros(2, requires_grad=True)):
        for name in ("step_at", "jump_at"):
            with pytest.raises(ValueError, match=name):
                fs.Adaptive(**{name: bad})
    with pytest.raises(TypeError, match="outside engine"):
        fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), integrator=TorchDiffEq(),
                 stepping=fs.Adaptive(jump_at=[0.5]))  # fmt: skip
