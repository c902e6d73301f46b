"""Strong and weak orders of the methods for SDEs, against what they declare."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import flowsde as fs
from benchmarks.counting import Counter, uncounted
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    SRA3,
    SRIW1,
    Draws,
    ImplicitEuler,
    Increment,
    LogODE,
    NinomiyaNinomiya,
    PlatenWeak2,
    SlowRK,
    Stochastic,
    StochasticHeun,
    Trapezoid,
)  # fmt: skip
from flowsde.integrators.langevin import KineticMethod

from .systems import catalogue, slope

METHODS: list[Stochastic] = catalogue(integrators, Stochastic)
PATHS, GROUPS, FINE, STEPS = 1500, 10, 512, (8, 16, 32, 64)


# --- problems -------------------------------------------------------------------------------------


def drift(t: Tensor, y: Tensor) -> Tensor:
    """Non-linear, coupled, and a function of time."""
    return 0.6 * (y.flip(-1) - t[..., None]).sin() - 0.5 * y


def wave(t: Tensor, y: Tensor) -> Tensor:
    """Bent enough for the noise to tell, where that is additive."""
    return (2.0 * y.flip(-1) - 0.5 * t[..., None]).sin()


def own(t: Tensor, y: Tensor) -> Tensor:
    """g_i(t, y_i)."""
    return (0.4 + 0.3 * (2.0 * t[..., None]).cos()) * (1.2 + (1.5 * y).sin())


def shared(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[..., 1].sin() + 0.4 * t, 1.2 * y[..., 0].cos()), -1)


def turning(t: Tensor, y: Tensor) -> Tensor:
    """Two columns, multiplications by complex numbers, which commute."""
    turned = torch.stack((-y[..., 1], y[..., 0]), -1)
    return torch.stack((0.5 * y + 0.3 * turned, 0.6 * turned - 0.2 * y), -1)


def turning_square(t: Tensor, y: Tensor) -> Tensor:
    """sum_k Dg_k[g_k] of ``turning``: (0.5 + 0.3i)^2 + (-0.2 + 0.6i)^2 = -0.16 + 0.06i."""
    return -0.16 * y + 0.06 * torch.stack((-y[..., 1], y[..., 0]), -1)


def crossing(t: Tensor, y: Tensor) -> Tensor:
    """Columns that do not commute."""
    zero = torch.zeros_like(y[..., 0])
    first, second = torch.stack((y[..., 1], zero), -1), torch.stack((zero, 0.7 * y[..., 0]), -1)
    return torch.stack((first, second), -1)


def spread(t: Tensor, y: Tensor) -> Tensor:
    return (1.3 + 0.3 * t[..., None].cos()).expand_as(y)


def mixing(t: Tensor, y: Tensor) -> Tensor:
    """Three Brownian motions in two dimensions."""
    row = torch.stack((1.2 + 0.0 * t, t.cos(), t - 0.5), -1)
    return torch.stack((row, 1.0 - row), -2).expand(*y.shape, 3)


def growth(t: Tensor, y: Tensor) -> Tensor:
    return 0.3 * y


def proportional(t: Tensor, y: Tensor) -> Tensor:
    return 0.8 * y


@dataclass(frozen=True)
class Problem:
    """An SDE, and the method whose fine path stands for the solution, or a closed form in W(1)."""

    name: str
    f: Callable[..., Tensor]
    g: Callable[..., Tensor]
    kind: Literal["diagonal", "scalar", "general"]
    stratonovich: bool = False
    additive: bool = False
    commutative: bool = False
    reference: Stochastic = SlowRK()
    exact: Callable[[Tensor, Tensor], Tensor] | None = None
    same: fs.SDE | None = None  # in the calculus of the reference

    @property
    def sde(self) -> fs.SDE:
        size = None if self.kind != "general" else 3 if self.additive else 2
        return fs.SDE(
            self.f, self.g, noise=self.kind, stratonovich=self.stratonovich,
            additive=self.additive, commutative=self.commutative, noise_size=size,
            batched_time=True,
        )  # fmt: skip


def ito_turning() -> fs.SDE:
    """The Stratonovich form of dy = drift dt + turning dW in the sense of Ito."""
    return fs.SDE(
        lambda t, y: drift(t, y) - 0.5 * turning_square(t, y), turning, noise="general",
        stratonovich=True, commutative=True, noise_size=2,
    )  # fmt: skip


PROBLEMS = [
    Problem("diagonal, Ito", drift, own, "diagonal", reference=SRIW1()),
    Problem("diagonal, Stratonovich", drift, own, "diagonal", stratonovich=True),
    Problem("scalar, Ito", drift, shared, "scalar", reference=SRIW1()),
    Problem("scalar, Stratonovich", wave, shared, "scalar", stratonovich=True),
    Problem("commutative, Ito", drift, turning, "general", commutative=True, same=ito_turning()),
    Problem("commutative, Stratonovich", drift, turning, "general", True, commutative=True),
    Problem("general, Ito", drift, crossing, "general", reference=integrators.EulerMaruyama()),
    Problem("general, Stratonovich", drift, crossing, "general", True, reference=StochasticHeun()),
    Problem("additive", wave, spread, "diagonal", additive=True, reference=SRA3()),
    Problem("additive, general", wave, mixing, "general", additive=True, reference=SRA3()),
    Problem(
        "geometric, Ito", growth, proportional, "diagonal",
        exact=lambda y0, w: y0 * torch.exp(0.3 - 0.32 + 0.8 * w),
    ),
    Problem(
        "geometric, Stratonovich", growth, proportional, "diagonal", True,
        exact=lambda y0, w: y0 * torch.exp(0.3 + 0.8 * w),
    ),
]  # fmt: skip
ELSEWHERE = (LogODE, NinomiyaNinomiya, PlatenWeak2, KineticMethod)  # have tests of their own
HERE = [m for m in METHODS if not isinstance(m, ELSEWHERE)]
CASES = [(m, p) for m in HERE for p in PROBLEMS if m.fits(p.sde.noise)]  # type: ignore[arg-type]


# --- strong orders --------------------------------------------------------------------------------


@functools.cache
def coarse(size: int | None, steps: int, extra: tuple[int, ...] | None = None) -> list[Increment]:
    """One path's increments over steps of [0, 1]: W, H and K, and further normals if asked."""
    shape = (PATHS,) if size is None else (PATHS, size)
    draws = Draws(torch.empty(shape), "K", None if extra is None else torch.empty(extra))
    grid = [n / steps for n in range(steps + 1)]
    source = fs.Brownian(7, torch.linspace(0.0, 1.0, FINE + 1)).bind(grid, draws)
    return [source(n, a, b) for n, (a, b) in enumerate(itertools.pairwise(grid))]


