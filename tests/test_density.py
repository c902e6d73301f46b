"""Densities: determinants, traces, closed forms, inverses; maps and flows through one code path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde import models
from flowsde.integrators import DPMSolverPP, Tsit5
from flowsde.paths import VP, uniform_lambda
from flowsde.transforms import density

from .systems import SCHEDULES, Mixture, generator

TIGHT = fs.Solver(Tsit5(), fs.Adaptive(1e-9, 1e-9))


def stack(dim: int, depth: int, seed: int, condition: int = 0) -> fs.Composed:
    """A coupling stack away from the identity."""
    torch.manual_seed(seed)
    made = models.realnvp(
        dim, depth, 16, generator=torch.Generator("cpu").manual_seed(seed), condition=condition
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.4)
    return made


def field(dim: int, seed: int) -> fs.ODE:
    torch.manual_seed(seed)
    made = models.cnf(dim, 16, 2)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


@given(dim=st.integers(1, 5), seed=st.integers(0, 1000), end=st.floats(0.1, 2.0))
def test_flows_invert(dim: int, seed: int, end: float) -> None:
    made, x = field(dim, seed), torch.randn(4, dim)
    with torch.no_grad():
        y = TIGHT.solve(made, x, 0.0, end).y1
        back = TIGHT.solve(made, y, end, 0.0).y1
    assert float((back - x).abs().max()) < 1e-6


@given(dim=st.integers(1, 4), seed=st.integers(0, 1000), reverse=st.booleans())
def test_flow_log_density_is_slogdet(dim: int, seed: int, reverse: bool) -> None:
    """The trace integrated, against the determinant of the solve's own Jacobian."""
    made, x = field(dim, seed), torch.randn(2, dim)
    span = (1.0, 0.0) if reverse else (0.0, 1.0)
    with torch.no_grad():
        change = TIGHT.solve(fs.log_density(made), (x, torch.zeros(2)), *span).y1[1]
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: TIGHT.solve(made, v[None], *span).y1[0], x[i]
        )
        assert float(-change[i]) == pytest.approx(
            float(torch.linalg.slogdet(jacobian)[1]), abs=1e-6
        )


ESTIMATORS = (
    fs.Hutchinson(), fs.Hutchinson(3, "gaussian"),
    fs.HutchPlusPlus(), fs.HutchPlusPlus(2, "gaussian"),
)  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_estimators_are_unbiased(estimator: fs.Divergence) -> None:
    """Of the trace, of the squared norm, and of the trace's gradients by x and by a parameter:
    each mean meets the exact one within five standard errors.
    """
    enter, leave, x, n = torch.randn(5, 8), torch.randn(8, 5), torch.randn(1, 5), 2000

    def measured(divergence: fs.Divergence, rows: int) -> list[Tensor]:
        many = x.expand(rows, 5).clone().requires_grad_()
        scale = torch.ones(rows, 1, requires_grad=True)  # a parameter, of each row's own
        found = divergence.prepare(many, 0).products(
            lambda v: torch.tanh(scale * (v @ enter)) @ leave, many
        )
        slopes = torch.autograd.grad(found.trace().sum(), (many, scale))
        return [found.trace()[:, None], found.norm()[:, None], *slopes]

    exact = measured(fs.Exact(), 1)
    for value, truth in zip(measured(estimator, n), exact, strict=True):
        error = value.detach().std(0) / math.sqrt(n)
        assert bool(((value.detach().mean(0) - truth.detach()).abs() < 5 * error + 1e-12).all())


@pytest.mark.parametrize("estimator", [fs.Exact(), *ESTIMATORS], ids=str)
def test_no_sample_has_no_density(estimator: fs.Divergence) -> None:
    ode = fs.ODE(lambda t, y: -y.sin())
    flow = fs.Flow(fs.Normal((2, 3)), ode, divergence=estimator)
    found = flow.log_prob(torch.zeros(0, 2, 3), generator=generator(0))
    assert found.shape == (0,)


def test_more_probes_spread_less() -> None:
    made, x, t = field(5, 3), torch.randn(1, 5).expand(3000, 5), torch.tensor(0.3)
    spreads = [
        float(fs.Hutchinson(n).prepare(x, 0)(lambda v: made(t, v), x)[1].detach().std())
        for n in (1, 16)
    ]
    assert spreads[1] == pytest.approx(spreads[0] / 4, rel=0.1)


