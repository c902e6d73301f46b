"""Events fall where closed forms say, and so do their derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flowsde as fs
from flowsde import integrators
from flowsde._scalar import to_float
from flowsde.integrators import RK4, DPMSolverPP, EulerMaruyama, ExplicitRK, Heun, Tsit5
from flowsde.models import realnvp

from .systems import catalogue

STEPPINGS = [
    fs.Fixed(steps=7), fs.Adaptive(1e-7, 1e-7), fs.Adaptive(1e-7, 1e-7, per_sample=True),
]  # fmt: skip
ADJOINTS = [fs.Direct(), fs.Checkpointed(1)]


def fall(t: Tensor, y: Tensor, g: Tensor, *_: Tensor) -> Tensor:
    return torch.stack((y[..., 1], -g + 0.0 * y[..., 1]), -1)


def height(t: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    return y[..., 0]


def decay(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
    return -a * y


FALL, DECAY = fs.ODE(fall, batched_time=True), fs.ODE(decay, batched_time=True)


def batched(stepping: fs.Stepping) -> bool:
    return isinstance(stepping, fs.Adaptive) and stepping.per_sample


# --- terminal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepping", STEPPINGS, ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_free_fall_meets_the_ground(stepping: fs.Stepping, adjoint: fs.Adjoint) -> None:
    """At sqrt(2 h / g), with speed -sqrt(2 g h), and so do their derivatives."""
    h, g = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(9.81, requires_grad=True)
    y0 = torch.stack((h, torch.zeros(2)), -1)
    if not batched(stepping):
        y0 = y0[0]
    sol = fs.solve(
        FALL, y0, 0.0, 2.0, args=(g,), integrator=Tsit5(), stepping=stepping, adjoint=adjoint,
        events=fs.Event(height),
    )  # fmt: skip
    time, speed = (2.0 * h / g).sqrt(), -(2.0 * g * h).sqrt()
    if not batched(stepping):
        time, speed = time[0], speed[0]
    assert torch.allclose(sol.t1, time, atol=1e-13)
    assert torch.allclose(sol.y1[..., 1], speed, atol=1e-12)
    assert float(sol.y1[..., 0].detach().abs().max()) < 1e-13
    assert sol.success
    for found, exact in ((sol.t1, time), (sol.y1[..., 1], speed)):
        ours = torch.autograd.grad(found.sum(), [h, g], retain_graph=True)
        theirs = torch.autograd.grad(exact.sum(), [h, g], retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-11)
    (dy,) = torch.autograd.grad(sol.y1[..., 0].sum(), [h])
    assert float(dy.abs().max()) < 1e-12  # the ground stays where it is
    assert sol.events is not None
    if batched(stepping):
        assert sol.status.tolist() == [fs.Status.EVENT] * 2
        assert sol.events.fired.tolist() == [0, 0]
    else:
        assert sol.status is fs.Status.EVENT
        assert sol.events.fired == 0
    assert torch.equal(sol.events.ts[0][0], sol.t1)
    assert torch.equal(sol.events.ys[0][0], sol.y1)


@pytest.mark.parametrize("method", catalogue(integrators, ExplicitRK), ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_derivatives_are_those_of_the_discrete_solve(method: ExplicitRK, per_sample: bool) -> None:
    """By finite differences, coarse steps and all, whatever the dense output."""

    def f(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
        t = t[..., None]
        return torch.stack((y[..., 1], -a * y[..., 0].sin()), -1) + 0.1 * t.cos()

    def run(y0: Tensor, a: Tensor, t0: Tensor) -> tuple[Tensor, Tensor]:
        sol = fs.solve(
            fs.ODE(f, batched_time=True), y0, t0, 1.7, args=(a,), integrator=method,
            stepping=fs.Fixed(steps=3),
            events=fs.Event(lambda t, y, a: y[..., 0] * y[..., 1] + 0.3 * t - a),
        )  # fmt: skip
        assert bool(torch.as_tensor(sol.status == fs.Status.EVENT).all())
        return sol.t1, sol.y1

    y0 = torch.tensor([[0.1, 1.1], [0.2, 1.3]])
    t0 = torch.tensor([0.0, 0.1]) if per_sample else torch.tensor(0.0)
    y0 = y0 if per_sample else y0[0]
    inputs = [x.requires_grad_() for x in (y0, torch.tensor(0.5), t0)]
    assert gradcheck(run, inputs, atol=1e-6, fast_mode=True)


def test_second_derivatives() -> None:
    def run(y0: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        sol = fs.solve(
            DECAY, y0, 0.0, 4.0, args=(a,), integrator=RK4(), stepping=fs.Fixed(steps=3),
            events=fs.Event(lambda t, y, a: y.prod() - 0.2 * a),
        )  # fmt: skip
        return torch.as_tensor(sol.t1), sol.y1

    y0, a = torch.tensor([1.0, 1.5], requires_grad=True), torch.tensor(0.7, requires_grad=True)
    assert gradgradcheck(run, [y0, a], atol=1e-5, fast_mode=True)


@settings(max_examples=6)
@given(
    rate=st.floats(0.3, 3.0), level=st.floats(0.05, 0.9), start=st.floats(-1.0, 1.0),
    backward=st.booleans(), fixed=st.booleans(),
)  # fmt: skip
def test_either_way_in_time(
    rate: float, level: float, start: float, backward: bool, fixed: bool
) -> None:
    """y = exp(-a (t - t0)) is at c after log(1 / c) / a; backwards it grows instead."""
    a, sign = torch.tensor(rate, requires_grad=True), -1.0 if backward else 1.0
    stepping = fs.Fixed(steps=200) if fixed else fs.Adaptive(1e-10, 1e-12)
    sol = fs.solve(
        DECAY, torch.ones(()), start, start + sign * 12.0, args=(sign * a,), integrator=Tsit5(),
        stepping=stepping, events=fs.Event(lambda t, y, a: y - level, direction=-1),
    )  # fmt: skip
    exact = start + sign * math.log(1.0 / level) / a
    assert to_float(sol.t1) == pytest.approx(to_float(exact), abs=1e-6)
    (g,) = torch.autograd.grad(sol.t1, [a])
    (h,) = torch.autograd.grad(exact, [a])
    assert float(g) == pytest.approx(float(h), rel=1e-5)


# --- what is found --------------------------------------------------------------------------------


def test_two_crossings_in_one_step() -> None:
    """A test of signs at the ends of the step sees neither of them."""
    clock = fs.ODE(lambda t, y: torch.ones_like(y), batched_time=True)
    for gap in (0.2, 0.07):
        fn = lambda t, y: (y[..., 0] - 0.5) ** 2 - gap**2
        for terminal in (False, True):
            sol = fs.solve(
                clock, torch.zeros(1), stepping=fs.Fixed(steps=1), integrator=RK4(),
                events=fs.Event(fn, terminal=terminal),
            )  # fmt: skip
            assert sol.events is not None
            found = sol.events.ts[0].tolist()
            assert found == pytest.approx([0.5 - gap, 0.5 + gap][: 2 - terminal], abs=1e-14)
        assert fn(None, torch.zeros(1)) > 0
        assert fn(None, torch.ones(1)) > 0


@pytest.mark.parametrize("stepping", STEPPINGS, ids=str)
def test_direction_and_start(stepping: fs.Stepping) -> None:
    """sin has its zero at t0 not counted, then those of the asked direction."""
    ode = fs.ODE(lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1), batched_time=True)
    y0 = torch.tensor([[0.0, 1.0]])
    wanted = {0: [1, 2], 1: [2], -1: [1]}
    for direction, multiples in wanted.items():
        sol = fs.solve(
            ode, y0, 0.0, 7.0, integrator=Tsit5(), stepping=stepping,
            events=fs.Event(height, terminal=False, direction=direction),
        )  # fmt: skip
        assert sol.events is not None
        exact = torch.tensor([math.pi * n for n in multiples])
        tolerance = 0.05 if isinstance(stepping, fs.Fixed) else 1e-5
        assert torch.allclose(sol.events.ts[0].flatten(), exact, atol=tolerance)
        assert float(sol.events.ys[0][..., 0].abs().max()) < 1e-13
        assert sol.status == fs.Status.SUCCESS
        assert float(sol.t1) == 7.0


def test_the_earliest_wins_and_those_at_one_time_all_fire() -> None:
    clock = fs.ODE(lambda t, y: torch.ones_like(y))
    at = lambda c: fs.Event(lambda t, y: y.sum() - c)
    sol = fs.solve(clock, torch.zeros(1), events=[at(0.8), at(0.3), at(0.31)])
    assert sol.events is not None
    assert sol.events.fired == 1
    assert float(sol.t1) == pytest.approx(0.3, abs=1e-15)
    assert [len(t) for t in sol.events.ts] == [0, 1, 0]
    # a ball into the corner of a box turns both ways
    free = fs.ODE(lambda t, y: torch.cat((y[2:], 0.0 * y[2:])))
    walls = [
        fs.Event(lambda t, y, i=i: 0.5 - y[i], direction=-1,
                 update=lambda t, y, i=i: torch.where(torch.arange(4) == i + 2, -y, y))
        for i in range(2)
    ]  # fmt: skip
    sol = fs.solve(free, torch.tensor([0.0, 0.0, 1.0, 1.0]), events=walls)
    assert torch.allclose(sol.y1, torch.tensor([0.0, 0.0, -1.0, -1.0]), atol=1e-14)


def test_a_crossing_that_has_no_slope_is_found_too() -> None:
    """Jumps and flat zeros: bisection's guarantee, and no gradient where there is none."""
    clock = fs.ODE(lambda t, y: torch.ones_like(y))
    y0 = torch.zeros(1, requires_grad=True)
    sol = fs.solve(
        clock, y0, events=fs.Event(lambda t, y: torch.where(y[0] > 0.3, 1.0, -1.0))
    )  # fmt: skip
    assert to_float(sol.t1) == pytest.approx(0.3, abs=1e-14)
    flat = fs.solve(clock, y0, events=fs.Event(lambda t, y: (y[0] - 0.3) ** 5))
    assert to_float(flat.t1) == pytest.approx(0.3, abs=1e-3)
    for result in (sol, flat):
        (g,) = torch.autograd.grad(result.y1.sum(), [y0])
        assert bool(torch.isfinite(g).all())


