"""Bad input: a typed error with the cure before the first step, or the right answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics import NoisePrediction, UnderdampedLangevin
from flowsde.integrators import (
    DDIM,
    ETDRK4,
    RK4,
    Dopri5,
    DPMSolverPP,
    EulerMaruyama,
    ImplicitRK,
    Integrator,
    Iterate,
    StepDoubling,
    TorchSDE,
    Tsit5,
)  # fmt: skip
from flowsde.integrators.base import Engine
from flowsde.integrators.exponential import Exponential
from flowsde.integrators.stochastic import Stochastic
from flowsde.integrators.symplectic import Symplectic
from flowsde.models import realnvp
from flowsde.paths import VP, Cosine, FlowMatching, karras, uniform_lambda

from .systems import admits, catalogue, generator, suited

ODE = fs.ODE(lambda t, y: -y)
Y0 = torch.ones(3, 2, device="cpu")


def refused(error: type[Exception], cure: str, **keywords: Any) -> None:
    """The solve raises before it calls the field."""
    calls = []
    dynamics = keywords.pop("dynamics", None) or fs.ODE(lambda t, y: calls.append(1) or -y)
    given = {"y0": torch.ones(3, 2), "t0": 0.0, "t1": 1.0, **keywords}
    with pytest.raises(error, match=cure):
        fs.solve(dynamics, given.pop("y0"), given.pop("t0"), given.pop("t1"), **given)
    assert not calls


def test_states() -> None:
    refused(TypeError, "float", y0=torch.ones(3, dtype=torch.int64))
    refused(TypeError, "as_tensor", y0=[1.0, 2.0])
    refused(TypeError, "as_tensor", y0=())
    refused(ValueError, "nan_to_num", y0=torch.tensor([1.0, math.nan]))
    refused(ValueError, "nan_to_num", y0=(torch.ones(2), torch.tensor([math.inf])))
    refused(ValueError, "nan_to_num", y0=torch.tensor([math.inf, -math.inf]))
    refused(ValueError, "nan_to_num", y0=torch.tensor([complex(0.0, math.nan), 1.0]))
    with pytest.raises(TypeError, match=r"ODE\(f\)"):
        fs.solve(lambda t, y: -y, torch.ones(2))  # type: ignore[arg-type]
    large = torch.full((4,), 0.9 * torch.finfo(torch.float32).max, dtype=torch.float32)
    for y0 in (large, (large, large.clone())):  # whose sum overflows
        assert fs.solve(fs.ODE(lambda t, y: y), y0, 0.0, 0.0).success


def test_devices() -> None:
    meta = torch.ones(2, device="meta")
    refused(TypeError, "several devices", y0=(torch.ones(2), meta))


def test_times() -> None:
    refused(ValueError, "finite", t1=math.inf)
    refused(ValueError, "finite", t0=math.nan)
    refused(TypeError, "number", t1="1")
    refused(ValueError, "0-d", t1=torch.ones(2, 2))
    refused(ValueError, "between the ends", save_at=[0.5, 1.5])
    refused(ValueError, "sort", save_at=[0.5, 0.2])
    refused(ValueError, "save_at is", save_at=torch.zeros(2, 2, 2))
    refused(ValueError, "t0", stepping=fs.Grid(torch.tensor([0.1, 1.0])))
    refused(ValueError, "t1", stepping=fs.Grid(torch.tensor([0.0, 0.9])))


def test_steppings() -> None:
    for bad in ({}, {"steps": 3, "dt": 0.1}, {"steps": 0}, {"dt": 0.0}, {"dt": -0.1},
                {"dt": math.inf}, {"steps": 2.5}):  # fmt: skip
        with pytest.raises(ValueError, match="Fixed"):
            fs.Fixed(**bad)
    for times in (torch.tensor([0.0]), torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.0, 0.0])):
        with pytest.raises(ValueError, match="Grid takes"):
            fs.Grid(times)
    for bad in ({"rtol": -1e-3}, {"atol": 0.0}, {"atol": -1.0}, {"dt0": 0.0}, {"dt_min": -1.0},
                {"dt_min": 2.0, "dt_max": 1.0}, {"safety": 1.5}, {"factor_min": 2.0},
                {"atol": torch.tensor([1e-3, -1e-3])}):  # fmt: skip
        with pytest.raises(ValueError, match=r"tolerance|dt|safety"):
            fs.Adaptive(**bad)
    refused(TypeError, "object", stepping="adaptive")
    refused(TypeError, "object", integrator="dopri5")


def test_max_steps() -> None:
    for bad in (-1, 1.5, True):
        refused(ValueError, "max_steps", max_steps=bad)
    for stepping in (fs.Fixed(steps=10), fs.Adaptive()):
        with pytest.raises(fs.MaxStepsReached, match="raise max_steps") as caught:
            fs.solve(ODE, Y0, stepping=stepping, integrator=Tsit5(), max_steps=0)
        assert torch.equal(caught.value.solution.y1, Y0)
        assert caught.value.solution.status is fs.Status.MAX_STEPS
    sol = fs.solve(ODE, Y0, stepping=fs.Fixed(steps=10), integrator=RK4(), max_steps=4,
                   throw=False, save_at=[0.0, 0.2, 0.4, 0.7])  # fmt: skip
    assert sol.t1 == pytest.approx(0.4)
    assert sol.ts is not None
    assert sol.ts.tolist() == [0.0, 0.2, 0.4]
    assert torch.allclose(sol.ys[2], Y0 * math.exp(-0.4), atol=1e-5)


@given(t=st.floats(-2, 2), adaptive=st.booleans())
def test_nothing_to_do_is_done_at_once(t: float, adaptive: bool) -> None:
    stepping = fs.Adaptive() if adaptive else fs.Fixed(steps=3)
    sol = fs.solve(ODE, Y0, t, t, stepping=stepping, max_steps=0, save_at=[t, t])
    assert torch.equal(sol.y1, Y0)
    assert torch.equal(sol.ys, torch.stack((Y0, Y0)))
    assert sol.success
    assert sol.stats.evaluations == 0


@given(t0=st.floats(-2, 2), length=st.floats(1e-6, 3), backward=st.booleans())
def test_any_span_either_way(t0: float, length: float, backward: bool) -> None:
    t1 = t0 - length if backward else t0 + length
    sol = fs.solve(ODE, Y0, t0, t1, stepping=fs.Adaptive(1e-8, 1e-10), save_at=[t0, t1])
    assert torch.allclose(sol.y1, Y0 * math.exp(-(t1 - t0)), rtol=1e-5)
    assert torch.equal(sol.ys[1], sol.y1)
    assert sol.t1 == t1


def test_fields_that_return_something_else() -> None:
    """Never a silent broadcast: shapes, dtypes and structures are the state's own."""
    bad = {
        "shape": lambda t, y: y.sum(-1, keepdim=True),
        "float32": lambda t, y: y,
        "structure": lambda t, y: (y,),
    }
    with pytest.raises(TypeError, match="state's own"):
        fs.solve(fs.ODE(bad["shape"]), torch.ones(3, 2))
    with pytest.raises(TypeError, match="give y0 as float64"):
        fs.solve(fs.ODE(lambda t, y: y.double()), torch.ones(3, dtype=torch.float32))
    with pytest.raises(TypeError, match="structure"):
        fs.solve(fs.ODE(bad["structure"]), torch.ones(3))
    with pytest.raises(TypeError, match="structure"):
        fs.solve(fs.ODE(lambda t, y: y[0]), (torch.ones(3), torch.ones(2)))


