"""The latent ODE: one solve for a batch, its bound against the exact evidence, its encoders."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives
from flowsde.integrators import RK4, Dopri5
from flowsde.paths import NaturalCubic
from flowsde.series import Series, collate

from .systems import generator

ENCODERS = [
    kind for kind in (getattr(models, name) for name in models.__all__)
    if inspect.isclass(kind) and issubclass(kind, models.Encoder) and not inspect.isabstract(kind)
]  # fmt: skip
TIGHT = fs.Solver(stepping=fs.Adaptive(1e-10, 1e-12))
STEPS = fs.Solver(RK4(), fs.Fixed(steps=4))
encoders = pytest.mark.parametrize("kind", ENCODERS)


def latent(kind: Any = models.GapGRU, **more: Any) -> models.LatentODE:
    torch.manual_seed(1)
    return models.LatentODE(2, 3, 0.5, encoder=kind(2, 6), **{"solver": STEPS, **more})


def ragged(count: int = 4, seed: int = 3) -> list[Series]:
    """Series of 1 to 5 rows at times of their own, some values missing."""
    draws, made = generator(seed), []
    for i in range(count):
        n = 1 + i % 5
        times = torch.rand(n, generator=draws).sort().values + 0.01 * torch.arange(n)
        values = torch.randn(n, 2, generator=draws)
        values[torch.rand(n, 2, generator=draws) < 0.3] = torch.nan
        values[0, 0] = 1.0
        made.append(Series(times, values))
    return made


def field(rate: Tensor) -> fs.ODE:
    return fs.ODE(lambda t, y: y @ rate.T, batched_time=True, rowwise=True)


def straight() -> fs.ODE:
    """At unit speed: any steps are exact."""
    return fs.ODE(lambda t, y: torch.ones_like(y), batched_time=True, rowwise=True)


# --- one solve ------------------------------------------------------------------------------------


@encoders
@settings(max_examples=4)
@given(seed=st.integers(0, 99))
@torch.no_grad()
def test_a_batch_is_its_series_one_by_one(kind: Any, seed: int) -> None:
    """Whatever their lengths and times; so what fills up shorter ones changes nothing either."""
    model, alone = latent(kind, solver=TIGHT), ragged(seed=seed)
    both = collate(alone)
    mean, std = model.encode(both.values, both.times)
    z0 = torch.randn(len(alone), 3, generator=generator(seed))
    z = model.paths(z0, both.times)
    for i, own in enumerate(alone):
        n = len(own.times)
        mine = model.encode(own.values[None], own.times)
        assert torch.allclose(torch.stack(mine)[:, 0], torch.stack((mean[i], std[i])), atol=1e-12)
        assert torch.allclose(z[i, :n], model.paths(z0[i, None], own.times[None])[0], atol=1e-8)


@torch.no_grad()
def test_a_batch_is_one_solve() -> None:
    """As many evaluations as one series takes; times in any order, and more than once."""
    calls = []

    def turn(t: Tensor, y: Tensor) -> Tensor:
        calls.append(y.shape)
        return torch.stack((y[:, 1], -y[:, 0]), -1)

    solver = fs.Solver(Dopri5(), fs.Fixed(steps=200))
    model = models.LatentODE(2, 2, 0.5, dynamics=fs.ODE(turn), solver=solver)
    z0, times = torch.randn(7, 2), 3.0 * torch.rand(7, 11)
    times[:, 5] = times[:, 2]
    z = model.paths(z0, times)
    assert calls == [(7, 2)] * (6 * 200 + 1)
    c, s = times.cos(), times.sin()
    a, b = z0[:, :1], z0[:, 1:]
    assert torch.allclose(z, torch.stack((c * a + s * b, c * b - s * a), -1), atol=1e-8)


@torch.no_grad()
def test_forecasts_go_on_and_start_where_the_start_is() -> None:
    """The same draw gives the same path, at any times and for any start."""
    model, later = latent(solver=TIGHT), latent(solver=TIGHT, start=2.0)
    x = collate(ragged())
    at = torch.tensor([0.0, 1.0, 4.0])
    whole = model.infer(x.values, x.times, generator=generator(2), at=at)
    assert torch.allclose(
        whole, later.infer(x.values, x.times + 2, generator=generator(2), at=at + 2), atol=1e-8
    )
    mine = model.infer(x.values, x.times, generator=generator(2))
    together = torch.cat((x.times, at.expand(4, -1)), 1)
    both = model.infer(x.values, x.times, generator=generator(2), at=together)
    assert torch.allclose(both, torch.cat((mine, whole), 1), atol=1e-8)
    drawn = model.sample(5, at, generator=generator())
    assert drawn.shape == (5, 3, 2)
    assert torch.equal(drawn, model.sample(5, at, generator=generator()))


# --- the bound ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bound_lies_below_the_exact_evidence() -> None:
    """Linear and Gaussian: x ~ N(b, M M^T + noise^2), and the mean bound is log p(x) less the
    divergence of q from the exact posterior, within four standard errors of the draws.
    """
    torch.manual_seed(0)
    rate, decoder = torch.tensor([[-0.3, 1.0], [-1.0, -0.3]]), nn.Linear(2, 2)
    model = models.LatentODE(
        2, 2, 0.5, encoder=models.GapGRU(2, 4), dynamics=field(rate), decoder=decoder, solver=TIGHT
    )
    times, x = torch.tensor([0.2, 0.5, 1.5]), torch.randn(1, 3, 2)
    x[0, 1, 0] = torch.nan
    seen = ~torch.isnan(x[0]).flatten()
    mixing = torch.cat([decoder.weight @ torch.linalg.matrix_exp(rate * t) for t in times])[seen]
    shift, seen_x = decoder.bias.repeat(3)[seen], x[0].flatten()[seen]
    noise = 0.25 * torch.eye(int(seen.sum()))
    normal = torch.distributions.MultivariateNormal
    evidence = normal(shift, mixing @ mixing.T + noise).log_prob(seen_x)
    precision = torch.eye(2) + mixing.T @ mixing / 0.25
    mean = torch.linalg.solve(precision, mixing.T @ (seen_x - shift) / 0.25)
    posterior = normal(mean, precision_matrix=precision)

    m, s = model.encode(x, times)
    gap = torch.distributions.kl_divergence(normal(m[0], torch.diag(s[0].square())), posterior)
    count = 20_000
    bounds = model.elbo(x.expand(count, -1, -1), times, generator=generator(2))
    error = float(bounds.std()) / math.sqrt(count)
    assert gap > 10 * error
    assert abs(float(bounds.mean() - (evidence - gap))) < 4 * error
    free = model.elbo(x.expand(count, -1, -1), times, generator=generator(2), weight=0.0)
    assert bool((free > bounds).all())


class LogRates(nn.Module):
    """log lambda = (a + b z_0, a + b z_0)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v)) for v in (a, b))

    def forward(self, z: Tensor) -> Tensor:
        return (self.a + self.b * z[..., :1]).expand(*z.shape[:-1], 2)