def test_a_root_takes_few_looks() -> None:
    calls = []

    def fn(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return y.exp().sum() - 1.7

    sol = fs.solve(
        fs.ODE(lambda t, y: torch.ones_like(y)), torch.zeros(1), integrator=RK4(),
        stepping=fs.Fixed(steps=1), events=fs.Event(fn),
    )  # fmt: skip
    assert float(sol.t1) == pytest.approx(math.log(1.7), abs=1e-15)
    assert len(calls) <= 1 + 9 + 16 + 2


# --- updates --------------------------------------------------------------------------------------


def bounce(times: int, h: Tensor, g: Tensor, e: Tensor, t: float) -> tuple[list[Tensor], Tensor]:
    """Bounce times of a ball dropped from h, and its height at t after the last of them."""
    first, speed = (2.0 * h / g).sqrt(), (2.0 * g * h).sqrt()
    found = [first]
    for n in range(1, times):
        found.append(found[-1] + 2.0 * speed * e**n / g)
    after = t - found[-1]
    return found, speed * e**times * after - 0.5 * g * after**2


@pytest.mark.parametrize("stepping", STEPPINGS, ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_bouncing_ball(stepping: fs.Stepping, adjoint: fs.Adjoint) -> None:
    h, g, e = (torch.tensor(x, requires_grad=True) for x in (1.0, 9.81, 0.8))
    times, end = bounce(4, h, g, e, 2.3)
    y0 = torch.stack((h, torch.zeros(())))
    hit = fs.Event(height, update=lambda t, y, g, e: torch.stack((y[..., 0], -e * y[..., 1]), -1))
    at = [0.3, 1.0, 2.0, 2.3]
    sol = fs.solve(
        FALL, y0[None] if batched(stepping) else y0, 0.0, 2.3, args=(g, e), integrator=Tsit5(),
        stepping=stepping, adjoint=adjoint, events=hit, save_at=at, dense=True,
    )  # fmt: skip
    assert sol.events is not None
    assert sol.success
    found = sol.events.ts[0].reshape(-1)
    inputs = [h, g, e]
    for ours, exact in ((found, torch.stack(times)), (sol.y1[..., 0].reshape(()), end)):
        assert torch.allclose(ours, exact, atol=1e-11)
        weights = torch.linspace(1.0, 2.0, ours.numel()).reshape(ours.shape)
        a = torch.autograd.grad((weights * ours).sum(), inputs, retain_graph=True)
        b = torch.autograd.grad((weights * exact).sum(), inputs, retain_graph=True)
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, atol=1e-9)
    for i, t in enumerate(at):
        passed = sum(to_float(b) < t for b in times)
        exact = bounce(passed, h, g, e, t)[1] if passed else h - 0.5 * g * t**2
        time = torch.tensor([t]) if batched(stepping) else t
        for state in (sol.ys[i], sol(time)):
            assert to_float(state.reshape(-1)[0]) == pytest.approx(to_float(exact), abs=1e-11)


@pytest.mark.parametrize("stepping", [STEPPINGS[2], fs.Fixed(steps=9)], ids=str)
def test_spiking_neurons(stepping: fs.Stepping) -> None:
    """v' = (I - v) / tau, reset from 1 to 0: spikes every tau log(I / (I - 1)), each its own."""
    drive = torch.tensor([1.5, 3.0, 0.9], requires_grad=True)
    tau = torch.tensor(0.4, requires_grad=True)
    cell = fs.ODE(lambda t, v, i, tau: (i - v) / tau, batched_time=True)
    spike = fs.Event(lambda t, v, i, tau: v - 1.0, update=lambda t, v, i, tau: 0.0 * v)
    sol = fs.solve(
        cell, torch.zeros(3), torch.zeros(3), 1.5, args=(drive, tau), stepping=stepping,
        integrator=integrators.Dopri8(), events=spike,
    )  # fmt: skip
    assert sol.events is not None
    ts = sol.events.ts[0]
    tolerance = 1e-9 if isinstance(stepping, fs.Adaptive) else 1e-6
    for i, current in enumerate([1.5, 3.0]):
        period = tau * (drive[i] / (drive[i] - 1.0)).log()
        count = int(1.5 / to_float(period))
        exact = period * torch.arange(1, count + 1)
        assert bool(torch.isnan(ts[count:, i]).all()), current
        assert torch.allclose(ts[:count, i], exact, atol=tolerance)
        a = torch.autograd.grad(ts[:count, i].sum(), [drive, tau], retain_graph=True)
        b = torch.autograd.grad(exact.sum(), [drive, tau])
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, atol=100 * tolerance)
    assert bool(torch.isnan(ts[:, 2]).all())
    assert float(sol.y1[2].detach()) == pytest.approx(0.9 * (1 - math.exp(-1.5 / 0.4)), abs=1e-6)


