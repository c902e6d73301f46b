"""Adaptive steps along a Brownian path: the path stays what it is, whatever steps are tried."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    Draws,
    EulerMaruyama,
    Integrator,
    Milstein,
    StepDoubling,
    Stochastic,
    StochasticHeun,
    Tsit5,
)  # fmt: skip
from flowsde.paths import BrownianTree

from .systems import DEVICE, catalogue, generator, slope

GAINS: dict[str, Any] = {"pcoeff": 0.1, "icoeff": 0.3}
HEUNS = [StochasticHeun(), StepDoubling(StochasticHeun())]


def well() -> fs.SDE:
    """Additive noise in a double well."""
    return fs.SDE(
        lambda t, y: 4.0 * y * (1.0 - y * y), lambda t, y: 0.5 * torch.ones_like(y),
        noise="diagonal", additive=True, batched_time=True, rowwise=True,
    )  # fmt: skip


def geometric(ito: bool = False) -> fs.SDE:
    return fs.SDE(
        lambda t, y: 0.3 * y, lambda t, y: 0.8 * y, noise="diagonal", stratonovich=not ito,
        batched_time=True, rowwise=True,
    )  # fmt: skip


def recorded() -> fs.SDE:
    """y moves as it likes; w, moved by the same Brownian motion, is its path."""
    return fs.SDE(
        lambda t, y: torch.stack((-3.0 * y[:, 0].sin(), 0.0 * y[:, 1]), 1),
        lambda t, y: torch.stack((y[:, 0].cos(), torch.ones_like(y[:, 1])), 1),
        noise="scalar", stratonovich=True, batched_time=True, rowwise=True,
    )  # fmt: skip


def turning(t: Tensor, y: Tensor) -> Tensor:
    """Two columns that do not commute."""
    zero = torch.zeros_like(y[:, 0])
    one, two = torch.stack((y[:, 1], zero), 1), torch.stack((zero, y[:, 0]), 1)
    return torch.stack((one, two), -1)


def general(**more: Any) -> fs.SDE:
    return fs.SDE(lambda t, y: -y, turning, noise="general", noise_size=2, **more)


def waves() -> fs.SDE:
    """Scalar noise."""
    return fs.SDE(
        lambda t, y: y.sin(), lambda t, y: y.cos(), noise="scalar", stratonovich=True,
    )  # fmt: skip


SYSTEMS = {
    "additive": well(), "diagonal": geometric(), "diagonal Ito": geometric(ito=True),
    "scalar": waves(), "general": general(stratonovich=True), "general Ito": general(),
}  # fmt: skip


def every() -> list[Any]:
    """Each stochastic method, by itself and doubled, on each system that it can step along."""
    found = []
    for plain in catalogue(integrators, Stochastic):
        for method in (plain, StepDoubling(plain)):
            for name, sde in SYSTEMS.items():
                try:
                    method.check(sde)
                    method.exponent(sde)
                    method.draws(sde, torch.ones(1, 2))
                except TypeError:
                    continue
                found.append(pytest.param(method, sde, id=f"{method}-{name}"))
    return found


@pytest.mark.parametrize(("method", "sde"), every())
def test_errors_are_of_the_order_that_steps_are_chosen_by(method: Any, sde: fs.SDE) -> None:
    """Root mean square over 16,000 samples of one step each: its slope errs by about 0.03.

    Doubled steps may do better: the order of a method may be held down by what does not average.
    """
    y0 = torch.tensor([[0.6, 0.4]]).expand(16_000, 2).contiguous()
    counts, sizes = [64, 128, 256, 512], []
    draws = method.draws(sde, y0)
    for n in counts:
        field, dt = Field(sde, (), y0), 1.0 / n
        dw = fs.Brownian(n).tree(0.0, dt, draws)(0, 0.0, dt)
        step = method.step(field, 0.0, dt, y0, dw, method.init(field, 0.0, y0))
        sizes.append(float(step.error().square().mean().sqrt()))
    gap = slope(sizes, counts) - method.exponent(sde)
    assert -0.15 < gap < (math.inf if isinstance(method, StepDoubling) else 0.15), sizes


# --- the path is what it is -----------------------------------------------------------------------


@pytest.mark.parametrize("method", HEUNS, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_try_disturbs_the_path(method: Integrator, per_sample: bool, backward: bool) -> None:
    """After all rejections, and at save times, w is W: exactly."""
    y0, seeds = torch.tensor([[1.0, 0.0]]).expand(6, 2), torch.arange(6)
    t0, t1 = (2.0, 0.5) if backward else (0.5, 2.0)
    save = torch.linspace(t0, t1, 4)[1:]
    path = BrownianTree(seeds, 0.0, 3.0)
    sol = fs.solve(
        recorded(), y0, t0, t1, integrator=method, save_at=save, path=path,
        stepping=fs.Adaptive(2e-2, 2e-2, per_sample=per_sample, dt0=1.0),
    )  # fmt: skip
    assert int(torch.as_tensor(sol.stats.rejected).sum()) > 0
    tree = path.tree(t0, t1, Draws(y0[:, 0]))
    for t, y in zip(save.tolist(), sol.ys, strict=True):
        assert torch.allclose(y[:, 1], tree(0, t0, t).w, atol=1e-12)
    assert torch.allclose(sol.y1, sol.ys[-1], atol=1e-14)


SEEDS = torch.arange(64, device=DEVICE)


def path_of(pieces: int) -> Tensor:
    """W over as many equal pieces of [0, 1], ``(64, pieces, 3)``, in one look at the tree."""
    start = (torch.arange(pieces) / pieces).repeat(len(SEEDS))
    tree = BrownianTree(SEEDS.repeat_interleave(pieces), 0.0, 1.0).tree(
        0.0, 1.0, Draws(torch.empty(len(start), 3))
    )
    return tree(0, start, start + 1.0 / pieces).w.reshape(-1, pieces, 3)


@functools.cache
def exact(name: str) -> tuple[Tensor, Tensor]:
    """Start and end: in closed form, or by 1,024 Euler-Heun steps on the same paths."""
    y0 = torch.linspace(0.5, 1.0, 3 * len(SEEDS)).reshape(-1, 3)
    if name == "diagonal":
        return y0, y0 * torch.exp(0.3 + 0.8 * path_of(1)[:, 0])
    sde, w, y = SYSTEMS[name], path_of(1024), y0
    for i in range(1024):
        f0, move = sde(y0, y) / 1024, sde.diffusion(y0, y) * w[:, i]
        y = y + 0.5 * (f0 + sde(y0, y + f0 + move) / 1024) + move
    return y0, y


@pytest.mark.parametrize(
    ("system", "method", "per_sample", "powers"),
    [
        ("additive", HEUNS[0], True, (4, 6, 8, 10)), ("additive", HEUNS[1], False, (4, 6, 8, 10)),
        ("diagonal", HEUNS[0], False, (4, 6, 8, 10)), ("diagonal", HEUNS[1], True, (5, 7, 9, 11)),
    ],
    ids=str,
)  # fmt: skip
def test_the_error_falls_with_the_tolerance(
    system: str, method: Any, per_sample: bool, powers: tuple[int, ...]
) -> None:
    """At every tightening, and as fast as local errors e = O(dt^q) that add up at random make it.

    With dt = tol^(1/q), the strong error of order p = 1 is tol^(1/q).
    """
    sde, errors = SYSTEMS[system], []
    y0, end = exact(system)
    for n in powers:
        stepping = fs.Adaptive(2.0**-n, 2.0**-n, per_sample=per_sample, **GAINS)
        y1 = fs.solve(
            sde, y0, 0.0, 1.0, integrator=method, stepping=stepping,
            path=BrownianTree(SEEDS, 0.0, 1.0),
        ).y1  # fmt: skip
        errors.append(float((y1 - end).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True), errors
    found = slope(errors, [2**n for n in powers])
    assert found > 1.0 / method.exponent(sde) - 0.2, (found, errors)


class _Rash(EulerMaruyama):
    """Euler's method, that claims to be better."""

    def strong_order(self, noise: fs.Noise) -> float:
        return 1.0