@pytest.mark.parametrize("b", [0.0, 0.7])
def test_times_are_a_poisson_process(b: float) -> None:
    """Where z_0 goes at unit speed, rates and their integral are known; so are the gradients."""
    x = collate(ragged())
    rates, found = LogRates(0.3, b), []
    for intensity in (None, rates):
        model = latent(dynamics=straight(), intensity=intensity, solver=TIGHT)
        found.append(model.elbo(x.values, x.times, generator=generator(5)))
    mean, std = model.encode(x.values, x.times)
    z0 = (mean + std * torch.randn(mean.shape, generator=generator(5)))[:, :1]
    a, w = (v.detach().clone().requires_grad_() for v in (rates.a, rates.b))
    seen = x.mask.any(-1)
    last = torch.where(seen, x.times, 0.0).amax(1, keepdim=True)
    over = torch.expm1(w * last) / w if b else last
    expected = 2.0 * torch.exp(a + w * z0) * over
    logs = x.mask.sum(-1) * (a + w * (z0 + x.times))
    exact = torch.where(seen, logs, 0.0).sum(1) - expected[:, 0]
    assert torch.allclose(found[1] - found[0], exact, rtol=1e-7, atol=1e-7)
    grads = torch.autograd.grad(found[1].sum(), [rates.a, rates.b])
    wanted = torch.autograd.grad(exact.sum(), [a, w])
    assert torch.allclose(grads[0], wanted[0], rtol=1e-6)
    assert not b or torch.allclose(grads[1], wanted[1], rtol=1e-6)


def test_noise_is_learned_where_its_logarithm_is_a_parameter() -> None:
    """The bound is that of the same number; and at its best the noise is the error's own size."""
    x, log_noise = collate(ragged()), nn.Parameter(torch.tensor([0.5, 0.5]).log())
    fixed, learned = latent(dynamics=straight()), latent(dynamics=straight())
    learned.log_noise = log_noise
    bounds = [m.elbo(x.values, x.times, generator=generator(5)) for m in (fixed, learned)]
    assert torch.allclose(*bounds, rtol=1e-12)
    assert log_noise in set(learned.parameters())
    grad = torch.autograd.grad(bounds[1].sum(), log_noise)[0]
    error = torch.where(x.mask, x.values - learned.infer(
        x.values, x.times, generator=generator(5)), 0.0)  # fmt: skip
    wanted = (error.square() / 0.25 - x.mask.to(error.dtype)).sum((0, 1))
    assert torch.allclose(grad, wanted, rtol=1e-10)