# --- per sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stepping", [STEPPINGS[2], fs.Fixed(steps=30)], ids=str)
@pytest.mark.parametrize("update", [False, True])
def test_each_sample_as_if_it_were_alone(stepping: fs.Stepping, update: bool) -> None:
    f = lambda t, y: torch.stack((y[:, 1], -y[:, 2] * y[:, 0], 0.0 * y[:, 2]), 1)
    ode = fs.ODE(f, batched_time=True)
    rates = torch.tensor([3.0, 7.0, 0.01, 15.0])
    y0 = torch.stack((torch.ones(4), torch.zeros(4), rates), 1)
    kick = torch.tensor([1.0, -1.1, 1.0])
    event = fs.Event(lambda t, y: y[:, 0] + 0.1 * t, direction=-1,
                     update=(lambda t, y: y * kick) if update else None)  # fmt: skip
    given: dict[str, Any] = {
        "integrator": Tsit5(), "stepping": stepping, "events": event, "save_at": [0.2, 0.7, 1.3],
    }  # fmt: skip
    whole = fs.solve(ode, y0, torch.zeros(4), 1.5, **given)
    assert whole.events is not None
    for i in range(4):
        alone = fs.solve(ode, y0[i : i + 1], torch.zeros(1), 1.5, **given)
        assert alone.events is not None
        count = len(alone.events.ts[0])
        assert torch.allclose(whole.events.ts[0][:count, i], alone.events.ts[0][:, 0], atol=1e-9)
        assert bool(torch.isnan(whole.events.ts[0][count:, i]).all())
        assert torch.allclose(whole.y1[i], alone.y1[0], atol=1e-8)
        assert torch.allclose(whole.ys[:, i], alone.ys[:, 0], atol=1e-8, equal_nan=True)
        assert int(whole.status[i]) == int(alone.status[0])
    if not update:
        assert whole.status.tolist() == [fs.Status.EVENT] * 2 + [0, fs.Status.EVENT]
        assert whole.events.fired.tolist() == [0, 0, -1, 0]
        assert bool((whole.t1[whole.status == 0] == 1.5).all())


