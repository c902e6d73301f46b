"""What score models are trained by: laws of times and weights, closed forms of the losses."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde import objectives
from flowsde.dynamics import (
    Data,
    EDMPrediction,
    NoisePrediction,
    Prediction,
    VPrediction,
    clip,
    dynamic_threshold,
)  # fmt: skip
from flowsde.dynamics.denoiser import Point
from flowsde.integrators import DDIM, Tsit5
from flowsde.objectives import (
    Ancestral,
    DenoisingScoreMatching,
    Discretized,
    EDMWeight,
    EnergyScore,
    FixedVariance,
    HybridLoss,
    LearnedVariance,
    Levels,
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    MinSNR,
    ScoreMatching,
    SlicedScoreMatching,
    TimeLaw,
    UniformLambda,
    UniformTime,
    VariationalBound,
    likelihood_weight,
    noise_weight,
    v_weight,
)  # fmt: skip
from flowsde.objectives.variational import _divergence
from flowsde.paths import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    FlowMatching,
    Schedule,
    uniform,
    uniform_lambda,
)

from .systems import DEVICE, EVERY_SCHEDULE, Mixture, Noised, generator

MIXTURE = Mixture.two()
POINT = Mixture(torch.ones(1, device=DEVICE), torch.zeros(1, 2, device=DEVICE), 0.0)

# --- laws of times --------------------------------------------------------------------------------

LAWS: dict[str, tuple[TimeLaw, Callable[[Tensor], Tensor]]] = {  # a law, and its distribution
    "UniformTime": (UniformTime(0.2, 0.9), lambda t: (t - 0.2) / 0.7),
    "UniformLambda": (
        UniformLambda(EDM(), 0.01, 50.0), lambda t: (t / 0.01).log() / math.log(5000.0)
    ),
    "LogNormal": (
        LogNormal(EDM(), -1.0, 1.5),
        lambda t: normal((t.log() + 1.0) / 1.5) / normal(torch.tensor(math.log(80.0) + 1.0) / 1.5),
    ),
    "LogitNormal": (LogitNormal(0.3, 0.8), lambda t: normal((t.logit() - 0.3) / 0.8)),
    "LowDiscrepancy": (LowDiscrepancy(UniformTime(0.0, 2.0)), lambda t: t / 2.0),
    "Levels": (Levels((0.1, 0.4, 1.0)), lambda t: (t / 0.4 + 1e-9).floor().clamp(max=2.0) / 3),
}  # fmt: skip


def normal(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def test_every_law_is_tested() -> None:
    public = (getattr(objectives, name) for name in objectives.__all__)
    kinds = {c.__name__ for c in public if inspect.isclass(c) and issubclass(c, TimeLaw)}
    assert kinds - {"TimeLaw"} == set(LAWS)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: str(s).split("(")[0])
def test_log_normal_times_stay_within_the_schedule(schedule: Schedule) -> None:
    """Wherever the law would have them; and follow it between."""
    t = LogNormal(schedule, 0.5, 3.0).sample(4000, torch.zeros(1), generator())
    for law in (LogNormal(schedule, 0.5, 3.0), LogNormal(schedule, 0.0, 30.0)):
        law.check(schedule)
        ends = law.quantile(torch.tensor([0.0, 1e-17, 1.0 - 2.0**-53]))
        assert float(ends.min()) >= 0.0
        assert float(ends.max()) <= schedule.horizon
    ratios = -torch.as_tensor(schedule.half_log_snr(torch.tensor([0.0, schedule.horizon])))
    low, high = normal((ratios - 0.5) / 3.0)
    place = (normal((-torch.as_tensor(schedule.half_log_snr(t)) - 0.5) / 3.0) - low) / (high - low)
    even = torch.linspace(0.0, 1.0, 4000)
    assert float((place.sort().values - even).abs().max()) < 2e-3


@pytest.mark.parametrize("name", [n for n in LAWS if n != "Levels"])
def test_a_times_own_law(name: str) -> None:
    """Kolmogorov's test, at a level of 1e-3, of times that were each drawn alone."""
    from scipy.stats import kstest

    law, distribution = LAWS[name]
    draws, like = generator(5), torch.zeros(1)
    t = torch.cat([law.sample(1, like, draws) for _ in range(300)])
    assert kstest(distribution(t).cpu().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", [n for n in LAWS if n != "Levels"])
def test_a_batch_of_times_is_stratified(name: str) -> None:
    """One time in each n-th of the law, in random order, in the data's precision."""
    law, distribution = LAWS[name]
    t = law.sample(1000, torch.zeros(1), generator())
    place = (1000 * distribution(t)).sort().values - torch.arange(1000)
    assert float(place.min()) > -1e-6
    assert float(place.max()) < 1.0 + 1e-6
    assert float(place.std()) < 1e-6 or name != "LowDiscrepancy"
    assert float(t.diff().sign().mean().abs()) < 0.1
    assert law.sample(3, torch.zeros(1, dtype=torch.float32), generator()).dtype == torch.float32
    assert torch.equal(law.sample(1000, torch.zeros(1), generator()), t)


def test_levels_are_as_frequent() -> None:
    """NCSN's ladder: even in VE's time, geometric in sigma."""
    schedule = VE(0.01, 1.0)
    law = Levels(tuple(uniform(0.0, 1.0, 9).tolist()))
    t = law.sample(1000, torch.zeros(1), generator())
    ladder, counts = schedule.sigma(t).unique(return_counts=True)  # type: ignore[union-attr]
    assert torch.equal(counts, torch.full((10,), 100))
    assert torch.allclose(ladder, torch.logspace(-2, 0, 10))


# --- denoising score matching ---------------------------------------------------------------------


class Linear(nn.Module):
    """A network w x + b t."""

    def __init__(self, w: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.w * x + self.b * t.reshape(-1, *[1] * (x.ndim - 1))


def named(weight: Any) -> str:
    return getattr(weight, "__name__", None) or type(weight).__name__


WEIGHTS = [noise_weight, v_weight, likelihood_weight, EDMWeight(0.7), MinSNR(3.0)]


@pytest.mark.parametrize("weight", [None, *WEIGHTS], ids=named)
def test_denoising_score_matching_recovers_a_gaussian(weight: Any) -> None:
    """At one time the best linear predictor of eps for data N(0, 4) is known."""
    schedule, t = VP(), 0.4
    network = Linear()
    denoiser = fs.Denoiser(network, schedule, NoisePrediction())
    objective = DenoisingScoreMatching(denoiser, UniformTime(t, t), weight)
    data = 2.0 * torch.randn(200_000, 1, generator=generator())
    loss = [objective(data, generator=generator(1))]
    (g0,) = torch.autograd.grad(loss[0], [network.w])
    with torch.no_grad():
        network.w.fill_(1.0)
    (g1,) = torch.autograd.grad(objective(data, generator=generator(1)), [network.w])
    best = float(g0 / (g0 - g1))  # the loss is quadratic in w
    alpha, sigma = schedule(t)
    assert best == pytest.approx(sigma / (4 * alpha**2 + sigma**2), rel=0.02)


@pytest.mark.parametrize("weight", WEIGHTS, ids=named)
def test_the_exact_denoiser_is_the_minimum(weight: Any) -> None:
    """The loss rises by the weighted square of what is added: the cross term has mean zero."""
    schedule, count = Cosine(), 4000
    law, exact = UniformTime(0.1, 0.9), MIXTURE.denoiser(schedule)
    t = law.sample(count, torch.zeros(1), generator(2))
    x0 = MIXTURE.sample(count, 3)
    at = Point.at(schedule, t, x0)
    x = at.alpha * x0 + at.sigma * torch.randn(x0.shape, generator=generator(4))
    added = 0.3 * (x + t[:, None]).sin()
    cross = (weight(at) * (exact(t, x) - x0) * added).sum(-1)
    assert abs(float(cross.mean())) < 4.0 * float(cross.std()) / math.sqrt(count)


@pytest.mark.parametrize("schedule", [VP(), FlowMatching(), EDM(3.0)], ids=lambda s: str(s)[:3])
def test_each_weight_is_the_error_that_it_names(schedule: Schedule) -> None:
    """Of eps, of v, of the score times g^2 / 2, and of EDM's own network output."""
    x, law = torch.randn(64, 3), UniformTime(0.1 * schedule.horizon, 0.9 * schedule.horizon)
    draws = generator(3)
    t = law.sample(64, x, draws)
    eps = torch.randn(x.shape, generator=draws)
    at = Point.at(schedule, t, x)
    noised = at.alpha * x + at.sigma * eps
    g = torch.as_tensor(schedule.diffusion(t))[:, None]

    def loss(prediction: Prediction, weight: Any) -> Tensor:
        denoiser = fs.Denoiser(Linear(0.3, 0.2), schedule, prediction)
        return DenoisingScoreMatching(denoiser, law, weight)(x, generator=generator(3))

    for prediction in (NoisePrediction(), VPrediction(), EDMPrediction(0.7), Data()):
        denoiser = fs.Denoiser(Linear(0.3, 0.2), schedule, prediction)
        noise, score = denoiser.noise(t, noised), denoiser.score(t, noised)
        v = at.alpha * (noise - eps) - at.sigma * (denoiser(t, noised) - x)
        named = {
            noise_weight: noise - eps,
            likelihood_weight: g / math.sqrt(2.0) * (score + eps / at.sigma),
            v_weight: v,
        }
        for weight, error in named.items():
            assert torch.allclose(loss(prediction, weight), error.square().mean())
        least = torch.minimum((at.alpha / at.sigma) ** 2, torch.tensor(3.0))
        hang = (least * (denoiser(t, noised) - x).square()).mean()
        assert torch.allclose(loss(prediction, MinSNR(3.0)), hang)
    for prediction, weight in (
        (NoisePrediction(), noise_weight), (VPrediction(), v_weight), (Data(), lambda at: 1.0),
        (EDMPrediction(0.7), EDMWeight(0.7)),
    ):  # fmt: skip
        assert torch.allclose(loss(prediction, None), loss(prediction, weight))


def test_likelihood_weighting_over_time_is_the_errors_over_lambda() -> None:
    """The same integral in either variable, of a Gaussian's closed error."""
    schedule, t = VP(), torch.linspace(0.05, 0.95, 4001)
    alpha, sigma = schedule(t)
    least = sigma**2 / (alpha**2 + sigma**2 / 0.25)  # E |x0_hat - x0|^2 for data N(0, 0.25)
    at = Point.at(schedule, t, torch.zeros(4001))
    over_time = torch.trapezoid(likelihood_weight(at) * least, t)
    over_lambda = -torch.trapezoid(noise_weight(at) * least, schedule.half_log_snr(t))
    assert float(over_time) == pytest.approx(float(over_lambda), rel=1e-5)


# --- score matching without noise -----------------------------------------------------------------


class Quadratic(nn.Module):
    """E(x) = (x - m)' P (x - m) / 2, and its score."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(x.mean(0))
        self.precision = nn.Parameter(torch.linalg.inv(torch.cov(x.T, correction=0)))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * torch.einsum("bi,ij,bj->b", x - self.m, self.precision, x - self.m)

    def score(self, x: Tensor) -> Tensor:
        return -(x - self.m) @ (0.5 * (self.precision + self.precision.T))


def gaussian() -> Tensor:
    mix = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.7, -0.3], [0.0, 0.0, 1.3]])
    return torch.randn(200, 3, generator=generator(1)) @ mix + 0.5


@pytest.mark.parametrize("kind", ["score", "energy"])
def test_score_matching_recovers_a_gaussian(kind: str) -> None:
    """The data's own mean and covariance are the minimum, without any error of sampling."""
    x = gaussian()
    model = Quadratic(x)
    score = EnergyScore(model) if kind == "energy" else model.score
    objective = ScoreMatching(score)
    best = objective(x, generator=generator())
    gradients = torch.autograd.grad(best, list(model.parameters()))
    assert all(float(g.abs().max()) < 1e-10 for g in gradients)
    assert float(best.detach()) == pytest.approx(-0.5 * float(model.precision.detach().trace()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
        assert float(objective(x, generator=generator())) > float(best.detach())


def test_slices_and_probes_average_to_the_whole() -> None:
    """Over all signs v: 1/2 (v.s)^2 + v'(ds/dx)v has the mean 1/2 |s|^2 + tr ds/dx."""
    x = gaussian()[:5]

    def score(x: Tensor) -> Tensor:
        return x.sin() @ torch.tensor([[1.0, 0.2, 0.0], [0.5, -1.0, 0.3], [0.1, 0.0, 2.0]])

    whole = float(ScoreMatching(score)(x, generator=generator()).detach())
    for law in ("rademacher", "gaussian"):
        for kind in (ScoreMatching, SlicedScoreMatching):
            objective = kind(score, fs.Hutchinson(400, law))  # type: ignore[arg-type]
            draws = generator(7)
            values = torch.stack([objective(x, generator=draws).detach() for _ in range(30)])
            assert float(values.std()) > 0.0
            error = float(values.std()) / math.sqrt(30)
            assert abs(float(values.mean()) - whole) < 4.0 * error, (law, kind)


def test_gradients_of_slices_reach_the_parameters() -> None:
    x = gaussian()
    model = Quadratic(x)
    loss = SlicedScoreMatching(EnergyScore(model))(x, generator=generator())
    assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(loss, list(model.parameters())))
    with torch.no_grad():
        assert torch.allclose(EnergyScore(model)(x), model.score(x))


def test_what_is_no_energy_and_no_score_is_refused() -> None:
    x = gaussian()
    with pytest.raises(TypeError, match="one number a sample"):
        EnergyScore(lambda x: x)(x)
    with pytest.raises(TypeError, match="the score"):
        ScoreMatching(lambda x: x[:, :2])(x, generator=generator())


# --- the variational bound ------------------------------------------------------------------------


def bayes(schedule: Schedule, s: float, t: float, x: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of x_s given x_t and x0: the product of two Gaussians in x_s."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    a = alpha_t / alpha_s
    noise = sigma_t**2 - a**2 * sigma_s**2
    variance = 1.0 / (1.0 / sigma_s**2 + a**2 / noise)
    return variance * (alpha_s * x0 / sigma_s**2 + a * x / noise), variance


@pytest.mark.parametrize("schedule", [VP(), Discrete.linear(10), FlowMatching(), EDM()], ids=str)
@pytest.mark.parametrize("v", [0.0, 0.4, 1.0])
def test_a_steps_divergence_is_bayes(schedule: Schedule, v: float) -> None:
    s, t = 0.3 * schedule.horizon, 0.5 * schedule.horizon
    x, x0, guess = torch.randn(3, 4, 2).unbind()
    mean, variance = bayes(schedule, s, t, x, x0)
    mine, _ = bayes(schedule, s, t, x, guess)
    sigma_s, sigma_t = schedule.sigma(s), schedule.sigma(t)
    own = variance * (sigma_t / sigma_s) ** (2 * v)
    q = torch.distributions.Normal(mean, math.sqrt(variance))
    p = torch.distributions.Normal(mine, math.sqrt(own))
    found = _divergence(schedule, torch.tensor(s), torch.tensor(t), x0 - guess, v)
    assert torch.allclose(found, torch.distributions.kl_divergence(q, p), rtol=1e-9)


def exact_bound(schedule: Schedule, times: Tensor, v: float, c: float) -> list[float]:
    """The expected terms for data N(0, c^2) in one dimension, its own denoiser, base N(0, 1)."""

    def least(t: Tensor) -> float:
        alpha, sigma = schedule(t)
        return float(c**2 * sigma**2 / (alpha**2 * c**2 + sigma**2))

    first = float(schedule.sigma(times[0]))
    terms = [0.5 * math.log(2 * math.pi * first**2) + 0.5 * least(times[0]) / first**2]
    for s, t in itertools.pairwise(times):
        error = torch.tensor(math.sqrt(least(t)))
        terms.append(float(_divergence(schedule, s, t, error, v)))
    alpha, sigma = (float(part) for part in schedule(times[-1]))
    terms.append(0.5 * (sigma**2 + alpha**2 * c**2 - 1.0) - math.log(sigma))
    return terms


def gaussian_denoiser(schedule: Schedule, c: float) -> fs.Denoiser:
    return fs.Denoiser(lambda t, x: torch.zeros_like(x), schedule, EDMPrediction(c))


@pytest.mark.parametrize("v", [0.0, 1.0])
def test_the_bound_of_a_gaussian_has_its_closed_form(v: float) -> None:
    schedule, times, c, count = Discrete.linear(8, 0.01, 0.5), uniform(0.125, 1.0, 7), 0.6, 4000
    bound = VariationalBound(FixedVariance(gaussian_denoiser(schedule, c), v), times, fs.Normal(1))
    x = c * torch.randn(count, 1, generator=generator(1))
    means, errors = bound(x, generator=generator(2)).means()
    expected = torch.tensor(exact_bound(schedule, times, v, c))
    assert means.shape == (9,)
    assert bool(((means - expected).abs() < 4.0 * errors + 1e-12).all())
    assert bool((errors > 0.0).all())


def test_the_bound_is_met_where_the_variance_is_right() -> None:
    """For data N(0, 1) the larger variance is the true one: no gap, whatever T and x."""
    schedule, x = VP(), torch.randn(3, 1).expand(3, 2000).reshape(-1, 1)
    likelihood = -fs.Normal(1).log_prob(x).reshape(3, -1)[:, 0]
    transition = FixedVariance(gaussian_denoiser(schedule, 1.0), 1.0)
    for steps in (2, 6):
        bound = VariationalBound(transition, uniform(0.2, 1.0, steps - 1), fs.Normal(1))
        totals = bound(x, generator=generator(2)).total.reshape(3, -1)
        errors = totals.std(1) / math.sqrt(2000)
        assert bool(((totals.mean(1) - likelihood).abs() < 4.0 * errors).all())


def test_the_gap_shrinks_with_the_number_of_steps() -> None:
    schedule, c = VP(), 0.6
    entropy = 0.5 * math.log(2.0 * math.pi * math.e * c**2)
    gaps = [
        sum(exact_bound(schedule, uniform_lambda(schedule, 1e-3, 1.0, n), 0.0, c)) - entropy
        for n in (10, 40, 160)
    ]
    assert gaps[0] > 3.5 * gaps[1] > 3.5**2 * gaps[2] > 0.0, gaps


@torch.no_grad()
def test_the_bound_of_a_mixture_is_one() -> None:
    """Mean bound at least the mean of -log p less three standard errors; nearer with more steps."""
    schedule, count, gaps = VP(), 500, []
    denoiser = fs.Denoiser(MIXTURE.denoiser(schedule), schedule, Data())
    x = MIXTURE.sample(count, 0)
    for steps in (40, 160):
        times = uniform_lambda(schedule, 1e-3, 1.0, steps)
        bound = VariationalBound(FixedVariance(denoiser), times, fs.Normal(2))
        gap = bound(x, generator=generator()).total + MIXTURE.log_prob(x)
        gaps.append(float(gap.mean()))
        assert gaps[-1] > -3.0 * float(gap.std()) / math.sqrt(count)
    assert gaps[0] > 2.5 * gaps[1]


def test_the_bound_of_data_in_levels() -> None:
    """Four grey levels, equally likely: not below two bits, and nearly that."""
    schedule, levels = VP(), Discretized(4)
    values = torch.linspace(-1.0, 1.0, 4)

    def denoiser(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return ((-0.5 * ((x[..., None] - alpha * values) / sigma) ** 2).softmax(-1) * values).sum(
            -1
        )

    transition = FixedVariance(fs.Denoiser(denoiser, schedule, Data()))
    times = uniform_lambda(schedule, 0.01, 1.0, 100)
    x = values.repeat(500)[:, None].expand(-1, 3)
    bits, error = VariationalBound(transition, times, fs.Normal(3), levels)(
        x, generator=generator()
    ).bits_per_dim()
    assert float(bits) > 2.0 - 3.0 * float(error)
    assert float(bits) < 2.2


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-5.0, 2.0))
def test_levels_share_all_of_the_mass(mean: float, log_std: float) -> None:
    levels, std = Discretized(16, 0.0, 1.0), math.exp(log_std)
    x = torch.linspace(0.0, 1.0, 16)
    log_mass = levels.log_prob(x, torch.tensor(mean), std)
    assert bool(torch.isfinite(log_mass).all())
    assert float(log_mass.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    cdf = torch.special.ndtr((x[:-1] + 0.5 / 15 - mean) / std)
    mass = torch.cat((cdf[:1], cdf.diff(), 1.0 - cdf[-1:]))
    assert torch.allclose(log_mass.exp(), mass, atol=1e-12)


def test_levels_far_off_are_finite_and_differentiable() -> None:
    mean = torch.tensor([-300.0, 300.0], requires_grad=True)
    values = Discretized().log_prob(torch.tensor([1.0, -1.0]), mean, 0.1)
    (slope,) = torch.autograd.grad(values.sum(), mean)
    assert torch.allclose(slope, torch.tensor([1.0, -1.0]) * 301.0 / 0.01, rtol=0.01)
    with pytest.raises(ValueError, match="levels"):
        Discretized(4).log_prob(torch.tensor([0.1]), mean, 0.1)
    with pytest.raises(ValueError, match="levels"):
        Discretized(4).log_prob(torch.tensor([5.0 / 3.0]), mean, 0.1)


@pytest.mark.parametrize("times", [torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.5])])
def test_times_of_a_bound_rise_from_noise(times: Tensor) -> None:
    transition = FixedVariance(gaussian_denoiser(VP(), 1.0))
    with pytest.raises(ValueError, match="rise"):
        VariationalBound(transition, times, fs.Normal(1))


# --- learned variance -----------------------------------------------------------------------------


class Halves(nn.Module):
    """A network of two halves: w x, and a number."""

    def __init__(self, w: float, u: float) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(u))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.cat((self.w * x, self.u * torch.ones_like(x)), dim=1)


def test_the_hybrid_loss_trains_the_mean_and_the_variance_apart() -> None:
    schedule, times = Discrete.linear(6, 0.05, 0.5), uniform(1 / 6, 1.0, 5)
    network, x = Halves(0.4, 0.2), torch.randn(3000, 2)
    transition = LearnedVariance(network, schedule, NoisePrediction())
    parameters = [network.w, network.u]

    def gradients(weight: float) -> list[Tensor]:
        loss = HybridLoss(transition, times, weight)(x, generator=generator(1))
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    (plain, none), (mean, one), (_, two) = gradients(0.0), gradients(1.0), gradients(2.0)
    assert torch.allclose(plain, mean)
    assert float(none) == 0.0
    assert float(one) != 0.0
    assert torch.allclose(2.0 * one, two)
    bound = VariationalBound(transition, times, fs.Normal(2))
    steps = bound(x, generator=generator(2)).terms[1:-1].sum(0).mean() / 2
    (whole,) = torch.autograd.grad(steps, [network.u])
    assert float(one) == pytest.approx(float(whole), rel=0.1)


def test_the_best_variance_is_that_of_the_reverse_step() -> None:
    """For a Gaussian p(x_s | x_t) is known; the bound's gradient by v vanishes at its variance."""
    schedule, s, t, c = VP(), 0.3, 0.5, 0.6
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    total_s, total_t = (alpha_s * c) ** 2 + sigma_s**2, (alpha_t * c) ** 2 + sigma_t**2
    covariance = alpha_t / alpha_s * total_s
    true = total_s - covariance**2 / total_t
    _, low = bayes(schedule, s, t, torch.zeros(1), torch.zeros(1))
    v = math.log(true / low) / math.log((sigma_t / sigma_s) ** 2)
    assert 0.0 < v < 1.0
    network = Halves(0.0, 2.0 * v - 1.0)
    transition = LearnedVariance(network, schedule, EDMPrediction(c))
    least = torch.tensor([[c * sigma_t / math.sqrt(total_t)]])  # root of E |x0_hat - x0|^2
    _, found = transition(torch.tensor(t), torch.randn(1, 1))
    loss = _divergence(schedule, torch.tensor(s), torch.tensor(t), least, found).sum()
    (slope,) = torch.autograd.grad(loss, [network.u])
    assert abs(float(slope)) < 1e-12


@torch.no_grad()
def test_learned_variances_make_few_steps_right() -> None:
    """Gaussian data: with the variance of the reverse step every x_t has its own law, however far
    apart the times are; neither of DDPM's two does.
    """
    schedule, c, times = VP(), 0.6, torch.tensor([0.02, 0.3, 0.6, 1.0])
    alpha, sigma = schedule(times)
    total = (alpha * c) ** 2 + sigma**2  # the variance of x_t
    true = total[:-1] - (alpha[1:] / alpha[:-1] * total[:-1]) ** 2 / total[1:]
    low = (sigma[:-1] / sigma[1:]) ** 2 * (
        sigma[1:] ** 2 - (alpha[1:] / alpha[:-1]) ** 2 * sigma[:-1] ** 2
    )
    v = (true / low).log() / (2.0 * (sigma[1:] / sigma[:-1]).log())

    def network(t: Tensor, x: Tensor) -> Tensor:
        i = int((times - t).abs().argmin())
        x0 = alpha[i] * c**2 / total[i] * x
        return torch.cat((x0, (2.0 * v[i - 1] - 1.0).expand_as(x)), dim=1)

    learned, found = LearnedVariance(network, schedule, Data()), []
    count, expected = 20_000, torch.cat((total[:-1].flip(0), (alpha * c**2)[:1] ** 2 / total[:1]))
    x = total[-1].sqrt() * torch.randn(count, 1)
    for each in (learned, *(FixedVariance(learned.denoiser, w) for w in (0.0, 1.0))):
        sol = fs.solve(Ancestral(each, times), x, generator=generator(1), save_at=fs.Steps())
        assert sol.stats.evaluations == len(times)
        found.append(sol.ys[1:].square().mean((1, 2)) / expected - 1.0)
    noise = 4.0 * math.sqrt(2.0 / count)
    assert bool((found[0].abs() < noise).all())
    assert float(found[1][-1]) < -2.0 * noise
    assert float(found[2][-1]) > 2.0 * noise


@pytest.mark.parametrize("schedule", [VP(), EDM(20.0), FlowMatching()], ids=str)
def test_ancestral_sampling_is_ddims_at_eta_one(schedule: Schedule) -> None:
    """Sample by sample, from the same generator; then x0_hat."""
    times, x = schedule.horizon * torch.tensor([0.05, 0.3, 0.7, 0.9]), torch.randn(5, 2)
    denoiser = fs.Denoiser(MIXTURE.denoiser(schedule), schedule, Data())
    found = fs.solve(Ancestral(FixedVariance(denoiser), times), x, generator=generator()).y1
    sol = fs.solve(
        fs.LinearSDE(schedule).probability_flow(denoiser), x, float(times[-1]), float(times[0]),
        integrator=DDIM(1.0), stepping=fs.Grid(times.flip(0)), generator=generator(),
    )  # fmt: skip
    assert torch.allclose(found, denoiser(times[0], sol.y1), rtol=1e-12, atol=1e-12)
    halves = LearnedVariance(Halves(0.4, 0.2).float(), schedule, NoisePrediction())
    for each in (FixedVariance(gaussian_denoiser(schedule, 0.6)), halves):
        y = fs.solve(Ancestral(each, times), x.float(), generator=generator()).y1
        assert y.dtype == torch.float32
    with pytest.raises(TypeError, match="generator"):
        fs.solve(Ancestral(FixedVariance(denoiser), times), x)
    with pytest.raises(ValueError, match="rise"):
        Ancestral(FixedVariance(denoiser), times.flip(0))


def test_a_denoiser_of_half_a_network() -> None:
    network, x = Halves(0.4, 0.2), torch.randn(5, 3)
    transition = LearnedVariance(network, VP(), NoisePrediction())
    plain = fs.Denoiser(Linear(0.4), VP(), NoisePrediction())
    t = torch.full((5,), 0.5)
    x0, v = transition(t, x)
    assert torch.equal(transition.denoiser(t, x), x0)
    assert torch.equal(plain(t, x), x0)
    assert torch.equal(v, torch.full((5, 3), 0.6))
    assert {id(p) for p in transition.parameters()} == {id(p) for p in network.parameters()}
    with pytest.raises(TypeError, match="half of the network"):
        LearnedVariance(lambda t, x: x, VP(), NoisePrediction())(t, torch.randn(5, 4))


# --- x0 kept in range -----------------------------------------------------------------------------


def loud(schedule: Schedule) -> fs.Denoiser:
    """x0 = 3 x."""
    return fs.Denoiser(lambda t, x: 3.0 * x, schedule, Data())


def test_dynamic_thresholding_is_the_papers() -> None:
    """Imagen: s = max(1, percentile of |x0|), then x0 clipped to [-s, s] and divided by s."""
    import numpy as np

    x, t = torch.randn(6, 2, 4, 4) * torch.tensor([0.1, 1, 2, 0.3, 1, 5])[:, None, None, None], 0.5
    x0 = 3.0 * x
    for q in (0.0, 0.3, 0.995, 1.0):
        found = dynamic_threshold(loud(VP()), q)(torch.tensor(t), x)
        s = np.maximum(np.quantile(x0.flatten(1).abs().cpu().numpy(), q, axis=1), 1.0)
        s = torch.as_tensor(s).reshape(-1, 1, 1, 1).to(x0)
        assert torch.allclose(found, x0.clamp(-s, s) / s)
        assert float(found.abs().max()) <= 1.0
    mild = dynamic_threshold(loud(VP()))(torch.tensor(t), x)
    assert torch.allclose(mild[0], x0[0])
    assert not torch.allclose(mild, clip(loud(VP()))(torch.tensor(t), x))
    twice = dynamic_threshold(loud(VP()), 0.9, bound=2.0)(torch.tensor(t), x)
    assert float(twice.abs().max()) == pytest.approx(2.0)


def test_a_kept_denoiser_is_one() -> None:
    schedule, x = FlowMatching(), torch.randn(5, 2)
    for kept in (clip(loud(schedule), -0.5, 0.8), dynamic_threshold(loud(schedule), bound=0.5)):
        flow = fs.LinearSDE(schedule).probability_flow(kept)
        end = fs.solve(flow, x, 1.0, 0.0, integrator=DDIM(), stepping=fs.Fixed(steps=4)).y1
        assert float(end.min()) >= -0.5
        assert float(end.max()) <= 0.8
    assert {id(p) for p in clip(fs.Denoiser(Linear(), VP(), Data())).parameters()}
    for made in (
        lambda: clip(loud(VP()), 1.0, -1.0), lambda: dynamic_threshold(loud(VP()), 1.5),
        lambda: dynamic_threshold(loud(VP()), 0.9, bound=0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            made()


def test_what_needs_signal_still_does_when_it_is_kept() -> None:
    """Clipping turns an infinite x0 into a finite one; it is refused as before."""
    schedule = Cosine()
    kept = clip(fs.Denoiser(Linear(), schedule, NoisePrediction()))
    flow = fs.LinearSDE(schedule).probability_flow(kept)
    with pytest.raises(ValueError, match=r"0\.999"):
        fs.solve(flow, torch.randn(2, 2), 1.0, 0.1, integrator=DDIM(), stepping=fs.Fixed(steps=3))


# --- likelihood -----------------------------------------------------------------------------------


def noise_to_data(schedule: Schedule, t_min: float) -> fs.Flow:
    """A flow whose base is the exact law, at tolerances of 1e-6."""
    t_max = 0.99 * schedule.horizon
    flow = fs.LinearSDE(schedule).probability_flow(MIXTURE.denoiser(schedule))
    flow.horizon = t_max
    solver = fs.Solver(Tsit5(), fs.Adaptive(1e-6, 1e-6))
    return fs.Flow(Noised(MIXTURE, *schedule(t_max)), flow, solver, t0=t_min)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: str(s).split("(")[0])
@torch.no_grad()
def test_the_likelihood_of_a_mixture(schedule: Schedule) -> None:
    """Within 1e-4 nats of the closed form at t_min."""
    x, t_min = MIXTURE.sample(20, 1), 1e-3
    flow, exact = noise_to_data(schedule, t_min), MIXTURE.log_prob(x, *schedule(t_min))
    assert float((flow.log_prob(x) - exact).abs().max()) < 1e-4
    sigma = schedule.sigma(flow.dynamics.horizon)
    plain = fs.Flow(Noised(POINT, 1.0, sigma), flow.dynamics, flow.solver, t0=t_min)
    gap = float((plain.log_prob(x) - exact).abs().max())
    print(f"\n{schedule}: the base N(0, sigma^2 I) adds an error of {gap:.2g} nats")
    assert gap > 1e-4


def test_the_gradient_of_a_likelihood_is_the_score() -> None:
    x = MIXTURE.sample(20, 1).requires_grad_()
    values = noise_to_data(VP(), 1e-3).log_prob(x), MIXTURE.log_prob(x, *VP()(1e-3))
    slope, score = (torch.autograd.grad(p.sum(), x)[0] for p in values)
    assert torch.allclose(slope, score, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "t0", "t1"), [(FlowMatching(), 1e-3, 1.0), (Cosine(), 1e-3, 1.0), (VP(), 0.0, 1.0)]
)
def test_lambda_is_uniform_between_finite_ends(schedule: Schedule, t0: float, t1: float) -> None:
    with pytest.raises(ValueError, match="move the end"):
        UniformLambda(schedule, t0, t1).sample(5, torch.zeros(5, 1), generator())


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching()])
def test_bounds_from_no_signal_need_a_prediction_that_knows_x0(schedule: Schedule) -> None:
    network, times = (lambda t, x: x), fs.paths.uniform(1 / 20, 1.0, 19)
    noise = FixedVariance(fs.Denoiser(network, schedule, NoisePrediction()))
    learned = LearnedVariance(lambda t, x: torch.cat((x, x), 1), schedule, NoisePrediction())
    for make in (
        lambda: VariationalBound(noise, times, fs.Normal(2)), lambda: HybridLoss(learned, times),
        lambda: Ancestral(noise, times),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="VPrediction"):
            make()
    Ancestral(FixedVariance(fs.Denoiser(network, schedule, VPrediction())), times)