def test_why_methods_of_order_one_half_are_refused() -> None:
    """Steps that Euler's method chooses by its own error lead elsewhere, Milstein's do not.

    Where Euler errs by g g' (dW^2 - dt)/2, it takes long steps where dW^2 happens to be near dt.
    """
    sde, count, tol = SYSTEMS["diagonal Ito"], 200, 5e-3
    path, y0, bias = BrownianTree(torch.arange(count), 0.0, 1.0), torch.ones(count, 1), []
    w = path.tree(0.0, 1.0, Draws(y0))(0, 0.0, 1.0).w
    for method in (_Rash(), Milstein()):
        y1 = fs.solve(
            sde, y0, 0.0, 1.0, integrator=StepDoubling(method), path=path,
            stepping=fs.Adaptive(tol, tol, per_sample=True),
        ).y1  # fmt: skip
        error = y1.log() - (0.3 - 0.32 + 0.8 * w)
        bias.append((float(error.mean()), float(error.std()) / math.sqrt(count)))
    (euler, noise), (milstein, _) = bias
    assert euler > 0.06 + 4.0 * noise, bias
    assert abs(milstein) < euler / 4.0, bias


# --- each sample as if it were alone --------------------------------------------------------------


@pytest.mark.parametrize("method", HEUNS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_per_sample_equals_solving_each_alone(method: Integrator, backward: bool) -> None:
    seeds = torch.tensor([5, 3, 8, 13])
    t0, t1 = torch.tensor([0.0, 0.3, 0.1, 0.0]), torch.tensor([1.0, 0.7, 0.9, 0.4])
    if backward:
        t0, t1 = t1, t0
    save = t0[:, None] + (t1 - t0)[:, None] * torch.tensor([0.0, 0.37, 0.5, 1.0])
    y0 = torch.tensor([[1.0, 0.0], [0.2, 0.0], [-1.0, 0.0], [2.0, 0.0]])

    def run(seed: Tensor, y: Tensor, a: Any, b: Any, at: Tensor, own: bool) -> fs.Solution:
        return fs.solve(
            recorded(), y, a, b, integrator=method, save_at=at, path=fs.Brownian(seed),
            stepping=fs.Adaptive(2e-2, 2e-2, per_sample=own, **GAINS),
        )  # fmt: skip

    whole = run(seeds, y0, t0, t1, save, own=True)
    for i in range(4):
        one = slice(i, i + 1)
        alone = run(seeds[one], y0[one], float(t0[i]), float(t1[i]), save[i], own=False)
        assert int(whole.stats.accepted[i]) == alone.stats.accepted
        assert int(whole.stats.rejected[i]) == alone.stats.rejected
        assert torch.allclose(whole.y1[i], alone.y1[0], atol=1e-10)
        assert torch.allclose(whole.ys[:, i], alone.ys[:, 0], atol=1e-10)


@given(seed=st.integers(0, 1000), count=st.integers(2, 5))
@settings(max_examples=6)
def test_no_sample_feels_the_others(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    y0, seeds, order = torch.randn(count, 2), torch.arange(count) + seed, torch.randperm(count)

    def run(rows: Tensor) -> Tensor:
        return fs.solve(
            recorded(), y0[rows], 0.0, 1.0, integrator=StochasticHeun(),
            stepping=fs.Adaptive(5e-2, 5e-2, per_sample=True), path=fs.Brownian(seeds[rows]),
        ).y1  # fmt: skip

    whole = run(torch.arange(count))
    assert torch.allclose(run(order), whole[order], atol=1e-12)
    assert torch.allclose(run(order[:1]), whole[order[:1]], atol=1e-12)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed()], ids=str)