def test_gradients_of_samples_that_end_at_their_own_times() -> None:
    """Those of each alone: samples without an event, or past theirs, put nothing in."""
    results = []
    for adjoint in ADJOINTS:
        a = torch.tensor([1.0, 2.0, 0.1], requires_grad=True)
        ode = fs.ODE(lambda t, y, a: -a * y, batched_time=True)
        sol = fs.solve(
            ode, torch.ones(3), 0.0, 3.0, args=(a,), adjoint=adjoint, stepping=STEPPINGS[2],
            events=fs.Event(lambda t, y, a: y - 0.5), save_at=[0.3, 1.0, 3.0],
        )  # fmt: skip
        exact = torch.where(torch.tensor([True, True, False]), math.log(2.0) / a, 3.0)
        assert torch.allclose(sol.t1, exact, atol=1e-8)
        (g,) = torch.autograd.grad(sol.t1.sum() + sol.ys[0].sum(), [a], retain_graph=True)
        (h,) = torch.autograd.grad(exact.sum() + (-0.3 * a).exp().sum(), [a])
        assert torch.allclose(g, h, atol=1e-6)
        results.append(g)
        assert torch.isnan(sol.ys).tolist() == [
            [False, False, False], [True, True, False],
            [True, True, False],
        ]  # fmt: skip
    assert torch.allclose(*results, rtol=1e-13)


