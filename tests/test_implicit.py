"""Implicit methods: their order, their stability, their equations and their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    GMRES,
    Dense,
    ImplicitEuler,
    ImplicitRK,
    ImplicitTableau,
    KenCarp3,
    KenCarp4,
    Kvaerno3,
    Kvaerno4,
    Kvaerno5,
    Tsit5,
)  # fmt: skip

from .systems import catalogue, slope
from .test_order import density, difference, swung, trees, worst

METHODS = catalogue(integrators, ImplicitRK)
STIFF = [m for m in METHODS if m.order != 2]  # Trapezoid is not L-stable
PAIRS = [m for m in METHODS if m.tableau.explicit]


def problem(method: ImplicitRK, one: Callable[..., Any], two: Callable[..., Any]) -> fs.ODE:
    """y' = one + two, in two parts for an additive pair."""
    if method.tableau.explicit:
        return fs.ODE(one, implicit=two, batched_time=True)
    return fs.ODE(lambda t, y: one(t, y) + two(t, y), batched_time=True)


def swinging(method: ImplicitRK) -> fs.ODE:
    return problem(
        method, lambda t, y: 0.8 * t.cos() + 0.0 * y, lambda t, y: 0.8 * t.cos() * y.square()
    )


# --- the methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_all_order_conditions(method: ImplicitRK) -> None:
    """For every rooted tree, its inner nodes coloured by either tableau of a pair."""
    table = method.tableau
    count = len(table.b)
    colours = []
    for rows, diagonal in ((table.a, table.gamma), (table.explicit, 0.0)):
        if rows is not None:
            a = torch.zeros(count, count)
            for i, row in enumerate(rows, start=1):
                a[i, : len(row)] = torch.tensor([float(v) for v in row])
                a[i, i] = diagonal
            colours.append(a)

    def weights(tree: tuple[Any, ...]) -> list[Tensor]:
        """The tree's stage weights in every colouring."""
        branches = [[a @ w for a in colours for w in weights(branch)] for branch in tree]
        return [math.prod(c, start=torch.ones(count)) for c in itertools.product(*branches)]

    for b, order in ((table.b, table.order), (table.b_low, table.order_low)):
        for tree in itertools.chain(*(trees(n) for n in range(1, order + 1))):
            for weight in weights(tree):
                value = float(torch.tensor([float(v) for v in b]) @ weight)
                assert value == pytest.approx(1 / density(tree), abs=1e-11), tree


@pytest.mark.parametrize("method", STIFF, ids=str)
def test_stability_at_infinity(method: ImplicitRK) -> None:
    """R(z) = 1 + z b (I - z A)^-1 1 goes to nothing, and is at most one on the imaginary axis."""
    table = method.tableau
    count = len(table.b)
    a = torch.zeros(count, count, dtype=torch.complex128)
    for i, row in enumerate(table.a, start=1):
        a[i, :i] = torch.tensor([float(v) for v in row])
        a[i, i] = table.gamma
    b = torch.tensor([float(v) for v in table.b], dtype=torch.complex128)

    def growth(z: complex) -> float:
        inner = torch.linalg.solve(torch.eye(count) - z * a, torch.ones_like(b))
        return float((1 + z * (b @ inner)).abs())

    assert growth(-1e7) < 1e-6
    assert max(growth(1j * 10.0 ** (n / 8)) for n in range(-16, 33)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("method", "backward"), [(m, bool(i % 2)) for i, m in enumerate(METHODS)], ids=str
)
def test_order(method: ImplicitRK, backward: bool) -> None:
    """Either way in time, by turns: the engine is one."""
    t0, t1 = (2.5, 0.3) if backward else (0.3, 2.5)
    errors, counts = [], [24, 48] if method.order < 5 else [20, 34]
    with torch.no_grad():
        for n in counts:
            sol = fs.solve(
                swinging(method), swung(t0), t0, t1, integrator=method,
                stepping=fs.Fixed(steps=n), save_at=fs.Steps(),
            )  # fmt: skip
            errors.append(worst(sol, swung))
    assert slope(errors, counts) > method.order - 0.35, errors
    assert slope(errors, counts) < method.order + 0.8, errors


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_dense_order(method: ImplicitRK) -> None:
    errors, counts = [], [16, 32]
    times = torch.linspace(0.31, 1.99, 57).tolist()
    with torch.no_grad():
        for n in counts:
            sol = fs.solve(
                swinging(method), swung(0.3), 0.3, 2.0, integrator=method,
                stepping=fs.Fixed(steps=n), dense=True,
            )  # fmt: skip
            errors.append(sum(difference(sol(t), swung(t)) for t in times))
    assert slope(errors, counts) > min(method.order, method.dense_order + 1) - 0.4, errors


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_error_estimates_fall_as_declared(method: ImplicitRK) -> None:
    y, sizes, counts = swung(0.3), [], [30, 60]
    for n in counts:
        step = method.step(Field(swinging(method), (), y), 0.3, 0.3 + 3.0 / n, y, None, None)
        sizes.append(float(step.error().abs().max()))
    assert method.error_order is not None
    assert slope(sizes, counts) > method.error_order - 0.35, sizes


