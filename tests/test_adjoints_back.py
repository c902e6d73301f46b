"""Adjoints that keep no graph: Reversible is exact, Backsolve converges to the exact gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import (
    ETDRK4,
    RK4,
    Bosh3,
    Dopri5,
    KenCarp4,
    Kvaerno5,
    Leapfrog,
    ReversibleRK,
    Stochastic,
    Trapezoid,
    Tsit5,
)
from flowsde.integrators.base import Integrator, ReversibleIntegrator

from .systems import catalogue
from .test_adjoint import Net, assert_same, gradients, measure

REVERSIBLE = [
    m for m in catalogue(integrators, Integrator)
    if isinstance(m, ReversibleIntegrator) and not isinstance(m, Stochastic)
] + [ReversibleRK(RK4()), ReversibleRK(Bosh3())]  # fmt: skip


ADAPTIVE = [fs.Adaptive(1e-2, 1e-2), fs.Adaptive(1e-2, 1e-2, per_sample=True)]
CASES = [(method, fs.Fixed(steps=17)) for method in REVERSIBLE] + [
    (method, stepping) for method in REVERSIBLE if method.error_order for stepping in ADAPTIVE
]


@pytest.mark.parametrize(("method", "stepping"), CASES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("save", [None, [0.1, 0.77, 1.3], fs.Steps(3)], ids=["end", "at", "steps"])
def test_reversible_equals_direct(
    method: Integrator, stepping: fs.Stepping, save: list[float] | fs.Steps | None
) -> None:
    """To 1e-10, on states and arguments that have a graph of their own, on all parameters."""
    net, x, v = Net(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    if isinstance(stepping, fs.Adaptive) and stepping.per_sample and isinstance(save, list):
        save = fs.Steps(2)  # times of each sample's own are refused
    found = []
    for adjoint in (fs.Direct(), fs.Reversible()):
        sol = fs.solve(
            fs.ODE(net, batched_time=True), x.sin(), 0.0, 1.3, args=(v.exp(),), integrator=method,
            stepping=stepping, adjoint=adjoint, save_at=save,
        )  # fmt: skip
        found.append([measure(sol), *gradients(measure(sol), [x, v, net.w, net.b, net.late])])
    assert_same(found[1], found[0], 1e-10)


@given(
    seed=st.integers(0, 10_000), steps=st.integers(1, 10), t0=st.floats(-1.0, 1.0),
    length=st.floats(-1.5, 1.5).filter(lambda x: abs(x) > 0.1),
)  # fmt: skip
def test_exact_modes_agree_on_drawn_fields(seed: int, steps: int, t0: float, length: float) -> None:
    """Direct, Checkpointed and Reversible, on pytrees, in both directions."""
    torch.manual_seed(seed)
    w = torch.randn(3, 3, requires_grad=True)
    y0 = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, requires_grad=True)}

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(w.detach().clone())

        def forward(self, t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            turned = torch.tanh(y["a"] @ self.w + t)
            return {"a": turned * y["b"][:, None].cos(), "b": turned.sum(-1) - y["b"]}

    field, found = Field(), []
    for adjoint in (fs.Direct(), fs.Checkpointed(5_000), fs.Reversible()):
        y1 = fs.solve(
            fs.ODE(field), y0, t0, t0 + length, integrator=ReversibleRK(),
            stepping=fs.Fixed(steps=steps), adjoint=adjoint,
        ).y1  # fmt: skip
        loss = y1["a"].square().sum() + y1["b"].sin().sum()
        found.append(gradients(loss, [y0["a"], y0["b"], field.w]))
    assert_same(found[1], found[0], 1e-10)
    assert_same(found[2], found[0], 1e-10)


@pytest.mark.parametrize("adjoint", [fs.Reversible(), fs.Backsolve()], ids=["rev", "back"])
@pytest.mark.parametrize("stepping", [fs.Fixed(steps=60), fs.Adaptive(1e-7, 1e-7)], ids=["f", "a"])
def test_times_differentiate(adjoint: fs.Adjoint, stepping: fs.Stepping) -> None:
    """By t0, t1 and saved times, against Direct."""
    net, y0 = Net(), torch.randn(2, 3, requires_grad=True)
    found = []
    method = ReversibleRK(Dopri5())
    for mode in (fs.Direct(), adjoint):
        t0, t1 = torch.tensor(0.6, requires_grad=True), torch.tensor(1.4, requires_grad=True)
        at = torch.tensor([0.6, 0.8, 1.1], requires_grad=True)
        sol = fs.solve(
            fs.ODE(net), y0, t0, t1, integrator=method, stepping=stepping, adjoint=mode,
            save_at=at,
        )  # fmt: skip
        found.append(gradients(measure(sol), [t0, t1, at, y0]))
    assert_same(found[1], found[0], 1e-10 if isinstance(adjoint, fs.Reversible) else 1e-4)


def test_backsolve_converges_to_the_gradient() -> None:
    """The gap to the exact gradient falls with the tolerance."""
    net, y0, u = Net(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    inputs = [y0, u, net.w, net.b, net.late]

    def grads(adjoint: fs.Adjoint, tolerance: float) -> list[Tensor]:
        sol = fs.solve(
            fs.ODE(net), y0, 1.3, 0.6, args=(u,), stepping=fs.Adaptive(tolerance, tolerance),
            adjoint=adjoint, save_at=[1.1, 0.9],
        )  # fmt: skip
        return gradients(measure(sol), inputs)

    exact = grads(fs.Direct(), 1e-12)
    gaps = []
    for tolerance in (1e-4, 1e-7, 1e-10):
        found = grads(fs.Backsolve(), tolerance)
        gaps.append(max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)))
    assert gaps[1] < gaps[0] / 30
    assert gaps[2] < 1e-7


def test_backsolve_takes_a_solver_of_its_own() -> None:
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)

    def gap(adjoint: fs.Adjoint) -> float:
        sol = fs.solve(fs.ODE(net), y0, 0.6, 1.4, stepping=fs.Adaptive(1e-10, 1e-10),
                       adjoint=adjoint)  # fmt: skip
        (g,) = gradients(measure(sol), [y0])
        return float((g - exact).abs().max())

    sol = fs.solve(fs.ODE(net), y0, 0.6, 1.4, stepping=fs.Adaptive(1e-12, 1e-12))
    (exact,) = gradients(measure(sol), [y0])
    fine = gap(fs.Backsolve(Dopri5(), fs.Adaptive(1e-10, 1e-10)))
    coarse = gap(fs.Backsolve(Bosh3(), fs.Adaptive(1e-3, 1e-3)))
    steps = gap(fs.Backsolve(RK4(), fs.Fixed(dt=0.02)))
    assert fine < 1e-8
    assert 1e-6 < coarse < 1e-1
    assert steps < 1e-5


def test_seminorm_spares_evaluations() -> None:
    """Integrals over parameters need no steps of their own (Kidger et al. 2021)."""
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    net.w.data.mul_(3.0)
    counts = []
    for seminorm in (True, False):
        sol = fs.solve(
            fs.ODE(net), y0, 0.6, 1.4, stepping=fs.Adaptive(1e-8, 1e-8),
            adjoint=fs.Backsolve(seminorm=seminorm),
        )  # fmt: skip
        (1e6 * measure(sol)).backward()
        counts.append(sol.stats.backward_evaluations)
    assert counts[0] < counts[1]


@pytest.mark.parametrize(
    ("adjoint", "method"), [(fs.Reversible(), ReversibleRK()), (fs.Backsolve(), Tsit5())],
    ids=["reversible", "backsolve"],
)  # fmt: skip
def test_what_cannot_come_back_is_refused(adjoint: fs.Adjoint, method: Integrator) -> None:
    """Closures, dense output, second derivatives: an error with the cure, never a lost gradient."""
    net, y0 = Net(), torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"args=\(u,\)"):
        fs.solve(fs.ODE(lambda t, y: y * weight), y0, integrator=method, adjoint=adjoint)
    with pytest.raises(TypeError, match="save_at"):
        fs.solve(fs.ODE(net), y0, integrator=method, adjoint=adjoint, dense=True)
    sol = fs.solve(fs.ODE(net), y0, integrator=method, adjoint=adjoint)
    (g,) = torch.autograd.grad(sol.y1.square().sum(), [y0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        g.sum().backward()
    with torch.no_grad():
        assert not fs.solve(fs.ODE(net), y0, integrator=method, adjoint=adjoint).y1.requires_grad


def test_methods_without_a_way_back_are_refused() -> None:
    with pytest.raises(TypeError, match="ReversibleRK"):
        fs.solve(fs.ODE(Net()), torch.randn(2, 3), adjoint=fs.Reversible())
    with pytest.raises(TypeError, match="Checkpointed"):
        fs.solve(
            fs.ODE(Net(), batched_time=True), torch.randn(2, 3, requires_grad=True),
            stepping=fs.Adaptive(per_sample=True), adjoint=fs.Backsolve(),
        )  # fmt: skip
    grid = fs.Grid(torch.tensor([0.0, 0.3, 1.0], requires_grad=True))
    with pytest.raises(TypeError, match="learn it through"):
        fs.solve(fs.ODE(Net()), torch.randn(2, 3), stepping=grid, adjoint=fs.Backsolve())


@pytest.mark.parametrize("adjoint", [fs.Reversible(), fs.Backsolve()], ids=["rev", "back"])
def test_memory_does_not_grow_with_the_steps(adjoint: fs.Adjoint) -> None:
    """Elements of tensors that the graph saves, however many the steps."""
    net, y0 = Net(), torch.randn(8, 3, requires_grad=True)

    def kept(steps: int) -> int:
        total = 0

        def watch(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(watch, lambda x: x):
            sol = fs.solve(
                fs.ODE(net), y0, integrator=ReversibleRK(), stepping=fs.Fixed(steps=steps),
                adjoint=adjoint,
            )  # fmt: skip
        assert sol.y1.requires_grad
        return total

    assert kept(200) <= kept(5) < 500


def test_the_gradient_of_a_decay_by_hand() -> None:
    """y = exp(-k t): dy1/dk = -t exp(-k t), by every adjoint, in float32 too."""
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        for adjoint in (fs.Direct(), fs.Checkpointed(), fs.Reversible(), fs.Backsolve()):
            k = torch.tensor([0.7], dtype=dtype, requires_grad=True)
            sol = fs.solve(
                fs.ODE(lambda t, y, k: -k * y), torch.ones(1, 1, dtype=dtype), 0.0, 2.0, args=(k,),
                integrator=ReversibleRK(), stepping=fs.Adaptive(1e-8, 1e-8) if
                dtype == torch.float64 else fs.Fixed(steps=40), adjoint=adjoint,
            )  # fmt: skip
            sol.y1.sum().backward()
            assert float(k.grad) == pytest.approx(-2.0 * math.exp(-1.4), rel=tolerance)


@pytest.mark.parametrize(
    ("method", "stepping", "error"),
    [
        (Kvaerno5(), fs.Fixed(steps=20), 1e-4),
        (Kvaerno5(), fs.Adaptive(1e-9, 1e-9), 1e-6),
        (Trapezoid(), fs.Fixed(steps=20), 2e-2),
        (Trapezoid(), fs.Adaptive(1e-5, 1e-5), 1e-3),
    ],
    ids=str,
)
def test_backsolve_knows_the_jacobian_of_the_way_back(
    method: Integrator, stepping: Any, error: float
) -> None:
    y, rate = torch.ones(2, 1, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    dynamics = fs.ODE(lambda t, y, rate: -rate * (y - torch.cos(t)))
    more: dict[str, Any] = {"integrator": method, "stepping": stepping, "args": (rate,)}
    back, exact = (
        torch.autograd.grad(
            fs.solve(dynamics, y, 0.0, 1.0, adjoint=adjoint, **more).y1.sum(), (y, rate)
        )
        for adjoint in (fs.Backsolve(), fs.Direct())
    )
    for a, b in zip(back, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error)


def test_the_costate_is_differentiable() -> None:
    """As any other dynamics where gradients are recorded."""
    y = torch.tensor([[0.3, -0.2]], requires_grad=True)
    a = torch.tensor([[1.0, 2.0]], requires_grad=True)
    turned = fs.costate(fs.ODE(lambda t, y: torch.sin(y)))

    def drift(y: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        k, slope, _ = turned(torch.tensor(0.0), (y, a, ()))
        return k, slope

    assert torch.autograd.gradcheck(drift, (y, a))


def test_a_norm_of_the_state_is_one_of_its_cotangent_too() -> None:
    shapes = set()

    def norm(scaled: Tensor, per_sample: bool) -> Tensor:
        shapes.add(scaled.shape)
        return scaled.abs().amax()

    y = torch.ones(2, 2, requires_grad=True)
    for seminorm in (True, False):
        solution = fs.solve(
            fs.ODE(lambda t, y: -y), y, 0.0, 1.0, stepping=fs.Adaptive(1e-9, 1e-9, norm=norm),
            adjoint=fs.Backsolve(seminorm=seminorm),
        )  # fmt: skip
        (found,) = torch.autograd.grad(solution.y1.sum(), y)
        torch.testing.assert_close(found, torch.full((2, 2), math.exp(-1.0)))
    assert shapes == {(2, 2)}


@pytest.mark.parametrize(
    ("method", "dynamics", "y0"),
    [
        (KenCarp4(), fs.ODE(torch.mul, implicit=torch.mul), torch.ones(2, 2)),
        (ETDRK4(), fs.ODE(torch.mul, linear=-1.0), torch.ones(2, 2)),
        (Leapfrog(), fs.ODE(lambda t, y: (y[1], y[0]), separable=True), (torch.ones(2, 2),) * 2),
    ],
    ids=str,
)
def test_backsolve_says_what_goes_back(method: Integrator, dynamics: fs.ODE, y0: Any) -> None:
    with pytest.raises(TypeError, match=r"Backsolve\(integrator=Tsit5\(\)"):
        fs.solve(
            dynamics, y0, 0.0, 1.0, integrator=method, stepping=fs.Fixed(steps=4),
            adjoint=fs.Backsolve(),
        )  # fmt: skip


def test_one_time_that_is_both_ends_has_both_slopes() -> None:
    t, y = torch.tensor(1.0, requires_grad=True), torch.ones(2, requires_grad=True)
    end = fs.solve(fs.ODE(lambda t, y: -y), y, t, t, adjoint=fs.Backsolve()).y1
    assert torch.autograd.grad(end.sum(), t)[0] == 0.0
