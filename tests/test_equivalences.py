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
from flowsde.dynamics import Data
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    DDIM,
    DEIS,
    SEEDS,
    DPMSolver,
    DPMSolverPP,
    EDMHeun,
    EulerMaruyama,
    ExponentialAdams,
    ExponentialEuler,
    Heun,
    UniPC,
)
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


# --- single steps and SEEDS, by their published formulas ------------------------------------------


def test_dpm_solver_3_is_its_algorithm() -> None:
    """Lu et al. 2022a, algorithm 2 with r1 = 1/3 and r2 = 2/3, in its own variables."""
    schedule, hand = VP(), start()
    denoiser, times = MIXTURE.denoiser(schedule), grid(schedule, 5)
    x = hand.clone()

    def eps(lam: Tensor, u: Tensor) -> Tensor:
        t = torch.as_tensor(schedule.time(lam))
        return (u - schedule.alpha(t) * denoiser(t, u)) / schedule.sigma(t)

    for t0, t1 in itertools.pairwise(times):
        lam, h = schedule.half_log_snr(t0), schedule.half_log_snr(t1) - schedule.half_log_snr(t0)
        (a0, _), (a1, s1) = schedule(t0), schedule(t1)
        e0, inner = eps(lam, hand), []
        for r in (1 / 3, 2 / 3):
            a, s = schedule(schedule.time(lam + r * h))
            u = a / a0 * hand - s * torch.expm1(r * h) * e0
            if inner:
                u = u - s * 2 * (torch.expm1(r * h) / (r * h) - 1) * (inner[0] - e0)
            inner.append(eps(lam + r * h, u))
        slope = torch.expm1(h) / h - 1
        hand = a1 / a0 * hand - s1 * (torch.expm1(h) * e0 + 1.5 * slope * (inner[1] - e0))
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, DPMSolver(3), times), hand)


@pytest.mark.parametrize("order", [2, 3])
def test_seeds_is_its_algorithm(order: int) -> None:
    """Gonzalez et al. 2023, SEEDS-2 and SEEDS-3, with the normals of the path in order."""
    schedule, x, (t0, t1) = VP(), start(), (0.6, 0.5)
    denoiser = MIXTURE.denoiser(schedule)
    sde, method = fs.LinearSDE(schedule).reverse_sde(denoiser), SEEDS(order)
    draws = method.draws(sde, x)
    assert draws is not None
    dw = fs.Brownian(3).bind([t0, t1], draws)(0, t0, t1)
    z = [*(dw.z or ()), dw.w / math.sqrt(t0 - t1)]
    lam = schedule.half_log_snr(t0)
    h = schedule.half_log_snr(t1) - lam

    def eps(lam: float, u: Tensor) -> Tensor:
        t = torch.tensor(schedule.time(lam))
        return (u - schedule.alpha(t) * denoiser(t, u)) / schedule.sigma(t)

    def stage(r: float, parts: list[float]) -> Tensor:
        """Without slopes; the noise of the pieces up to r."""
        a, s = schedule(schedule.time(lam + r * h))
        u = a / schedule.alpha(t0) * x - 2 * s * math.expm1(r * h) * eps(lam, x)
        ends = [*parts, r]
        for i, (c, d) in enumerate(itertools.pairwise([0.0, *ends])):
            size = math.exp(2 * (r - c) * h) - math.exp(2 * (r - d) * h)
            u = u + s * math.sqrt(size) * z[i]
        return u

    def slope(r: float) -> float:
        return 2 * schedule.sigma(schedule.time(lam + r * h)) * (math.expm1(r * h) / (r * h) - 1)

    if order == 2:
        d1 = eps(lam + h / 2, stage(0.5, [])) - eps(lam, x)
        hand = stage(1.0, [0.5]) - 2 * schedule.sigma(t1) * math.expm1(h) * d1
    else:
        d1 = eps(lam + h / 3, stage(1 / 3, [])) - eps(lam, x)
        d2 = eps(lam + 2 * h / 3, stage(2 / 3, [1 / 3]) - 2 * slope(2 / 3) * d1) - eps(lam, x)
        hand = stage(1.0, [1 / 3, 2 / 3]) - 1.5 * slope(1.0) * d2
    close(run(sde, x, method, torch.tensor([t0, t1]), path=fs.Brownian(3)), hand)