@pytest.mark.parametrize("per_sample", [False, True])
def test_fields_that_leave_the_finite_numbers(per_sample: bool) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        late = (t > 0.5) if t.ndim == 0 else (t > 0.5)[:, None]
        bad = torch.zeros_like(y)
        bad[1, 1] = 1.0
        return torch.where(late & (bad > 0), torch.nan, -y)

    ode = fs.ODE(f, batched_time=True)
    with pytest.raises(fs.NonFiniteState) as caught:
        fs.solve(ode, torch.ones(3, 2), stepping=fs.Adaptive(1e-6, 1e-6, per_sample=per_sample))
    message, partial = str(caught.value), caught.value.solution
    assert "0.5" in message or "0.49" in message
    assert ("(1, 1)" in message) or ("1 NON_FINITE" in message)
    assert bool(torch.isfinite(partial.y1).all())
    with pytest.raises(fs.NonFiniteState, match=r"component \(1, 1\)"):
        fs.solve(ode, torch.ones(3, 2), integrator=RK4(), stepping=fs.Fixed(steps=10))
    nowhere = fs.ODE(lambda t, y: y * torch.nan)
    with pytest.raises(fs.NonFiniteState):
        fs.solve(nowhere, torch.ones(3, 2))


def test_blow_up_ends_in_a_typed_error_with_what_was_computed() -> None:
    with pytest.raises(fs.SolveError, match=r"t = (0\.99|1\.00)") as caught:
        fs.solve(
            fs.ODE(lambda t, y: y.square()), torch.tensor([1.0, 0.1]), 0.0, 2.0,
            save_at=[0.5, 0.9, 1.5], stepping=fs.Adaptive(1e-8, 1e-8),
        )  # fmt: skip
    partial = caught.value.solution
    assert partial.ts is not None
    assert partial.ts.tolist() == [0.5, 0.9]
    assert float(partial.ys[1, 0]) == pytest.approx(10.0, rel=1e-5)


