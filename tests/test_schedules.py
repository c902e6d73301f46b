"""Noise schedules and time grids."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import paths
from flowsde.dynamics import NoisePrediction
from flowsde.integrators import DDIM
from flowsde.paths import EDM, Cosine, Discrete, LearnedSchedule, Schedule, SubVP, Trigonometric
from flowsde.paths import grids as grids_module

from .systems import EVERY_SCHEDULE

PARTS = ("alpha", "sigma", "dalpha", "dsigma", "half_log_snr", "diffusion")


def ids(schedule: object) -> str:
    return str(schedule).split("(")[0]


every = pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=ids)


def test_every_schedule_is_tested() -> None:
    public = (getattr(paths, name) for name in paths.__all__)
    kinds = {c for c in public if inspect.isclass(c) and issubclass(c, Schedule)}
    assert kinds - {Schedule} == {type(s) for s in EVERY_SCHEDULE}


@every
@settings(max_examples=8)
@given(part=st.floats(0.01, 0.98))
def test_parts_rates_and_inverse(schedule: Schedule, part: float) -> None:
    """Floats and tensors agree; rates are derivatives; the inverse inverts."""
    t = part * schedule.horizon
    wide = torch.tensor([t], requires_grad=True)
    for name in PARTS:
        function = getattr(schedule, name)
        assert isinstance(function(t), float)
        assert float(function(wide).detach()) == pytest.approx(function(t), rel=1e-12, abs=1e-14)
    for name in ("alpha", "sigma"):
        (rate,) = torch.autograd.grad(getattr(schedule, name)(wide), wide, allow_unused=True)
        found = getattr(schedule, "d" + name)(t)
        assert found == pytest.approx(float(rate), rel=1e-9, abs=1e-12)
    lam = schedule.half_log_snr(t)
    assert isinstance(schedule.time(lam), float)
    assert schedule.time(lam) == pytest.approx(t, rel=1e-8)
    assert float(schedule.time(torch.tensor(lam))) == pytest.approx(t, rel=1e-8)
    alpha, sigma = schedule(t)
    assert lam == pytest.approx(math.log(alpha / sigma), rel=1e-9, abs=1e-9)


@every
def test_the_sde_has_the_kernels_moments(schedule: Schedule) -> None:
    """m' = f m and v' = 2 f v + g^2 lead from (alpha, sigma^2) at s to that at t."""
    sde = fs.LinearSDE(schedule)

    def rates(t: Tensor, y: Tensor) -> Tensor:
        f = sde(t, torch.ones(1, 1))[0, 0]
        g = sde.diffusion(t, torch.ones(1, 1))
        return torch.stack((f * y[0], 2.0 * f * y[1] + g**2))

    s, t = 0.05 * schedule.horizon, 0.9 * schedule.horizon
    start, end = (torch.tensor([a, b**2]) for a, b in (schedule(s), schedule(t)))
    with torch.no_grad():
        found = fs.solve(fs.ODE(rates), start, s, t, stepping=fs.Adaptive(1e-5, 1e-7)).y1
    assert torch.allclose(found, end, rtol=1e-3)


@every
def test_lambda_falls_all_the_way(schedule: Schedule) -> None:
    lam = schedule.half_log_snr(torch.linspace(0.0, schedule.horizon, 200))
    assert bool((lam.diff() < 0).all())
    assert math.isfinite(schedule.diffusion(0.0))


@every
def test_ends_in_both_types(schedule: Schedule) -> None:
    """No noise at 0 but where it is declared; where the signal goes, to 0 itself."""
    for t in (0.0, schedule.horizon):
        for name in PARTS:
            tensor, number = getattr(schedule, name)(torch.tensor(t)), getattr(schedule, name)(t)
            assert not math.isnan(number), (name, t)
            assert float(tensor) == pytest.approx(number, rel=1e-12, abs=1e-15)
    if not isinstance(schedule, (paths.VE, LearnedSchedule)):
        assert schedule(0.0) == (1.0, 0.0)
        assert schedule.half_log_snr(0.0) == math.inf
    if isinstance(schedule, (paths.VP, SubVP)):  # never, by their formulas
        for lam in (-math.inf, torch.tensor(-math.inf)):
            assert float(torch.as_tensor(schedule.time(lam))) > 1e6
    table = getattr(schedule, "alphas_cumprod", (1.0,))
    if isinstance(schedule, (Cosine, Trigonometric, paths.FlowMatching)) or table[-1] == 0.0:
        assert schedule(1.0) == (0.0, 1.0)
        assert schedule.half_log_snr(1.0) == -math.inf
        assert schedule.diffusion(1.0) == math.inf


@every
def test_single_precision_and_shapes(schedule: Schedule) -> None:
    for shape in ((), (3,), (2, 3)):
        t = schedule.horizon * (0.2 + 0.5 * torch.rand(shape))
        for name in PARTS:
            narrow = getattr(schedule, name)(t.float())
            assert narrow.shape == shape
            assert narrow.dtype == torch.float32
            assert torch.allclose(narrow.double(), getattr(schedule, name)(t), rtol=1e-4, atol=1e-5)


@every
def test_nothing_is_read_on_the_host(schedule: Schedule) -> None:
    """Meta tensors have no values that could be."""
    if isinstance(schedule, LearnedSchedule):
        schedule = copy.deepcopy(schedule).to("meta")
    for shape in ((), (3,)):
        t = torch.empty(shape, device="meta")
        for name in (*PARTS, "time"):
            assert getattr(schedule, name)(t).shape == shape


@given(t=st.floats(0.0, 1.0))
def test_variances(t: float) -> None:
    for schedule in EVERY_SCHEDULE:
        alpha, sigma = schedule(t)
        if isinstance(schedule, SubVP):
            assert sigma == pytest.approx(1.0 - alpha**2, abs=1e-15)
        elif not isinstance(schedule, (paths.VE, EDM, paths.FlowMatching)):
            assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-14)


# --- tables ---------------------------------------------------------------------------------------


def test_tables_are_those_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    for name, made in (
        ("linear", Discrete.linear(100, 1e-4, 0.02)),
        ("scaled_linear", Discrete.scaled_linear(100, 1e-4, 0.02)),
        ("squaredcos_cap_v2", Discrete.cosine(100)),
    ):
        theirs = DDPMScheduler(100, beta_start=1e-4, beta_end=0.02, beta_schedule=name)
        ours = torch.tensor(made.alphas_cumprod).float()
        assert torch.allclose(ours, theirs.alphas_cumprod.cpu().to(ours.device), rtol=1e-4)
        read = Discrete.from_alphas_cumprod(theirs.alphas_cumprod)
        times = (torch.arange(100) + 1.0) / 100
        assert torch.allclose(read.alpha(times).square().float(), theirs.alphas_cumprod.to(ours))
        assert torch.allclose(read.step(times), torch.arange(100.0))


@pytest.mark.parametrize("schedule", [paths.VP(), Cosine()], ids=ids)
def test_tables_are_joined_smoothly(schedule: Schedule) -> None:
    """Between its entries a table follows the schedule that it was read from."""
    t, worst = torch.linspace(0.1, 0.9, 997), []
    for steps in (20, 40, 80):
        knots = (torch.arange(steps) + 1.0) / steps
        table = Discrete.from_alphas_cumprod(torch.as_tensor(schedule.alpha(knots)).square())
        errors = [
            (getattr(table, name)(t) - getattr(schedule, name)(t)).abs().max()
            for name in ("alpha", "sigma", "dalpha", "dsigma")
        ]
        worst.append((float(max(errors[:2])), float(max(errors[2:]))))
    assert worst[0][0] > 6.0 * worst[1][0] > 36.0 * worst[2][0]
    assert worst[0][1] > 3.0 * worst[1][1] > 9.0 * worst[2][1]
    assert worst[2][0] < 1e-5


def test_a_table_of_the_circle_is_the_circle() -> None:
    """The square of its angle is quadratic, which the interpolation keeps."""
    t, knots = torch.linspace(0.05, 1.0, 58), torch.arange(1, 21) / 20
    table = Discrete.from_alphas_cumprod(torch.as_tensor(Trigonometric().alpha(knots)).square())
    for name in ("alpha", "sigma", "dalpha", "dsigma"):
        assert torch.allclose(
            getattr(table, name)(t), getattr(Trigonometric(), name)(t), rtol=0, atol=1e-12
        )
    assert table == Discrete(table.alphas_cumprod)
    assert table != Discrete.linear(5)


@pytest.mark.parametrize(
    "table", [(), (1.0, 0.5), (0.9, 0.9), (0.5, 0.6), (0.5, -0.1), (math.nan,)]
)
def test_what_is_no_table_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="from_betas"):
        Discrete(table)


# --- a learned schedule ---------------------------------------------------------------------------


def learned(seed: int = 0, spread: float = 0.5) -> LearnedSchedule:
    torch.manual_seed(seed)
    schedule = LearnedSchedule(3.0, -2.0, 6).double()
    with torch.no_grad():
        for p in schedule.parameters():
            p.add_(spread * torch.randn_like(p))
    return schedule


@given(seed=st.integers(0, 10_000))
def test_whatever_is_learned_falls_and_inverts(seed: int) -> None:
    schedule, t = learned(seed, 1.5), torch.linspace(0.0, 1.0, 50)
    with torch.no_grad():
        lam = schedule.half_log_snr(t)
        assert bool((lam.diff() < 0).all())
        assert torch.allclose(schedule.time(lam), t, atol=1e-8)
        assert torch.allclose(lam[0], schedule.first)
        assert torch.allclose(lam[0] - lam[-1], schedule.log_drop.exp())


def test_gradients_reach_a_learned_schedule() -> None:
    """time(half_log_snr(t)) is t, so that its derivatives by the parameters, the first and the
    second, are zero; and by lambda they are the inverse's.
    """
    schedule, t = learned(), torch.tensor([0.2, 0.7], requires_grad=True)
    parameters = list(schedule.parameters())
    lam = schedule.half_log_snr(t)
    assert all(
        bool(g.abs().sum() > 0)
        for g in torch.autograd.grad(lam.sum(), parameters, retain_graph=True)
    )
    again = schedule.time(lam)
    (one,) = torch.autograd.grad(again.sum(), t, create_graph=True)
    assert torch.allclose(one, torch.ones(2))
    (zero,) = torch.autograd.grad(one.sum(), t, retain_graph=True)
    assert torch.allclose(zero, torch.zeros(2), atol=1e-6)
    for g in torch.autograd.grad(again.sum(), parameters):
        assert float(g.abs().max()) < 1e-9
    at_float = schedule.alpha(0.3)
    assert isinstance(at_float, Tensor)
    assert at_float.requires_grad
    with torch.no_grad():
        assert isinstance(schedule.alpha(0.3), float)


def test_a_solve_is_differentiated_by_its_schedule() -> None:
    schedule, y = learned(), torch.tensor([[0.7], [-0.4]])
    denoiser = fs.Denoiser(lambda t, x: x.sin(), schedule, NoisePrediction())
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in schedule.parameters()}

    def end() -> Tensor:
        flow = fs.LinearSDE(schedule).probability_flow(denoiser)
        return fs.solve(flow, y, 0.9, 0.1, integrator=DDIM(), stepping=fs.Fixed(steps=3)).y1.sum()

    (found,) = torch.autograd.grad(end(), schedule.center)
    with torch.no_grad():
        ends = []
        for move in (1e-5, -2e-5):
            schedule.center[2] += move
            ends.append(float(end()))
    assert float(found[2]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_a_schedule_that_rises_is_refused() -> None:
    with pytest.raises(ValueError, match="first"):
        LearnedSchedule(-1.0, 2.0)


# --- grids ----------------------------------------------------------------------------------------


def ratio(schedule: Schedule, t: Tensor) -> Tensor:
    return torch.exp(-schedule.half_log_snr(t))


def beta_law(s: Schedule, t: Tensor, low: float, high: float) -> Tensor:
    from scipy.stats import beta

    return torch.tensor(beta.cdf(((t - low) / (high - low)).cpu().numpy(), 0.6, 0.6))


Grids = dict[str, tuple[Callable[..., Tensor], Callable[[Schedule, Tensor], Tensor]]]
GRIDS: Grids = {  # a grid, and what it is even in
    "uniform": (lambda s, *a: paths.uniform(*a), lambda s, t: t),
    "quadratic": (lambda s, *a: paths.quadratic(*a), lambda s, t: t.sqrt()),
    "beta": (
        lambda s, *a: paths.beta(*a),
        lambda s, t: beta_law(s, t, float(t.min()), float(t.max())),
    ),
    "uniform_lambda": (paths.uniform_lambda, lambda s, t: s.half_log_snr(t)),
    "uniform_sigma": (paths.uniform_sigma, ratio),
    "karras": (paths.karras, lambda s, t: ratio(s, t) ** (1 / 7)),
    "aligned": (paths.aligned, lambda s, t: torch.atan(ratio(s, t) / 0.5)),
}


def test_every_grid_is_tested() -> None:
    assert {*GRIDS, "resampled"} == set(grids_module.__all__)


GRIDS_IN_TIME = ("uniform", "quadratic", "beta")
CASES = [(n, s) for n in GRIDS for s in EVERY_SCHEDULE[: 1 if n in GRIDS_IN_TIME else None]]


@pytest.mark.parametrize(("name", "schedule"), CASES, ids=ids)
@settings(max_examples=4)
@given(steps=st.integers(1, 60), up=st.booleans())
def test_grids(name: str, schedule: Schedule, steps: int, up: bool) -> None:
    """From end to end exactly, one way or the other alike, each even in what it says."""
    make, coordinate = GRIDS[name]
    low, high = 0.01, 0.9 * schedule.horizon
    t0, t1 = (low, high) if up else (high, low)
    grid = make(schedule, t0, t1, steps)
    assert grid.dtype == torch.float64
    assert len(grid) == steps + 1
    assert (float(grid[0]), float(grid[-1])) == (t0, t1)
    assert bool(((grid.diff() > 0) if up else (grid.diff() < 0)).all())
    assert torch.allclose(make(schedule, t1, t0, steps).flip(0), grid, rtol=1e-9)
    gaps = coordinate(schedule, grid).diff()
    assert torch.allclose(gaps, gaps.mean(), rtol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_of_double_precision_whatever_torchs_default(name: str) -> None:
    make, schedule = GRIDS[name][0], Trigonometric()
    wide = make(schedule, 0.9, 0.1, 7)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(make(schedule, 0.9, 0.1, 7), wide)


def test_karras_is_the_papers() -> None:
    """Equation 5 of Karras et al. 2022 at sigma = t."""
    i, n = torch.arange(18), 18
    paper = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(paths.karras(EDM(), 80.0, 0.002, n - 1), paper)


@pytest.mark.parametrize("schedule", [EDM(20.0), Trigonometric()], ids=ids)
def test_ddim_errs_least_on_aligned_grids(schedule: Schedule) -> None:
    """For data N(0, c^2) its result is exact times the product of the cosines of its steps."""
    c, steps, (t0, t1) = 0.7, 6, (0.99 * schedule.horizon, 0.01)

    def denoiser(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * x

    flow = fs.LinearSDE(schedule).probability_flow(denoiser)

    def kept(times: Tensor) -> float:
        one = torch.ones(1, 1)
        end = fs.solve(flow, one, t0, t1, integrator=DDIM(), stepping=fs.Grid(times)).y1
        (a0, s0), (a1, s1) = schedule(t0), schedule(t1)
        return float(end) / (math.hypot(a1 * c, s1) / math.hypot(a0 * c, s0))

    times = paths.aligned(schedule, t0, t1, steps, sigma_data=c)
    angles = torch.atan(ratio(schedule, times) / c)
    best = kept(times)
    assert best == pytest.approx(float(angles.diff().cos().prod()), rel=1e-9)
    for i, move in itertools.product(range(1, steps), (0.02, -0.02)):
        other = times.clone()
        other[i] += move * (times[i - 1] - times[i + 1])
        assert kept(other) < best
    for name in ("uniform", "uniform_lambda", "karras"):
        assert kept(GRIDS[name][0](schedule, t0, t1, steps)) < best


def test_aligned_grids_reach_ends_without_noise_and_signal() -> None:
    times = paths.aligned(Trigonometric(), 1.0, 0.0, 4, sigma_data=1.0)
    assert torch.allclose(times, torch.linspace(1.0, 0.0, 5))


def test_a_table_of_ratios_is_followed() -> None:
    table = [14.6, 6.4, 1.9, 0.65, 0.03]
    whole = paths.resampled(EDM(), table, 4)
    assert torch.allclose(whole, torch.tensor(table))
    finer = paths.resampled(EDM(), table, 8)
    assert torch.allclose(finer[::2], whole)
    assert torch.allclose(finer[1::2], (whole[1:] * whole[:-1]).sqrt())
    assert torch.allclose(paths.resampled(EDM(), table[::-1], 8).flip(0), finer)


def test_what_makes_no_grid_is_refused() -> None:
    schedule = Cosine()
    for make, _ in GRIDS.values():
        with pytest.raises(ValueError, match="at least one step"):
            make(schedule, 0.9, 0.1, 0)
        with pytest.raises(ValueError, match="differ"):
            make(schedule, 0.3, 0.3, 4)
    for name in ("uniform_lambda", "uniform_sigma", "karras"):
        with pytest.raises(ValueError, match="as a last step"):
            GRIDS[name][0](schedule, 1.0, 0.0, 4)
    with pytest.raises(ValueError, match="not negative"):
        paths.quadratic(-1.0, 1.0, 4)
    with pytest.raises(ValueError, match="Beta"):
        paths.beta(0.0, 1.0, 4, a=0.0)
    with pytest.raises(ValueError, match="rho"):
        paths.karras(schedule, 0.9, 0.1, 4, rho=0.0)
    with pytest.raises(ValueError, match="sigma_data"):
        paths.aligned(schedule, 0.9, 0.1, 4, sigma_data=0.0)
    for table in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="ratios"):
            paths.resampled(schedule, table, 4)
    with pytest.raises(ValueError, match="further"):
        paths.resampled(schedule, [1.0, 2.0, 1.0], 2)
    with pytest.raises(ValueError, match="further"):
        paths.uniform(1.0, 1.0 + 1e-15, 100)


@pytest.mark.parametrize("t", [1e-7, 1e-5, 1e-3, 0.3, 1.0])
def test_small_noise_of_a_cosine_keeps_its_digits(t: float) -> None:
    schedule = paths.Cosine()
    single = schedule.sigma(torch.tensor(t, dtype=torch.float32))
    assert float(single) == pytest.approx(schedule.sigma(t), rel=1e-5)
    assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1.0, rel=1e-14)


def test_little_noise_is_not_lost_in_float32() -> None:
    schedule = Cosine()
    t = torch.tensor([1e-4, 3e-4, 1e-3, 0.5, 0.98], dtype=torch.float64)
    found = schedule.time(schedule.half_log_snr(t).float()).double()
    assert torch.allclose(found, t, rtol=3e-6, atol=0.0)
    assert torch.allclose(schedule.time(schedule.half_log_snr(t)), t, rtol=1e-12, atol=0.0)