def test_an_encoder_may_be_given_the_past_alone() -> None:
    x = collate(ragged())
    past = x.values.masked_fill(x.times[..., None] > 0.4, torch.nan)
    model = latent(dynamics=straight())
    whole = model.elbo(x.values, x.times, past, generator=generator(5), weight=0.0)
    path = model.infer(past, x.times, generator=generator(5), at=x.times)
    exact = torch.distributions.Normal(path, 0.5).log_prob(x.values.nan_to_num())
    assert torch.allclose(whole, torch.where(x.mask, exact, 0.0).sum((1, 2)), rtol=1e-8)


@encoders
@torch.no_grad()
def test_what_was_not_seen_changes_nothing(kind: Any) -> None:
    """A row of nothing is as no row, whenever it was, and a value's place is known to be empty."""
    model, times = latent(kind, solver=TIGHT), torch.tensor([0.1, 0.4, 0.5, 0.9])
    x = torch.randn(3, 4, 2, generator=generator())
    x[:, 1] = torch.nan
    x[0, 2, 1] = torch.nan
    kept = [0, 2, 3]

    def bound(x: Tensor, times: Tensor) -> Tensor:
        return model.elbo(x, times, generator=generator(5))

    without = bound(x[:, kept], times[kept])
    for moved in (0.2, 0.45):
        other = times.clone()
        other[1] = moved
        assert torch.allclose(bound(x, other), without, atol=1e-12)
    zero = x[:, kept].nan_to_num()  # seen to be zero is not unseen
    assert not torch.allclose(bound(zero, times[kept])[0], without[0])
    assert torch.allclose(bound(zero, times[kept])[1:], without[1:])


@encoders
@torch.no_grad()
def test_series_come_in_any_order(kind: Any) -> None:
    model, x, order = latent(kind), collate(ragged()), torch.tensor([2, 0, 3, 1])
    mean, std = model.encode(x.values, x.times)
    moved = model.encode(x.values[order], x.times[order])
    assert torch.allclose(torch.stack(moved), torch.stack((mean, std))[:, order], atol=1e-12)


@encoders
def test_gradients_are_those_of_differences(kind: Any) -> None:
    """By every parameter and by the values; what was not seen gets none."""
    model, x = latent(kind), collate(ragged(3))
    values = x.values.requires_grad_()
    names, weights = zip(*model.named_parameters(), strict=True)

    def loss(seen: Tensor, *weights: Tensor) -> Tensor:
        own = dict(zip(names, weights, strict=True))
        keywords = {"generator": generator(4)}
        wrapped = {f"model.{name}": weight for name, weight in own.items()}
        values = x.values.detach().masked_scatter(x.mask, seen)
        return torch.func.functional_call(
            objectives.ELBO(model), wrapped, (values, x.times), keywords
        )

    seen = values.detach()[x.mask].requires_grad_()
    assert torch.autograd.gradcheck(loss, (seen, *weights), fast_mode=True)
    (slope,) = torch.autograd.grad(
        objectives.ELBO(model)(values, x.times, generator=generator(4)), values
    )
    assert torch.equal(slope != 0, x.mask)


@encoders
def test_adjoints_agree(kind: Any) -> None:
    slopes, x = [], collate(ragged())
    for adjoint in (fs.Direct(), fs.Checkpointed(), fs.Backsolve()):
        model = latent(kind, solver=fs.Solver(stepping=TIGHT.stepping, adjoint=adjoint))
        loss = objectives.ELBO(model)(x.values, x.times, generator=generator(4))
        own = torch.autograd.grad(loss, list(model.parameters()))
        assert all(bool((g != 0).any()) for g in own)
        slopes.append(torch.cat([g.flatten() for g in own]))
    direct, checkpointed, backsolved = slopes
    assert torch.allclose(checkpointed, direct, rtol=1e-12, atol=1e-14)
    assert float((backsolved - direct).norm() / direct.norm()) < 1e-7  # of dense output


# --- encoders -------------------------------------------------------------------------------------


@encoders
@torch.no_grad()
def test_a_series_is_read_from_its_end_to_the_start(kind: Any) -> None:
    model, x = latent(kind, start=-1.0), torch.randn(2, 3, 2)
    times = torch.tensor([[0.0, 0.3, 1.0], [0.1, 0.2, 0.4]])
    by_hand = model.starter(model.encoder(x.flip(1), times.flip(1), -1.0)).chunk(2, -1)
    mean, std = model.encode(x, times)
    assert torch.allclose(mean, by_hand[0])
    assert torch.allclose(std.log(), by_hand[1])
    assert not torch.allclose(model.encode(x, times + 0.1)[0], mean)  # it knows how long ago


