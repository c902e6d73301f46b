"""Solvers from outside."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS
from torchsde._core import methods
from torchsde.settings import METHODS

import flowsde as fs
from flowsde.integrators import (
    EulerMaruyama,
    Milstein,
    ReversibleHeun,
    SciPy,
    StochasticHeun,
    StochasticMidpoint,
    TorchDiffEq,
    TorchSDE,
)  # fmt: skip
from flowsde.integrators.engines import _FIXED, _SCIPY, _TORCHSDE
from flowsde.paths import BrownianTree

from .systems import slope

TIGHT = fs.Adaptive(1e-9, 1e-10)


def field(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
    a, b = y["pair"]
    return {"pair": (b * t, -a * t), "z": 1j * t * y["z"]}


def start(dtype: torch.dtype) -> dict[str, Any]:
    pair = (torch.tensor([[1.0], [0.5]], dtype=dtype), torch.tensor([[0.0], [-0.3]], dtype=dtype))
    return {"pair": pair, "z": torch.tensor(1.0 + 0.5j, dtype=dtype.to_complex())}


@pytest.mark.parametrize("method", sorted(set(SOLVERS) - {"scipy_solver"}))
def test_every_method_of_torchdiffeq(method: str) -> None:
    """Its own list: on a state of several leaves, forward, with saved times."""
    stepping = fs.Fixed(dt=0.01) if method in _FIXED else fs.Adaptive(1e-6, 1e-6)
    ode, y0 = fs.ODE(lambda t, y: -y * t.cos()), torch.tensor([1.0, -2.0], requires_grad=True)
    sol = fs.solve(
        ode, y0, 0.0, 1.0, integrator=TorchDiffEq(method), stepping=stepping, save_at=[0.4, 1.0]
    )
    exact = torch.stack([y0 * math.exp(-math.sin(t)) for t in (0.4, 1.0)])
    loose = {"euler": 2e-2}.get(method, 1e-3)
    assert float((sol.ys - exact).detach().abs().max()) < loose
    (g,) = torch.autograd.grad(sol.y1.sum(), [y0])
    assert torch.allclose(g, torch.full((2,), math.exp(-math.sin(1.0))), atol=loose)
    assert sol.stats.evaluations > 0


@pytest.mark.parametrize("method", _SCIPY)
@pytest.mark.parametrize("backward", [False, True])
def test_every_method_of_scipy(method: str, backward: bool) -> None:
    """On a pytree with a complex leaf, either way, at saved times; the calls are counted."""
    t0, t1, at = (1.2, 0.1, 0.7) if backward else (0.1, 1.2, 0.7)
    calls = []

    def counted(t: Tensor, y: Any) -> Any:
        calls.append(t)
        return field(t, y)

    stepping = fs.Adaptive(1e-7, 1e-8, dt0=5.0, dt_max=0.5)
    y0 = start(torch.float64)
    sol = fs.solve(
        fs.ODE(counted), y0, t0, t1, integrator=SciPy(method), stepping=stepping, save_at=[at, t1]
    )
    truth = fs.solve(fs.ODE(field), y0, t0, t1, stepping=TIGHT, save_at=[at, t1])
    for a, b in zip(*(torch.utils._pytree.tree_leaves(s.ys) for s in (sol, truth)), strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) < 1e-5
    assert sol.stats.evaluations == len(calls) > 10


def test_scipy_keeps_the_states_dtype() -> None:
    y0 = start(torch.float32)
    sol = fs.solve(fs.ODE(field), y0, integrator=SciPy("RK45"))
    assert sol.y1["z"].dtype == torch.complex64
    assert sol.y1["pair"][0].dtype == torch.float32


def test_scipy_solves_what_is_stiff() -> None:
    """Robertson's kinetics, to t = 1e4: out of reach of an explicit method."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y
        first, second, third = 0.04 * a, 3e7 * b * b, 1e4 * b * c
        return torch.stack((third - first, first - second - third, second))

    sol = fs.solve(fs.ODE(f), torch.tensor([1.0, 0.0, 0.0]), 0.0, 4e4, integrator=SciPy("LSODA"),
                   stepping=fs.Adaptive(1e-7, 1e-10))  # fmt: skip
    assert float(sol.y1[0]) == pytest.approx(3.898e-2, rel=1e-3)  # Mazzia and Magherini 2008
    assert sol.stats.evaluations < 5000


