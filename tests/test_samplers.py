"""Diffusion samplers: orders, laws, costs, and what they are next to their published formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from benchmarks.counting import Counter, uncounted
from flowsde import integrators
from flowsde.dynamics import Data, Denoiser, NoisePrediction
from flowsde.integrators import (
    DDIM,
    DEIS,
    SEEDS,
    Bosh3,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMHeun,
    EulerMaruyama,
    ExponentialAdams,
    ExponentialEuler,
    Heun,
    Increment,
    Integrator,
    PredictorCorrector,
    StochasticHeun,
    Tsit5,
    UniPC,
)
from flowsde.integrators.exponential import Exponential, lagrange, phi
from flowsde.paths import (
    EDM,
    VP,
    Discrete,
    FlowMatching,
    aligned,
    karras,
    uniform,
    uniform_lambda,
)  # fmt: skip
from flowsde.paths.base import RandomPath

from .systems import Mixture, catalogue, slope
from .test_etd import series

MIXTURE = Mixture.two()
SAMPLERS = [
    *catalogue(integrators, Exponential), DPMSolverPP(3), DPMSolverPP(3, start=2), DEIS(3),
    DPMSolver(3), DPMSolverPPSingle(3), UniPC(3, bh=1), UniPC(3, start=3),
    ExponentialAdams(3, dual=True), DPMSolverPP(3, start=3, final=1), UniPC(3, start=2, final=1),
]  # fmt: skip


def flow(schedule: fs.Schedule) -> Any:
    return fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))


def run(dynamics: fs.Dynamics, x: Any, method: Integrator, times: Tensor, **more: Any) -> Any:
    return fs.solve(
        dynamics, x, float(times[0]), float(times[-1]), integrator=method,
        stepping=fs.Grid(times), **more,
    ).y1  # fmt: skip


# --- order ----------------------------------------------------------------------------------------


SPANS: dict[fs.Schedule, tuple[float, float]] = {VP(): (0.6, 0.15), EDM(20.0): (2.0, 0.2)}


@functools.cache
def reference(schedule: fs.Schedule) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    t0, t1 = SPANS[schedule]
    x = torch.randn(5, 2) * schedule.sigma(t0)
    tight = fs.Adaptive(1e-13, 1e-13)
    sol = fs.solve(flow(schedule), x, t0, t1, integrator=integrators.Dopri8(), stepping=tight)
    return x, sol.y1


def uniform_t(schedule: fs.Schedule, t0: float, t1: float, steps: int) -> Tensor:
    return uniform(t0, t1, steps)


def order(schedule: fs.Schedule, method: Integrator, grid: Any, counts: list[int]) -> float:
    """As these numbers of steps show it."""
    (x, truth), (t0, t1) = reference(schedule), SPANS[schedule]
    ends = [run(flow(schedule), x, method, grid(schedule, t0, t1, n)) for n in counts]
    return slope([float((end - truth).square().mean().sqrt()) for end in ends], counts)


@torch.no_grad()
@pytest.mark.parametrize("grid", [uniform_lambda, karras])
@pytest.mark.parametrize(
    ("method", "known"),
    [
        (DDIM(), 1), (DPMSolver(2), 2), (DPMSolver(3), 3),
        (DPMSolverPPSingle(2), 2), (DPMSolverPPSingle(3), 3), (DPMSolverPP(2), 2),
        (DPMSolverPP(3, start=1), 2), (DPMSolverPP(3, start=2), 3), (DEIS(2), 2),
        (DEIS(3, start=3), 3), (ExponentialAdams(2, dual=True), 2), (EDMHeun(), 2),
        (ExponentialAdams(3, start=2, dual=True), 3), (UniPC(1), 2), (UniPC(2), 3),
        (UniPC(2, bh=1), 3), (UniPC(3, start=1), 3), (UniPC(3, start=3), 4),
        (DPMSolverPP(3, start=2, final=1), 2), (DPMSolverPP(3, start=2, final=2), 3),
        (UniPC(3, start=2, final=1), 2),
    ],
    ids=str,
)  # fmt: skip
def test_order(method: Integrator, known: int, grid: Any) -> None:
    """Uniform in lambda and Karras's grid. The published start costs 3M, and UniPC-3, an order."""
    found = order(EDM(20.0), method, grid, [160, 320] if known == 4 else [48, 96])
    assert abs(found - known) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("grid", [uniform_t, karras])