@torch.no_grad()
def test_an_ode_rnn_knows_the_past_alone() -> None:
    net, x = models.ODERNN(2, 6), torch.randn(3, 5, 2)
    times = torch.rand(3, 5).sort(1).values
    states, other = net.states(x, times), x.clone()
    other[:, 2] += 1.0
    changed = net.states(other, times)
    assert torch.equal(changed[:, :2], states[:, :2])
    assert bool((changed[:, 2:] != states[:, 2:]).any(-1).all())


@torch.no_grad()
def test_between_rows_an_ode_rnn_moves_by_its_ode() -> None:
    """dh/dt = A h, in either direction: exp(A gap), and through a row of nothing the same."""
    rate = torch.randn(6, 6)
    net = models.ODERNN(2, 6, field(rate), fs.Solver(RK4(), fs.Fixed(steps=100)))
    x, times = torch.randn(3, 1, 2), torch.rand(3, 1)
    h = net.cell(torch.cat((x[:, 0], torch.ones(3, 2)), -1))
    for to in (-0.5, 1.5):
        moved = torch.linalg.matrix_exp(rate * (to - times)[..., None]) @ h[..., None]
        found = net(x, times, to)
        assert torch.allclose(found, moved[..., 0], atol=1e-7)
        nothing = torch.cat((x, torch.full_like(x, torch.nan)), 1)
        through = net(nothing, torch.cat((times, 0.5 * (times + to)), 1), to)
        assert torch.allclose(through, found, atol=1e-7)


def test_what_does_not_fit_is_told() -> None:
    model, x = latent(), torch.zeros(2, 3, 2)
    times = torch.tensor([0.0, 0.5, 1.0])
    for given_x, given_times in ((x[0], times), (x, times[:2]), (x, times.expand(3, -1))):
        with pytest.raises(ValueError, match=r"\(batch, n, channels\)"):
            model.encode(given_x, given_times)
    for wrong in (times - 0.5, times.flip(0), times * torch.nan):
        with pytest.raises(ValueError, match="increase, from"):
            model.elbo(x, wrong, generator=generator())
    with pytest.raises(ValueError, match="the start, on"):
        model.infer(x, times, generator=generator(), at=times - 1.0)
    with pytest.raises(TypeError, match="detach"):
        model.infer(x, times, generator=generator(), at=times.clone().requires_grad_())


AUTOCAST = {
    "latent SDE": lambda x, t, g: models.LatentSDE(t, 2, 1.0).elbo(x, generator=g),
    "latent ODE": lambda x, t, g: models.LatentODE(2, 3, 0.5).elbo(x, t, generator=g),
    "neural CDE": lambda x, t, g: models.NeuralCDE(2, 2)(NaturalCubic(t, x)),
}


@pytest.mark.parametrize("make", AUTOCAST.values(), ids=list(AUTOCAST))
def test_series_train_under_autocast(make: Any) -> None:
    """Networks run in half precision, the state does not: it starts in that of the series."""
    torch.set_default_dtype(torch.float32)
    x, t, draws = torch.randn(3, 6, 2), torch.linspace(0.0, 1.0, 6), generator()
    with torch.autocast(x.device.type, torch.bfloat16):
        found = make(x, t, draws)
    found.float().sum().backward()
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("part", ["decoder", "intensity"])
def test_parts_of_other_channels_are_refused(part: str) -> None:
    x, t = torch.randn(3, 6, 2), torch.linspace(0.0, 1.0, 6)
    model = models.LatentODE(2, 3, 0.5, **{part: nn.Linear(3, 1)})
    with pytest.raises(ValueError, match="as many outputs"):
        model.elbo(x, t, generator=generator())
    with pytest.raises(ValueError, match="shaped as x"):
        model.elbo(x, t, x[:1], generator=generator())
    with pytest.raises(ValueError, match="one logarithm a channel"):
        models.LatentODE(2, 3, nn.Parameter(torch.zeros(3)))


def test_nothing_asked_for_is_nothing() -> None:
    x, t, model = torch.randn(3, 6, 2), torch.linspace(0.0, 1.0, 6), latent()
    assert model.sample(0, t, generator=generator()).shape == (0, 6, 2)
    assert model.infer(x, t, at=t[:0], generator=generator()).shape == (3, 0, 2)
    assert model.elbo(x[:0], t, generator=generator()).shape == (0,)
    with pytest.raises(ValueError, match="one row"):
        model.elbo(x[:, :0], t[:0], generator=generator())