def test_no_gradient_is_dropped_silently() -> None:
    """y0, an argument, a parameter, what a closure holds, a time: each is refused."""
    one = torch.ones(2, 3)
    leaf, net = torch.ones(3, requires_grad=True), nn.Linear(3, 3)
    end = torch.tensor(1.0, requires_grad=True)
    plain = fs.ODE(lambda t, y, *args: -y)
    cases: list[tuple[fs.Dynamics, Tensor, dict[str, Any]]] = [
        (plain, leaf, {}), (plain, one, {"args": (leaf,)}), (plain, one, {"t0": end - 1.0}),
        (plain, one, {"t1": end}), (fs.ODE(lambda t, y: leaf * y), one, {}),
        (fs.ODE(nn.Sequential()), one, {"args": ({"u": leaf},)}),
    ]  # fmt: skip

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y)

    cases.append((fs.ODE(Held()), one, {}))
    for dynamics, y0, more in cases:
        with pytest.raises(TypeError, match="no_grad"):
            fs.solve(dynamics, y0, **{"t0": 0.0, "t1": 1.0, "integrator": SciPy(), **more})
    with torch.no_grad():
        assert fs.solve(fs.ODE(Held()), one, integrator=SciPy()).success


@pytest.mark.parametrize("method", ["RK45", "BDF", "Radau", "LSODA"])
def test_a_field_that_is_not_finite_ends_in_a_typed_error(method: str) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, torch.nan, -y)

    with pytest.raises(fs.SolveError, match="look at the field there") as caught:
        fs.solve(fs.ODE(f), torch.ones(2), integrator=SciPy(method), save_at=[0.3, 0.4, 1.0])
    partial = caught.value.solution
    assert partial.t1 == 0.4
    assert partial.ts is not None
    assert partial.ts.tolist() == [0.3, 0.4]
    assert torch.allclose(partial.y1, torch.full((2,), math.exp(-0.4)), atol=1e-4)


def test_blow_up_is_a_step_underflow() -> None:
    with pytest.raises(fs.StepUnderflow, match="RK45 gave up"):
        fs.solve(fs.ODE(lambda t, y: y.square()), torch.ones(2), 0.0, 2.0, integrator=SciPy("RK45"))


def test_errors_of_the_field_itself_pass_through() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise ValueError("my own")
        return -y

    with pytest.raises(ValueError, match="my own"):
        fs.solve(fs.ODE(f), torch.ones(2), integrator=SciPy())


def test_what_scipy_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="LSODA"):
        SciPy("dopri5")
    one = torch.ones(2, 1)
    for stepping in (
        fs.Fixed(steps=4), fs.Adaptive(per_sample=True), fs.Adaptive(torch.tensor([1e-3, 1e-4])),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"Adaptive\(rtol, atol\)|batched_time|one time"):
            fs.solve(fs.ODE(lambda t, y: -y), one, integrator=SciPy(), stepping=stepping)
    with pytest.raises(TypeError, match=r"SciPy\(method\)"):
        fs.solve(fs.ODE(lambda t, y: -y), one, integrator=TorchDiffEq("scipy_solver"))
    with pytest.raises(TypeError, match="save_at"):
        fs.solve(fs.ODE(lambda t, y: -y), one, integrator=SciPy(), dense=True)(0.5)
    with pytest.raises(TypeError, match=r"Direct\(\)"):
        fs.solve(fs.ODE(lambda t, y: -y), one, integrator=SciPy(), adjoint=fs.Checkpointed())


# --- torchsde -------------------------------------------------------------------------------------


