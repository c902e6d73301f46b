"""The latent SDE's bound against the evidence it bounds; the SDE-GAN's critic and generator."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators, models, objectives
from flowsde.integrators import EulerMaruyama
from flowsde.integrators.stochastic import Stochastic

from .systems import DEVICE, admits, catalogue, generator

TIMES = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64, device=DEVICE)


def latent(noise: float = 1.0, **more: Any) -> models.LatentSDE:
    torch.manual_seed(1)
    times = TIMES.to(torch.get_default_device())
    solver = fs.Solver(EulerMaruyama(), fs.Grid(torch.linspace(0.0, 1.0, 11)))
    return models.LatentSDE(
        times, 2, noise, latent=2, context=4, width=16, **{"solver": solver, **more}
    )


def series(rows: int = 3) -> Tensor:
    x = torch.randn(rows, 4, 2, generator=generator(3))
    x[:, 1, 0] = torch.nan
    return x


def log_likelihood(x: Tensor, mean: Tensor, noise: float) -> Tensor:
    seen = ~torch.isnan(x)
    law = torch.distributions.Normal(mean, noise)
    return torch.where(seen, law.log_prob(torch.where(seen, x, 0.0)), 0.0).sum((1, 2))


@torch.no_grad()
def test_the_bound_lies_below_the_evidence() -> None:
    """log p(x) by draws of the prior, and by the posterior's draws with Girsanov's weights: equal
    within four standard errors; the mean bound is below by the divergence of the two.
    """
    model, count = latent(), 4000
    x = series(1).repeat(count, 1, 1)
    prior = log_likelihood(x, model.sample(count, generator=generator(5)), model.noise).exp()

    mean, std, context = model.encode(x)
    start = mean + std * torch.randn(mean.shape, generator=generator(6))
    both = fs.girsanov(model.posterior, model.prior)
    saved = model.solver.solve(
        both, both.enter(start), 0.0, 1.0, args=(context,), save_at=model.times,
        path=fs.Brownian(7),
    ).ys  # fmt: skip
    z, weight = both.leave(saved.transpose(0, 1))
    ends = torch.distributions.Normal(model.start[0], model.start[1].exp()).log_prob(start)
    ends = ends - torch.distributions.Normal(mean, std).log_prob(start)
    logs = log_likelihood(x, model.decoder(z), model.noise) + weight[:, -1] + ends.sum(-1)
    posterior = logs.exp()

    def error(v: Tensor) -> float:
        return float(v.std()) / math.sqrt(count)

    gap = float(prior.mean() - posterior.mean())
    assert abs(gap) < 4 * math.hypot(error(prior), error(posterior))
    assert error(posterior) < 0.05 * float(posterior.mean())

    bounds = model.elbo(x, generator=generator(8))
    assert abs(float(bounds.mean() - logs.mean())) < 4 * math.hypot(error(bounds), error(logs))
    assert float(bounds.mean()) + 4 * error(bounds) < float(posterior.mean().log())
    free = model.elbo(x, generator=generator(8), weight=0.0)
    assert bool((free >= bounds).all())


@torch.no_grad()
def test_the_context_knows_what_is_to_come_and_nothing_else() -> None:
    model, x = latent(), series()
    mean, _, context = model.encode(x)
    other = x.clone()
    other[:, 1] += 1.0
    changed = model.encode(other)
    assert torch.equal(changed[2][:, 2:], context[:, 2:])
    assert not torch.allclose(changed[2][:, :2], context[:, :2])
    assert not torch.allclose(changed[0], mean)
    # between the times the first one after t counts; the drift takes t of both shapes
    y, drift = torch.randn(3, 2), model.posterior
    assert torch.equal(
        drift(torch.tensor(0.4), y, context), drift(torch.tensor(0.4), y, changed[2])
    )
    assert not torch.equal(
        drift(torch.tensor(0.2), y, context), drift(torch.tensor(0.2), y, changed[2])
    )
    for t in (0.0, 0.2, 0.3, 1.0):
        own = drift(torch.full((3,), t), y, context)
        assert torch.allclose(own, drift(torch.tensor(t), y, context))


@torch.no_grad()
def test_the_bound_pays_the_divergence_of_the_paths() -> None:
    """The posterior knows what steers it, ``path_kl`` finds it from the two drifts: on one path."""
    model, x, draws = latent(), series(), generator(8)
    mean, std, context = model.encode(x)
    both = fs.path_kl(model.posterior, model.prior)
    start = mean + std * torch.randn(mean.shape, generator=draws)
    saved = model.solver.solve(
        both, both.enter(start), 0.0, 1.0, args=(context,), save_at=model.times, generator=draws
    ).ys  # fmt: skip
    z, kl = both.leave(saved.transpose(0, 1))
    laws = (
        torch.distributions.Normal(mean, std),
        torch.distributions.Normal(model.start[0], model.start[1].exp()),
    )
    ends = torch.distributions.kl_divergence(*laws).sum(-1)
    bound = log_likelihood(x, model.decoder(z), model.noise) - kl[:, -1] - ends
    assert torch.allclose(model.elbo(x, generator=generator(8)), bound, rtol=1e-10)
    assert bool((kl[:, -1] > 0.0).all())


def test_each_component_has_a_diffusion_of_its_own() -> None:
    """So that methods for diagonal noise hold; and prior and posterior share it."""
    model, y = latent(), torch.randn(2)
    assert model.prior.g is model.posterior.g
    jacobian = torch.autograd.functional.jacobian(
        lambda v: model.prior.diffusion(torch.tensor(0.0), v[None])[0], y
    )
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert bool((jacobian.diagonal() != 0).all())


FITTING = [m for m in catalogue(integrators, Stochastic) if admits(m, latent().posterior)]


@pytest.mark.parametrize("method", FITTING, ids=repr)
def test_any_method_that_fits_draws_the_posterior(method: Any) -> None:
    """On one path as Euler-Maruyama with the same steps, near to it."""
    model = latent(solver=fs.Solver(method, fs.Fixed(steps=64)))
    euler = latent(solver=fs.Solver(EulerMaruyama(), fs.Fixed(steps=64)))
    with torch.no_grad():
        a, b = (m.infer(series(), generator=generator(2)) for m in (model, euler))
    assert float((a - b).abs().max()) < 0.25


def test_every_parameter_learns_and_checkpoints_agree() -> None:
    slopes = []
    for adjoint in (fs.Direct(), fs.Checkpointed()):
        model = latent()
        model.solver = fs.Solver(EulerMaruyama(), fs.Fixed(steps=10), adjoint)
        loss = objectives.ELBO(model)(series(), generator=generator(4))
        slopes.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(bool(torch.isfinite(g).all()) and bool((g != 0).any()) for g in slopes[0])
    for a, b in zip(*slopes, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_weight_of_the_divergence_rises() -> None:
    objective, x = objectives.ELBO(latent(), warmup=2), series()
    losses = [float(objective(x, generator=generator(4)).detach()) for _ in range(4)]
    assert losses[0] < losses[1] < losses[2] == losses[3]
    objective.eval()
    assert int(objective.batches) == 4
    objective(x, generator=generator(4))
    assert int(objective.batches) == 4


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="one row a time"):
        latent().encode(torch.zeros(2, 3, 2))
    for make in (latent_at, models.PathDiscriminator, models.PathGenerator):
        with pytest.raises(ValueError, match="increasing"):
            make(torch.tensor([0.0, 0.0]), 1)


def latent_at(times: Tensor, channels: int) -> models.LatentSDE:
    return models.LatentSDE(times, channels, 1.0)


# --- SDE-GAN --------------------------------------------------------------------------------------


def test_clipping_keeps_linear_maps_from_stretching() -> None:
    critic = models.PathDiscriminator(torch.linspace(0.0, 1.0, 5), 2)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(50.0)
    maps = [m for m in critic.modules() if isinstance(m, torch.nn.Linear)]

    def stretch(m: torch.nn.Linear) -> float:
        return float(torch.linalg.matrix_norm(m.weight.detach(), 1))  # the norm of sums of moduli

    assert all(stretch(m) > 1.0 for m in maps)
    critic.clip()
    assert all(stretch(m) <= 1.0 + 1e-12 for m in maps)
    x = torch.linspace(-9.0, 9.0, 2001, requires_grad=True)
    (slopes,) = torch.autograd.grad(models.LipSwish()(x).sum(), x)
    assert 0.99 < float(slopes.abs().max()) <= 1.0


@torch.no_grad()
def test_the_critic_judges_the_path_not_its_points() -> None:
    """A further point on a straight piece changes nothing but the steps."""
    torch.manual_seed(0)
    coarse, fine = torch.tensor([0.0, 0.5, 1.0]), torch.linspace(0.0, 1.0, 5)
    exact = fs.Solver(stepping=fs.Adaptive(1e-9, 1e-9, jump_at=(0.5,)))
    a = models.PathDiscriminator(coarse, 2, solver=exact)
    b = models.PathDiscriminator(fine, 2, solver=exact)
    b.load_state_dict({**a.state_dict(), "times": fine})
    y = torch.randn(3, 3, 2)
    middle = 0.5 * (y[:, 1:] + y[:, :-1])
    dense = torch.stack((y[:, 0], middle[:, 0], y[:, 1], middle[:, 1], y[:, 2]), 1)
    assert torch.allclose(a(y), b(dense), atol=1e-7)
    assert not torch.allclose(a(y), a(y + 1.0), atol=1e-3)


def test_the_generator_learns_from_the_critic() -> None:
    times = torch.linspace(0.0, 1.0, 5)
    steps = fs.Solver(integrators.StochasticHeun(), fs.Grid(times))
    made = models.PathGenerator(times, 2, solver=steps)
    critic = models.PathDiscriminator(times, 2)
    paths = made(6, generator=generator())
    assert torch.equal(paths, made(6, generator=generator()))
    assert not torch.equal(paths, made(6, generator=generator(1)))
    every = [*made.parameters(), *critic.parameters()]
    slopes = torch.autograd.grad(critic(paths).sum(), every)
    assert all(bool((g != 0).any()) for g in slopes)


def test_the_context_is_of_the_time_to_come_whatever_the_times_dtype() -> None:
    """Decimal times are not the same number in float32 and in float64."""
    times = torch.arange(11, dtype=torch.float64) / 10
    found = []
    for t in (times, times.float()):
        torch.manual_seed(0)
        model = models.LatentSDE(t, 1, 0.1, solver=fs.Solver(EulerMaruyama(), fs.Grid(t))).float()
        model.times = t
        context = torch.zeros(2, 11, 32, dtype=torch.float32, requires_grad=True)
        start = torch.zeros(2, 4, dtype=torch.float32)
        z = model._solve(model.posterior, start, t, generator(0), (context,))
        slope = torch.autograd.grad(z.square().sum(), context)[0].abs().sum((0, 2))
        found.append(slope[1:] > 0.0)
    assert bool(torch.stack(found).all())


def test_only_networks_of_a_gan_are_narrowed_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    solve = fs.Solver.solve

    def spy(self: fs.Solver, dynamics: Any, y0: Tensor, *args: Any, **more: Any) -> Any:
        kinds.append(y0.dtype)
        return solve(self, dynamics, y0, *args, **more)

    monkeypatch.setattr(fs.Solver, "solve", spy)
    maker, critic = models.PathGenerator(TIMES, 2), models.PathDiscriminator(TIMES, 2)
    with torch.autocast(TIMES.device.type, dtype=torch.bfloat16):
        critic(maker(3, generator=generator(0)))
    assert kinds == [torch.float64, torch.float64]
