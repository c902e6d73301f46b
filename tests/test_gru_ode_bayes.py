"""GRU-ODE-Bayes: a density, causal, of series as they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import RK4
from flowsde.series import collate

from .systems import generator
from .test_latent_ode import ragged

STEPS, FINE = (fs.Solver(RK4(), fs.Fixed(steps=n)) for n in (2, 50))


def bayes(seed: int = 0, **more: object) -> models.GRUODEBayes:
    torch.manual_seed(seed)
    return models.GRUODEBayes(2, 5, 0.3, **{"solver": STEPS, **more})


@settings(max_examples=4)
@given(seed=st.integers(0, 99))
@torch.no_grad()
def test_a_batch_is_its_series_one_by_one(seed: int) -> None:
    model, alone = bayes(seed), ragged(seed=seed)
    both = collate(alone)
    for by in (model.log_prob, model.elbo):
        each = torch.cat([by(own.values[None], own.times) for own in alone])
        assert torch.allclose(by(both.values, both.times), each, atol=1e-12)


@torch.no_grad()
def test_the_density_is_that_of_each_row_given_those_before() -> None:
    """Whether ``log_prob`` tells them at once or ``predict`` one by one, of the past alone."""
    model, own = bayes(), ragged()[3]
    x, times = own.values[None], own.times
    steps = []
    for i in range(len(times)):
        law = Normal(*model.predict(x[:, :i], times[:i], times[i : i + 1]))
        row = x[:, i : i + 1]
        steps.append(torch.where(row.isnan(), 0.0, law.log_prob(row.nan_to_num())).sum())
    assert torch.allclose(model.log_prob(x, times), torch.stack(steps).sum(), atol=1e-12)


@torch.no_grad()
def test_a_row_of_nothing_changes_nothing() -> None:
    model, own = bayes(solver=FINE), ragged()[3]
    x, times = own.values[None], own.times
    middle = times[1:].sub(times.diff() / 3)
    order = torch.cat((times, middle)).argsort()
    rows = torch.cat((x, torch.full((1, len(middle), 2), torch.nan)), 1)[:, order]
    other = model.log_prob(rows, torch.cat((times, middle))[order])
    assert torch.allclose(model.log_prob(x, times), other, atol=1e-8)


@torch.no_grad()
def test_predictions_come_in_the_order_of_their_times_and_know_the_row_at_theirs() -> None:
    model, both = bayes(solver=FINE), collate(ragged())
    x, times = both.values, both.times
    at = torch.tensor([7.0, 0.5, 3.0])
    mean, std = model.predict(x, times, at)
    for j, t in enumerate(at):
        m, s = model.predict(x, times, t[None])
        assert torch.allclose(mean[:, j], m[:, 0], atol=1e-8)
        assert torch.allclose(std[:, j], s[:, 0], atol=1e-8)
    after = model.laws(x, times)[1]
    m, s = model.predict(x, times, times)
    assert torch.allclose(m, after.mean, atol=1e-12)
    assert torch.allclose(s, after.stddev, atol=1e-12)


@torch.no_grad()
def test_the_state_stays_in_its_box() -> None:
    model = bayes()
    x, times = 50.0 * torch.randn(3, 6, 2, generator=generator(0)), torch.arange(6.0)
    before, after = model.filter.walk(x, times.expand(3, -1))
    assert float(torch.stack((before, after)).abs().max()) <= 1.0


@torch.no_grad()
def test_the_bound_is_the_density_less_what_bayes_rule_would_have_done_better() -> None:
    model, x, times = bayes(), torch.tensor([[[0.4, torch.nan]]]), torch.tensor([0.7])
    before, after = model.laws(x, times)
    m, s = before.mean[0, 0, 0], before.stddev[0, 0, 0]
    grid = torch.linspace(-8.0, 8.0, 20001)
    posterior = Normal(m, s).log_prob(grid).exp() * Normal(0.4, 0.3).log_prob(grid).exp()
    posterior = posterior / posterior.sum()
    mean = (grid * posterior).sum()
    std = ((grid - mean).square() * posterior).sum().sqrt()
    missed = kl_divergence(Normal(mean, std), Normal(after.mean[0, 0, 0], after.stddev[0, 0, 0]))
    for weight in (0.0, 0.5, 1.0):
        bound = model.elbo(x, times, weight=weight)
        assert torch.allclose(bound, model.log_prob(x, times) - weight * missed, atol=1e-6)


def test_gradients() -> None:
    model, both = bayes(), collate(ragged(2))
    parameters = tuple(p.detach().requires_grad_() for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def bound(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        wrapped = torch.func.functional_call(
            _Bound(model), {f"model.{n}": v for n, v in given.items()}, (both.values, both.times)
        )
        assert isinstance(wrapped, torch.Tensor)
        return wrapped

    assert torch.autograd.gradcheck(bound, parameters, fast_mode=True)


class _Bound(torch.nn.Module):
    def __init__(self, model: models.GRUODEBayes) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self.model.elbo(x, times)


def test_it_learns_to_forecast() -> None:
    """Levels that stay, drawn from N(0, 1), seen three times and with gaps."""
    pytest.importorskip("accelerate")
    draws = generator(0)
    level, times = torch.randn(128, 1, 1, generator=draws), torch.linspace(0.0, 2.0, 5)
    x = level + 0.1 * torch.randn(128, 5, 1, generator=draws)
    x = x.masked_fill(torch.rand(x.shape, generator=draws) < 0.2, torch.nan)
    torch.manual_seed(0)
    model = models.GRUODEBayes(1, 16, 0.1, solver=fs.Solver(RK4(), fs.Fixed(steps=1)))
    data = (x, times.expand(128, -1))
    training.fit(objectives.ELBO(model), data, steps=60, batch_size=128, seed=0, lr=2e-2, warmup=5)
    with torch.no_grad():
        mean, std = model.predict(x[:, :3], times[:3], times[3:])
    missed = mean - level
    assert float(missed.square().mean().sqrt()) < 0.5 < float(level.std())
    assert float((missed.abs() < 2.0 * std).double().mean()) > 0.8


@pytest.mark.parametrize(
    ("times", "at"),
    [((0.0, 0.0), (1.0,)), ((-1.0, 1.0), (1.0,)), ((0.0, 1.0, 2.0), (1.0,)), ((0.0, 1.0), (-1.0,)),
     ((0.0, 1.0), (float("nan"),))],
)  # fmt: skip
def test_bad_times(times: tuple[float, ...], at: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="times"):
        bayes().predict(torch.randn(3, 2, 2), torch.tensor(times), torch.tensor(at))


def test_whole_times_do_not_round_others() -> None:
    model, x, times = models.GRUODEBayes(1), torch.randn(1, 5, 1), torch.arange(5)
    at = torch.tensor([2.5, 2.9])
    found = model.predict(x, times, at)[0]
    assert torch.equal(found, model.predict(x, times.to(x), at)[0])