def test_samples_that_have_ended_cost_nothing(adjoint: fs.Adjoint) -> None:
    """The same results and gradients, from the rows that were still on their way alone."""
    spans = torch.linspace(0.05, 1.0, 16)
    found, counts = [], []
    for rowwise in (False, True):
        rows = [0]

        def drift(t: Tensor, y: Tensor, rows: list[int] = rows) -> Tensor:
            rows[0] += len(y)
            return -3.0 * y.sin()

        sde = fs.SDE(
            drift, lambda t, y: y.cos(), noise="diagonal", stratonovich=True,
            batched_time=True, rowwise=rowwise,
        )  # fmt: skip
        y0 = torch.linspace(0.0, 1.0, 32).reshape(16, 2).requires_grad_()
        sol = fs.solve(
            sde, y0, 0.0, spans, integrator=StochasticHeun(), adjoint=adjoint,
            path=fs.Brownian(torch.arange(16)), save_at=spans[:, None] * torch.tensor([0.3, 1.0]),
            stepping=fs.Adaptive(3e-2, 3e-2, per_sample=True, **GAINS),
        )  # fmt: skip
        counts.append((rows[0], sol.stats.evaluations))
        loss = sol.y1.square().sum() + sol.ys.sin().sum()
        (grad,) = torch.autograd.grad(loss, y0)
        found.append([sol.y1, sol.ys, sol.stats.accepted, sol.stats.rejected, grad])
    for whole, thinned in zip(*found, strict=True):
        assert torch.allclose(whole.double(), thinned.double(), rtol=1e-10, atol=1e-10)
    assert counts[0][1] == counts[1][1]
    assert counts[1][0] < 0.7 * counts[0][0]


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", HEUNS, ids=str)
def test_gradients_are_those_of_the_accepted_grid(method: Integrator) -> None:
    """Bit by bit those of a solve on its steps, which finite differences confirm."""
    y0 = torch.tensor([[0.5, -0.2], [1.0, 0.3]], requires_grad=True)
    theta = torch.tensor([2.0, 0.7], requires_grad=True)
    sde = fs.SDE(
        lambda t, y, p: -p[0] * y.sin(), lambda t, y, p: p[1] * y.cos(), noise="diagonal",
        stratonovich=True,
    )  # fmt: skip
    path = BrownianTree(3, 0.0, 1.0)

    def run(y: Tensor, p: Tensor, stepping: fs.Stepping, **more: Any) -> fs.Solution:
        return fs.solve(
            sde, y, 0.0, 1.0, args=(p,), integrator=method, stepping=stepping, path=path, **more
        )

    def grads(sol: fs.Solution) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sol.y1.sin().sum(), (y0, theta))

    adaptive = fs.Adaptive(5e-2, 5e-2)
    sol = run(y0, theta, adaptive, save_at=fs.Steps())
    assert sol.stats.rejected
    assert sol.ts is not None
    grid = fs.Grid(sol.ts)
    direct = grads(sol)
    for other in (
        run(y0, theta, grid), run(y0, theta, adaptive, adjoint=fs.Checkpointed()),
        run(y0, theta, adaptive, adjoint=fs.Checkpointed(20_000)),
    ):  # fmt: skip
        for a, b in zip(grads(other), direct, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda y, p: run(y, p, grid).y1, (y0, theta), atol=1e-6)