# --- what goes along ------------------------------------------------------------------------------


def test_what_lies_past_the_end_is_left_out() -> None:
    sol = fs.solve(
        DECAY, torch.ones(1), 0.0, 5.0, args=(torch.tensor(1.0),), save_at=[0.1, 0.6, 1.0, 4.0],
        events=fs.Event(lambda t, y, a: y[0] - 0.5), dense=True,
    )  # fmt: skip
    assert sol.ts is not None
    assert sol.ts.tolist() == [0.1, 0.6]
    assert isinstance(sol.t1, float)
    assert torch.allclose(sol(sol.t1), sol.y1, atol=1e-15)
    with pytest.raises(ValueError, match="outside"):
        sol(0.8)
    steps = fs.solve(
        DECAY, torch.ones(1), 0.0, 5.0, args=(torch.tensor(1.0),), save_at=fs.Steps(),
        events=fs.Event(lambda t, y, a: y[0] - 0.5),
    )  # fmt: skip
    assert steps.ts is not None
    assert float(steps.ts[-1]) == steps.t1
    assert torch.equal(steps.ys[-1], steps.y1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_states_of_every_kind(dtype: torch.dtype) -> None:
    y0 = {"a": torch.ones(2, dtype=dtype), "b": (torch.ones(2, 3, dtype=dtype),)}
    ode = fs.ODE(lambda t, y: {"a": -y["a"], "b": (-2.0 * y["b"][0],)}, batched_time=True)
    event = fs.Event(lambda t, y: y["b"][0].abs().mean(1) - 0.5)
    sol = fs.solve(ode, y0, events=event, stepping=fs.Adaptive(1e-5, 1e-6, per_sample=True))
    assert sol.t1.tolist() == pytest.approx([math.log(2.0) / 2] * 2, abs=1e-5)
    assert sol.y1["a"].dtype == dtype
    assert sol.events is not None
    assert sol.events.ys[0]["a"].shape == (1, 2)
    none = fs.solve(ode, y0, events=fs.Event(lambda t, y: y["a"].abs().min()))
    assert none.events is not None
    assert none.events.fired == -1
    assert none.events.ys[0]["b"][0].shape == (0, 2, 3)
    assert none.status is fs.Status.SUCCESS


def test_an_event_at_the_end() -> None:
    clock = fs.ODE(lambda t, y: torch.ones_like(y))
    for stepping in (fs.Fixed(steps=4), fs.Adaptive(dt0=0.25, dt_max=0.25)):
        given: dict[str, Any] = {"integrator": Heun()}
        sol = fs.solve(clock, torch.zeros(()), stepping=stepping,
                       events=fs.Event(lambda t, y: y - 1.0), **given)  # fmt: skip
        assert sol.status is fs.Status.EVENT
        assert float(sol.t1) == pytest.approx(1.0, abs=1e-15)
        event = fs.Event(lambda t, y: y - 1.0, update=lambda t, y: 0 * y)
        sol = fs.solve(clock, torch.zeros(()), stepping=stepping, save_at=[0.5, 1.0],
                       events=event, **given)  # fmt: skip
        assert sol.success
        assert float(sol.y1) == pytest.approx(0.0, abs=1e-15)


def test_what_cannot_be_watched_is_refused() -> None:
    ode, y0 = fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(3, 2)
    for fn, cure in (
        (height, "per_sample=True"), (lambda t, y: 1.0, "real"), (lambda t, y: y > 0, "real"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=cure):
            fs.solve(ode, y0, events=fs.Event(fn))
    with pytest.raises(TypeError, match=r"\(3,\)"):
        fs.solve(ode, y0, stepping=STEPPINGS[2], events=fs.Event(lambda t, y: y.min()))
    with pytest.raises(TypeError, match="own shape"):
        fs.solve(ode, y0, events=fs.Event(lambda t, y: y.min() - 0.5, update=lambda t, y: y[0]))
    for events in ([], [height], height):
        with pytest.raises(TypeError, match="Event"):
            fs.solve(ode, y0, events=events)
    with pytest.raises(ValueError, match="direction"):
        fs.Event(height, direction=2)
    with pytest.raises(TypeError, match="fn"):
        fs.Event(3)  # type: ignore[arg-type]
    event = fs.Event(lambda t, y: y.min() - 0.5)
    with pytest.raises(TypeError, match="no states between"):
        fs.solve(
            ode, y0, integrator=integrators.TorchDiffEq(), stepping=fs.Adaptive(), events=event
        )
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.1 * y, noise="diagonal")
    with pytest.raises(TypeError, match="smooth"):
        fs.solve(sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=3),
                 path=fs.Brownian(0), events=event)  # fmt: skip
    with pytest.raises(TypeError, match="smooth"):
        fs.solve(realnvp(2, 2, 4, generator=torch.Generator("cpu")), y0, events=event)