# --- structure ------------------------------------------------------------------------------------

ITO = fs.SDE(lambda t, y: -y, lambda t, y: 0.1 * y, noise="diagonal")
STRATONOVICH = fs.SDE(lambda t, y: -y, lambda t, y: 0.1 * y, noise="diagonal", stratonovich=True)
ADDITIVE = fs.SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y), noise="diagonal", additive=True)
LANGEVIN = UnderdampedLangevin(lambda t, x: -x)
STOCHASTIC = (Stochastic, StepDoubling, TorchSDE)


def fits_noise(method: Integrator, dynamics: fs.SDE) -> bool:
    """Whether a stochastic method declares that it fits; the rest fit no noise."""
    assert dynamics.noise is not None
    plain = method.method if isinstance(method, StepDoubling) else method
    return isinstance(plain, (Stochastic, TorchSDE)) and plain.fits(dynamics.noise)


def stack() -> fs.Map:
    return realnvp(2, 2, 4, generator=torch.Generator("cpu").manual_seed(0))


@pytest.mark.parametrize("method", catalogue(integrators, Integrator), ids=str)
def test_every_integrator_refuses_what_it_cannot_integrate(method: Integrator) -> None:
    """With a TypeError that names an integrator that can."""
    semilinear = isinstance(method, (Exponential, ETDRK4))
    imex = isinstance(method, ImplicitRK) and method.tableau.explicit is not None
    ordinary = not (semilinear or isinstance(method, (Symplectic, *STOCHASTIC, Iterate)))
    fits = {
        "ode": ordinary and not imex,
        "split": ordinary or semilinear,
        "separable": (ordinary and not imex) or isinstance(method, Symplectic),
        "ito": fits_noise(method, ITO), "additive": fits_noise(method, ADDITIVE),
        "stratonovich": fits_noise(method, STRATONOVICH),
        "langevin": admits(method, LANGEVIN) and not isinstance(method, TorchSDE),
        "map": isinstance(method, Iterate),
    }  # fmt: skip
    systems = {
        "ode": ODE, "split": fs.ODE(lambda t, y: y, linear=-1.0),
        "separable": fs.ODE(lambda t, y: (y[1], -y[0]), separable=True), "ito": ITO,
        "stratonovich": STRATONOVICH, "additive": ADDITIVE, "langevin": LANGEVIN,
        "map": stack(),
    }  # fmt: skip
    noisy = {"ito", "additive", "stratonovich", "langevin"}
    assert isinstance(method, STOCHASTIC) == any(fits[name] for name in noisy)
    for name, dynamics in systems.items():
        keywords: dict[str, Any] = {"integrator": method}
        if name != "map":
            own = isinstance(method, Engine)
            keywords["stepping"] = fs.Adaptive() if own else fs.Fixed(dt=0.5)
        if name in noisy:
            keywords["path"] = fs.Brownian(0)
        one = torch.ones(3, 2)
        y0 = (one, one) if name in ("separable", "langevin") else one
        if fits[name]:
            assert fs.solve(dynamics, y0, **keywords).success
        else:
            refused(TypeError, r"[Uu]se |add ", dynamics=dynamics, y0=y0, **keywords)


def test_steps_need_what_they_are_chosen_by() -> None:
    for method in catalogue(integrators, Integrator):
        if method.error_order is None and not isinstance(method, (Engine, Iterate, StepDoubling)):
            dynamics, y0 = suited(method, lambda t, y: y, torch.ones(3, 2))
            refused(TypeError, "Fixed", dynamics=dynamics, y0=y0, integrator=method,
                    stepping=fs.Adaptive(), path=fs.Brownian(0))  # fmt: skip
            refused(TypeError, "Fixed", dynamics=dynamics, y0=y0, integrator=method,
                    path=fs.Brownian(0))  # fmt: skip


def test_stochastic_solves_name_their_method_and_their_randomness() -> None:
    fixed = fs.Fixed(steps=3)
    refused(TypeError, "name the integrator", dynamics=ITO, stepping=fixed)
    refused(TypeError, "randomness", dynamics=ITO, stepping=fixed, integrator=EulerMaruyama())
    refused(TypeError, "torch.Generator", dynamics=ITO, stepping=fixed,
            integrator=EulerMaruyama(), generator=3)  # fmt: skip
    refused(TypeError, "Brownian", dynamics=ITO, stepping=fixed, integrator=EulerMaruyama(), path=3)
    refused(ValueError, "per-sample seeds", dynamics=ITO, stepping=fixed,
            integrator=EulerMaruyama(), path=fs.Brownian(torch.arange(5)))  # fmt: skip
    refused(ValueError, "not on the grid", dynamics=ITO, stepping=fixed,
            integrator=EulerMaruyama(), path=fs.Brownian(0, torch.linspace(0, 1, 5)))  # fmt: skip
    refused(TypeError, "DDIM brings its own", integrator=DDIM(1.0), stepping=fixed,
            dynamics=fs.LinearSDE(VP()).reverse_sde(lambda t, x: x),
            path=fs.Brownian(0))  # fmt: skip
    assert fs.solve(ITO, torch.ones(3, 2), integrator=EulerMaruyama(), stepping=fixed,
                    generator=generator()).success  # fmt: skip