def test_per_sample_gradients_replay() -> None:
    y0 = torch.linspace(-1.0, 1.0, 8).reshape(4, 2).requires_grad_()
    found = []
    for adjoint in (fs.Direct(), fs.Checkpointed(), fs.Checkpointed(20_000)):
        y1 = fs.solve(
            recorded(), y0, 0.0, 1.0, integrator=StochasticHeun(), adjoint=adjoint,
            stepping=fs.Adaptive(5e-2, 5e-2, per_sample=True), path=fs.Brownian(1),
        ).y1  # fmt: skip
        found.append(torch.autograd.grad(y1.sin().sum(), y0)[0])
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ito", [False, True], ids=["stratonovich", "ito"])
def test_backsolve_meets_the_exact_gradient_as_the_tolerance_falls(ito: bool) -> None:
    """Geometric Brownian motion, back over the steps that were accepted, from saved times too."""
    sde = fs.SDE(
        lambda t, y, a, b: a * y, lambda t, y, a, b: b * y, noise="diagonal", stratonovich=not ito
    )
    method = StepDoubling(Milstein()) if ito else StochasticHeun()
    path, at = BrownianTree(SEEDS, 0.0, 1.0), torch.tensor([0.4, 1.0])
    start = torch.linspace(0.5, 1.0, len(SEEDS))[:, None]
    given = [start, torch.full_like(start, 0.3), torch.full_like(start, 0.8)]
    y0, a, b = (x.clone().requires_grad_() for x in given)
    tree = path.tree(0.0, 1.0, Draws(start))
    rate = a - 0.5 * b * b if ito else a
    ends = [y0 * torch.exp(rate * t + b * tree(0, 0.0, t).w) for t in at.tolist()]
    exact = torch.autograd.grad(torch.stack(ends).square().sum(), [y0, a, b])
    errors, powers = [], (2, 4, 6)
    for n in powers:
        sol = fs.solve(
            sde, y0, 0.0, 1.0, args=(a, b), integrator=method, path=path, save_at=at,
            stepping=fs.Adaptive(2.0**-n, 2.0**-n, **GAINS), adjoint=fs.Backsolve(),
        )  # fmt: skip
        near = torch.autograd.grad(sol.ys.square().sum(), [y0, a, b])
        gaps = (p - q for p, q in zip(near, exact, strict=True))
        errors.append(float(sum(gap.square().mean() for gap in gaps)) ** 0.5)
    assert errors == sorted(errors, reverse=True), errors
    found = slope(errors, [2**n for n in powers])
    assert found > 1.0 / method.exponent(sde) - 0.2, (found, errors)


