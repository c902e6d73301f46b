"""The states between the ends of a step: many at once are those worked out one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import flowsde as fs
from benchmarks.counting import Counter
from flowsde import integrators
from flowsde._state import leaves, stack
from flowsde.dynamics.field import Field
from flowsde.integrators import Adams, ExplicitRK, ImplicitRK, Integrator
from flowsde.integrators.interpolation import Interpolation
from flowsde.integrators.stabilised import RKC2
from flowsde.integrators.symplectic import Symplectic

from .systems import catalogue, generator, suited


@given(
    seed=st.integers(0, 1000), batch=st.integers(1, 3), count=st.integers(1, 4),
    places=st.integers(1, 4), lengths=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    own=st.sampled_from(["neither", "places", "factors", "powers"]),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)  # fmt: skip
def test_many_places_are_as_one_by_one(
    seed: int, batch: int, count: int, places: int, lengths: list[int], own: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    g = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=g.device)

    def state() -> Any:
        return draw(batch, 2).to(dtype) * (1 + 2j if dtype.is_complex else 1), draw(batch)

    def number(rows: bool) -> Any:
        return draw(batch) if rows else float(draw(()))

    powers = [[number(own == "powers") for _ in range(lengths[i])] for i in range(count)]
    factors = [number(own == "factors") for _ in range(count)]
    sums = Interpolation(state(), [state() for _ in range(count)], powers, factors)
    thetas = draw(places, batch) if own == "places" else draw(places)
    each = [sums.at(theta if own == "places" else float(theta)) for theta in thetas]
    assert_close(sums.many(thetas), stack(each), rtol=1e-10, atol=1e-10)


def test_many_places_differentiate() -> None:
    g = generator()
    y, v, factor, thetas = (
        torch.randn(*shape, generator=g, device=g.device, requires_grad=True)
        for shape in ((2, 3), (2, 3), (2,), (4, 2))
    )

    def many(y: Tensor, v: Tensor, factor: Tensor, thetas: Tensor) -> Tensor:
        return Interpolation(y, [v], [(1.0, -2.0)], [factor]).many(thetas)

    assert torch.autograd.gradcheck(many, (y, v, factor, thetas))
    assert torch.autograd.gradgradcheck(many, (y, v, factor, thetas))


SUMS = [
    m for m in catalogue(integrators, Integrator)
    if isinstance(m, (ExplicitRK, ImplicitRK, Adams, RKC2, Symplectic))
]  # fmt: skip


CASES = [(m, own) for m in SUMS for own in (False, True) if not (own and isinstance(m, Adams))]


@pytest.mark.parametrize(("method", "own"), CASES, ids=str)
def test_every_method_gives_many_at_once(method: Integrator, own: bool) -> None:
    dynamics, y0 = suited(method, lambda t, y: -y.square(), torch.rand(3, 2) + 0.5)
    field = Field(dynamics, (), y0)
    t1: Any = torch.tensor([0.1, 0.2, 0.3]) if own else 0.2
    t0 = 0.0 * t1
    method = method.bind(fs.Adaptive(per_sample=own))
    with torch.no_grad():
        step = method.step(field, t0, t1, y0, None, method.init(field, t0, y0))
        thetas = [n / 7 for n in range(8)]
        assert_close(step.between(thetas), [step.dense(theta) for theta in thetas])
        if own:
            rows = torch.rand(9, 3, generator=generator())
            assert_close(step.by_rows(rows), stack([step.dense(theta) for theta in rows]))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, list])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", [integrators.Dopri5(), integrators.Dopri8()], ids=str)
def test_many_times_of_a_dense_solution(method: Integrator, per_sample: bool, kind: Any) -> None:
    ode = fs.ODE(lambda t, y: -y.square(), batched_time=True)
    stepping = fs.Adaptive(1e-6, 1e-6, per_sample=per_sample)
    sol = fs.solve(
        ode, torch.rand(3, 2) + 0.5, 0.0, 2.0, integrator=method, stepping=stepping, dense=True
    )
    times: Any = 2.0 * torch.rand(40, generator=generator(), dtype=torch.float64)
    times[:2] = torch.tensor([0.0, 2.0])
    times = times.tolist() if kind is list else times.to(kind)
    with Counter() as counter:
        many = sol(times)
    assert_close(many, stack([sol(t) for t in times]))
    if kind is not list and not per_sample:
        assert counter.reads <= len(times)
    if isinstance(method, integrators.Dopri5):
        with Counter() as more:
            sol([*times, *times] if kind is list else times.repeat_interleave(2))
        assert more.operations < 1.8 * counter.operations


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_dense_states_own_memory(per_sample: bool) -> None:
    """It may be written to, and times come in any form."""
    y0 = torch.rand(3, 2, requires_grad=True)
    ode, stepping = fs.ODE(lambda t, y: -y, batched_time=True), fs.Adaptive(per_sample=per_sample)
    sol = fs.solve(ode, y0, stepping=stepping, dense=True)
    assert_close(sol(0.5).mul_(2.0), 2.0 * sol(0.5))
    assert_close(sol(n / 7 for n in range(8)), sol([n / 7 for n in range(8)]))


@pytest.mark.parametrize("method", SUMS, ids=str)
def test_a_look_without_a_graph_drops_no_gradient(method: Integrator) -> None:
    w = torch.tensor(1.0, requires_grad=True)
    dynamics, y0 = suited(method, lambda t, y: -w * y.square(), torch.rand(3, 2) + 0.5)
    slopes = []
    for looked in (False, True):
        sol = fs.solve(
            dynamics, y0, 0.0, 1.0, integrator=method, stepping=fs.Fixed(steps=2),
            adjoint=fs.Direct(), dense=True,
        )  # fmt: skip
        if looked:
            with torch.no_grad():
                sol(0.3)
        slopes += torch.autograd.grad(leaves(sol(0.3))[0].sum(), w)
    assert torch.equal(*slopes)


@pytest.mark.parametrize("method", [integrators.Dopri5(), integrators.Dopri8()], ids=str)
def test_a_step_reads_once_however_many_times_it_saves(method: Integrator) -> None:
    def cost(saves: int) -> tuple[int, int]:
        ode = fs.ODE(lambda t, y: -y, batched_time=True, rowwise=True)
        with torch.no_grad(), Counter() as counter:
            fs.solve(
                ode, torch.ones(3, 2), 0.0, 1.0, integrator=method,
                stepping=fs.Adaptive(per_sample=True), save_at=torch.linspace(0.0, 1.0, saves),
            )  # fmt: skip
        return counter.reads, counter.operations

    few, many = cost(200), cost(2000)
    assert few[0] == many[0]
    if isinstance(method, integrators.Dopri5):
        assert few[1] == many[1]