@pytest.mark.parametrize(
    ("method", "known"),
    [
        (DDIM(), 1), (DPMSolverPP(2), 2), (DPMSolverPPSingle(2), 2), (EDMHeun(), 2),
        (DPMSolver(3), 3), (DPMSolverPP(3, start=2), 3), (UniPC(3, start=3), 4),
    ],
    ids=str,
)  # fmt: skip
def test_order_on_vp(method: Integrator, known: int, grid: Any) -> None:
    """Where the higher ones show late, and what a start costs is too little to see."""
    found = order(VP(), method, grid, [320, 640] if known > 2 else [48, 96])
    assert abs(found - known) < 0.2


@torch.no_grad()
@pytest.mark.parametrize(("method", "order"), [(DPMSolver(2), 2), (UniPC(2), 3)], ids=str)
def test_density_rides_along_in_either_form(method: Integrator, order: int) -> None:
    schedule = VP()
    (x, truth), (t0, t1) = reference(schedule), SPANS[schedule]
    dynamics, begin = fs.log_density(flow(schedule)), (x, torch.zeros(len(x)))
    exact = [MIXTURE.log_prob(y, *schedule(t)) for y, t in ((x, t0), (truth, t1))]
    counts, errors = [24, 48], []
    for n in counts:
        _, density = run(dynamics, begin, method, uniform_lambda(schedule, t0, t1, n))
        errors.append(float((density - (exact[1] - exact[0])).abs().mean()))
    assert slope(errors, counts) > order - 0.3, errors


@dataclass(frozen=True)
class Impulses(RandomPath):
    """Row 0 of the batch sees no noise; each other row one of the normals that are drawn, as 1."""

    steps: int
    kinds: int

    def bind(self, grid: Sequence[Any], draws: Any) -> Any:
        def source(n: int, t0: float, t1: float) -> Increment:
            zs = torch.zeros(self.kinds, 1 + self.steps * self.kinds, 1)
            for kind in range(self.kinds):
                zs[kind, 1 + n * self.kinds + kind] = 1.0
            w = zs[0] * math.sqrt(abs(t1 - t0))
            return Increment(w, z=tuple(zs[1:]) or None)

        return source

    def tree(self, t0: Any, t1: Any, draws: Any) -> Any:
        raise NotImplementedError


def variance(dynamics: Any, method: Integrator, times: Tensor, kinds: int, first: float) -> float:
    """Of the samples of a linear method, exactly: it is a sum over its independent normals."""
    steps = len(times) - 1
    x = torch.zeros(1 + steps * kinds, 1)
    x[0] = 1.0
    y = run(dynamics, x, method, times, path=Impulses(steps, kinds))
    return first * float(y[0]) ** 2 + float(y[1:].square().sum())


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "kinds", "order"),
    [
        (ExponentialEuler(), 1, 1), (DPMSolverPP(2), 1, 2), (DPMSolverPP(3), 1, 2),
        (DEIS(2), 1, 2), (ExponentialAdams(2), 1, 2),
        (SEEDS(1), 1, 1), (SEEDS(2), 2, 2), (SEEDS(3), 3, 2), (DDIM(1.0), 1, 1),
        (DPMSolverPPSingle(2), 2, 2), (EDMHeun(gamma=0.5), 1, 2),
    ],
    ids=str,
)  # fmt: skip
def test_weak_order_by_exact_moments(method: Integrator, kinds: int, order: int) -> None:
    """Gaussian data: the denoiser is linear, so that the variance is propagated in closed form."""
    schedule, std, (t0, t1) = VP(), 0.3, (0.6, 0.15)

    def law(t: float) -> float:
        alpha, sigma = schedule(t)
        return alpha**2 * std**2 + sigma**2

    def denoiser(t: Tensor, x: Tensor) -> Tensor:
        return schedule.alpha(t) * std**2 / law(t) * x

    process, counts, errors = fs.LinearSDE(schedule), [80, 160], []
    for n in counts:
        own = isinstance(method, (DDIM, EDMHeun))
        dynamics = process.probability_flow(denoiser) if own else process.reverse_sde(denoiser)
        each = EDMHeun(gamma=4.0 / n) if isinstance(method, EDMHeun) else method
        found = variance(dynamics, each, uniform_lambda(schedule, t0, t1, n), kinds, law(t0))
        errors.append(abs(found - law(t1)))
    assert abs(slope(errors, counts) - order) < 0.25, errors


