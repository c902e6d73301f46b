"""What kicks and drifts preserve."""

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
from flowsde.integrators import Dopri5, Leapfrog, Yoshida4
from flowsde.integrators.symplectic import Symplectic

from .systems import catalogue, slope

METHODS = catalogue(integrators, Symplectic)
Pair = tuple[Tensor, Tensor]


def shaken(t: Tensor, y: Pair) -> Pair:
    """Nonlinear, with time in both halves: H = cosh(p) (2 + cos t) - cos(q) + q sin(2 t)."""
    q, p = y
    return (2.0 + t.cos()) * p.sinh(), -q.sin() - (2.0 * t).sin()


def kepler(t: Tensor, y: Pair) -> Pair:
    q, p = y
    return p, -q / q.square().sum(-1, keepdim=True) ** 1.5


def orbit(eccentricity: float) -> Pair:
    """At the perihelion; period 2 pi, energy -1/2."""
    speed = math.sqrt((1 + eccentricity) / (1 - eccentricity))
    return torch.tensor([[1.0 - eccentricity, 0.0]]), torch.tensor([[0.0, speed]])


def energy(q: Tensor, p: Tensor) -> Tensor:
    return 0.5 * p.square().sum(-1) - q.square().sum(-1).rsqrt()


def test_coefficients_are_symmetric_and_sum_to_one() -> None:
    for method in METHODS:
        for row in (method.kicks, method.drifts):
            assert sum(row) == pytest.approx(1.0, abs=1e-15)
            assert row == tuple(reversed(row))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_order(method: Symplectic, backward: bool) -> None:
    """At the end of the solve, and between the steps."""
    ode, y0 = fs.ODE(shaken, separable=True), (torch.tensor([0.3, -0.8]), torch.tensor([0.2, 0.4]))
    span = (2.0, 0.4) if backward else (0.4, 2.0)
    truth = fs.solve(ode, y0, *span, stepping=fs.Adaptive(1e-12, 1e-12), dense=True)
    ends, between, counts = [], [], [20, 30, 45, 67]
    for n in counts:
        sol = fs.solve(ode, y0, *span, integrator=method, stepping=fs.Fixed(steps=n), dense=True)
        ends.append(max(float((a - b).abs().max()) for a, b in zip(sol.y1, truth.y1, strict=True)))
        times = torch.linspace(0.45, 1.95, 41).tolist()
        between.append(sum(float((sol(t)[0] - truth(t)[0]).abs().max()) for t in times))
    assert abs(slope(ends, counts) - method.order) < 0.2, ends
    assert slope(between, counts) > min(method.order, method.dense_order + 1) - 0.3, between


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(
    seed=st.integers(0, 1000), t0=st.floats(-2.0, 2.0), dt=st.floats(0.01, 0.3),
    steps=st.integers(1, 6),
)  # fmt: skip
def test_a_step_back_undoes_a_step(
    method: Symplectic, seed: int, t0: float, dt: float, steps: int
) -> None:
    draws = torch.Generator("cpu").manual_seed(seed)
    y0 = (torch.randn(3, generator=draws), torch.randn(3, generator=draws))
    keywords: dict[str, Any] = {"integrator": method, "stepping": fs.Fixed(steps=steps)}
    ode, t1 = fs.ODE(shaken, separable=True), t0 + steps * dt
    y1 = fs.solve(ode, y0, t0, t1, **keywords).y1
    back = fs.solve(ode, y1, t1, t0, **keywords).y1
    size = 1.0 + max(float(leaf.abs().max()) for leaf in (*y1, *y0))
    for a, b in zip(back, y0, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * size**2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_symplectic_form_is_kept(method: Symplectic) -> None:
    """J^T Omega J = Omega, for a Hamiltonian system; Dopri5 does not keep it."""

    def field(t: Tensor, y: Pair) -> Pair:
        q, p = y
        with torch.enable_grad():
            x = q if q.requires_grad else q.detach().requires_grad_()
            potential = (x.square().sum() ** 2 + (x[0] * x[1]).sin() * (1.0 + t)).sum()
            (force,) = torch.autograd.grad(potential, [x], create_graph=True)
        return p * 1.5 + p**3, -force

    def end(y: Tensor, integrator: Any) -> Tensor:
        ode = fs.ODE(field, separable=True)
        sol = fs.solve(ode, (y[:2], y[2:]), 0.2, 1.1, integrator=integrator,
                       stepping=fs.Fixed(steps=5))  # fmt: skip
        return torch.cat(sol.y1)

    omega = torch.block_diag(torch.eye(2), torch.eye(2)).roll(2, 0)
    omega[2:] *= -1
    y0 = torch.tensor([0.3, -0.4, 0.5, 0.2])
    defects = []
    for integrator in (method, Dopri5()):
        jacobian = torch.autograd.functional.jacobian(lambda y, m=integrator: end(y, m), y0)
        defects.append(float((jacobian.T @ omega @ jacobian - omega).abs().max()))
    assert defects[0] < 1e-13
    assert defects[1] > 1e-7


def test_energy_stays_bounded_where_dopri5_drifts() -> None:
    """Kepler's orbit, eccentricity 0.3, 25 periods, as many calls of the field for each."""
    y0, ode, periods = orbit(0.3), fs.ODE(kepler, separable=True), 25
    steps, peaks = 20 * periods, []
    for method in (Yoshida4(), Dopri5()):
        sol = fs.solve(
            ode, y0, 0.0, 2 * math.pi * periods, integrator=method,
            stepping=fs.Fixed(steps=steps), save_at=fs.Steps(),
        )  # fmt: skip
        assert sol.stats.evaluations == 1 + 6 * steps
        error = (energy(*sol.ys) + 0.5).abs().flatten()
        peaks.append([float(part.max()) for part in error.tensor_split(8)])
    assert peaks[0][-1] < 1.1 * peaks[0][0]
    assert peaks[1][-1] > 4.0 * peaks[1][0]
    assert peaks[0][-1] < peaks[1][-1]


def test_gradients_of_a_kicked_system() -> None:
    strength = torch.tensor(0.7, requires_grad=True)
    y0 = (torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True))

    def end(k: Tensor, q: Tensor, p: Tensor) -> Any:
        ode = fs.ODE(lambda t, y: (y[1] * k, -y[0].sin() * k * t), separable=True)
        return fs.solve(ode, (q, p), integrator=Leapfrog(), stepping=fs.Fixed(steps=4),
                        adjoint=fs.Checkpointed(1)).y1  # fmt: skip

    assert torch.autograd.gradcheck(end, (strength, *y0))


def test_structure_is_declared_and_checked() -> None:
    calls = []

    def f(t: Tensor, y: Any) -> Any:
        calls.append(1)
        return y[1], -y[0]

    keywords: dict[str, Any] = {"integrator": Leapfrog(), "stepping": fs.Fixed(steps=3)}
    one, two = torch.ones(3), torch.ones(3, 2)
    with pytest.raises(TypeError, match="separable=True"):
        fs.solve(fs.ODE(f), (one, one), **keywords)
    for y0 in (two.T, (one,), (one, one, one), (one, two), [one, one], {"q": one, "p": one}):
        with pytest.raises(TypeError, match=r"\(q, p\)"):
            fs.solve(fs.ODE(f, separable=True), y0, **keywords)
    with pytest.raises(ValueError, match="one part"):
        fs.ODE(f, linear=-1.0, separable=True)
    assert not calls
    tree = ({"a": one, "b": two}, {"a": one, "b": two})
    sol = fs.solve(fs.ODE(f_tree, separable=True), tree, **keywords)
    assert sol.y1[0]["b"].shape == (3, 2)


def f_tree(t: Tensor, y: Any) -> Any:
    q, p = y
    return {k: 1.0 * v for k, v in p.items()}, {k: -v for k, v in q.items()}