@pytest.mark.parametrize(("rank", "samples"), [(7, 7), (7, 9), (2, 2), (2, 3), (1, 1), (0, 1)])
def test_a_sketch_that_holds_the_jacobian_is_exact(rank: int, samples: int) -> None:
    """Its gradients too, those by the matrix: the sketch's own derivative drops out."""
    matrix = (torch.randn(7, rank) @ torch.randn(rank, 7)).requires_grad_()
    x = torch.randn(4, 7)

    def run(divergence: fs.Divergence) -> tuple[Tensor, Tensor]:
        trace = divergence.prepare(x, 1)(lambda v: (v @ matrix).sin(), x)[1]
        return trace, torch.autograd.grad(trace.square().sum(), matrix)[0]

    for found, truth in zip(run(fs.HutchPlusPlus(samples)), run(fs.Exact()), strict=True):
        if found.ndim == 2 and rank < 7:
            continue  # off the range of J the gradient is an estimate
        assert torch.allclose(found, truth, atol=1e-10)


def test_a_sketch_beats_as_many_plain_probes_on_a_fading_spectrum() -> None:
    turn = torch.linalg.qr(torch.randn(40, 40)).Q
    matrix = turn @ torch.diag(torch.arange(1.0, 41.0) ** -2) @ turn.T
    x = torch.zeros(500, 40)

    def spread(divergence: fs.Divergence) -> float:
        return float(divergence.prepare(x, 2)(lambda v: v @ matrix, x)[1].std())

    assert spread(fs.HutchPlusPlus(4)) < 0.3 * spread(fs.Hutchinson(12))


