"""Exponential time differencing of fourth order, where the linear part is stiff."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import ETDRK4, RK4, Dopri8
from flowsde.integrators.exponential import phi
from flowsde.paths import EDM, VP, FlowMatching, uniform_lambda

from .systems import Mixture, slope


def series(z: Fraction, k: int) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!, in exact arithmetic."""
    total, term = Fraction(0), Fraction(1, math.factorial(k))
    for n in range(1, 150):
        total, term = total + term, term * z / (n + k)
    return float(total)


def test_phi_functions_on_the_real_line() -> None:
    """Relative to their own size, on both sides of the switch; floats and tensors alike."""
    for z in (0.0, 1e-12, 1e-5, 0.3, 0.999, 1.0, 1.001, 2.5, 12.0, 30.0):
        for x in (z, -z):
            exact = [series(Fraction(x), k) for k in (2, 3)]
            assert phi(x) == pytest.approx(exact, rel=1e-14)
            assert [float(v) for v in phi(torch.tensor(x))] == pytest.approx(exact, rel=1e-14)


def test_phi_functions_in_the_complex_plane() -> None:
    """Against the mean over a circle, as Kassam and Trefethen have it."""
    points = [r * cmath.exp(1j * a) for r in (0.0, 0.4, 0.99, 1.01, 3.0, 2 * math.pi, 20.0)
              for a in (0.3, math.pi / 2, 2.5, 4.0)]  # fmt: skip
    z = torch.tensor(points, dtype=torch.complex128)
    angles = 2j * math.pi * (torch.arange(128) + 0.5) / 128
    w = z[:, None] + 2.0 * angles.exp()
    two = (w.exp() - 1 - w) / w**2
    three = (w.exp() - 1 - w - w**2 / 2) / w**3
    for found, around in zip(phi(z), (two, three), strict=True):
        assert float(((found - around.mean(1)).abs() / (1.0 + around.abs().mean(1))).max()) < 1e-13


@pytest.mark.parametrize("rate", [0.0, torch.zeros(3, device="cpu").double()], ids=["one", "each"])
def test_at_rate_zero_it_is_rk4(rate: Any) -> None:
    y0, f = torch.randn(2, 3), lambda t, y: y.sin() * t.cos() + y.roll(1, -1)
    keywords: dict[str, Any] = {"stepping": fs.Fixed(steps=7), "dense": True}
    if isinstance(rate, Tensor):
        rate = rate.to(y0.device)
    a = fs.solve(fs.ODE(f, linear=rate), y0, 0.2, 1.3, integrator=ETDRK4(), **keywords)
    b = fs.solve(fs.ODE(f), y0, 0.2, 1.3, integrator=RK4(), **keywords)
    assert torch.allclose(a.y1, b.y1, rtol=1e-14, atol=1e-14)
    assert a.stats.evaluations == b.stats.evaluations == 28


def modes(count: int) -> Tensor:
    return torch.fft.fftfreq(count, 1.0 / count)


@pytest.mark.parametrize("equation", ["korteweg-de vries", "kuramoto-sivashinsky"])
def test_order_on_stiff_equations_in_fourier_space(equation: str) -> None:
    """u_t + u u_x = -u_xxx, and = -u_xx - u_xxxx: rates that are complex, and long and real."""
    k = modes(32)
    rate = 1j * k**3 if equation == "korteweg-de vries" else (k**2 - 0.1 * k**4) * (1 + 0j)
    x = 2 * math.pi * torch.arange(32) / 32
    v0 = torch.fft.fft(x.cos() + 0.2 * (2 * x).sin())

    def advection(t: Tensor, v: Tensor) -> Tensor:
        return -0.5j * k * torch.fft.fft(torch.fft.ifft(v).real.square())

    ode = fs.ODE(advection, linear=rate)
    keywords: dict[str, Any] = {"integrator": ETDRK4()}
    truth = fs.solve(ode, v0, 0.0, 0.2, stepping=fs.Fixed(steps=320), **keywords).y1
    counts, errors = [40, 60, 90], []
    for n in counts:
        v1 = fs.solve(ode, v0, 0.0, 0.2, stepping=fs.Fixed(steps=n), **keywords).y1
        errors.append(float((v1 - truth).abs().max()))
    assert abs(slope(errors, counts) - 4.0) < 0.25, errors
    unsplit = fs.ODE(lambda t, v: rate * v + advection(t, v))
    blown = fs.solve(unsplit, v0, 0.0, 0.2, integrator=RK4(), stepping=fs.Fixed(steps=40),
                     throw=False).y1  # fmt: skip
    assert not float((blown - truth).abs().max()) < 1e3 * errors[0]


