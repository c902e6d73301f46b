"""Gradients of stochastic solves: exact by three adjoints, and in the limit by the fourth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from benchmarks.storages import Storages
from flowsde.dynamics import UnderdampedLangevin
from flowsde.integrators import (
    BAOAB,
    EulerMaruyama,
    ReversibleHeun,
    StochasticHeun,
    StochasticMidpoint,
    Tsit5,
)  # fmt: skip
from flowsde.transforms.costate import costate

from .systems import increments, slope
from .test_adjoint import Net, assert_same, gradients, measure

KINDS = ("diagonal", "scalar", "general")


class Diffusion(nn.Module):
    """A diffusion of any kind, with a buffer, a frozen weight, and one that f shares."""

    def __init__(self, kind: Any, shared: Tensor, dim: int = 3, size: int = 2) -> None:
        super().__init__()
        self.kind, self.shared = kind, shared
        self.v = nn.Parameter(0.4 * torch.randn(dim, size))
        self.frozen = nn.Parameter(torch.randn(dim), requires_grad=False)
        self.register_buffer("scale", torch.full((), 0.3))

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        column = t[..., None]
        own = self.scale * (1.5 + torch.tanh(y * self.v[:, 0] + self.frozen * column.sin()))
        for arg in args:
            own = own + 0.1 * arg.sin()
        if self.kind != "general":
            return own * (1.0 + 0.1 * self.shared)
        return own[..., None] * torch.cos(y[..., None] + self.v) * self.shared[:, None]


def system(kind: Any, stratonovich: bool = True) -> tuple[fs.SDE, Net, Diffusion]:
    torch.manual_seed(3)
    f = Net()
    g = Diffusion(kind, f.b)
    size = 2 if kind == "general" else None
    sde = fs.SDE(
        f, g, noise=kind, stratonovich=stratonovich, noise_size=size, batched_time=True
    )  # fmt: skip
    return sde, f, g


def found(sde: fs.SDE, adjoint: fs.Adjoint, inputs: list[Tensor], **keywords: Any) -> list[Tensor]:
    """The loss and its gradients by x, v and all parameters, on a state with a graph of its own."""
    x, v = inputs
    usual = {"t0": 0.1, "t1": 1.3, "stepping": fs.Fixed(steps=12), "path": fs.Brownian(5)}
    sol = fs.solve(sde, x.sin(), args=(v.sin(),), adjoint=adjoint, **{**usual, **keywords})
    loss = measure(sol)
    own = [p for p in sde.parameters() if p.requires_grad]
    return [loss, *gradients(loss, [x, v, *own])]


def states() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)]


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("save", [None, [0.2, 0.77, 1.3], fs.Steps(5)], ids=["end", "at", "steps"])
def test_exact_adjoints_agree(kind: str, backward: bool, save: Any) -> None:
    sde, _, _ = system(kind)
    span = {"t0": 1.3, "t1": 0.1} if backward else {}
    at = save[::-1] if backward and isinstance(save, list) else save
    both = [
        found(sde, adjoint, states(), integrator=ReversibleHeun(), save_at=at, **span)
        for adjoint in (fs.Direct(), fs.Checkpointed(1), fs.Checkpointed(20_000), fs.Reversible())
    ]
    assert_same(both[1], both[0], 1e-13)
    assert_same(both[2], both[0], 1e-13)
    assert_same(both[3], both[0], 1e-10)


def test_exact_adjoints_agree_over_a_thousand_steps() -> None:
    w = torch.tensor([0.7, -0.4], requires_grad=True)
    sde = fs.SDE(
        lambda t, y, w: (w * y).sin() - y, lambda t, y, w: 0.5 * (y - w).cos(), noise="diagonal",
        stratonovich=True,
    )  # fmt: skip
    y0, both = torch.randn(3, 2, requires_grad=True), []
    for adjoint in (fs.Direct(), fs.Checkpointed(), fs.Reversible()):
        sol = fs.solve(
            sde, y0, 0.0, 4.0, args=(w,), integrator=ReversibleHeun(), adjoint=adjoint,
            stepping=fs.Fixed(steps=1000), path=fs.Brownian(5),
        )  # fmt: skip
        both.append(gradients(measure(sol), [y0, w]))
    assert_same(both[1], both[0], 1e-13)
    assert_same(both[2], both[0], 1e-10)


@pytest.mark.parametrize("adjoint", [fs.Checkpointed(1), fs.Reversible()], ids=["check", "rev"])
@pytest.mark.parametrize("stepping", [fs.Fixed(steps=9), fs.Fixed(dt=0.1)], ids=["steps", "dt"])
def test_times_differentiate(adjoint: fs.Adjoint, stepping: fs.Stepping) -> None:
    """The derivative of the discrete solve: normals held, increments scaled with the steps."""
    sde, f, g = system("diagonal")
    y0 = torch.randn(2, 3)

    def loss(t0: Tensor, t1: Tensor, mode: fs.Adjoint) -> Tensor:
        return measure(fs.solve(
            sde, y0, t0, t1, integrator=ReversibleHeun(), stepping=stepping, adjoint=mode,
            path=fs.Brownian(2),
        ))  # fmt: skip

    both = []
    for mode in (fs.Direct(), adjoint):
        times = [torch.tensor(t, requires_grad=True) for t in (0.23, 1.31)]
        both.append(gradients(loss(times[0], times[1], mode), [*times, f.w, g.v]))
    assert_same(both[1], both[0], 1e-10)
    with torch.no_grad():
        for i in (0, 1):
            near = [loss(*(t + s * (i == j) for j, t in enumerate(times)), fs.Direct())
                    for s in (1e-6, -1e-6)]  # fmt: skip
            assert float(near[0] - near[1]) / 2e-6 == pytest.approx(float(both[0][i]), rel=1e-5)


@given(
    seed=st.integers(0, 10_000), steps=st.integers(1, 8), length=st.floats(0.2, 1.5),
    backward=st.booleans(), own=st.booleans(),
)  # fmt: skip
def test_exact_adjoints_agree_on_drawn_pytrees(
    seed: int, steps: int, length: float, backward: bool, own: bool
) -> None:
    """Of one seed, and of one seed a sample."""
    torch.manual_seed(seed)
    w = nn.Parameter(torch.randn(3, 3))
    y0 = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, requires_grad=True)}

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = w

        def forward(self, t: Tensor, y: Any) -> Any:
            turned = torch.tanh(y["a"] @ self.w + t)
            return {"a": turned * y["b"][:, None].cos(), "b": turned.sum(-1) - y["b"]}

    class Spread(Drift):
        def forward(self, t: Tensor, y: Any) -> Any:
            return {"a": 0.3 * (y["a"] * self.w[0]).cos(), "b": 0.2 * y["b"].sin() * t}

    sde = fs.SDE(Drift(), Spread(), noise="diagonal", stratonovich=True)
    path = fs.Brownian(torch.arange(2) + seed if own else seed)
    both = []
    for adjoint in (fs.Direct(), fs.Checkpointed(5_000), fs.Reversible()):
        y1 = fs.solve(
            sde, y0, 0.1, 0.1 - length if backward else 0.1 + length, adjoint=adjoint, path=path,
            integrator=ReversibleHeun(), stepping=fs.Fixed(steps=steps),
        ).y1  # fmt: skip
        loss = y1["a"].square().sum() + y1["b"].sin().sum()
        both.append(gradients(loss, [y0["a"], y0["b"], w]))
    assert_same(both[1], both[0], 1e-12)
    assert_same(both[2], both[0], 1e-10)


def test_per_sample_times() -> None:
    sde, _, _ = system("diagonal")
    ends = torch.tensor([0.4, 0.9, 1.3, 0.1])
    keywords: dict[str, Any] = {"integrator": ReversibleHeun(), "t1": ends}
    both = [found(sde, adjoint, states(), **keywords) for adjoint in (fs.Direct(), fs.Reversible())]
    assert_same(both[1], both[0], 1e-10)
    chosen = {"integrator": ReversibleHeun(), "stepping": fs.Adaptive(1e-2, 1e-2, per_sample=True)}
    both = [found(sde, adjoint, states(), **chosen) for adjoint in (fs.Direct(), fs.Reversible())]
    assert_same(both[1], both[0], 1e-10)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint", [fs.Checkpointed(30_000), fs.Reversible(), fs.Backsolve()],
    ids=["checkpointed", "reversible", "backsolve"],
)  # fmt: skip
def test_memory_does_not_grow_with_the_steps(
    adjoint: fs.Adjoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most bytes of tensors alive during a solve and its gradient: noise is drawn again."""
    monkeypatch.setattr("flowsde.paths.brownian._CHUNK", 1024)
    sde, _, _ = system("diagonal")

    def peak(mode: fs.Adjoint, steps: int) -> int:
        inputs = [torch.randn(32, 3, requires_grad=True) for _ in range(2)]
        with Storages() as storages:
            found(sde, mode, inputs, integrator=ReversibleHeun(), stepping=fs.Fixed(steps=steps))
        return storages.peak

    direct, short, long = peak(fs.Direct(), 40), peak(adjoint, 40), peak(adjoint, 120)
    assert long <= 1.1 * short
    assert short < direct / 2