# --- laws -----------------------------------------------------------------------------------------


def test_phi_functions_up_to_the_fourth() -> None:
    for z in (-30.0, -1.5, -1.0, -0.3, 0.0, 1e-9, 0.9, 2.0):
        exact = [series(Fraction(z), k) for k in (2, 3, 4)]
        assert phi(z, 4) == pytest.approx(exact, rel=1e-13)


def test_lagrange_polynomials_and_their_limits() -> None:
    nodes = [0.0, 0.7, -0.4, -1.3]
    for i, p in enumerate(lagrange(nodes)):
        for j, u in enumerate(nodes):
            value = sum(c * u**m for m, c in enumerate(p))
            assert value == pytest.approx(float(i == j), abs=1e-13)
    assert lagrange([0.0, -0.4, -math.inf])[:2] == [[*p, 0.0] for p in lagrange([0.0, -0.4])]
    rows = lagrange([torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1.0])])
    assert rows[1][1].tolist() == [0.0, -1.0]


@pytest.mark.parametrize("method", SAMPLERS, ids=str)
def test_times_of_each_samples_own(method: Integrator) -> None:
    """Tensors of times come to what floats do, for a sample that ends at once too."""
    dynamics, x = flow(VP()), torch.randn(3, 2)
    ends = torch.tensor([0.1, 0.5, 0.9])
    fixed = fs.Fixed(steps=5)
    whole = fs.solve(dynamics, x, 0.9, ends, integrator=method, stepping=fixed).y1
    for i, end in enumerate(ends.tolist()):
        alone = fs.solve(dynamics, x[i : i + 1], 0.9, end, integrator=method, stepping=fixed).y1
        assert torch.allclose(whole[i], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SAMPLERS, ids=str)
def test_steps_onto_no_noise_and_from_no_signal(method: Any) -> None:
    """The way's ends are finite in float32 too; noise cannot be predicted where there is no
    signal.
    """
    schedule = FlowMatching()
    x, times = torch.randn(40, 2, dtype=torch.float32), torch.linspace(1.0, 0.0, 31)
    keywords: dict[str, Any] = {"path": fs.Brownian(0)} if method.draws(flow(schedule), x) else {}
    if method.dual:
        with pytest.raises(ValueError, match=r"0\.999"):
            run(flow(schedule), x, method, times, **keywords)
        times = torch.linspace(0.999, 0.0, 31)
    y = run(flow(schedule), x, method, times, **keywords)
    truth = fs.solve(flow(schedule), x.double(), float(times[0]), 1e-4).y1
    assert y.dtype == torch.float32
    assert float((y - truth).abs().mean()) < 0.1


@pytest.mark.parametrize("method", [ExponentialEuler(), SEEDS(2), DPMSolverPPSingle(3)], ids=str)
def test_the_last_step_of_a_reverse_sde_leaves_no_noise(method: Any) -> None:
    """Onto sigma = 0 it goes to the denoiser's own mean, whatever is predicted."""
    schedule, x, t = FlowMatching(), torch.randn(5, 2), 0.2
    denoiser = MIXTURE.denoiser(schedule)
    sde = fs.LinearSDE(schedule).reverse_sde(denoiser)
    y = run(sde, x, method, torch.tensor([t, 0.0]), path=fs.Brownian(0))
    assert torch.allclose(y, denoiser(torch.tensor(t), x), atol=1e-13)


def test_inversion_goes_there_and_back() -> None:
    """DDIM from data to noise and back errs to first order, DPM-Solver-2 to second."""
    schedule, x = VP(), MIXTURE.sample(8, 0)
    for method, order in ((DDIM(), 1), (DPMSolver(2), 2)):
        counts, errors = [20, 40], []
        for n in counts:
            times = uniform_lambda(schedule, 0.01, 0.9, n)
            noise = run(flow(schedule), x, method, times)
            back = run(flow(schedule), noise, method, times.flip(0))
            errors.append(float((back - x).abs().mean()))
        assert slope(errors, counts) > order - 0.3, errors