def stochastic(kind: Any, stratonovich: bool, additive: bool = False) -> fs.SDE:
    def g(t: Tensor, y: Tensor) -> Tensor:
        own = 0.3 + 0.1 * (torch.zeros_like(y) if additive else y.sin()) + 0.1 * t
        return torch.stack((own, 0.5 * own), -1) if kind == "general" else own

    return fs.SDE(
        lambda t, y: -y + t, g, noise=kind, stratonovich=stratonovich, additive=additive,
        noise_size=2 if kind == "general" else None,
    )  # fmt: skip


TWINS = {
    "euler": (EulerMaruyama(), False), "milstein": (Milstein(), False),
    "heun": (StochasticHeun(), True), "midpoint": (StochasticMidpoint(), True),
    "reversible_heun": (ReversibleHeun(), True),
}  # fmt: skip


@pytest.mark.parametrize("method", TWINS)
@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_torchsde_and_ours_take_the_same_steps(method: str, kind: str) -> None:
    """On one path, to rounding: states, saved states and gradients."""
    ours, stratonovich = TWINS[method]
    sde = stochastic(kind, stratonovich, additive=kind == "general")
    y0 = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], requires_grad=True)
    found = []
    for method_, stepping in ((ours, fs.Fixed(steps=8)), (TorchSDE(method), fs.Fixed(dt=0.125))):
        sol = fs.solve(
            sde, y0, integrator=method_, stepping=stepping, path=BrownianTree(3, 0.0, 1.0),
            save_at=[0.25, 1.0],
        )  # fmt: skip
        (g,) = torch.autograd.grad(sol.ys.square().sum(), [y0])
        found.append(torch.cat((sol.ys, g[None])))
        assert sol.stats.evaluations > 0
    if method == "reversible_heun":  # it starts afresh in each save interval
        found = [x[:1] for x in found]
    assert torch.allclose(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_torchsdes_srk_takes_our_levy_area(kind: str) -> None:
    """Of strong order 1.5 it is near the closed form on a path of ours, with a seed of any kind."""
    additive = kind == "general"
    y0, steps = torch.tensor([[1.0, 0.5]]).repeat(200, 1), [4, 8, 16]
    sde = stochastic(kind, False, additive)
    seeds = torch.arange(200)
    draws = {"path": BrownianTree(seeds, 0.0, 1.0)}
    with torch.no_grad():
        fine = fs.solve(
            sde, y0, integrator=TorchSDE(), stepping=fs.Fixed(dt=1.0 / 128), **draws
        ).y1  # fmt: skip
        ends = [
            fs.solve(sde, y0, integrator=TorchSDE(), stepping=fs.Fixed(dt=1.0 / n), **draws).y1
            for n in steps
        ]
    errors = [float((end - fine).square().mean().sqrt()) for end in ends]
    assert slope(errors, steps) > 1.25, errors


def test_torchsde_adapts_and_its_seed_decides() -> None:
    sde, y0 = stochastic("diagonal", True), torch.ones(3, 2)

    def run(seed: int) -> Tensor:
        stepping = fs.Adaptive(1e-3, 1e-3, dt0=0.1)
        path = fs.Brownian(seed)
        return fs.solve(sde, y0, integrator=TorchSDE("heun"), stepping=stepping, path=path).y1

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_the_table_of_torchsde_is_its_own() -> None:
    """Methods, calculus and kinds of noise, but for those that need Levy areas or are adjoints."""
    known = set(METHODS.all()) - {"log_ode", "adjoint_reversible_heun"}
    assert set(_TORCHSDE) == known
    for method, (readings, kinds) in _TORCHSDE.items():
        for reading in readings:
            theirs = methods.select(method, reading)
            assert theirs.sde_type == reading
            assert set(theirs.noise_types) == kinds
            assert "space-time" in theirs.levy_area_approximations


def test_what_torchsde_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="srk"):
        TorchSDE("log_ode")
    y0, end = torch.ones(2, 2), torch.tensor(1.0, requires_grad=True)
    usual: dict[str, Any] = {"stepping": fs.Fixed(dt=0.5), "path": fs.Brownian(0)}
    cases: list[tuple[fs.Dynamics, str, dict[str, Any], str]] = [
        (stochastic("diagonal", True), "srk", {}, "midpoint"),
        (stochastic("general", False), "milstein", {}, "euler"),
        (fs.ODE(lambda t, y: -y), "euler", {}, "without noise"),
        (stochastic("diagonal", False), "euler", {"stepping": fs.Fixed(steps=4)}, "Fixed.dt"),
        (stochastic("diagonal", False), "euler", {"y0": torch.ones(2, 2, 2)}, "batch, d"),
        (stochastic("diagonal", False), "euler", {"t0": 1.0, "t1": 0.0}, "forwards"),
        (stochastic("diagonal", False), "euler", {"t1": end}, "derivative"),
        (stochastic("diagonal", False), "euler", {"adjoint": fs.Checkpointed()}, "Direct"),
        (stochastic("diagonal", False), "euler", {"adjoint": fs.Backsolve()}, "Direct"),
        (stochastic("diagonal", False), "euler",
         {"path": fs.Brownian(0, torch.linspace(0, 1, 3))}, "BrownianTree"),
    ]  # fmt: skip
    for sde, method, more, cure in cases:
        with pytest.raises(TypeError, match=cure):
            fs.solve(sde, **{"y0": y0, "integrator": TorchSDE(method), **usual, **more})