def test_deis_is_its_quadrature() -> None:
    """Zhang and Chen 2023, tAB: the polynomials in t, integrated over rho."""
    from scipy.integrate import quad

    schedule = VP()
    denoiser, times, x = MIXTURE.denoiser(schedule), grid(schedule, 6), start()
    hand, old = x.clone(), []
    for n in range(6):
        t0, t1 = float(times[n]), float(times[n + 1])
        a, s = schedule(times[n])
        old = [(hand - a * denoiser(times[n], hand)) / s, *old][:3]
        at = times[max(0, n - 2) : n + 1].flip(0).tolist()
        hand = schedule.alpha(t1) / a * hand
        for j, e in enumerate(old):
            others = [u for i, u in enumerate(at) if i != j]

            def density(t: float, j: int = j, others: list[float] = others) -> float:
                alpha, sigma = schedule(t)
                rate = (schedule.dsigma(t) - sigma * schedule.dalpha(t) / alpha) / alpha
                return rate * math.prod((t - u) / (at[j] - u) for u in others)

            hand = hand + schedule.alpha(t1) * quad(density, t0, t1, epsabs=1e-13)[0] * e
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, DEIS(3), times), hand, 1e-10)


def test_churn_is_edms() -> None:
    """Karras et al. 2022, algorithm 2: from sigma to (1 + gamma) sigma between two levels."""
    schedule, times = EDM(20.0), karras(EDM(20.0), 10.0, 0.05, 8)
    denoiser, x = MIXTURE.denoiser(schedule), start()
    method = EDMHeun(gamma=0.3, low=0.2, high=5.0, swell=1.01)
    noise, hand = increments(fs.Brownian(7), times.tolist(), x), x
    for n, (s0, s1) in enumerate(itertools.pairwise(times)):
        gamma = 0.3 if 0.2 <= float(s0) <= 5.0 else 0.0
        s = (1 + gamma) * s0
        z = noise(n) / (s0 - s1).sqrt()
        hand = hand + (s**2 - s0**2).sqrt() * 1.01 * z
        d = (hand - denoiser(s, hand)) / s
        guess = hand + (s1 - s) * d
        hand = hand + (s1 - s) * 0.5 * (d + (guess - denoiser(s1, guess)) / s1)
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, method, times, path=fs.Brownian(7)), hand)


def test_ancestral_euler_is_ddim_with_eta_one() -> None:
    """k-diffusion's: down to sigma_down, then sigma_up of noise, of the same variance in all."""
    schedule, times = EDM(20.0), karras(EDM(20.0), 10.0, 0.05, 8)
    denoiser, x = MIXTURE.denoiser(schedule), start()
    noise, hand = increments(fs.Brownian(7), times.tolist(), x), x
    for n, (s0, s1) in enumerate(itertools.pairwise(times)):
        up = (s1**2 * (s0**2 - s1**2) / s0**2).sqrt()
        down = (s1**2 - up**2).sqrt()
        hand = hand + (down - s0) * (hand - denoiser(s0, hand)) / s0
        hand = hand + up * noise(n) / (s0 - s1).sqrt()
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, DDIM(1.0), times, path=fs.Brownian(7)), hand)


def test_edm_heun_is_heun_in_the_noise_clock() -> None:
    schedule = VP()
    flow = fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))
    clock, times, x = fs.change_clock(flow), karras(schedule, *ends(schedule), 8), start()
    z = run(clock, clock.enter(float(times[0]), x), Heun(), clock.grid(times))
    close(run(flow, x, EDMHeun(), times), clock.leave(float(times[-1]), z), 1e-10)


# --- diffusers, on the same grid ------------------------------------------------------------------


their_warnings = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of NumPy 2