def test_backsolve_refuses_samples_with_steps_of_their_own() -> None:
    refused(
        "Checkpointed", y0=torch.ones(3, 2, requires_grad=True), adjoint=fs.Backsolve(),
        stepping=fs.Adaptive(per_sample=True),
    )  # fmt: skip


# --- the first step -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("drift", "noise"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1e-3, 10.0)])
def test_the_first_step_knows_drift_and_diffusion(scale: float, drift: float, noise: float) -> None:
    """Of the size of the steps that follow, in any unit of time."""
    sde = fs.SDE(
        lambda t, y: -drift * scale * y.sin(), lambda t, y: noise * math.sqrt(scale) * y.cos(),
        noise="diagonal", stratonovich=True,
    )  # fmt: skip
    sol = fs.solve(
        sde, torch.ones(64, 2), 0.0, 1.0 / scale, integrator=StochasticHeun(), path=fs.Brownian(0),
        stepping=fs.Adaptive(5e-2, 5e-2, **GAINS), save_at=fs.Steps(),
    )  # fmt: skip
    assert sol.ts is not None
    steps = sol.ts.diff()
    middle = float(steps[:-1].median())
    assert middle / 15.0 < float(steps[0]) < 15.0 * middle
    assert sol.stats.rejected <= max(2, sol.stats.accepted // 4)


def test_a_first_step_that_was_named_is_taken() -> None:
    sol = fs.solve(
        geometric(), torch.ones(3, 1), 0.0, -1.0, integrator=StochasticHeun(), path=fs.Brownian(0),
        stepping=fs.Adaptive(1e-1, 1e-1, dt0=1e-3), save_at=fs.Steps(),
    )  # fmt: skip
    assert sol.ts is not None
    assert float(sol.ts[1]) == -1e-3


# --- what is refused ------------------------------------------------------------------------------


def refused(cure: str, **changes: Any) -> None:
    given = {
        "dynamics": geometric(), "y0": torch.ones(3, 2), "t0": 0.0, "t1": 1.0,
        "integrator": StochasticHeun(), "stepping": fs.Adaptive(), "path": fs.Brownian(0),
    } | changes  # fmt: skip
    with pytest.raises(TypeError, match=cure):
        fs.solve(**given)


def test_refusals() -> None:
    ito = {"dynamics": geometric(ito=True), "integrator": EulerMaruyama()}
    refused(r"another solution.*Fixed", **ito)
    refused("another solution", **ito | {"integrator": StepDoubling(EulerMaruyama())})
    refused("another solution", dynamics=general(stratonovich=True))
    refused(r"StepDoubling\(EulerMaruyama\(\)\)", dynamics=well(), integrator=EulerMaruyama())
    refused("needs its randomness", path=None)
    refused("name the times in save_at", dense=True)
    refused("step_at", stepping=fs.Adaptive(jump_at=[0.5]))
    refused("no steps between", path=fs.Brownian(0, torch.linspace(0.0, 1.0, 9)))
    for name in ("t0", "t1"):
        refused("no derivative by time", **{name: torch.tensor(0.5, requires_grad=True)})
    refused("no derivative by time", save_at=torch.tensor([0.5], requires_grad=True))
    refused("its steps named", stepping=None)
    with pytest.raises(TypeError, match="StochasticHeun"):
        StepDoubling(Tsit5())  # type: ignore[arg-type]


def test_steps_end_where_they_are_told() -> None:
    sol = fs.solve(
        well(), torch.ones(3, 1), 0.0, 1.0, integrator=StochasticHeun(), save_at=fs.Steps(),
        stepping=fs.Adaptive(1e-2, 1e-2, step_at=[0.3, 0.7]), generator=generator(),
    )  # fmt: skip
    assert sol.ts is not None
    assert {0.3, 0.7} <= set(sol.ts.tolist())


def test_complex_states_choose_their_first_step() -> None:
    sde = fs.SDE(
        lambda t, y: -0.5 * y, lambda t, y: 0.3 * torch.cos(y), noise="diagonal", stratonovich=True
    )
    y1 = fs.solve(
        sde, torch.ones(1, 2, dtype=torch.complex128), integrator=StochasticHeun(),
        stepping=fs.Adaptive(1e-2, 1e-2), path=fs.Brownian(1),
    ).y1  # fmt: skip
    assert bool(torch.isfinite(torch.view_as_real(y1)).all())


def test_doubled_steps_know_the_tolerances() -> None:
    bound = StepDoubling(integrators.DriftImplicitEuler()).bind(fs.Adaptive(1e-2, 1e-2))
    assert bound.method.drift.stepping is not None