def test_noise_is_declared_and_checked() -> None:
    with pytest.raises(ValueError, match="'diagonal'"):
        fs.SDE(lambda t, y: y, lambda t, y: y, noise="matrix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_size"):
        fs.SDE(lambda t, y: y, lambda t, y: y, noise="general")
    keywords: dict[str, Any] = {
        "integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=2), "path": fs.Brownian(0),
    }  # fmt: skip
    for noise, g, more in (
        ("diagonal", lambda t, y: torch.ones(3, 2, 2), {}),
        ("scalar", lambda t, y: torch.ones(3), {}),
        ("general", lambda t, y: torch.ones(3, 2), {"noise_size": 2}),
    ):  # fmt: skip
        with pytest.raises((TypeError, RuntimeError), match="diffusion"):
            fs.solve(fs.SDE(lambda t, y: y, g, noise=noise, **more), torch.ones(3, 2), **keywords)


def test_chains_run_between_whole_numbers() -> None:
    refused(ValueError, "whole numbers", dynamics=stack(), t1=1.5)
    refused(ValueError, "whole numbers", dynamics=stack(), t1=len(stack()) + 1.0)
    refused(TypeError, "leave out stepping", dynamics=stack(), t1=2.0, stepping=fs.Fixed(steps=2))
    with pytest.raises(TypeError, match="Iterate"):
        stack()(torch.tensor(0.0), torch.ones(1, 2))


def test_samplers_start_where_there_is_signal() -> None:
    for schedule in (FlowMatching(), Cosine()):
        denoiser = fs.Denoiser(lambda t, x: x, FlowMatching(), NoisePrediction())
        if schedule == FlowMatching():
            flow = fs.LinearSDE(schedule).probability_flow(denoiser)
            refused(ValueError, "0.999", dynamics=flow, t0=1.0, t1=0.0, integrator=DPMSolverPP(),
                    stepping=fs.Fixed(steps=3))  # fmt: skip
        else:
            with pytest.raises(ValueError, match="one schedule for both"):
                fs.LinearSDE(schedule).probability_flow(denoiser)
    for grid in (uniform_lambda, karras):
        with pytest.raises(ValueError, match="move the end"):
            grid(FlowMatching(), 1.0, 0.1, 5)
        with pytest.raises(ValueError, match="one step"):
            grid(VP(), 1.0, 0.1, 0)


def test_pieces_refuse_wrong_parts() -> None:
    for make, error in (
        (lambda: fs.ODE(3), TypeError), (lambda: fs.CDE(lambda t, y: y, 3), TypeError),
        (lambda: fs.LinearSDE("vp"), TypeError), (lambda: fs.Normal(2, 0.0), ValueError),
        (lambda: fs.Denoiser(lambda t, x: x, VP(), "eps"), TypeError),
        (lambda: fs.Denoiser(lambda t, x: x, "vp", NoisePrediction()), TypeError),
        (lambda: fs.LinearSDE(VP()).reverse_sde(lambda t, x: x, -1.0), ValueError),
        (lambda: DDIM(1.5), ValueError), (lambda: fs.Hutchinson(0), ValueError),
        (lambda: fs.Steps(0), ValueError), (lambda: fs.change_clock(ODE), TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            make()  # type: ignore[no-untyped-call]


def test_dense_output_is_asked_for_and_stays_inside() -> None:
    with pytest.raises(TypeError, match="dense=True"):
        fs.solve(ODE, Y0)(0.5)
    sol = fs.solve(ODE, Y0, dense=True)
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match="outside"):
            sol(t)
    assert torch.allclose(sol(torch.tensor([0.2, 0.4]))[1], Y0 * math.exp(-0.4), atol=1e-4)


def test_torchdiffeq_steps_by_itself() -> None:
    with pytest.raises(TypeError, match="steps by itself"):
        fs.solve(ODE, Y0, integrator=integrators.TorchDiffEq("rk4"), stepping=fs.Fixed(steps=3))
    for method, stepping in (("dopri5", fs.Fixed(dt=0.1)), ("rk4", fs.Adaptive())):
        with pytest.raises(TypeError, match="steps by itself"):
            fs.solve(ODE, Y0, integrator=integrators.TorchDiffEq(method), stepping=stepping)
    assert Dopri5().error_order == 5