def test_a_budget_is_not_charged_with_the_noise_of_other_steps() -> None:
    """Increments are parts of what was drawn for many steps at once."""
    y0 = torch.randn(16, 8, requires_grad=True)
    sde = fs.SDE(lambda t, y: -y.sin(), lambda t, y: 0.3 * y.cos(), noise="diagonal")
    sol = fs.solve(
        sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=300), path=fs.Brownian(0),
        adjoint=fs.Checkpointed(50_000),
    )  # fmt: skip
    sol.y1.sum().backward()
    assert sol.stats.backward_evaluations <= 4 * sol.stats.evaluations


# --- the continuous adjoint -----------------------------------------------------------------------


def geometric(ito: bool, kind: Any) -> tuple[fs.SDE, Any]:
    """dy = a y dt + b y dW with a and b as arguments, and the logarithm's mean over time."""

    def g(t: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.diag_embed(b * y) if kind == "general" else b * y

    sde = fs.SDE(
        lambda t, y, a, b: a * y, g, noise=kind, stratonovich=not ito, commutative=True,
        noise_size=2 if kind == "general" else None,
    )  # fmt: skip
    return sde, lambda a, b: a - 0.5 * b * b if ito else a


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ito", [True, False], ids=["ito", "stratonovich"])
def test_backsolve_converges_to_the_exact_gradient(ito: bool, kind: str) -> None:
    """Geometric Brownian motion: strong order 1/2 where the way there is Euler's, else 1."""
    count, steps = 500, [8, 16, 32, 64]
    sde, rate = geometric(ito, kind)
    start = torch.tensor([[1.0, 0.5]]).repeat(count, 1)
    path = fs.Brownian(3, torch.linspace(0.0, 1.0, steps[-1] + 1))
    assert sde.noise is not None
    w = increments(path, [0.0, 1.0], sde.noise.shapes(start))(0)
    w = w[:, None] if kind == "scalar" else w

    def inputs() -> list[Tensor]:
        a, b = torch.full((count, 2), 0.3), torch.full((count, 2), 0.5)
        return [x.requires_grad_() for x in (start.clone(), a, b)]

    y0, a, b = inputs()
    exact = gradients((y0 * torch.exp(rate(a, b) + b * w)).square().sum(), [y0, a, b])
    errors = []
    for n in steps:
        y0, a, b = inputs()
        y1 = fs.solve(
            sde, y0, args=(a, b), integrator=EulerMaruyama() if ito else StochasticHeun(),
            stepping=fs.Fixed(steps=n), adjoint=fs.Backsolve(), path=path,
        ).y1  # fmt: skip
        near = gradients(y1.square().sum(), [y0, a, b])
        squares = sum((p - q).square().sum(-1).mean() for p, q in zip(near, exact, strict=True))
        errors.append(float(squares) ** 0.5)
    assert slope(errors, steps) > (0.5 if ito else 1.0) - 0.15, errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ito", [True, False], ids=["ito", "stratonovich"])
def test_backsolve_meets_direct_on_networks(ito: bool, kind: str) -> None:
    """By state, arguments, shared and sometimes-used parameters, with saved states on the way."""
    sde, _, _ = system(kind, stratonovich=not ito)
    at, gaps = [0.4, 0.7, 1.3], []
    times = torch.linspace(0.1, 1.3, 33)
    for steps in (4, 32):
        keywords = {
            "integrator": EulerMaruyama() if ito else StochasticHeun(), "save_at": at,
            "stepping": fs.Fixed(steps=steps), "path": fs.Brownian(4, times),
        }  # fmt: skip
        near, exact = (
            torch.cat([x.detach().flatten() for x in found(sde, adjoint, states(), **keywords)])
            for adjoint in (fs.Backsolve(), fs.Direct())
        )
        gaps.append(float((near - exact).norm() / exact.norm()))
    assert gaps[1] < 0.05
    assert gaps[1] < gaps[0] / 2


def test_backsolve_takes_an_integrator_of_its_own() -> None:
    """And costs on the way back what that costs; on additive noise Ito methods go back too."""
    sde, _, _ = system("diagonal")
    counts = {}
    for name, adjoint in {
        "own": fs.Backsolve(), "midpoint": fs.Backsolve(StochasticMidpoint()),
    }.items():  # fmt: skip
        x = torch.randn(4, 3, requires_grad=True)
        sol = fs.solve(
            sde, x, integrator=ReversibleHeun(), stepping=fs.Fixed(steps=10), adjoint=adjoint,
            path=fs.Brownian(0),
        )  # fmt: skip
        sol.y1.sum().backward()
        counts[name] = sol.stats.evaluations, sol.stats.backward_evaluations
    assert counts == {"own": (11, 11), "midpoint": (11, 20)}

    w = torch.tensor(0.7, requires_grad=True)
    additive = fs.SDE(
        lambda t, y, w: (w * y).sin(), lambda t, y, w: w * t.cos(), noise="diagonal", additive=True
    )  # fmt: skip
    path, found_ = fs.Brownian(1, torch.linspace(0.0, 1.0, 257)), []
    for adjoint, steps in ((fs.Direct(), 256), (fs.Backsolve(), 256), (fs.Backsolve(), 32)):
        sol = fs.solve(
            additive, torch.ones(4, 3), args=(w,), integrator=EulerMaruyama(), adjoint=adjoint,
            stepping=fs.Fixed(steps=steps), path=path,
        )  # fmt: skip
        sol.y1.square().sum().backward()
        found_.append(float(w.grad))
        w.grad = None
    exact, fine, coarse = found_
    assert abs(fine - exact) < abs(coarse - exact) / 3
    assert fine == pytest.approx(exact, rel=0.02)


def held(sde: str) -> fs.SDE:
    """Systems of which drift or diffusion hold on to a tensor from outside."""
    w = torch.randn(3, requires_grad=True)
    f, g = (lambda t, y: -y), (lambda t, y: 0.1 * y)
    f, g = ((lambda t, y: w * y), g) if sde == "drift" else (f, lambda t, y: w * y)
    return fs.SDE(f, g, noise="diagonal", stratonovich=True)


@pytest.mark.parametrize("adjoint", [fs.Reversible(), fs.Backsolve()], ids=["rev", "back"])
def test_what_cannot_come_back_is_refused(adjoint: fs.Adjoint) -> None:
    usual: dict[str, Any] = {
        "integrator": ReversibleHeun(), "stepping": fs.Fixed(steps=4), "path": fs.Brownian(0),
        "adjoint": adjoint,
    }  # fmt: skip
    y0 = torch.randn(2, 3, requires_grad=True)
    for place in ("drift", "diffusion"):
        with pytest.raises(TypeError, match=r"args=\(u,\)"):
            fs.solve(held(place), y0, **usual)
    sde, _, _ = system("diagonal")
    with pytest.raises(TypeError, match="save_at"):
        fs.solve(sde, y0, **usual, dense=True)
    with torch.no_grad():
        assert not fs.solve(sde, y0, **usual).y1.requires_grad


def test_backsolve_follows_langevin_methods_back() -> None:
    wells = UnderdampedLangevin(lambda t, x: x - x**3, friction=1.2)
    y0 = torch.tensor([[0.3], [-1.1]], requires_grad=True)

    def slope_by(adjoint: fs.Adjoint) -> Tensor:
        x1, v1 = fs.solve(
            wells, (y0, 0.5 * y0), integrator=BAOAB(), stepping=fs.Fixed(steps=400),
            path=fs.Brownian(1), adjoint=adjoint,
        ).y1  # fmt: skip
        return torch.autograd.grad((x1 + v1.square()).sum(), y0)[0]

    assert torch.allclose(slope_by(fs.Backsolve()), slope_by(fs.Direct()), rtol=0.02)


def test_backsolve_takes_numbers_and_narrow_times() -> None:
    """g as a number, and save times that float32 has rounded."""
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.5, noise="diagonal")
    y0 = torch.ones(3, 2, requires_grad=True)
    ys = fs.solve(
        sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=100), path=fs.Brownian(1),
        adjoint=fs.Backsolve(), save_at=torch.linspace(0.0, 1.0, 11, dtype=torch.float32),
    ).ys  # fmt: skip
    (slope_,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert torch.allclose(slope_, torch.full_like(y0, math.exp(-1.0)), rtol=1e-2)


def test_a_path_on_given_times_has_no_slope_by_them() -> None:
    sde, _, _ = system("diagonal")
    mid = torch.tensor(0.5, requires_grad=True)
    grid = fs.Grid(torch.stack((torch.tensor(0.0), mid, torch.tensor(1.0))))
    with pytest.raises(TypeError, match="scale with them"):
        fs.solve(
            sde, torch.ones(2, 3), integrator=StochasticHeun(), stepping=grid,
            path=fs.Brownian(1, torch.linspace(0.0, 1.0, 5)),
        )  # fmt: skip


def test_what_backsolve_cannot_do_is_refused() -> None:
    sde, _, _ = system("diagonal")
    end, y0 = torch.tensor(1.0, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    ito, _, _ = system("diagonal", stratonovich=False)
    cases: list[tuple[fs.SDE, dict[str, Any], str]] = [
        (sde, {"adjoint": fs.Backsolve(stepping=fs.Fixed(steps=8))}, "leave out"),
        (sde, {"adjoint": fs.Backsolve(EulerMaruyama())}, "StochasticHeun"),
        (sde, {"adjoint": fs.Backsolve(Tsit5())}, "integrates ODEs"),
        (sde, {"t1": end}, "no slope in time"),
        (sde, {"save_at": [0.3, 1.0]}, "Steps"),
        (sde, {"t1": torch.tensor([0.5, 1.0])}, "one time for all"),
        (ito, {"integrator": EulerMaruyama(), "adjoint": fs.Reversible()}, "ReversibleHeun"),
    ]  # fmt: skip
    for dynamics, more, cure in cases:
        usual = {
            "integrator": StochasticHeun(), "stepping": fs.Fixed(steps=4), "path": fs.Brownian(0),
            "adjoint": fs.Backsolve(),
        }  # fmt: skip
        with pytest.raises(TypeError, match=cure):
            fs.solve(dynamics, y0, **{**usual, **more})
    with pytest.raises(TypeError, match="to_stratonovich"):
        costate(ito)