def test_two_m_costs_twelve_operations_a_step_at_most() -> None:
    counts = []
    for steps in (5, 25):
        counter = Counter()
        network = uncounted(lambda t, x: 0.1 * x, counter)
        dynamics = fs.LinearSDE(VP()).probability_flow(
            fs.Denoiser(network, VP(), NoisePrediction())
        )
        with torch.no_grad(), counter:
            run(dynamics, torch.randn(4, 2), DPMSolverPP(), torch.linspace(0.9, 0.1, steps + 1))
        counts.append(counter.operations)
    assert (counts[1] - counts[0]) / 20 <= 12


@pytest.mark.parametrize(
    ("method", "cost"),
    [
        (DPMSolverPP(3), 9), (DPMSolverPP(3, start=2), 10), (DPMSolverPP(3, start=3), 13),
        (DPMSolver(3), 27), (UniPC(3), 9), (EDMHeun(), 17), (DEIS(3), 9),
    ],
    ids=str,
)  # fmt: skip
def test_evaluations(method: Integrator, cost: int) -> None:
    """Nine steps; EDM's last one, onto sigma = 0, is Euler's."""
    times = torch.linspace(2.0, 0.0 if isinstance(method, EDMHeun) else 0.1, 10)
    sol = fs.solve(
        flow(EDM(20.0)), torch.randn(3, 2), 2.0, float(times[-1]), integrator=method,
        stepping=fs.Grid(times),
    )  # fmt: skip
    assert sol.stats.evaluations == cost


# --- with Langevin steps, and adaptive ------------------------------------------------------------


@torch.no_grad()
def test_predictor_corrector_beats_its_predictor() -> None:
    """At equal steps, in the mean of log p that samples should have."""
    means = torch.stack((torch.full((16,), -0.8), torch.full((16,), 0.5)))
    mixture = Mixture(torch.tensor([0.3, 0.7]), means, 0.5)
    schedule, x = VP(), torch.randn(2000, 16)
    dynamics = fs.LinearSDE(schedule).probability_flow(mixture.denoiser(schedule))
    wanted, gaps = mixture.log_prob(mixture.sample(4000, 1)).mean(), []
    for method in (DDIM(1.0), PredictorCorrector(DDIM(1.0))):
        y = run(dynamics, x, method, aligned(schedule, 1.0, 1e-3, 30), path=fs.Brownian(0))
        gaps.append(float(mixture.log_prob(y).mean() - wanted))
    assert abs(gaps[1]) < 0.7 * abs(gaps[0])


NOISED = [EulerMaruyama(), SEEDS(2)]
PLAIN = [Heun(), Tsit5(), Bosh3(), DDIM(), EDMHeun(), DPMSolverPPSingle(2)]