@pytest.mark.parametrize("method", PAIRS, ids=str)
def test_pairs_on_a_stiff_linear_part(method: ImplicitRK) -> None:
    """y' = -50 y + 50 cos t - sin t, from a point off the slow curve."""

    def exact(t: float) -> Tensor:
        return math.cos(t) + torch.tensor([0.5, -1.0]) * math.exp(-50.0 * t)

    errors, counts = [], [50, 70, 100]
    ode = fs.ODE(lambda t, y: 50.0 * t.cos() - t.sin() + 0.0 * y, linear=-50.0)
    with torch.no_grad():
        for n in counts:
            sol = fs.solve(
                ode, exact(0.0), 0.0, 0.5, integrator=method, stepping=fs.Fixed(steps=n),
                save_at=fs.Steps(),
            )  # fmt: skip
            errors.append(worst(sol, exact))
    assert slope(errors, counts) > method.order - 0.35, errors


def tree_field(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
    a, b = y["pair"]
    return {"pair": (b * t[..., None], -a * t[..., None]), "z": -y["z"] * y["z"] * a[..., 0]}


def tree_start(count: int) -> dict[str, Any]:
    a = torch.linspace(0.5, 1.0, 2 * count).reshape(count, 2)
    return {"pair": (a, 0.3 * a), "z": torch.linspace(1.0, 2.0, count)}


@pytest.mark.parametrize("method", [Kvaerno5(), Kvaerno4(linear=GMRES())], ids=str)
def test_pytrees(method: ImplicitRK) -> None:
    ode, y0 = fs.ODE(tree_field, batched_time=True), tree_start(3)
    with torch.no_grad():
        wanted = fs.solve(ode, y0, 0.0, 0.5, stepping=fs.Adaptive(1e-9, 1e-9)).y1
        for own in (False, True):
            sol = fs.solve(
                ode, y0, 0.0, 0.5, integrator=method,
                stepping=fs.Adaptive(1e-6, 1e-6, per_sample=own),
            )  # fmt: skip
            assert difference(sol.y1, wanted) < 1e-5


def test_wrong_tableaus_are_refused_at_birth() -> None:
    euler: dict[str, Any] = {
        "c": (0, 1), "a": ((0,),), "gamma": 1, "b": (0, 1), "order": 1, "b_low": (1, 0),
        "order_low": 1,
    }  # fmt: skip
    assert ImplicitTableau(**euler).fsal
    for change, complaint in (
        ({"a": ((0.5,),)}, "row"), ({"order": 2}, "quadrature condition of order 2"),
        ({"c": (0.5, 1)}, "nodes from 0"), ({"b_low": (1, 1)}, "quadrature condition of order 1"),
        ({"explicit": ((0.5,),)}, "row"), ({"dense": ((1,), (1,))}, "dense"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            ImplicitTableau(**{**euler, **change})
    table = KenCarp3.tableau
    with pytest.raises(ValueError, match="coupling"):
        ImplicitTableau(
            table.c, table.a, table.gamma, table.b, 3, table.b_low, 2,
            explicit=(table.explicit[0], (3 / 5, 0), table.explicit[2]),  # type: ignore[index]
        )  # fmt: skip


# --- stiff systems --------------------------------------------------------------------------------


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack((back - slow, slow - back - fast, fast), -1)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack((v, 1000.0 * (1.0 - x * x) * v - x), -1)


def oregonator(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack((
        77.27 * (b + a * (1.0 - 8.375e-6 * a - b)), (c - (1.0 + a) * b) / 77.27, 0.161 * (a - c),
    ), -1)  # fmt: skip


def hires(t: Tensor, y: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = y.unbind(-1)
    meet = 280.0 * f * h
    return torch.stack((
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007, 1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e, 8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g, -meet + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        meet - 1.81 * g, 1.81 * g - meet,
    ), -1)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "y0", "t1", "atol"),
    [
        (robertson, [[1.0, 0.0, 0.0], [0.9, 0.0, 0.1]], 0.004, 1e-13),
        (van_der_pol, [[2.0, 0.0], [1.8, 0.1]], 0.005, 1e-10),
        (oregonator, [[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]], 0.03, 1e-9),
        (hires, [[1.0, 0, 0, 0, 0, 0, 0, 0.0057], [0.9, 0, 0, 0, 0, 0, 0, 0.006]], 0.02, 1e-11),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_stiff_systems_against_radau(
    field: Callable[[Tensor, Tensor], Tensor], y0: list[list[float]], t1: float, atol: float
) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    start = torch.tensor(y0)
    with torch.no_grad():
        sol = fs.solve(
            fs.ODE(field, batched_time=True), start, 0.0, t1, integrator=Kvaerno5(),
            stepping=fs.Adaptive(1e-8, atol, per_sample=True),
        )  # fmt: skip
    for row, found in zip(start, sol.y1, strict=True):
        reference = integrate.solve_ivp(
            lambda t, y: field(torch.zeros(()), torch.as_tensor(y, device="cpu")).numpy(),
            (0.0, t1), row.cpu().numpy(), method="Radau", rtol=1e-9, atol=0.1 * atol,
        ).y[:, -1]  # fmt: skip
        wanted = torch.as_tensor(reference, device="cpu")
        assert torch.allclose(found.cpu(), wanted, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("method", STIFF, ids=str)
def test_steps_far_beyond_the_stiffness(method: ImplicitRK) -> None:
    """y' = -1e6 (y - cos t) - sin t, off its curve: ten steps of 1e5 time constants."""
    ode = problem(
        method, lambda t, y: -t.sin() + 0.0 * y, lambda t, y: -1e6 * (y - t.cos()[..., None])
    )
    sol = fs.solve(
        ode, torch.tensor([[2.0], [1.0]]), 0.0, 1.0, integrator=method,
        stepping=fs.Fixed(steps=10),
    )  # fmt: skip
    assert float((sol.y1 - math.cos(1.0)).abs().max()) < 5e-3


def test_an_adaptive_solve_is_no_slave_of_its_stiffness() -> None:
    for method in (Kvaerno5(), KenCarp4(), ImplicitEuler()):
        ode = problem(method, lambda t, y: -t.sin() + 0.0 * y, lambda t, y: -1e6 * (y - t.cos()))
        rtol = 1e-2 if method.order == 1 else 1e-4
        with torch.no_grad():
            sol = fs.solve(
                ode, torch.tensor([[2.0]]), 0.0, 1.0, integrator=method,
                stepping=fs.Adaptive(rtol, rtol),
            )  # fmt: skip
        assert float((sol.y1 - math.cos(1.0)).abs()) < 10 * rtol
        assert sol.stats.attempts < 200


# --- the equations of a step ----------------------------------------------------------------------


@pytest.mark.parametrize("method", [Kvaerno3(), KenCarp4(), Kvaerno5(linear=GMRES())], ids=str)
def test_every_sample_is_solved_as_if_alone(method: ImplicitRK) -> None:
    ode = problem(
        method, lambda t, y: (3.0 * t).sin()[..., None] + 0.0 * y,
        lambda t, y: -torch.stack((y[..., 0] ** 3, 1e3 * y[..., 1] * y[..., 0]), -1),
    )  # fmt: skip
    y0, t1 = torch.tensor([[1.0, 0.5], [9.0, 1.0], [3.0, -2.0]]), torch.tensor([0.5, 0.05, 0.2])
    with torch.no_grad():
        whole = fs.solve(
            ode, y0, 0.0, t1, integrator=method, stepping=fs.Adaptive(1e-3, 1e-4, per_sample=True)
        )
        for i in range(3):
            alone = fs.solve(
                ode, y0[i : i + 1], 0.0, float(t1[i]), integrator=method,
                stepping=fs.Adaptive(1e-3, 1e-4),
            )  # fmt: skip
            assert torch.allclose(whole.y1[i], alone.y1[0], atol=1e-10, rtol=1e-9)
            assert int(whole.stats.accepted[i]) == alone.stats.accepted  # type: ignore[index]


@pytest.mark.parametrize("restart", [4, 8])
def test_krylov_solves_are_those_of_the_factors(restart: int) -> None:
    a = torch.randn(8, 8)
    f = lambda t, y: torch.tanh(y @ a) - torch.linspace(1.0, 20.0, 8) * y
    y0 = torch.randn(3, 8, requires_grad=True)
    ends, gradients = [], []
    for linear in (Dense(), GMRES(restart, cycles=20)):
        sol = fs.solve(
            fs.ODE(f), y0, integrator=Kvaerno3(linear=linear), stepping=fs.Fixed(steps=2)
        )
        ends.append(sol.y1.detach())
        gradients.append(torch.autograd.grad(sol.y1.square().sum(), y0)[0])
    assert torch.allclose(ends[1], ends[0], atol=1e-11)
    assert torch.allclose(gradients[1], gradients[0], atol=1e-11)
    short = Kvaerno3(60, GMRES(2, cycles=1, tol=0.5))
    sol = fs.solve(fs.ODE(f), y0, integrator=short, stepping=fs.Adaptive(0.1, 0.1))
    with pytest.raises(RuntimeError, match="raise its restart"):
        sol.y1.sum().backward()


def test_the_jacobian_is_made_once_a_state() -> None:
    """d products at each accepted step's start, none where a rejected step starts again."""
    f = lambda t, y: torch.where(t > 0.5, -40.0, -1.0) * (y - t.cos())
    with torch.no_grad():
        sol = fs.solve(
            fs.ODE(f), torch.ones(1, 3), integrator=Kvaerno3(), stepping=fs.Adaptive(1e-5, 1e-5)
        )
    assert sol.stats.rejected > 0
    assert sol.stats.products == 3 * int(sol.stats.accepted)


def test_one_sample_is_a_vector() -> None:
    a = torch.randn(4, 4)
    f, y0 = lambda t, y: torch.tanh(a @ y) - y, torch.randn(4)
    keywords: dict[str, Any] = {"stepping": fs.Adaptive(1e-9, 1e-9)}
    with torch.no_grad():
        found = fs.solve(fs.ODE(f), y0, integrator=Kvaerno5(), **keywords).y1
        scalar = fs.solve(fs.ODE(lambda t, y: -y), torch.tensor(1.0), integrator=Kvaerno5()).y1
    assert difference(found, fs.solve(fs.ODE(f), y0, **keywords).y1) < 1e-8
    assert float(scalar) == pytest.approx(math.exp(-1.0), rel=1e-4)


@pytest.mark.parametrize("linear", [Dense(), GMRES()], ids=str)
def test_a_field_that_mixes_its_samples(linear: Any) -> None:
    """It is solved as one sample, gradients and all; it has no times of each sample's own."""
    ode = fs.ODE(lambda t, y: -30.0 * (y - y.mean(0) ** 2), batched_time=True)
    y0 = torch.rand(3, 2, requires_grad=True)
    found = []
    for method in (Kvaerno5(linear=linear), Tsit5()):
        y1 = fs.solve(ode, y0, 0.0, 0.1, integrator=method, stepping=fs.Adaptive(1e-9, 1e-9)).y1
        found.append((y1.detach(), torch.autograd.grad(y1[0].sum(), y0)[0]))
    assert difference(found[0], found[1]) < 1e-6
    with pytest.raises(TypeError, match="mixes the samples"):
        fs.solve(ode, y0, integrator=Kvaerno5(), stepping=fs.Adaptive(per_sample=True))


class _Unbatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return -y.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        float(g.sum())  # which no batched backward pass allows
        return -2.0 * y * g


def test_a_backward_pass_that_cannot_be_batched() -> None:
    y0 = torch.rand(2, 3)
    fields: tuple[Any, ...] = (lambda t, y: _Unbatched.apply(y), lambda t, y: -y.square())
    a, b = (fs.solve(fs.ODE(f), y0, integrator=Kvaerno3()).y1 for f in fields)
    assert torch.allclose(a, b, atol=1e-13)


def test_equations_without_a_solution_end_in_a_typed_error() -> None:
    """y' = -sign(y) has no smooth solution through 0; one row is spared."""
    f = lambda t, y: torch.where(y > 0, -1.0, 1e9) * (y[:, :1] < 0.9)
    y0 = torch.tensor([[0.5], [1.0]])
    for stepping in (fs.Adaptive(1e-9, 1e-9, per_sample=True), fs.Fixed(steps=3)):
        sol = fs.solve(
            fs.ODE(f, batched_time=True), y0, integrator=Kvaerno3(), stepping=stepping,
            throw=False, max_steps=300,
        )  # fmt: skip
        assert not sol.success
    with pytest.raises(fs.SolveError):
        fs.solve(fs.ODE(f), y0, integrator=Kvaerno3(), stepping=fs.Adaptive(1e-9, 1e-9))
    sol = fs.solve(
        fs.ODE(f, batched_time=True), y0, integrator=Kvaerno3(), throw=False,
        stepping=fs.Adaptive(1e-9, 1e-9, per_sample=True),
    )  # fmt: skip
    assert torch.is_tensor(sol.status)
    assert sol.status[1] == fs.Status.SUCCESS
    assert sol.status[0] in (fs.Status.NON_FINITE, fs.Status.UNDERFLOW)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "adjoint"),
    [
        (Kvaerno3(), fs.Direct()), (Kvaerno3(), fs.Checkpointed(1)),
        (ImplicitEuler(linear=GMRES()), fs.Checkpointed(1)), (KenCarp3(), fs.Direct()),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_are_exact(method: ImplicitRK, adjoint: fs.Adjoint) -> None:
    """By the state, the parameters, the arguments and both times, against finite differences."""

    def end(y0: Tensor, w: Tensor, u: Tensor, t0: Tensor, t1: Tensor) -> tuple[Tensor, Tensor]:
        one = lambda t, y, u: torch.tanh(y @ w) + u * y.cos()
        two = lambda t, y, u: -5.0 * (y - t.cos()) ** 3 - 10.0 * w.square().sum() * y
        if method.tableau.explicit:
            ode = fs.ODE(one, implicit=two)
        else:
            ode = fs.ODE(lambda t, y, u: one(t, y, u) + two(t, y, u))
        sol = fs.solve(
            ode, y0, t0, t1, args=(u,), integrator=method, stepping=fs.Fixed(steps=2),
            adjoint=adjoint, save_at=[0.3],
        )  # fmt: skip
        return sol.y1, sol.ys

    inputs = (torch.rand(2, 2), 0.5 * torch.randn(2, 2), torch.rand(2, 2), torch.tensor(0.1),
              torch.tensor(0.4))  # fmt: skip
    assert torch.autograd.gradcheck(end, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_rejected_rows_leave_gradients_whole() -> None:
    """Newton fails on some rows of an attempt; their gradients are those of what counted."""
    ode = fs.ODE(lambda t, y: -100.0 * y**3, batched_time=True)
    y0 = torch.tensor([[0.1], [30.0]], requires_grad=True)
    sol = fs.solve(
        ode, y0, 0.0, 0.1, integrator=Kvaerno3(),
        stepping=fs.Adaptive(1e-4, 1e-4, True, dt0=0.02),
    )  # fmt: skip
    assert int(sol.stats.rejected[1]) > 0  # type: ignore[index]
    (g,) = torch.autograd.grad(sol.y1.sum(), y0)
    assert torch.allclose(g, (1.0 + 20.0 * y0.square()).pow(-1.5), rtol=1e-2)


def test_second_derivatives_are_refused() -> None:
    y0 = torch.rand(2, 2, requires_grad=True)
    y1 = fs.solve(
        fs.ODE(lambda t, y: -y.square()), y0, integrator=Kvaerno3(), stepping=fs.Fixed(steps=2)
    ).y1
    (g,) = torch.autograd.grad(y1.sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        g.sum().backward()


def test_the_way_back_tells_its_method_the_tolerances_of_its_own() -> None:
    class Told(Tsit5):
        def bind(self, stepping: fs.Stepping) -> Told:
            seen.append(stepping)
            return self

    seen: list[fs.Stepping] = []
    back = fs.Backsolve(Told(), fs.Adaptive(1e-3, 1e-2))
    y0 = torch.ones(2, requires_grad=True)
    fs.solve(fs.ODE(lambda t, y: -y), y0, adjoint=back).y1.sum().backward()
    (told,) = seen
    assert isinstance(told, fs.Adaptive)
    assert (told.rtol, told.atol) == (1e-3, 1e-2)


def test_nothing_is_paid_for_gradients_that_nobody_asks_for() -> None:
    keywords: dict[str, Any] = {"integrator": Kvaerno5(), "stepping": fs.Fixed(steps=3)}
    ode, y0 = fs.ODE(lambda t, y: -y.square()), torch.rand(2, 2)
    plain = fs.solve(ode, y0, **keywords).stats.evaluations
    with torch.no_grad():
        assert fs.solve(ode, y0, **keywords).stats.evaluations == plain
    asked = fs.solve(ode, y0.requires_grad_(), **keywords).stats.evaluations
    assert asked == plain + 3 * 6


# --- what is declared, and what is refused --------------------------------------------------------


def test_the_parts_sum_to_the_field() -> None:
    y, t = torch.rand(2, 3), torch.tensor(0.3)
    f, g, rate = (lambda t, y: y.sin()), (lambda t, y: -y * t), torch.tensor([-1.0, -2.0, 0.0])
    for ode in (fs.ODE(f, implicit=g), fs.ODE(f, linear=rate), fs.ODE(f, linear=rate, implicit=g)):
        parts = ode.parts()
        assert parts is not None
        assert torch.allclose(parts[0](t, y) + parts[1](t, y), ode(t, y))
    split = fs.ODE(f, linear=rate, implicit=g).split()
    assert split is not None
    assert torch.allclose(split.residual(t, y), f(t, y) + g(t, y))
    assert fs.ODE(f).parts() is None
    ends = [
        fs.solve(fs.ODE(f, linear=rate, implicit=g), y, integrator=m,
                 stepping=fs.Adaptive(1e-8, 1e-8)).y1
        for m in (Tsit5(), KenCarp4())
    ]  # fmt: skip
    assert difference(*ends) < 1e-7
    with pytest.raises(TypeError, match="implicit part"):
        fs.solve(fs.ODE(f, implicit=lambda t, y: y[:1]), y)


def test_what_cannot_be_solved_is_refused() -> None:
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2, 3)
    for state, cure in ((y0.to(torch.complex128), "view_as_real"), (y0.half(), r"float\(\)")):
        with pytest.raises(TypeError, match=cure):
            fs.solve(ode, state, integrator=Kvaerno5())
    with pytest.raises(TypeError, match="no_grad"), torch.inference_mode():
        fs.solve(ode, y0, integrator=Kvaerno5())
    with pytest.raises(TypeError, match="implicit=g"):
        fs.solve(ode, y0, integrator=KenCarp4())
    for bad, error in ((lambda: Kvaerno5(0), ValueError), (lambda: GMRES(0), ValueError),
                       (lambda: GMRES(tol=2.0), ValueError),
                       (lambda: Kvaerno5(linear="dense"), TypeError),  # type: ignore[arg-type]
                       (lambda: fs.ODE(lambda t, y: y, implicit=3), TypeError)):  # fmt: skip
        with pytest.raises(error):
            bad()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("linear", [Dense(), GMRES()], ids=str)
@pytest.mark.parametrize("method", [Kvaerno5, KenCarp4], ids=lambda m: m.__name__)
def test_a_field_may_leave_out_part_of_the_state(method: Any, linear: Any) -> None:
    """A running cost beside what it is of; and a forcing, which sees nothing of it."""
    a = torch.ones(2, 2, requires_grad=True)
    y0 = {"a": a, "cost": torch.zeros(2, 1)}
    push = torch.ones(2, requires_grad=True)

    def field(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": -y["a"], "cost": y["a"].square().sum(1, keepdim=True)}

    def forced(t: Tensor, y: Tensor) -> Tensor:
        return (push * torch.cos(t)).expand(3, 2)

    steps = {"integrator": method(linear=linear), "stepping": fs.Adaptive(1e-9, 1e-9)}
    parts = method is KenCarp4
    dynamics = fs.ODE(lambda t, y: {k: 0.0 * v for k, v in y.items()}, implicit=field)
    end = fs.solve(dynamics if parts else fs.ODE(field), y0, 0.0, 1.0, **steps).y1
    found = torch.autograd.grad(end["cost"].sum(), a)[0]
    torch.testing.assert_close(found, torch.full((2, 2), 1.0 - math.exp(-2.0)))
    dynamics = fs.ODE(lambda t, y: 0.0 * y, implicit=forced)
    end = fs.solve(dynamics if parts else fs.ODE(forced), torch.zeros(3, 2), 0.0, 1.0, **steps).y1
    (found,) = torch.autograd.grad(end.sum(), push)
    torch.testing.assert_close(found, torch.full((2,), 3.0 * math.sin(1.0)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "executor", [fs.Eager(), fs.Compiled(backend="eager")], ids=["eager", "graph"]
)
def test_given_steps_solve_their_equations(dtype: torch.dtype, executor: fs.Executor) -> None:
    """y + l y^3 = 1 of many l: what Newton's iteration takes for solved is, from far starts too.

    Its last correction by the first Jacobian said how far the first by its own would be off.
    """
    rates = torch.logspace(-1, 4, 300, dtype=dtype)[:, None]
    sol = fs.solve(
        fs.ODE(lambda t, y, l: -l * y**3), torch.ones(300, 1, dtype=dtype), args=(rates,),
        integrator=ImplicitEuler(newton=30), stepping=fs.Fixed(steps=1), executor=executor,
    )  # fmt: skip
    y = sol.y1.double()
    slope = 1.0 + 3.0 * rates * y.square()
    error = (y + rates * y**3 - 1.0) / slope
    assert float(error.abs().max()) < 4.0 * torch.finfo(dtype).eps ** 0.8


@torch.no_grad()
@pytest.mark.parametrize("method", [ImplicitEuler(), Kvaerno3(), Kvaerno5()], ids=str)
def test_given_steps_know_no_unit(method: ImplicitRK) -> None:
    """Tolerated was eps^0.8 of 1, whatever the state's size: concentrations changed their sign."""
    found = []
    for unit in (1.0, 1e-6, 1e-12, 1e-20, 1e6):
        decay = fs.ODE(lambda t, y, unit=unit: -y * y / unit)
        y0 = torch.full((2, 1), unit)
        keywords: dict[str, Any] = {"integrator": method, "stepping": fs.Fixed(steps=4)}
        found.append(fs.solve(decay, y0, 0.0, 4.0, **keywords).y1 / unit)
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-10)


def test_given_steps_that_newton_does_not_solve_say_so() -> None:
    with pytest.raises(fs.NonFiniteState, match=r"more corrections \(newton=30\)"):
        fs.solve(
            fs.ODE(lambda t, y: -1e9 * y**3), torch.ones(1, 1), integrator=ImplicitEuler(),
            stepping=fs.Fixed(steps=1),
        )  # fmt: skip


def test_states_without_components_or_of_inference() -> None:
    decay, method = fs.ODE(lambda t, y: -y), Kvaerno3()
    for stepping in (fs.Adaptive(), fs.Fixed(steps=2)):
        sol = fs.solve(decay, torch.zeros(2, 0), integrator=method, stepping=stepping)
        assert sol.y1.shape == (2, 0)
    with torch.inference_mode():
        y0 = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"clone\(\)"):
        fs.solve(decay, y0, integrator=method)
