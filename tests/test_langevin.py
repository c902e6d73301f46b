"""Langevin dynamics: stationary laws, orders of the methods that know its structure, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics import Langevin, UnderdampedLangevin
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    ALIGN,
    BAOAB,
    QUICSORT,
    EulerMaruyama,
    Increment,
    StochasticHeun,
)  # fmt: skip
from flowsde.integrators.langevin import KineticMethod

from .systems import Mixture, catalogue, generator, slope

METHODS: list[KineticMethod] = catalogue(integrators, KineticMethod)
FRICTION, MASS, TEMPERATURE, STIFFNESS = 1.3, 1.4, 0.7, 2.0


def harmonic() -> UnderdampedLangevin:
    return UnderdampedLangevin(
        lambda t, x: -STIFFNESS * x, friction=FRICTION, mass=MASS, temperature=TEMPERATURE
    )


def rest() -> Tensor:
    """The stationary covariance of (x, v)."""
    return torch.diag(torch.tensor([TEMPERATURE / STIFFNESS, TEMPERATURE / MASS]))


def one_step(method: KineticMethod, h: float) -> tuple[Tensor, Tensor]:
    """The matrix of a step of the harmonic motion, and its noise's covariance."""
    x, v, *parts = torch.eye(5)[..., None]
    field = Field(harmonic(), (), (x, v))
    carry = method.init(field, 0.0, (x, v))
    dw = Increment(*((torch.zeros_like(part), part) for part in parts))
    moved = method.step(field, 0.0, h, (x, v), dw, carry).y1
    matrix = torch.cat(moved, 1).T
    spread = torch.diag(torch.tensor([h, h / 12, h / 720]))
    return matrix[:, :2], matrix[:, 2:] @ spread @ matrix[:, 2:].T


def stationary(method: KineticMethod, h: float) -> Tensor:
    """The covariance that steps of length h settle at."""
    matrix, noise = one_step(method, h)
    system = torch.eye(4) - torch.kron(matrix, matrix)
    return torch.linalg.solve(system, noise.flatten()).reshape(2, 2)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weak_order_of_a_harmonic_motion(method: KineticMethod) -> None:
    """Mean and covariance at t = 1 against their closed forms: no draw is made."""
    rate = torch.tensor([[0.0, 1.0], [-STIFFNESS / MASS, -FRICTION]])
    flow = torch.matrix_exp(rate)
    truth = rest() - flow @ rest() @ flow.T
    means, covariances, steps = [], [], [8, 16, 32, 64]
    for n in steps:
        matrix, noise = one_step(method, 1 / n)
        covariance = torch.zeros(2, 2)
        for _ in range(n):
            covariance = matrix @ covariance @ matrix.T + noise
        means.append(float((torch.linalg.matrix_power(matrix, n) - flow).norm()))
        covariances.append(float((covariance - truth).norm()))
    noise_kind = harmonic().noise
    assert noise_kind is not None
    for errors in (means, covariances):
        assert abs(slope(errors, steps) - method.weak_order(noise_kind)) < 0.15, errors


@pytest.mark.parametrize("h", [0.05, 0.5, 1.5])
def test_baoab_samples_harmonic_positions_exactly(h: float) -> None:
    """At every stable step; the velocities' law is off by the square of it."""
    found = stationary(BAOAB(), h)
    assert float(found[0, 0]) == pytest.approx(TEMPERATURE / STIFFNESS, rel=1e-12)
    assert abs(float(found[0, 1])) < 1e-12
    assert float(found[1, 1]) == pytest.approx(
        TEMPERATURE / MASS * (1 - h**2 * STIFFNESS / (4 * MASS)), rel=1e-12
    )


@pytest.mark.parametrize("method", [ALIGN(), QUICSORT()], ids=str)
def test_stationary_laws_converge(method: KineticMethod) -> None:
    steps = [4, 8, 16]
    errors = [float((stationary(method, 1 / n) - rest()).norm()) for n in steps]
    noise = harmonic().noise
    assert noise is not None
    assert slope(errors, steps) > method.weak_order(noise) - 0.15, errors


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_friction_or_force_a_motion_is_straight(method: KineticMethod) -> None:
    y0 = (torch.tensor([[0.3]]), torch.tensor([[-1.2]]))
    free = UnderdampedLangevin(lambda t, x: torch.zeros_like(x), friction=0.0)
    x, v = fs.solve(free, y0, integrator=method, stepping=fs.Fixed(steps=3), path=fs.Brownian(0)).y1
    assert float(x) == pytest.approx(-0.9, abs=1e-14)
    assert float(v) == pytest.approx(-1.2, abs=1e-14)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_path_drives_v_as_any_other_method_does(method: KineticMethod) -> None:
    """Without force or friction to speak of, v1 - v0 is the path's W times sqrt(2)."""
    free = UnderdampedLangevin(lambda t, x: 0.0 * x, friction=1e-9, temperature=1e9)
    y0, path = (torch.zeros(4, 3), torch.zeros(4, 3)), fs.BrownianTree(1, 0.0, 1.0, levy="K")
    steps: dict[str, Any] = {"stepping": fs.Fixed(steps=4), "path": path}
    plain = fs.solve(free, y0, integrator=StochasticHeun(), **steps).y1[1]
    v1 = fs.solve(free, y0, integrator=method, **steps).y1[1]
    assert torch.allclose(v1, plain, rtol=1e-6)