@pytest.mark.parametrize("predictor", [*NOISED, *PLAIN], ids=str)
def test_a_corrector_is_langevin_at_the_steps_noise(predictor: Integrator) -> None:
    """Its size, of each sample; then the predictor's own step, which starts afresh from there."""
    schedule, x, (t0, t1) = VP(), torch.randn(3, 2), (0.6, 0.5)
    denoiser = MIXTURE.denoiser(schedule)
    process = fs.LinearSDE(schedule)
    dynamics = (
        process.reverse_sde(denoiser, eta=0.7) if predictor in NOISED
        else process.probability_flow(denoiser)
    )  # fmt: skip
    method, times = PredictorCorrector(predictor, 1, 0.2), torch.tensor([t0, t1])
    draws = method.draws(dynamics, x)
    assert draws is not None
    dw = fs.Brownian(4).bind([t0, t1], draws)(0, t0, t1)
    assert dw.z is not None
    (alpha, sigma), z = schedule(t0), dw.z[0]
    score = (alpha * denoiser(torch.tensor(t0), x) - x) / sigma**2
    size = score.norm(dim=1, keepdim=True)
    usual = 2.0 / x.norm(dim=1, keepdim=True)
    ratio = 2.0 / (size.maximum(usual) * size.maximum(0.1 * usual))
    e = 2 * (alpha / schedule.alpha(t1)) ** 2 * 0.2**2 * ratio
    corrected = x + e * score + (2 * e).sqrt() * z
    field = fs.dynamics.field.Field(dynamics, (), x)
    rest = None
    if predictor in NOISED:
        rest = dw._replace(z=dw.z[1] if len(dw.z) > 1 else None)
    carry = predictor.init(field, t0, corrected)
    hand = predictor.step(field, t0, t1, corrected, rest, carry).y1
    assert torch.allclose(run(dynamics, x, method, times, path=fs.Brownian(4)), hand, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dim", [8, 16, 64])
def test_corrections_widen_the_law_by_little(dim: int) -> None:
    """A normal law, as the docstring says; to its deviation as estimated, a normal number too."""
    schedule, count = VP(), 40_000 // dim

    def denoiser(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x

    alpha, sigma = schedule(1e-3)
    y = run(
        fs.LinearSDE(schedule).probability_flow(denoiser), torch.randn(count, dim),
        PredictorCorrector(EDMHeun()), aligned(schedule, 1.0, 1e-3, 50), path=fs.Brownian(0),
    )  # fmt: skip
    wide = float(y.std()) / (0.25 * alpha**2 + sigma**2) ** 0.5
    assert abs(wide - 1.0) < 0.01 + 0.5 / dim + 3.5 * (2 * 40_000) ** -0.5


@pytest.mark.parametrize("predictor", [UniPC(3), DPMSolverPP(), DEIS(3)], ids=str)
def test_multistep_methods_predict_nothing(predictor: Integrator) -> None:
    """They would take the corrections for a trend."""
    with pytest.raises(TypeError, match="one-step"):
        PredictorCorrector(predictor)


def test_a_correction_where_the_score_vanishes_stays() -> None:
    still = fs.LinearSDE(EDM()).probability_flow(lambda t, x: 0.0 * x)
    found = fs.solve(
        still, torch.zeros(2, 3), 1.0, 0.5, integrator=PredictorCorrector(DDIM()),
        stepping=fs.Fixed(steps=2), path=fs.Brownian(0),
    ).y1  # fmt: skip
    assert bool(found.isfinite().all())


def test_own_noise_upwards_is_refused() -> None:
    flow = fs.LinearSDE(VP()).probability_flow(lambda t, x: 0.0 * x)
    with pytest.raises(ValueError, match="encode"):
        fs.solve(
            flow, torch.randn(3, 2), 1e-3, 1.0, integrator=DDIM(1.0),
            stepping=fs.Fixed(steps=5), path=fs.Brownian(0),
        )  # fmt: skip


def test_annealed_langevin_is_ncsns() -> None:
    schedule, steps, eps, x = EDM(20.0), 3, 0.05, torch.randn(5, 2)
    levels, denoiser = torch.tensor([4.0, 2.0, 1.0]), MIXTURE.denoiser(schedule)
    dynamics = fs.LinearSDE(schedule).annealed_langevin(denoiser, levels, steps, eps)
    path = fs.Brownian(2)
    grid = [float(k) for k in range(10)]
    source = path.bind(grid, EulerMaruyama().draws(dynamics, x))  # type: ignore[arg-type]
    hand = x
    for k in range(9):
        sigma = levels[k // steps]
        a = eps * (sigma / levels[-1]) ** 2
        score = (denoiser(sigma, hand) - hand) / sigma**2
        hand = hand + 0.5 * a * score + a.sqrt() * source(k, grid[k], grid[k + 1]).w
    y = fs.solve(
        dynamics, x, integrator=EulerMaruyama(), stepping=fs.Fixed(dt=1.0), path=path
    ).y1  # fmt: skip
    assert torch.allclose(y, hand, atol=1e-12)
    drift = dynamics(torch.zeros(5, dtype=torch.float32), x.float())
    assert torch.allclose(drift, dynamics(torch.tensor(0.0), x).float())
    pull = Denoiser(lambda t, x: 0.5 * x, schedule, Data())
    single = fs.LinearSDE(schedule).annealed_langevin(pull, levels, steps, eps)
    end = run(single, x.float(), EulerMaruyama(), torch.arange(10.0), path=path)
    assert end.dtype is torch.float32
    with pytest.raises(ValueError, match=r"levels\.flip"):
        fs.LinearSDE(schedule).annealed_langevin(denoiser, levels.flip(0))
    with pytest.raises(ValueError, match="levels of shape"):
        fs.LinearSDE(schedule).annealed_langevin(denoiser, torch.ones(2, 2))


@torch.no_grad()
def test_annealing_recovers_weights_that_plain_langevin_does_not() -> None:
    """NCSN's toy at its paper's settings: .8 and .2 at +-5, by 20,000 chains, to .03."""
    mixture = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[5.0], [-5.0]]), 1.0)
    schedule, x = EDM(25.0), 16.0 * torch.rand(20_000, 1) - 8.0
    process, denoiser = fs.LinearSDE(schedule), mixture.denoiser(schedule)
    levels, weights = torch.logspace(math.log10(20.0), 0.0, 10), []
    for times, steps in ((levels, 100), (levels[-1:], 1000)):
        y = fs.solve(
            process.annealed_langevin(denoiser, times, steps, 0.1), x, integrator=EulerMaruyama(),
            stepping=fs.Fixed(dt=1.0), path=fs.Brownian(0),
        ).y1  # fmt: skip
        weights.append(float((y > 0).double().mean()))
    print(f"\nweight of +5, wanted .8: annealed {weights[0]:.4f}, plain {weights[1]:.4f}")
    assert abs(weights[0] - 0.8) < 0.03
    assert abs(weights[1] - 0.8) > 0.2