@pytest.mark.parametrize("numbers", [1, 40, 2**16])
def test_products_in_parts_are_the_same(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, two at a time with one left over, and all at once."""
    monkeypatch.setattr(density, "_CACHED", numbers)
    made, x, t = field(5, 3), torch.randn(4, 5), torch.tensor(0.3)
    found = fs.Exact().products(lambda v: made(t, v), x)
    rows = torch.autograd.functional.jacobian(lambda v: made(t, v).sum(0), x)
    assert torch.allclose(found.rows, rows.reshape(found.rows.shape), atol=1e-12)


def test_probes_are_drawn_once_a_solve() -> None:
    made = fs.log_density(field(4, 0), fs.Hutchinson())
    start = torch.randn(3, 4), torch.zeros(3)

    def run(seed: int) -> Tensor:
        return TIGHT.solve(made, start, generator=generator(seed)).y1[1]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    with pytest.raises(TypeError, match="generator"):
        TIGHT.solve(made, start)


def test_divergence_of_images_and_of_constant_fields() -> None:
    x = torch.randn(2, 1, 3, 3)
    value, trace = fs.Exact()(lambda v: v * v, x)
    assert torch.allclose(trace, (2 * x).flatten(1).sum(-1))
    assert torch.allclose(value, x * x)
    assert torch.equal(fs.Exact()(lambda v: torch.ones(2, 1, 3, 3), x)[1], torch.zeros(2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_probability_flow_likelihood_of_a_mixture(schedule: fs.Schedule) -> None:
    """log p at t0 from log p at T, both known in closed form; adaptive and exponential alike."""
    mixture, t0, t1 = Mixture.two(), 0.05, 0.9 * schedule.horizon
    flow = fs.LinearSDE(schedule).probability_flow(mixture.denoiser(schedule))
    x = mixture.sample(50, 0)
    truth = mixture.log_prob(x, *schedule(t0))
    times = uniform_lambda(schedule, t0, t1, 400)
    solvers = (
        (TIGHT, 1e-6), (fs.Solver(DPMSolverPP(), fs.Grid(times)), 2e-3),
    )  # fmt: skip
    for solver, tolerance in solvers:
        with torch.no_grad():
            z, change = solver.solve(fs.log_density(flow), (x, torch.zeros(50)), t0, t1).y1
        found = mixture.log_prob(z, *schedule(t1)) - change
        assert float((found - truth).abs().max()) < tolerance * (1 + float(truth.abs().max()))


def test_exponential_likelihood_is_of_second_order() -> None:
    schedule, mixture = VP(), Mixture.two()
    dynamics = fs.log_density(fs.LinearSDE(schedule).probability_flow(mixture.denoiser(schedule)))
    start = mixture.sample(30, 0), torch.zeros(30)
    truth = TIGHT.solve(dynamics, start, 0.05, 0.9).y1[1].detach()
    errors = []
    for steps in (100, 200):
        grid = fs.Grid(uniform_lambda(schedule, 0.05, 0.9, steps))
        end = fs.solve(dynamics, start, 0.05, 0.9, integrator=DPMSolverPP(), stepping=grid).y1
        errors.append(float((end[1].detach() - truth).abs().mean()))
    assert math.log2(errors[0] / errors[1]) > 1.7, errors


# --- Flow -----------------------------------------------------------------------------------------


def flows() -> dict[str, fs.Flow]:
    schedule = VP()
    diffusion = fs.LinearSDE(schedule).probability_flow(Mixture.two().denoiser(schedule))
    return {
        "map": fs.Flow(fs.Normal(2), stack(2, 4, 0)),
        "cnf": fs.Flow(fs.Normal(2), field(2, 0), TIGHT),
        "diffusion": fs.Flow(fs.Normal(2), diffusion, TIGHT, t0=0.02),
    }


@pytest.mark.parametrize("name", ["map", "cnf", "diffusion"])
def test_densities_integrate_to_one(name: str) -> None:
    flow = flows()[name]
    flow.solver = fs.Solver(flow.solver.integrator, fs.Adaptive(1e-5, 1e-5)) if name != "map" else (
        flow.solver
    )  # fmt: skip
    with torch.no_grad():
        samples = flow.sample((400,), generator=generator())
        low, high = samples.amin(0) - 2.5, samples.amax(0) + 2.5
        count = 160
        a, b = (torch.linspace(float(x), float(y), count) for x, y in zip(low, high, strict=True))
        grid = torch.cartesian_prod(a, b)
        mass = float(flow.log_prob(grid).exp().sum() * (a[1] - a[0]) * (b[1] - b[0]))
    assert mass == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["map", "cnf", "diffusion"])
def test_samples_know_their_density(name: str) -> None:
    flow = flows()[name]
    x, density = flow.sample_and_log_prob((3, 2), generator=generator())
    assert x.shape == (3, 2, 2)
    assert density.shape == (3, 2)
    assert torch.allclose(flow.log_prob(x), density, atol=1e-5)
    assert torch.equal(flow.sample((4,), seed=3), flow.sample((4,), seed=3))
    seeds = torch.arange(5)
    whole = flow.sample((5,), seed=seeds)
    tolerance = 1e-7 if name != "map" else 1e-12
    assert torch.allclose(flow.sample((2,), seed=seeds[3:]), whole[3:], atol=tolerance)
    assert flow.sample(generator=generator()).shape == (2,)
    with pytest.raises(TypeError, match="generator"):
        flow.sample((2,))
    with pytest.raises(ValueError, match="event"):
        flow.log_prob(torch.zeros(3, 5))


def test_the_bases_density_is_torchs() -> None:
    base, x = fs.Normal((2, 3), 1.7), torch.randn(4, 2, 3)
    expected = torch.distributions.Normal(0.0, 1.7).log_prob(x).sum((-1, -2))
    assert torch.allclose(base.log_prob(x), expected, atol=1e-6)


def test_conditional_maps_take_args() -> None:
    flow, c = fs.Flow(fs.Normal(3), stack(3, 4, 1, condition=2)), torch.randn(5, 2)
    x, density = flow.sample_and_log_prob((5,), c, generator=generator())
    assert torch.allclose(flow.log_prob(x, c), density, atol=1e-10)
    assert not torch.allclose(flow.log_prob(x, c + 1.0), density)


def test_reparametrised_gradients_reach_the_parameters() -> None:
    for name in ("map", "cnf"):
        flow = flows()[name]
        loss = flow.rsample((6,), seed=1).square().sum()
        found = torch.autograd.grad(loss, list(flow.dynamics.parameters()), allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in found)
        x = flow.sample((3,), seed=1)
        assert not x.requires_grad


def test_an_sde_has_no_density_along_its_paths() -> None:
    sde = fs.LinearSDE(VP())
    with pytest.raises(TypeError, match="probability_flow"):
        fs.log_density(sde.reverse_sde(Mixture.two().denoiser(VP())))


def test_bits_per_dim_of_uniform_noise_is_its_entropy() -> None:
    """Uniform grey levels, uniform density: log2(levels) bits."""
    assert float(fs.bits_per_dim(torch.tensor(0.0), 64, 16)) == 4.0