def test_dense_output_is_as_exact_as_the_steps() -> None:
    ode = fs.ODE(lambda t, y: 20.0 * t.cos() - t.sin() + 0.1 * (y - t.cos()) ** 2, linear=-20.0)
    y0 = torch.tensor([1.5])
    truth = fs.solve(ode, y0, stepping=fs.Adaptive(1e-12, 1e-12), dense=True)
    counts, errors = [20, 40, 80], []
    for n in counts:
        sol = fs.solve(ode, y0, integrator=ETDRK4(), stepping=fs.Fixed(steps=n), dense=True)
        errors.append(sum(abs(float(sol(t) - truth(t))) for t in torch.linspace(0.01, 1, 23)))
    assert slope(errors, counts) > 3.7, errors


@torch.no_grad()
@pytest.mark.parametrize("schedule", [VP(), FlowMatching(), EDM(20.0)], ids=str)
def test_order_on_a_probability_flow_and_its_density(schedule: fs.Schedule) -> None:
    flow = fs.LinearSDE(schedule).probability_flow(Mixture.two().denoiser(schedule))
    t0, t1 = 0.9 * schedule.horizon, 0.1
    y0 = (torch.randn(3, 2) * schedule.sigma(t0), torch.zeros(3))
    truth = fs.solve(fs.log_density(flow), y0, t0, t1, integrator=Dopri8(),
                     stepping=fs.Adaptive(1e-10, 1e-10)).y1  # fmt: skip
    counts, errors, density = [24, 48], [], []
    for n in counts:
        grid = fs.Grid(uniform_lambda(schedule, t0, t1, n))
        y1 = fs.solve(
            fs.log_density(flow), y0, t0, t1, integrator=ETDRK4(), stepping=grid
        ).y1  # fmt: skip
        errors.append(float((y1[0] - truth[0]).abs().mean()))
        density.append(float((y1[1] - truth[1]).abs().mean()))
    alone = fs.solve(flow, y0[0], t0, t1, integrator=ETDRK4(), stepping=grid).y1
    assert torch.allclose(y1[0], alone, atol=1e-12)
    assert slope(errors, counts) > 3.6, errors
    assert slope(density, counts) > 3.6, density


def test_a_step_onto_no_noise_is_finite_and_so_is_its_gradient() -> None:
    schedule = FlowMatching()
    flow = fs.LinearSDE(schedule).probability_flow(Mixture.two().denoiser(schedule))
    for end in (0.0, torch.zeros(4)):
        x = torch.randn(4, 2, requires_grad=True)
        y1 = fs.solve(flow, x, 1.0, end, integrator=ETDRK4(), stepping=fs.Fixed(steps=19)).y1
        (g,) = torch.autograd.grad(y1.sum(), [x])
        assert bool(torch.isfinite(y1).all())
        assert bool(torch.isfinite(g).all())
        truth = fs.solve(flow, x, 1.0, 1e-5, stepping=fs.Adaptive(1e-5, 1e-5)).y1
        assert float((y1 - truth).detach().abs().max()) < 0.1
    with pytest.raises(ValueError, match="no noise"):
        fs.solve(flow, x, 0.0, 1.0, integrator=ETDRK4(), stepping=fs.Fixed(steps=9))


def test_rates_states_and_times_differentiate() -> None:
    rate = torch.tensor([-30.0, -0.5, 0.3], requires_grad=True)
    y0 = torch.randn(2, 3, requires_grad=True)
    end = torch.tensor(0.7, requires_grad=True)

    def solve(r: Tensor, y: Tensor, t1: Tensor) -> Tensor:
        ode = fs.ODE(lambda t, x: x.sin() * t, linear=r)
        return fs.solve(ode, y, 0.1, t1, integrator=ETDRK4(), stepping=fs.Fixed(steps=3),
                        adjoint=fs.Checkpointed(1)).y1  # fmt: skip

    assert torch.autograd.gradcheck(solve, (rate, y0, end))


@pytest.mark.parametrize("integrator", [ETDRK4(), RK4()], ids=str)
@pytest.mark.parametrize(
    ("rate", "y0"),
    [
        (torch.arange(4.0, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float32)),
        (1j * torch.arange(4.0), torch.ones(3, 4)),
        (1j, torch.ones(3, 4)),
        (torch.ones(3, 4), torch.ones(4)),
        (torch.ones(5), torch.ones(3, 4)),
    ],
    ids=str,
)
def test_a_rate_makes_no_other_state(integrator: Any, rate: Any, y0: Tensor) -> None:
    with pytest.raises(TypeError, match="shaped as one sample"):
        fs.solve(
            fs.ODE(lambda t, y: -(y**2), linear=rate), y0, 0.0, 1.0, integrator=integrator,
            stepping=fs.Fixed(steps=3),
        )  # fmt: skip