@torch.no_grad()
def test_adaptive_steps_of_the_reverse_sde() -> None:
    """Jolicoeur-Martineau et al. 2021: the improved Euler step beside Euler's, on chosen steps.
    More of them for less tolerance, and the law of the samples, to four standard errors.
    """
    schedule, x = VP(), torch.randn(200, 2)
    sde, counts = fs.LinearSDE(schedule).reverse_sde(MIXTURE.denoiser(schedule)), []
    for tolerance in (0.3, 0.1):
        sol = fs.solve(
            sde, x, 1.0, 1e-2, integrator=StochasticHeun(), path=fs.Brownian(0),
            stepping=fs.Adaptive(tolerance, 0.05),
        )  # fmt: skip
        counts.append(sol.stats.accepted)
    assert 1.3 * counts[0] < counts[1] < 100
    share = float((sol.y1[:, 0] < -0.25).double().mean())
    assert abs(share - 0.3) < 4.0 * math.sqrt(0.21 / len(x))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_steps_onto_no_noise_have_a_slope_in_time(eta: float) -> None:
    dynamics, x = flow(EDM(1.0)), torch.randn(3, 2)
    inner = torch.tensor([0.6, 0.3, 0.1], requires_grad=True)
    ends = torch.tensor([0.99]), torch.zeros(1)

    def end(inner: Tensor) -> Tensor:
        stepping = fs.Grid(torch.cat((ends[0], inner, ends[1])))
        return fs.solve(
            dynamics, x, 0.99, 0.0, integrator=DDIM(eta), stepping=stepping, path=fs.Brownian(3)
        ).y1  # fmt: skip

    assert torch.autograd.gradcheck(end, inner)


# --- refusals -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    sde = fs.LinearSDE(VP()).reverse_sde(lambda t, x: x)
    split, x, times = (
        fs.ODE(lambda t, y: y, linear=-1.0),
        torch.randn(3, 2),
        torch.tensor([0.9, 0.1]),
    )
    for dynamics, method, cure in (
        (sde, UniPC(), "DPMSolverPP"), (sde, EDMHeun(), "SEEDS"), (sde, DDIM(), "DPMSolverPP"),
        (split, EDMHeun(gamma=0.1), "probability_flow"), (split, DDIM(0.5), "probability_flow"),
        (split, PredictorCorrector(Heun()), "probability_flow"),
        (sde, DPMSolverPP(3, start=2), "start=1"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=cure):
            run(dynamics, x, method, times, path=fs.Brownian(0))
    table = fs.LinearSDE(Discrete.linear()).probability_flow(lambda t, x: x)
    with pytest.raises(ValueError, match=r"times are those of \[0, 1\]"):
        run(table, x, DDIM(), torch.tensor([999.0, 0.0]))
    for make in (
        lambda: DPMSolverPP(4), lambda: DPMSolverPP(final=0), lambda: DPMSolverPP(start=0),
        lambda: DPMSolver(0),
        lambda: UniPC(bh=3), lambda: UniPC(4), lambda: EDMHeun(gamma=-1.0),
        lambda: PredictorCorrector(Heun(), 0), lambda: PredictorCorrector(Heun(), snr=0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            make()