def test_multistep_methods_start_again_after_an_update() -> None:
    """The slope before the jump is no guide to the one after it."""
    split = fs.ODE(lambda t, y: torch.ones_like(y), linear=-1.0)
    event = fs.Event(lambda t, y: y[0] - 0.5, update=lambda t, y: 0.0 * y)
    sol = fs.solve(split, torch.zeros(1), 0.0, 2.0, integrator=DPMSolverPP(),
                   stepping=fs.Fixed(steps=20), events=event)  # fmt: skip
    assert sol.events is not None
    exact = math.log(2.0) * torch.arange(1, 3)
    assert torch.allclose(sol.events.ts[0], exact, atol=1e-13)


@pytest.mark.parametrize(
    "more",
    [
        {"stepping": fs.Adaptive(per_sample=True)},
        {"t0": torch.zeros(0), "integrator": RK4(), "stepping": fs.Fixed(steps=3)},
    ],
)
def test_a_batch_of_none_has_no_events(more: dict[str, Any]) -> None:
    event = fs.Event(lambda t, y: y[:, 0] - 0.5)
    dynamics = fs.ODE(lambda t, y: -y, batched_time=True)
    solution = fs.solve(dynamics, torch.zeros(0, 3), **{"t0": 0.0, **more}, t1=1.0, events=event)
    assert solution.y1.shape == (0, 3)
    assert solution.events is not None
    assert solution.events.ys[0].shape[-1] == 3


def test_an_update_in_place_leaves_what_was_recorded() -> None:
    def bounce(t: Tensor, y: Tensor) -> Tensor:
        y[1] *= -0.8
        return y

    dynamics = fs.ODE(lambda t, y: torch.stack((y[1], -9.8 + 0.0 * y[1])))
    event = fs.Event(lambda t, y: y[0], update=bounce, direction=-1)
    solution = fs.solve(dynamics, torch.tensor([2.0, 0.0]), 0.0, 1.0, events=event)
    assert solution.events is not None
    assert float(solution.events.ys[0][0, 1]) == pytest.approx(-math.sqrt(2 * 9.8 * 2.0), rel=1e-5)