# --- strong orders --------------------------------------------------------------------------------


def double_well() -> UnderdampedLangevin:
    """Wells at both sides, a force that is also a function of time."""
    return UnderdampedLangevin(
        lambda t, x: 2.0 * x / (1.0 + x.square()) - x + 0.5 * torch.cos(2.0 * t), friction=1.5,
        batched_time=True,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_strong_order(method: KineticMethod) -> None:
    """On one path, refined; the slope's standard error, over groups of paths, below 0.05."""
    count, groups, steps, fine = 200, 10, [4, 8, 16, 32], 256
    path = fs.Brownian(3, torch.linspace(0.0, 1.0, fine + 1))
    y0 = (torch.linspace(-2.0, 2.0, count)[:, None], torch.zeros(count, 1))

    def run(method: KineticMethod, n: int) -> Tensor:
        stepping = fs.Fixed(steps=n)
        y1 = fs.solve(double_well(), y0, integrator=method, stepping=stepping, path=path).y1
        return torch.cat(y1, 1)

    truth = run(QUICSORT(), fine)
    gaps = torch.stack([(run(method, n) - truth).square().sum(1) for n in steps])
    parts = gaps[:, torch.randperm(count, generator=generator())].reshape(len(steps), groups, -1)
    slopes = [slope(column.tolist(), steps) / 2 for column in parts.mean(2).T]
    assert float(torch.tensor(slopes).std()) / math.sqrt(groups) < 0.05
    errors = gaps.mean(1).sqrt().tolist()
    noise = double_well().noise
    assert noise is not None
    assert abs(slope(errors, steps) - method.strong_order(noise)) < 0.15, errors


# --- sampling -------------------------------------------------------------------------------------


def check_mixture(x: Tensor, mixture: Mixture) -> None:
    """Weight, means and spreads of both modes, within four standard errors and a little bias."""
    right = x[:, 0] > -0.25
    error = 4 * math.sqrt(0.21 / len(x))
    assert float(right.double().mean()) == pytest.approx(0.7, abs=error + 0.005)
    for mask, mean in ((~right, mixture.means[0]), (right, mixture.means[1])):
        error = 4 * mixture.std / math.sqrt(int(mask.sum()))
        assert torch.allclose(x[mask].mean(0), mean, atol=error + 0.01)
        assert torch.allclose(x[mask].std(0), torch.full((2,), mixture.std), atol=error + 0.01)


def score(mixture: Mixture) -> Any:
    def force(t: Tensor, x: Tensor) -> Tensor:
        logits = mixture._logits(x, 1.0, mixture.std**2)
        gaps = mixture.means - x[:, None]
        return (logits.softmax(-1)[..., None] * gaps).sum(1) / mixture.std**2

    return force


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_underdamped_motion_keeps_a_mixture(method: KineticMethod) -> None:
    """From the exact law at temperature one: its weights, means and spreads stay."""
    mixture, count = Mixture.two(), 8000
    y0 = (mixture.sample(count, 1), torch.randn(count, 2, generator=generator(2)))
    motion = UnderdampedLangevin(score(mixture), friction=1.0)
    with torch.no_grad():
        x, v = fs.solve(
            motion, y0, 0.0, 6.0, integrator=method, stepping=fs.Fixed(steps=60),
            path=fs.Brownian(5),
        ).y1  # fmt: skip
    check_mixture(x, mixture)
    assert float(v.var()) == pytest.approx(1.0, rel=4 * math.sqrt(2 / v.numel()) + 0.015)
    assert abs(float((x * v).mean())) < 4 / math.sqrt(v.numel()) * 1.5


def test_the_overdamped_motion_keeps_a_mixture() -> None:
    mixture, count = Mixture.two(), 8000
    motion = Langevin(score(mixture))
    with torch.no_grad():
        x = fs.solve(
            motion, mixture.sample(count, 1), 0.0, 1.5, integrator=StochasticHeun(),
            stepping=fs.Fixed(steps=100), path=fs.Brownian(5),
        ).y1  # fmt: skip
    check_mixture(x, mixture)


def test_temperature_scales_the_variance() -> None:
    """dx = -x dt + sqrt(2 T) dW has variance T (1 - exp(-2 t)), by Euler's own recursion."""
    n, h, count, temperature = 20, 0.1, 20_000, 0.3
    x = fs.solve(
        Langevin(lambda t, x: -x, temperature=temperature), torch.zeros(count), 0.0, n * h,
        integrator=EulerMaruyama(), stepping=fs.Fixed(steps=n), path=fs.Brownian(1),
    ).y1  # fmt: skip
    truth = sum(2 * temperature * h * (1 - h) ** (2 * i) for i in range(n))
    assert float(x.var()) == pytest.approx(truth, rel=4 * math.sqrt(2 / count))


# --- seams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_evaluations(method: KineticMethod) -> None:
    """One a step and one at the start, where the last one starts the next step; else two."""
    y0 = (torch.zeros(2, 1), torch.zeros(2, 1))
    sol = fs.solve(
        harmonic(), y0, integrator=method, stepping=fs.Fixed(steps=10), path=fs.Brownian(0)
    )
    assert sol.stats.evaluations == (20 if isinstance(method, QUICSORT) else 11)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_any_pytree_and_times_of_each_sample(method: KineticMethod) -> None:
    """A position of several leaves moves as its leaves do; so do spans of each sample's own."""
    x = {"a": torch.randn(3, 2), "b": torch.randn(3)}
    v = {"a": torch.randn(3, 2), "b": torch.randn(3)}
    motion = UnderdampedLangevin(
        lambda t, x: {"a": -x["a"], "b": -2.0 * x["b"]}, friction=0.7, batched_time=True
    )

    def run(y0: Any, t1: Any, seeds: Tensor) -> Any:
        stepping = fs.Fixed(steps=5)
        path = fs.Brownian(seeds)
        return fs.solve(motion, y0, 0.0, t1, integrator=method, stepping=stepping, path=path).y1

    ends, seeds = torch.tensor([0.5, 1.0, 0.0]), torch.arange(3)
    whole = run((x, v), ends, seeds)
    for i in range(3):
        row = [{k: p[k][i : i + 1] for k in p} for p in (x, v)]
        alone = run((row[0], row[1]), float(ends[i]), seeds[i : i + 1])
        for part, other in zip(whole, alone, strict=True):
            for key in part:
                assert torch.allclose(part[key][i], other[key][0], atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients(method: KineticMethod) -> None:
    """By friction, temperature, stiffness and the start, against finite differences."""
    y0 = (torch.randn(2, 1), torch.randn(2, 1))

    def end(friction: Tensor, temperature: Tensor, stiffness: Tensor, x: Tensor) -> Tensor:
        motion = UnderdampedLangevin(
            lambda t, x, k: -k * x.sin(), friction=friction, temperature=temperature
        )
        y1 = fs.solve(
            motion, (x, y0[1]), args=(stiffness,), integrator=method,
            stepping=fs.Fixed(steps=4), path=fs.Brownian(4),
        ).y1  # fmt: skip
        return torch.cat(y1)

    numbers = [torch.tensor(v, requires_grad=True) for v in (0.8, 0.6, 1.7)]
    assert torch.autograd.gradcheck(end, (*numbers, y0[0].requires_grad_()))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_single_precision_stays_single(method: KineticMethod) -> None:
    y0 = (torch.ones(2, 1, dtype=torch.float32), torch.ones(2, 1, dtype=torch.float32))
    x, v = fs.solve(
        harmonic(), y0, integrator=method, stepping=fs.Fixed(steps=3), path=fs.Brownian(0)
    ).y1
    assert x.dtype == v.dtype == torch.float32


def test_what_has_no_such_structure_is_refused() -> None:
    sde = fs.SDE(
        lambda t, y: (y[1], -y[0]), lambda t, y: (0.0, 1.0), noise="diagonal", additive=True
    )
    pair = (torch.zeros(2, 1), torch.zeros(2, 1))
    for method in METHODS:
        with pytest.raises(TypeError, match="UnderdampedLangevin"):
            fs.solve(sde, pair, integrator=method, stepping=fs.Fixed(steps=2), path=fs.Brownian(0))
        with pytest.raises(TypeError, match=r"\(x, v\), a tuple of two alike"):
            fs.solve(
                harmonic(), pair[0], integrator=method, stepping=fs.Fixed(steps=2),
                path=fs.Brownian(0),
            )  # fmt: skip
    with pytest.raises(ValueError, match="friction is not negative"):
        UnderdampedLangevin(lambda t, x: -x, friction=-1.0)
    with pytest.raises(ValueError, match="one number for all"):
        Langevin(lambda t, x: -x, temperature=torch.ones(2))
    with pytest.raises(TypeError, match="force is a callable"):
        Langevin(1.0)  # type: ignore[arg-type]


def test_methods_for_additive_noise_take_the_motion_too() -> None:
    """Heun's step on the pair, against QUICSORT in law: mean and variance of the velocity."""
    count = 4000
    y0 = (torch.ones(count, 1), torch.zeros(count, 1))
    found = []
    for method in (StochasticHeun(), QUICSORT()):
        _, v = fs.solve(
            harmonic(), y0, integrator=method, stepping=fs.Fixed(steps=30), path=fs.Brownian(8)
        ).y1
        found.append((float(v.mean()), float(v.var())))
    assert found[0][0] == pytest.approx(found[1][0], abs=6 / math.sqrt(count))
    assert found[0][1] == pytest.approx(found[1][1], rel=6 * math.sqrt(2 / count))
