"""Every integrator converges as fast as it declares: at the end, and between its steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import (
    Dopri5,
    ExplicitRK,
    Heun,
    ImplicitRK,
    Integrator,
    Iterate,
    StepDoubling,
    Tableau,
)  # fmt: skip
from flowsde.integrators.base import Engine
from flowsde.integrators.stochastic import Stochastic
from flowsde.integrators.symplectic import Symplectic

from .systems import admits, catalogue, log_norm, slope

RUNGE_KUTTA = catalogue(integrators, ExplicitRK)
ORDINARY = [
    m for m in catalogue(integrators, Integrator)
    if admits(m, fs.ODE(lambda t, y: y)) and not isinstance(m, Engine)
]  # fmt: skip
CHEAP = [m for m in ORDINARY if not isinstance(m, ImplicitRK)]  # test_implicit has the others
EXPONENTIAL = [
    m for m in catalogue(integrators, Integrator)
    if admits(m, fs.ODE(lambda t, y: y, linear=-1.0)) and not admits(m, fs.ODE(lambda t, y: y))
    and not isinstance(m, ImplicitRK)
]  # fmt: skip


def test_every_integrator_is_tested_for_its_order() -> None:
    """One of the groups below, those of test_symplectic, test_implicit and test_stochastic."""
    kinds = (Symplectic, ImplicitRK, Stochastic, StepDoubling, Iterate, Engine)
    for method in catalogue(integrators, Integrator):
        assert method in ORDINARY + EXPONENTIAL or isinstance(method, kinds), method


# --- problems -------------------------------------------------------------------------------------


def swing(t: Tensor, y: Tensor) -> Tensor:
    """Non-autonomous and nonlinear, with a closed form: y' = 0.8 (1 + y^2) cos t."""
    return 0.8 * (1.0 + y.square()) * t.cos()


def swung(t: float) -> Tensor:
    return torch.tan(torch.tensor([0.1, -0.2, 0.3]) + 0.8 * math.sin(t))