def pulse(t: Tensor, y: Tensor) -> Tensor:
    return 10.0 * torch.exp(-(((t - 5.3) / 0.02) ** 2)) + 0.0 * y


def test_torchdiffeq_hears_the_longest_step() -> None:
    stepping = fs.Adaptive(1e-6, 1e-6, dt0=0.01, dt_max=0.02)
    end = fs.solve(
        fs.ODE(pulse), torch.zeros(1), 0.0, 10.0, integrator=TorchDiffEq(), stepping=stepping
    ).y1  # fmt: skip
    assert float(end) == pytest.approx(0.2 * math.sqrt(math.pi), rel=1e-4)


@pytest.mark.parametrize("engine", [TorchDiffEq(), SciPy(), TorchSDE("euler")], ids=str)
@pytest.mark.parametrize(
    "more", [{"atol": torch.tensor([1e-3, 1e-6])}, {"per_sample": True}, {"norm": torch.sum}]
)
def test_an_engine_refuses_what_it_would_not_hear(engine: Any, more: Any) -> None:
    with pytest.raises(TypeError, match=f"leave out {next(iter(more))}"):
        engine.bind(fs.Adaptive(**more))


def test_half_precision_is_refused_of_engines_too() -> None:
    y0 = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="half precision"):
        fs.solve(fs.ODE(lambda t, y: -y), y0, 0.0, 1.0, integrator=TorchDiffEq())


def test_a_fields_own_assertion_is_its_own() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        assert y.shape == (3,), "three components"
        return -y

    with pytest.raises(AssertionError, match="three components"):
        fs.solve(fs.ODE(field), torch.ones(2), 0.0, 1.0, integrator=TorchDiffEq())


def test_torchdiffeq_keeps_every_leafs_dtype() -> None:
    y0 = torch.ones(2, dtype=torch.float32), torch.ones(2), torch.ones(0)
    kinds = []

    def field(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kinds.append([x.dtype for x in y])
        return tuple(-x for x in y)

    end = fs.solve(fs.ODE(field), y0, 0.0, 1.0, integrator=TorchDiffEq()).y1
    assert [x.dtype for x in end] == [torch.float32, torch.float64, torch.float64]
    assert all(kind == kinds[0] for kind in kinds)
    empty = fs.solve(fs.ODE(lambda t, y: -y), torch.ones(0, 3), 0.0, 1.0, integrator=TorchDiffEq())
    assert empty.y1.shape == (0, 3)


def test_an_engine_that_goes_nowhere_says_it_has_no_slope() -> None:
    t1 = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(TypeError, match="goes nowhere"):
        fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), 1.0, t1, integrator=TorchDiffEq())