def peer(scheduler: Any, times: Tensor, x: Tensor, **table: Tensor) -> Tensor:
    """What a scheduler of diffusers makes of the exact denoiser, with these of its tables."""
    count, denoiser = len(times) - 1, MIXTURE.denoiser(VP())
    scheduler.set_timesteps(count)
    for name, values in table.items():
        setattr(scheduler, name, values)
    for n, step in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser(times[n], x), step, x).prev_sample
    return x


def ratios(times: Tensor) -> Tensor:
    alpha, sigma = VP()(times)
    return torch.as_tensor(sigma) / alpha


BH2, BH1 = {"solver_type": "bh2"}, {"solver_type": "bh1"}


@their_warnings
@pytest.mark.parametrize(
    ("method", "name", "config", "last"),
    [
        (DPMSolverPP(2), "DPMSolver", {}, 0.02), (DPMSolverPP(2), "DPMSolver", {}, 0.0),
        (ExponentialAdams(2), "DPMSolver", {"solver_type": "heun"}, 0.02),
        (UniPC(2), "UniPC", BH2, 0.02), (UniPC(2), "UniPC", BH2, 0.0),
        (UniPC(2, bh=1), "UniPC", BH1, 0.02), (UniPC(3), "UniPC", BH2, 0.02),
        (UniPC(3, bh=1), "UniPC", BH1, 0.02),
    ],
    ids=str,
)  # fmt: skip
def test_diffusers_multistep(method: Any, name: str, config: dict[str, Any], last: float) -> None:
    """Down to some noise and to none, where a step of first order ends both. (There bh1 is not a
    number with theirs, and order 3 is lowered one step earlier.)
    """
    diffusers = pytest.importorskip("diffusers")
    times, x, config = grid(VP(), 10), start(), {"solver_order": method.values, **config}
    if last == 0.0:
        times = torch.cat((times, torch.zeros(1)))
    else:
        config = {**config, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    scheduler = getattr(diffusers, f"{name}MultistepScheduler")(prediction_type="sample", **config)
    flow = fs.LinearSDE(VP()).probability_flow(MIXTURE.denoiser(VP()))
    close(run(flow, x, method, times), peer(scheduler, times, x, sigmas=ratios(times)), 1e-6)


def three_m(times: Tensor, x: Tensor, weight: float) -> Tensor:
    """The multistep update of order 3 with this weight of the second divided difference."""
    schedule = VP()
    denoiser, lam, old = MIXTURE.denoiser(schedule), schedule.half_log_snr(times), []
    for n in range(len(times) - 1):
        (_, s0), (a, s) = schedule(times[n]), schedule(times[n + 1])
        h, old = lam[n + 1] - lam[n], [denoiser(times[n], x), *old][:3]
        x = s / s0 * x - a * torch.expm1(-h) * old[0]
        phi2 = torch.expm1(-h) / h + 1
        if len(old) == 2:
            x = x - a * torch.expm1(-h) * 0.5 * h / (lam[n] - lam[n - 1]) * (old[0] - old[1])
        if len(old) == 3:
            r0, r1 = (lam[n] - lam[n - 1]) / h, (lam[n - 1] - lam[n - 2]) / h
            d0, d1 = (old[0] - old[1]) / r0, (old[1] - old[2]) / r1
            second = (d0 - d1) / (r0 + r1)
            x = x + a * phi2 * (d0 + r0 * second) - a * weight * (phi2 / h - 0.5) * second
    return x


@their_warnings
def test_diffusers_three_m_misses_a_factor() -> None:
    """The Taylor expansion of DPM-Solver++ decides (Lu et al. 2022b): the second
    derivative is twice the second divided difference. Theirs takes it once.
    """
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="sample", solver_order=3, lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    times, x = grid(VP(), 10), start(4)  # theirs rounds to float32 on the way
    flow = fs.LinearSDE(VP()).probability_flow(MIXTURE.denoiser(VP()))
    close(peer(scheduler, times, x, sigmas=ratios(times)), three_m(times, x, 1.0), 1e-6)
    close(run(flow, x, DPMSolverPP(3), times), three_m(times, x, 2.0), 1e-11)


def test_a_residual_that_is_a_parabola_is_continued_exactly() -> None:
    """What tells 3M's two formulas apart: x0_hat = lambda^2, in one step with two behind it."""
    from scipy.integrate import quad

    schedule, x, times = VP(), torch.randn(1, 1), [0.6, 0.52, 0.45, 0.4]
    denoiser = fs.Denoiser(
        lambda t, x: torch.as_tensor(schedule.half_log_snr(t)) ** 2 + 0.0 * x, schedule, Data()
    )
    field = Field(fs.LinearSDE(schedule).probability_flow(denoiser), (), x)
    carry = tuple((t, field.residual(t, x)) for t in (times[1], times[0]))
    (_, s0), (a1, s1) = schedule(times[2]), schedule(times[3])
    lam0, lam1 = (schedule.half_log_snr(t) for t in times[2:])
    integral = quad(lambda lam: math.exp(lam - lam1) * lam**2, lam0, lam1, epsabs=1e-14)[0]
    exact = s1 / s0 * x + a1 * integral
    for method in (DPMSolverPP(3), ExponentialAdams(3)):
        found = method.step(field, times[2], times[3], x, None, carry).y1
        assert torch.allclose(found, exact, atol=1e-13)


@their_warnings
def test_diffusers_deis_has_its_polynomials_in_log_rho() -> None:
    """The paper's tAB has them in t; theirs are exponential Adams on the noise."""
    diffusers = pytest.importorskip("diffusers")
    times, x = grid(VP(), 10), start()
    scheduler = diffusers.DEISMultistepScheduler(
        prediction_type="sample", solver_order=3, lower_order_final=False
    )
    flow = fs.LinearSDE(VP()).probability_flow(MIXTURE.denoiser(VP()))
    found = peer(scheduler, times, x, sigmas=ratios(times))
    close(run(flow, x, ExponentialAdams(3, dual=True), times), found, 1e-6)
    assert float((run(flow, x, DEIS(3), times) - found).abs().max()) > 1e-3


@their_warnings
def test_diffusers_ddim() -> None:
    diffusers = pytest.importorskip("diffusers")
    times, x = grid(VP(), 10), start()
    scheduler = diffusers.DDIMScheduler(10, prediction_type="sample", clip_sample=False)
    squares = torch.as_tensor(VP().alpha(times)) ** 2
    found = peer(
        scheduler, times, x, alphas_cumprod=squares[:-1].flip(0), final_alpha_cumprod=squares[-1]
    )
    flow = fs.LinearSDE(VP()).probability_flow(MIXTURE.denoiser(VP()))
    close(run(flow, x, DDIM(), times), found, 1e-6)


@their_warnings
def test_diffusers_heun() -> None:
    """Euler's step onto sigma = 0 and all."""
    diffusers = pytest.importorskip("diffusers")
    schedule = EDM(20.0)
    denoiser, x = MIXTURE.denoiser(schedule), 10.0 * start()
    sigmas = torch.cat((karras(schedule, 10.0, 0.05, 8), torch.zeros(1)))
    scheduler, found = diffusers.HeunDiscreteScheduler(prediction_type="sample"), x
    scheduler.set_timesteps(9)
    scheduler.sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
    for n, step in enumerate(scheduler.timesteps):
        found = scheduler.step(denoiser(sigmas[(n + 1) // 2], found), step, found).prev_sample
    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    close(run(flow, x, EDMHeun(), sigmas), found, 1e-6)


def test_euler_maruyama_without_noise_is_euler() -> None:
    f = lambda t, y: -y * t.cos()
    still = fs.SDE(f, lambda t, y: torch.zeros_like(y), noise="diagonal", additive=True)
    y, stepping = start(), fs.Fixed(steps=9)
    sde = fs.solve(still, y, integrator=EulerMaruyama(), stepping=stepping, path=fs.Brownian(0))
    ode = fs.solve(fs.ODE(f), y, integrator=integrators.Euler(), stepping=stepping)
    close(sde.y1, ode.y1)