def path(method: Stochastic, problem: Problem, steps: int) -> list[Increment]:
    """What the method asks of it."""
    draws = method.draws(problem.sde, start())
    assert draws is not None
    extra = None if draws.extra is None else tuple(draws.extra.shape)
    return coarse(width(problem), steps, extra)


def start() -> Tensor:
    return torch.ones(PATHS, 2) * torch.tensor([1.0, 0.5])


def walk(method: Stochastic, sde: fs.SDE, y: Any, dws: list[Increment]) -> Any:
    """The state at 1 from that at 0."""
    field, n = Field(sde, (), y), len(dws)
    carry = method.init(field, 0.0, y)
    for i, dw in enumerate(dws):
        step = method.step(field, i / n, (i + 1) / n, y, dw, carry)
        y, carry = step.y1, step.carry
    return y


@functools.cache
def solution(name: str) -> Tensor:
    problem = next(p for p in PROBLEMS if p.name == name)
    size = width(problem)
    if problem.exact is not None:
        return problem.exact(start(), coarse(size, 1)[0].w)
    return walk(problem.reference, problem.same or problem.sde, start(), coarse(size, FINE))


def width(problem: Problem) -> int | None:
    assert problem.sde.noise is not None
    return {"diagonal": 2, "scalar": None, "general": problem.sde.noise.size}[problem.kind]


