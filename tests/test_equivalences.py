"""Section 2 of the design: the samplers of the literature are coefficient choices, to rounding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import DDIM, DPMSolverPP, EulerMaruyama, ExponentialEuler, Heun
from flowsde.paths import EDM, VP, karras, uniform_lambda

from .systems import SCHEDULES, Mixture, increments

MIXTURE = Mixture.two()


def start(count: int = 7) -> Tensor:
    return torch.randn(count, 2)


def ends(schedule: fs.Schedule) -> tuple[float, float]:
    return schedule.horizon * 0.95, 0.02


def grid(schedule: fs.Schedule, steps: int = 8) -> Tensor:
    return uniform_lambda(schedule, *ends(schedule), steps)


def run(dynamics: fs.Dynamics, x: Tensor, integrator: fs.Integrator, times: Tensor, **more: Any
        ) -> Tensor:  # fmt: skip
    return fs.solve(
        dynamics, x, float(times[0]), float(times[-1]), integrator=integrator,
        stepping=fs.Grid(times), **more,
    ).y1  # fmt: skip


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert float((a - b).abs().max()) < tolerance * (1.0 + float(b.abs().max()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_first_order_exponential_is_ddim(schedule: fs.Schedule) -> None:
    """x1 = alpha1 x0 + sigma1 eps, Song et al. 2020."""
    denoiser = MIXTURE.denoiser(schedule)
    flow, times, x = fs.LinearSDE(schedule).probability_flow(denoiser), grid(schedule), start()
    hand = x
    for t0, t1 in itertools.pairwise(times):
        (a0, s0), (a1, s1) = schedule(t0), schedule(t1)
        x0 = denoiser(t0, hand)
        hand = a1 * x0 + s1 * (hand - a0 * x0) / s0
    close(run(flow, x, ExponentialEuler(), times), hand)
    close(run(flow, x, DDIM(), times), hand)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(schedule: fs.Schedule, eta: float) -> None:
    denoiser = MIXTURE.denoiser(schedule)
    flow, times, x = fs.LinearSDE(schedule).probability_flow(denoiser), grid(schedule), start()
    noise = increments(fs.Brownian(3), times.tolist(), x)
    hand = x
    for n, (t0, t1) in enumerate(itertools.pairwise(times)):
        (a0, s0), (a1, s1) = schedule(t0), schedule(t1)
        x0 = denoiser(t0, hand)
        variance = eta**2 * s1**2 * (1 - (a0 * s1 / (a1 * s0)) ** 2)
        eps, z = (hand - a0 * x0) / s0, noise(n) / (t0 - t1).sqrt()
        hand = a1 * x0 + (s1**2 - variance).sqrt() * eps + variance.sqrt() * z
    close(run(flow, x, DDIM(eta), times, path=fs.Brownian(3)), hand)


def test_ddim_with_eta_one_is_the_ddpm_posterior() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x0), Ho et al. 2020, equations 6 and 7."""
    schedule, x = VP(), start()
    denoiser = MIXTURE.denoiser(schedule)
    t0, t1 = torch.tensor(0.6), torch.tensor(0.55)
    (a0, s0), (a1, s1) = schedule(t0), schedule(t1)
    step = (a0 / a1) ** 2  # DDPM's alpha_t
    x0 = denoiser(t0, x)
    mean = a1 * (1 - step) / s0**2 * x0 + step.sqrt() * s1**2 / s0**2 * x
    deviation = (s1**2 / s0**2 * (1 - step)).sqrt()
    times = torch.stack((t0, t1))
    z = increments(fs.Brownian(5), times.tolist(), x)(0) / (t0 - t1).sqrt()
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, DDIM(1.0), times, path=fs.Brownian(5)), mean + deviation * z)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_second_order_exponential_is_dpm_solver_pp_2m(schedule: fs.Schedule) -> None:
    """Lu et al. 2022b, algorithm 2, in its own variables."""
    denoiser = MIXTURE.denoiser(schedule)
    flow, times, hand = fs.LinearSDE(schedule).probability_flow(denoiser), grid(schedule), start()
    x, lam, old = hand.clone(), [schedule.half_log_snr(t) for t in times], None
    for n in range(len(times) - 1):
        x0, h = denoiser(times[n], hand), lam[n + 1] - lam[n]
        d = x0
        if old is not None:
            r = (lam[n] - lam[n - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        alpha, sigma = schedule(times[n + 1])
        hand = sigma / schedule.sigma(times[n]) * hand - alpha * torch.expm1(-h) * d
        old = x0
    close(run(flow, x, DPMSolverPP(), times), hand)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("method", [ExponentialEuler(), DPMSolverPP()], ids=str)
def test_on_the_reverse_sde_they_are_sde_dpm_solver_pp(
    schedule: fs.Schedule, method: fs.Integrator
) -> None:
    denoiser = MIXTURE.denoiser(schedule)
    sde, times, hand = fs.LinearSDE(schedule).reverse_sde(denoiser), grid(schedule), start()
    noise = increments(fs.Brownian(1), times.tolist(), hand)
    x, lam, old = hand.clone(), [schedule.half_log_snr(t) for t in times], None
    for n in range(len(times) - 1):
        x0, h = denoiser(times[n], hand), lam[n + 1] - lam[n]
        d = x0
        if old is not None and method.order == 2:
            d = x0 + 0.5 * h / (lam[n] - lam[n - 1]) * (x0 - old)
        alpha, sigma = schedule(times[n + 1])
        z = noise(n) / (times[n] - times[n + 1]).sqrt()
        hand = (
            sigma / schedule.sigma(times[n]) * torch.exp(-h) * hand
            + alpha * (1 - torch.exp(-2 * h)) * d
            + sigma * (1 - torch.exp(-2 * h)).sqrt() * z
        )
        old = x0
    close(run(sde, x, method, times, path=fs.Brownian(1)), hand, 1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_heun_in_the_noise_clock_is_edms_sampler(schedule: fs.Schedule) -> None:
    """Karras et al. 2022, algorithm 1 with s(t) = 1 and no churn, on z = x / alpha."""
    denoiser = MIXTURE.denoiser(schedule)
    clock = fs.change_clock(fs.LinearSDE(schedule).probability_flow(denoiser))
    times = karras(schedule, *ends(schedule), 8)
    sigmas, x = clock.grid(times), start()

    def slope(s: Tensor, z: Tensor) -> Tensor:
        t = torch.as_tensor(schedule.time(-s.log()))
        return (z - denoiser(t, schedule.alpha(t) * z)) / s

    hand = z = clock.enter(float(times[0]), x)
    for s0, s1 in itertools.pairwise(sigmas):
        d = slope(s0, hand)
        hand = hand + (s1 - s0) * 0.5 * (d + slope(s1, hand + (s1 - s0) * d))
    close(run(clock, z, Heun(), sigmas), hand, 1e-10)


def test_in_edms_schedule_plain_heun_is_the_same() -> None:
    schedule = EDM(20.0)
    flow = fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))
    times, x = karras(schedule, 19.0, 0.02, 8), start()
    close(run(flow, x, Heun(), times), run(fs.change_clock(flow), x, Heun(), times), 1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_both_samplers_meet_the_flow_they_discretise(schedule: fs.Schedule) -> None:
    denoiser = MIXTURE.denoiser(schedule)
    flow, x = fs.LinearSDE(schedule).probability_flow(denoiser), start()
    t0, t1 = ends(schedule)
    truth = fs.solve(flow, x, t0, t1, stepping=fs.Adaptive(1e-10, 1e-10)).y1
    for method, wanted in ((DDIM(), 1), (DPMSolverPP(), 2)):
        errors = [
            float((run(flow, x, method, grid(schedule, n)) - truth).abs().mean()) for n in (80, 160)
        ]
        assert math.log2(errors[0] / errors[1]) > wanted - 0.3


def test_steps_onto_no_noise_and_from_no_signal_are_finite() -> None:
    """sigma = 0 at the end, alpha = 0 at the start: the weights have their limits."""
    schedule = fs.paths.FlowMatching()
    flow = fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))
    times = torch.linspace(1.0, 0.0, 41)
    x = torch.randn(2000, 2)
    for method in (DDIM(), DPMSolverPP(), ExponentialEuler()):
        y = run(flow, x, method, times)
        assert bool(torch.isfinite(y).all())
        assert float((y.mean(0) - MIXTURE.sample(20000, 1).mean(0)).abs().max()) < 0.15


def test_euler_maruyama_without_noise_is_euler() -> None:
    f = lambda t, y: -y * t.cos()
    still = fs.SDE(f, lambda t, y: torch.zeros_like(y), noise="diagonal", additive=True)
    y, stepping = start(), fs.Fixed(steps=9)
    sde = fs.solve(still, y, integrator=EulerMaruyama(), stepping=stepping, path=fs.Brownian(0))
    ode = fs.solve(fs.ODE(f), y, integrator=integrators.Euler(), stepping=stepping)
    close(sde.y1, ode.y1)