def tree(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
    """A pytree with a complex leaf: z' = i t z; and a pair that turns."""
    (a, b), z = y["pair"], y["z"]
    return {"pair": (b * t, -a * t), "z": 1j * t * z}


def tree_start() -> dict[str, Any]:
    return {
        "pair": (torch.tensor([1.0, 0.5]), torch.tensor([0.0, -0.3])),
        "z": torch.tensor(1.0 + 0.5j, dtype=torch.complex128),
    }


def tree_end(t: float) -> dict[str, Any]:
    (a, b), z, s = tree_start()["pair"], tree_start()["z"], 0.5 * t * t
    pair = (a * math.cos(s) + b * math.sin(s), b * math.cos(s) - a * math.sin(s))
    return {"pair": pair, "z": z * complex(math.cos(s), math.sin(s))}


def difference(a: Any, b: Any) -> float:
    return log_norm(torch.utils._pytree.tree_map(torch.sub, a, b))


def steps_for(order: int) -> list[int]:
    """Far enough that the leading term rules, near enough that rounding does not."""
    if order >= 6:
        return [24, 34, 48] if order < 8 else [10, 14, 20]
    return [80, 120, 180] if order <= 4 else [60, 100, 150]


def worst(sol: fs.Solution, exact: Any) -> float:
    """Error over all steps, so that no chance zero crossing at the end decides."""
    assert sol.ts is not None
    flat = [torch.utils._pytree.tree_leaves(exact(float(t))) for t in sol.ts]
    found = torch.utils._pytree.tree_leaves(sol.ys)
    parts = [
        (x - torch.stack(e)).abs().square().mean()
        for x, e in zip(found, zip(*flat, strict=True), strict=True)
    ]
    return float(torch.stack(parts).mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", CHEAP, ids=str)
def test_order(method: Integrator, backward: bool) -> None:
    t0, t1 = (3.0, 0.3) if backward else (0.3, 3.0)
    errors, counts = [], steps_for(method.order)
    for n in counts:
        sol = fs.solve(
            fs.ODE(swing), swung(t0), t0, t1, integrator=method, stepping=fs.Fixed(steps=n),
            save_at=fs.Steps(),
        )  # fmt: skip
        errors.append(worst(sol, swung))
    assert slope(errors, counts) > method.order - 0.35, errors
    assert slope(errors, counts) < method.order + 0.6, errors


@torch.no_grad()
@pytest.mark.parametrize("method", CHEAP, ids=str)
def test_order_on_a_pytree(method: Integrator) -> None:
    """One of its leaves is complex."""
    errors, counts = [], [n // 2 for n in steps_for(method.order)]
    for n in counts:
        sol = fs.solve(
            fs.ODE(tree), tree_start(), 0.0, 3.0, integrator=method, stepping=fs.Fixed(steps=n),
            save_at=fs.Steps(),
        )  # fmt: skip
        errors.append(worst(sol, tree_end))
    assert slope(errors, counts) > method.order - 0.35, errors


@torch.no_grad()
@pytest.mark.parametrize("method", CHEAP, ids=str)
def test_dense_order(method: Integrator) -> None:
    """The worst error between steps falls with the lesser of both orders, counted globally."""
    errors, counts = [], steps_for(method.dense_order)
    for n in counts:
        sol = fs.solve(
            fs.ODE(swing), swung(0.3), 0.3, 2.0, integrator=method, stepping=fs.Fixed(steps=n),
            dense=True,
        )  # fmt: skip
        times = torch.linspace(0.31, 1.99, 103).tolist()
        errors.append(sum(difference(sol(t), swung(t)) for t in times))
    wanted = min(method.order, method.dense_order + 1)
    assert slope(errors, counts) > wanted - 0.4, errors


def trees(order: int) -> list[tuple[Any, ...]]:
    """Rooted trees with this many nodes, as sorted tuples of their branches."""
    if order == 1:
        return [()]
    found = set()

    def grow(left: int, branches: tuple[Any, ...]) -> None:
        if left == 0:
            found.add(tuple(sorted(branches, key=repr)))
            return
        for size in range(1, left + 1):
            for branch in trees(size):
                grow(left - size, (*branches, branch))

    grow(order - 1, ())
    return sorted(found, key=repr)


def size(t: tuple[Any, ...]) -> int:
    return 1 + sum(map(size, t))


def density(t: tuple[Any, ...]) -> int:
    return size(t) * math.prod(map(density, t))


@pytest.mark.parametrize("method", RUNGE_KUTTA, ids=str)
def test_all_order_conditions(method: ExplicitRK) -> None:
    """sum_i b_i Phi_i(tree) = 1 / density(tree), for every rooted tree up to the order."""
    table = method.tableau
    count = len(table.b)
    a = torch.zeros(count, count)
    for i, row in enumerate(table.a, start=1):
        a[i, : len(row)] = torch.tensor([float(v) for v in row])

    def weight(t: tuple[Any, ...]) -> Tensor:
        phi = torch.ones(count)
        for branch in t:
            phi = phi * (a @ weight(branch))
        return phi

    pairs = [(table.b, table.order)]
    if table.b_low is not None:
        pairs.append((table.b_low, table.order_low))
    for b, order in pairs:
        for n in range(1, min(order, 7) + 1):
            for t in trees(n):
                value = float(torch.tensor([float(v) for v in b]) @ weight(t))
                assert value == pytest.approx(1 / density(t), abs=2e-10), (n, t)


@pytest.mark.parametrize("method", [m for m in RUNGE_KUTTA if m.tableau.dense], ids=str)
def test_dense_weights_meet_their_order_conditions(method: ExplicitRK) -> None:
    table = method.tableau
    assert table.dense is not None
    for theta in (0.2, 0.5, 0.9):
        b = [sum(p * theta ** (n + 1) for n, p in enumerate(row)) for row in table.dense]
        for q in range(1, table.dense_order + 1):
            moment = sum(w * c ** (q - 1) for w, c in zip(b, table.c, strict=True))
            assert moment == pytest.approx(theta**q / q, abs=1e-10)


@pytest.mark.parametrize("method", [m for m in CHEAP if m.error_order], ids=str)
def test_error_estimates_fall_as_declared(method: Integrator) -> None:
    from flowsde.dynamics.field import Field

    y, sizes, counts = swung(0.3), [], [12, 18, 27] if method.order > 5 else [60, 100, 150]
    for n in counts:
        field = Field(fs.ODE(swing), (), y)
        carry = method.init(field, 0.3, y)
        step = method.step(field, 0.3, 0.3 + 3.0 / n, y, None, carry)
        sizes.append(float(step.error().abs().max()))
    assert method.error_order is not None
    assert slope(sizes, counts) > method.error_order - 0.35, sizes


@torch.no_grad()
@pytest.mark.parametrize("method", [m for m in ORDINARY if m.error_order], ids=str)
def test_adaptive_errors_follow_the_tolerance(method: Integrator) -> None:
    coarse = {2: (1e-3, 1e-5), 3: (1e-4, 1e-6)}
    tolerances = coarse.get(method.error_order or 0, (1e-5, 1e-9))
    errors = []
    for tolerance in tolerances:
        sol = fs.solve(
            fs.ODE(swing), swung(0.3), 0.3, 2.0, integrator=method,
            stepping=fs.Adaptive(tolerance, tolerance), save_at=[0.3, 0.7, 1.1, 2.0],
        )  # fmt: skip
        errors.append(difference(sol.y1, swung(2.0)))
        size = 3**0.5 * (1.0 + log_norm(sol.y1))  # of one component, in the norm of all three
        assert errors[-1] < max(30, sol.stats.accepted * size) * tolerance  # local errors add up
        between = min(1.0, (method.dense_order + 1) / method.error_order)
        slack = max(100, sol.stats.accepted * size)
        assert difference(sol.ys[1], swung(0.7)) < slack * tolerance**between
        assert sol.ts is not None
        assert sol.ts.tolist() == [0.3, 0.7, 1.1, 2.0]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("method", EXPONENTIAL, ids=str)
def test_exponential_order_on_a_stiff_split(method: Integrator) -> None:
    """y' = -50 y + 50 cos t - sin t, from a point off the slow curve."""

    def rest(t: Tensor, y: Tensor) -> Tensor:
        return 50.0 * t.cos() - t.sin() + 0.0 * y

    def exact(t: float) -> Tensor:
        return math.cos(t) + torch.tensor([0.5, -1.0]) * math.exp(-50.0 * t)

    errors, counts = [], [200, 400, 800]
    for n in counts:
        sol = fs.solve(
            fs.ODE(rest, linear=-50.0), exact(0.0), 0.0, 1.0, integrator=method,
            stepping=fs.Fixed(steps=n),
        )  # fmt: skip
        errors.append(difference(sol.y1, exact(1.0)))
    assert abs(slope(errors, counts) - method.order) < 0.3, errors


@pytest.mark.parametrize("method", EXPONENTIAL, ids=str)
def test_exponential_methods_solve_the_linear_part_exactly(method: Integrator) -> None:
    rates = torch.tensor([-1e3, -1.0, 0.0])
    y0 = torch.tensor([[1.0, 2.0, 3.0]])
    dynamics = fs.ODE(lambda t, y: torch.ones_like(y), linear=rates)
    sol = fs.solve(dynamics, y0, 0.0, 2.0, integrator=method, stepping=fs.Fixed(steps=3))
    growth = torch.where(rates == 0, 2.0, torch.expm1(rates * 2.0) / torch.where(
        rates == 0, 1.0, rates))  # fmt: skip
    assert difference(sol.y1, y0 * (rates * 2.0).exp() + growth) < 1e-12


def test_wrong_tableaus_are_refused_at_birth() -> None:
    with pytest.raises(ValueError, match="row"):
        Tableau(c=(0, 1 / 2), a=((1 / 3,),), b=(0, 1), order=1)
    with pytest.raises(ValueError, match="quadrature condition of order 2"):
        Tableau(c=(0, 1), a=((1,),), b=(0, 1), order=2)
    with pytest.raises(ValueError, match="quadrature condition of order 1"):
        Tableau(c=(0,), a=(), b=(0.5,), order=1)
    with pytest.raises(ValueError, match="first node is 0"):
        Tableau(c=(1 / 2,), a=(), b=(1,), order=1)
    with pytest.raises(ValueError, match="order 1 or more"):
        Tableau(c=(0,), a=(), b=(0.5,), order=0)


def test_first_same_as_last_is_seen_and_used() -> None:
    stepping = fs.Fixed(steps=10)
    assert Dopri5.tableau.fsal
    assert not Heun.tableau.fsal
    sol = fs.solve(fs.ODE(swing), swung(0.0), integrator=Dopri5(), stepping=stepping)
    assert sol.stats.evaluations == 1 + 6 * 10
    sol = fs.solve(fs.ODE(swing), swung(0.0), integrator=Heun(), stepping=stepping)
    assert sol.stats.evaluations == 2 * 10


def test_a_residual_network_is_euler_to_the_bit() -> None:
    """Row 10: z + f(z) layer by layer, and Fixed(dt=1) with Euler."""
    layers = [torch.nn.Linear(3, 3) for _ in range(4)]
    z = y = torch.randn(5, 3)
    for layer in layers:
        z = z + layer(z).tanh()
    sol = fs.solve(
        fs.ODE(lambda t, y: layers[int(t)](y).tanh()), y, 0.0, 4.0,
        integrator=integrators.Euler(), stepping=fs.Fixed(dt=1.0),
    )  # fmt: skip
    assert torch.equal(sol.y1, z)