@pytest.mark.parametrize(("method", "problem"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_strong_order(method: Stochastic, problem: Problem) -> None:
    """E |error| within 0.15 of the order declared, the slope's own standard error below 0.05."""
    sde, truth = problem.sde, solution(problem.name)
    gaps = [
        (walk(method, sde, start(), path(method, problem, n)) - truth).norm(dim=-1) for n in STEPS
    ]
    groups = [gap.reshape(GROUPS, -1).mean(-1) for gap in gaps]
    slopes = torch.tensor([
        slope([float(g[i]) for g in groups], list(STEPS)) for i in range(GROUPS)
    ])  # fmt: skip
    assert float(slopes.std()) / math.sqrt(GROUPS) < 0.05
    errors = [float(gap.mean()) for gap in gaps]
    assert sde.noise is not None
    declared = method.strong_order(sde.noise)
    assert declared is not None
    excess = slope(errors, list(STEPS)) - declared
    assert excess > -0.15, errors
    # a closed form in W(1) alone has drift and noise commute: SlowRK is of order two there
    assert excess < 0.15 or (problem.exact is not None and isinstance(method, SlowRK)), errors


def test_every_method_is_measured() -> None:
    assert {type(m) for m, _ in CASES} == {type(m) for m in HERE}


# --- what holds of every method -------------------------------------------------------------------


def systems(method: Stochastic) -> list[Problem]:
    return [p for m, p in CASES if m == method]


@pytest.mark.parametrize("method", HERE, ids=str)
def test_samples_may_have_times_of_their_own(method: Stochastic) -> None:
    """A batch of times gives every row what it gets alone, either way in time."""
    for problem in systems(method):
        size = width(problem)
        shape = (3,) if size is None else (3, size)
        dw = Increment(torch.randn(shape), 0.3 * torch.randn(shape))
        y = torch.randn(3, 2)
        for sign in (1.0, -1.0):
            t0 = torch.tensor([0.1, 0.5, 0.9])
            t1 = t0 + sign * torch.tensor([0.2, 0.1, 0.3])
            field = Field(problem.sde, (), y)
            whole = method.step(field, t0, t1, y, dw, method.init(field, t0, y)).y1
            for i in range(3):
                row, a, b = y[i : i + 1], float(t0[i]), float(t1[i])
                field = Field(problem.sde, (), row)
                part = Increment(dw.w[i : i + 1], dw.h[i : i + 1])
                one = method.step(field, a, b, row, part, method.init(field, a, row)).y1
                assert torch.allclose(one, whole[i : i + 1], rtol=1e-12, atol=1e-12)


def parted(x: Tensor) -> dict[str, Tensor]:
    return dict(zip("ab", x.split(1, -1), strict=True))


def joined(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat((tree["a"], tree["b"]), -1)


@pytest.mark.parametrize(
    ("method", "problem"), [c for c in CASES if c[1].kind == "diagonal"],
    ids=lambda x: getattr(x, "name", str(x)),
)  # fmt: skip
def test_a_pytree_is_its_leaves(method: Stochastic, problem: Problem) -> None:
    """Diagonal noise moves the parts of a state as it moves them joined."""
    tree = fs.SDE(
        lambda t, y: parted(problem.f(t, joined(y))), lambda t, y: parted(problem.g(t, joined(y))),
        noise="diagonal", stratonovich=problem.stratonovich, additive=problem.additive,
    )  # fmt: skip
    dws = coarse(2, 8)
    parts = [Increment(parted(dw.w), parted(dw.h)) for dw in dws]
    found = joined(walk(method, tree, parted(start()), parts))
    assert torch.allclose(found, walk(method, problem.sde, start(), dws), atol=1e-12)


@pytest.mark.parametrize(("method", "problem"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_gradients_pass_through_steps(method: Stochastic, problem: Problem) -> None:
    """By the start and by numbers of the drift and the diffusion, against differences."""
    dws = [Increment(dw.w[:2], dw.h[:2]) for dw in path(method, problem, 8)[:3]]

    def end(x: Tensor) -> Tensor:
        scaled = dataclasses.replace(
            problem, f=lambda t, y: x[0] * problem.f(t, y), g=lambda t, y: x[1] * problem.g(t, y)
        )
        return walk(method, scaled.sde, x[2:].expand(2, 2), dws)

    x = torch.tensor([1.1, 0.9, 0.4, -0.3])
    exact = torch.autograd.functional.jacobian(end, x)
    steps = 1e-6 * torch.eye(4)
    apart = torch.stack([(end(x + d) - end(x - d)) / 2e-6 for d in steps], -1)
    assert torch.allclose(exact, apart, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [m for m in HERE if m.error_order], ids=str)
def test_error_estimates_fall_as_declared(method: Stochastic) -> None:
    """In the mean square over one step; of additive noise they may fall faster."""
    for problem in systems(method):
        sizes, counts = [], [64, 128, 256, 512]
        for n in counts:
            field, dw, y = Field(problem.sde, (), start()), path(method, problem, n)[0], start()
            step = method.step(field, 0.0, 1.0 / n, y, dw, method.init(field, 0.0, y))
            sizes.append(float(step.error().square().mean().sqrt()))
        assert method.error_order is not None
        assert slope(sizes, counts) > method.error_order - 0.15, sizes


EVALUATIONS = {
    "EulerHeun": (1, 2), "EulerMaruyama": (1, 1), "Milstein": (1, 1), "MilsteinRK": (1, 2),
    "StochasticHeun": (2, 2), "StochasticMidpoint": (2, 2), "ReversibleHeun": (1, 1),
    "SRIW1": (2, 4), "SRI2": (3, 4), "SEA": (1, 1), "ShARK": (2, 1), "SRA1": (2, 1),
    "SRA3": (3, 1), "SlowRK": (2, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_each_stage_is_evaluated_once(name: str) -> None:
    """The start, which may evaluate too, left out."""
    method = getattr(integrators, name)()
    problem, calls = systems(method)[0], [0, 0]

    def counted(which: int, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Tensor, y: Tensor) -> Tensor:
            calls[which] += 1
            return f(t, y)

        return call

    sde = dataclasses.replace(problem, f=counted(0, problem.f), g=counted(1, problem.g)).sde
    walk(method, sde, start(), coarse(width(problem), 2)[:1])
    once = list(calls)
    walk(method, sde, start(), coarse(width(problem), 2))
    assert (calls[0] - 2 * once[0], calls[1] - 2 * once[1]) == EVALUATIONS[name]


@pytest.mark.parametrize("kind", ["diagonal", "scalar"])
def test_an_euler_step_is_four_operations(kind: Any) -> None:
    """Beyond f, g and the draw, no number is read by the host."""
    counter = Counter()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * y

    sde = fs.SDE(uncounted(f, counter), uncounted(g, counter), noise=kind)
    y, size = torch.ones(64, 4), None if kind == "scalar" else 4
    field, method = Field(sde, (), y), integrators.EulerMaruyama()
    dw = Increment(torch.randn((64,) if size is None else (64, size)))
    with torch.no_grad(), counter:
        method.step(field, 0.1, 0.2, y, dw, None)
    assert counter.operations <= 4
    assert counter.reads == 0


def test_an_implicit_drift_takes_steps_beyond_its_rates() -> None:
    """An Ornstein-Uhlenbeck process of rate 1000: Trapezoid keeps its variance."""
    sde = fs.SDE(
        lambda t, y: -1000.0 * y, lambda t, y: torch.ones_like(y), noise="diagonal", additive=True
    )
    y0 = torch.zeros(20_000, 1)
    for drift, variance in ((ImplicitEuler(), 1 / (1000 * 52)), (Trapezoid(), 1 / 2000)):
        method = integrators.DriftImplicitEuler(drift)
        sol = fs.solve(
            sde, y0, integrator=method, stepping=fs.Fixed(steps=500 if variance > 1e-4 else 20),
            path=fs.Brownian(1),
        )  # fmt: skip
        assert float(sol.y1.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / 20_000))
    with pytest.raises(TypeError, match=r"Trapezoid\(\)"):
        integrators.DriftImplicitEuler(integrators.Kvaerno3())  # type: ignore[arg-type]
