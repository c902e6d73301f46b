"""Steps that can be taken back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    RK4,
    AsynchronousLeapfrog,
    Euler,
    Heun,
    ReversibleIntegrator,
    ReversibleRK,
    Stochastic,
)  # fmt: skip

from .systems import catalogue

STOCHASTIC = [m for m in catalogue(integrators, ReversibleIntegrator) if isinstance(m, Stochastic)]
METHODS = [
    *(m for m in catalogue(integrators, ReversibleIntegrator) if m not in STOCHASTIC),
    ReversibleRK(RK4(), 0.9), ReversibleRK(Heun()),
]  # fmt: skip


def gap(a: Any, b: Any) -> float:
    """Largest difference of two trees, relative to their size."""
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    size = 1.0 + max(float(y.abs().max()) for _, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs) / size


def there_and_back(
    method: Any, dynamics: fs.Dynamics, y0: Any, times: list[Any], seed: int = 0
) -> None:
    """Every step taken back, the last first, to the state and the carry of each."""
    field, draws = Field(dynamics, (), y0), method.draws(dynamics, y0)
    path = fs.Brownian(seed).bind(times, draws) if draws else lambda n, t0, t1: None
    dws = [path(n, t0, t1) for n, (t0, t1) in enumerate(itertools.pairwise(times))]
    trail = [(y0, method.init(field, times[0], y0))]
    for dw, (t0, t1) in zip(dws, itertools.pairwise(times), strict=True):
        step = method.step(field, t0, t1, trail[-1][0], dw, trail[-1][1])
        trail.append((step.y1, step.carry))
    y, carry = trail[-1]
    for n in range(len(times) - 2, -1, -1):
        y, carry = method.unstep(field, times[n], times[n + 1], y, dws[n], carry)
        assert gap((y, carry), trail[n]) < 1e-12, n


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(
    seed=st.integers(0, 10_000), t0=st.floats(-2.0, 2.0), steps=st.integers(1, 8),
    dt=st.floats(0.01, 0.4), backward=st.booleans(), per_sample=st.booleans(),
)  # fmt: skip
def test_unstep_undoes_step(
    method: Any, seed: int, t0: float, steps: int, dt: float, backward: bool, per_sample: bool
) -> None:
    draws = torch.Generator("cpu").manual_seed(seed)
    w, y0 = torch.randn(3, 3, generator=draws), torch.randn(4, 3, generator=draws)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ w) - 0.3 * y + t[..., None].cos()

    dt = -dt if backward else dt
    start: Any = t0 + torch.linspace(0, 1, 4) if per_sample else t0
    there_and_back(
        method, fs.ODE(f, batched_time=True), y0, [start + n * dt for n in range(steps + 1)]
    )


@pytest.mark.parametrize("method", STOCHASTIC, ids=str)
@given(
    seed=st.integers(0, 10_000), t0=st.floats(-2.0, 2.0), steps=st.integers(1, 8),
    dt=st.floats(0.01, 0.4), backward=st.booleans(), per_sample=st.booleans(),
    kind=st.sampled_from(["diagonal", "scalar", "general"]),
)  # fmt: skip
def test_unstep_undoes_step_along_a_path(
    method: Any, seed: int, t0: float, steps: int, dt: float, backward: bool, per_sample: bool,
    kind: Any,
) -> None:  # fmt: skip
    draws = torch.Generator("cpu").manual_seed(seed)
    w, y0 = torch.randn(3, 3, generator=draws), torch.randn(4, 3, generator=draws)

    def g(t: Tensor, y: Tensor) -> Tensor:
        columns = torch.tanh(y @ w) * t[..., None].cos()
        return columns if kind != "general" else torch.stack((columns, y.sin()), -1)

    sde = fs.SDE(
        lambda t, y: torch.tanh(y @ w) - 0.3 * y, g, noise=kind, stratonovich=True,
        batched_time=True, noise_size=2 if kind == "general" else None,
    )  # fmt: skip
    start: Any = t0 + torch.linspace(0, 1, 4) if per_sample else t0
    dt = -dt if backward else dt
    there_and_back(method, sde, y0, [start + n * dt for n in range(steps + 1)], seed)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_unstep_undoes_step_on_a_pytree(method: Any) -> None:
    def f(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
        a, b = y["pair"]
        return {"pair": (b * t, -a.sin()), "z": 1j * t * y["z"]}

    y0 = {"pair": (torch.randn(2), torch.randn(2)), "z": torch.randn(3, dtype=torch.complex128)}
    there_and_back(method, fs.ODE(f), y0, [0.1, 0.3, 0.35, 0.9])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_first_carry_is_known_from_the_start(method: Any) -> None:
    """What an adjoint meets when it has gone all the way back."""
    field = Field(fs.ODE(lambda t, y: y.cos() * t), (), torch.ones(3))
    y0 = torch.randn(3)
    carry = method.init(field, 0.4, y0)
    assert gap(method.slope(carry), y0.cos() * 0.4) < 1e-15


def test_asynchronous_leapfrog_keeps_a_turning_system_and_not_a_contracting_one() -> None:
    """The stability that its docstring states: the imaginary axis, up to |dt lambda| = 2."""
    far: dict[str, Any] = {"integrator": AsynchronousLeapfrog(), "stepping": fs.Fixed(dt=0.5)}
    turn = fs.ODE(lambda t, y: 1j * y)
    y0 = torch.ones(1, dtype=torch.complex128)
    assert float(fs.solve(turn, y0, 0.0, 500.0, **far).y1.abs()) < 1.5
    decay = fs.ODE(lambda t, y: -y)
    assert float(fs.solve(decay, torch.ones(1), 0.0, 100.0, **far).y1.abs()) > 1e3


def test_a_reversible_method_of_lower_coupling_is_stable_where_it_contracts() -> None:
    decay = fs.ODE(lambda t, y: -y)
    ends = [
        float(fs.solve(decay, torch.ones(1), 0.0, 100.0, integrator=ReversibleRK(Euler(), coupling),
                       stepping=fs.Fixed(dt=0.25)).y1.abs())
        for coupling in (0.7, 1.0)
    ]  # fmt: skip
    assert ends[0] < 1e-3
    assert ends[1] > 1.0


def test_costs() -> None:
    for method, each in ((AsynchronousLeapfrog(), 1), (ReversibleRK(RK4()), 8)):
        sol = fs.solve(
            fs.ODE(lambda t, y: -y), torch.ones(2), integrator=method, stepping=fs.Fixed(steps=10)
        )
        assert sol.stats.evaluations == 1 + 10 * each


def test_wrong_parts_are_refused_at_birth() -> None:
    for coupling in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="coupling"):
            ReversibleRK(RK4(), coupling)
    with pytest.raises(TypeError, match=r"RK4\(\)"):
        ReversibleRK(AsynchronousLeapfrog())  # type: ignore[arg-type]
