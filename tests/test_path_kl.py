"""Divergences and weights between laws of paths, against Ornstein-Uhlenbeck in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import EulerMaruyama, StochasticHeun

KINDS = ("diagonal", "scalar", "wide scalar", "general", "tall", "wide")
RATE, PULL, LEVEL, SIZE, START = 0.5, 1.0, 0.2, 0.6, -0.3
END = 1.2
MIX = torch.tensor([[1.0, 0.4], [-0.3, 0.8]], dtype=torch.float64, device="cpu")
ROWS = torch.tensor([[0.6, 0.8, 0.0], [-0.48, 0.36, 0.8]], dtype=torch.float64, device="cpu")
TALL = torch.tensor([[1.0], [2.0]], dtype=torch.float64, device="cpu")


def ornstein_uhlenbeck(kind: str) -> tuple[fs.SDE, fs.SDE, Tensor]:
    """dx = -rate (x - level) dt + SIZE dW twice, seen as y = A x through each kind of noise."""
    a = {"diagonal": torch.eye(2), "scalar": torch.eye(1), "wide scalar": TALL, "tall": TALL}.get(
        kind, MIX
    )
    a = a.to(torch.get_default_device())
    back = torch.linalg.pinv(a)
    g = SIZE * a
    if kind == "wide":
        g = SIZE * a @ ROWS.to(a)

    def noise(t: Tensor, y: Tensor) -> Tensor:
        if kind == "diagonal":
            return torch.full_like(y, SIZE)
        return g.T.expand_as(y) if "scalar" in kind else g.expand(len(y), *g.shape)

    def make(rate: float, level: float) -> fs.SDE:
        def drift(t: Tensor, y: Tensor) -> Tensor:
            return (-rate * (y @ back.T - level)) @ a.T

        name: Any = kind.removeprefix("wide ")
        if name in ("tall", "wide"):
            name = "general"
        size = g.shape[1] if name == "general" else None
        return fs.SDE(drift, noise, noise=name, additive=True, noise_size=size)

    return make(PULL, LEVEL), make(RATE, 0.0), a


def divergence(count: int, rate: float = RATE) -> float:
    """KL of the paths of ``count`` independent components, posterior from prior."""
    b, c, gap = PULL, rate - PULL, START - LEVEL
    once, twice = -math.expm1(-b * END) / b, -math.expm1(-2 * b * END) / (2 * b)
    constant = rate * LEVEL
    mean = constant**2 * END + 2 * constant * c * gap * once + c**2 * gap**2 * twice
    variance = c**2 * SIZE**2 / (2 * b) * (END - twice)
    return count * (mean + variance) / (2 * SIZE**2)


def start(rows: int, a: Tensor) -> Tensor:
    return torch.full((rows, a.shape[1]), START) @ a.T


def run(
    dynamics: fs.Dynamics, z0: Tensor, integrator: Any, steps: int = 30, seed: int = 0, **more: Any
) -> fs.Solution:
    more = {"path": fs.Brownian(seed), "stepping": fs.Fixed(steps=steps), **more}
    return fs.solve(dynamics, z0, 0.0, END, integrator=integrator, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_ornstein_uhlenbeck(kind: str) -> None:
    """Within four standard errors (6e-5 by chance); Heun's own bias is a hundredth of one."""
    posterior, prior, a = ornstein_uhlenbeck(kind)
    both = fs.path_kl(posterior, prior)
    z = run(both, both.enter(start(3000, a)), StochasticHeun()).y1
    _, kl = both.leave(z)
    error = float(kl.std()) / math.sqrt(len(kl))
    truth = divergence(a.shape[1])
    assert error < 0.03 * truth
    assert abs(float(kl.mean()) - truth) < 4 * error
    same = fs.path_kl(prior, prior)
    assert torch.equal(same.leave(run(same, z, EulerMaruyama()).y1)[1], kl)  # adds nothing


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_mean_one_and_the_divergence(kind: str) -> None:
    posterior, prior, a = ornstein_uhlenbeck(kind)
    both = fs.girsanov(posterior, prior)
    z = run(both, both.enter(start(3000, a)), EulerMaruyama()).y1
    y, weight = both.leave(z)
    drifted = fs.path_kl(posterior, prior)
    again, kl = drifted.leave(run(drifted, drifted.enter(start(3000, a)), EulerMaruyama()).y1)
    assert torch.allclose(y, again)  # on one path

    def close(values: Tensor, truth: Any) -> None:
        error = values.std(0) / math.sqrt(len(values))
        assert bool(((values.mean(0) - truth).abs() < 4 * error).all())

    close(weight.exp(), 1.0)
    close(weight + kl, 0.0)
    # Euler's chains are weighted exactly: the prior's mean is that of Euler's chain
    mean = (1 - RATE * END / 30) ** 30 * start(1, a)[0]
    close(weight.exp()[:, None] * y, mean)


def test_weights_are_the_ratio_of_densities_of_eulers_chain() -> None:
    """sum log N(y1; y0 + f_prior dt, g^2 dt) - log N(y1; y0 + f_posterior dt, g^2 dt)."""

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.4 + 0.3 * torch.sin(y)

    posterior = fs.SDE(lambda t, y: torch.cos(y) - t * y.flip(-1), g, noise="diagonal")
    prior = fs.SDE(lambda t, y: -y, g, noise="diagonal")
    both, dt = fs.girsanov(posterior, prior), END / 20
    found = run(both, both.enter(torch.randn(5, 3)), EulerMaruyama(), 20, save_at=fs.Steps(1))
    ys, weights = both.leave(found.ys)
    ratio = torch.zeros(5)
    for t, y0, y1 in zip(found.ts, ys[:-1], ys[1:], strict=False):
        for sde, sign in ((prior, 1.0), (posterior, -1.0)):
            law = torch.distributions.Normal(y0 + sde(t, y0) * dt, g(t, y0) * math.sqrt(dt))
            ratio = ratio + sign * law.log_prob(y1).sum(-1)
    assert torch.allclose(weights[-1], ratio, rtol=1e-11, atol=1e-11)


def test_stratonovich_weights_through_the_conversion() -> None:
    """The Ito sum by Euler, the Stratonovich sum by Heun: nearer to each other as steps shrink."""

    def g(t: Tensor, y: Tensor) -> Tensor:
        return 0.5 + 0.3 * torch.sin(y)

    posterior = fs.SDE(lambda t, y: torch.cos(y), g, noise="diagonal", stratonovich=True)
    prior = fs.SDE(lambda t, y: -y, g, noise="diagonal", stratonovich=True)
    with pytest.raises(TypeError, match="to_ito"):
        fs.girsanov(posterior, prior)
    ito = fs.girsanov(fs.to_ito(posterior), fs.to_ito(prior))
    gaps, z0 = [], ito.enter(torch.zeros(200, 1))
    readings = ((ito, EulerMaruyama()), (fs.to_stratonovich(ito), StochasticHeun()))
    for steps in (8, 64):
        path = fs.Brownian(1, torch.linspace(0.0, END, 65))
        with torch.no_grad():
            ends = [run(d, z0, m, steps, path=path).y1 for d, m in readings]
        gaps.append(float((ends[0] - ends[1])[:, 1].square().mean().sqrt()))
    assert math.log2(gaps[0] / gaps[1]) / 3 > 0.35


def test_the_path_is_that_of_the_posterior_alone() -> None:
    posterior, prior, _ = ornstein_uhlenbeck("diagonal")
    both, y0 = fs.path_kl(posterior, prior), torch.randn(6, 2)
    alone = run(posterior, y0, EulerMaruyama(), seed=4).y1
    assert torch.equal(both.leave(run(both, both.enter(y0), EulerMaruyama(), seed=4).y1)[0], alone)


def test_gradients_are_those_of_the_closed_form() -> None:
    """Of the divergence by the prior's rate, within four standard errors."""
    rate = torch.tensor(RATE, requires_grad=True)

    def g(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return torch.full_like(y, SIZE)

    posterior = fs.SDE(lambda t, y, r: -PULL * (y - LEVEL), g, noise="diagonal", additive=True)
    prior = fs.SDE(lambda t, y, r: -r * y, g, noise="diagonal", additive=True)
    both, y0 = fs.path_kl(posterior, prior), torch.full((2000, 1), START)
    rates = rate.expand(2000, 1)
    _, kl = both.leave(run(both, both.enter(y0), StochasticHeun(), args=(rates,)).y1)
    (slopes,) = torch.autograd.grad(kl.sum(), rates)
    error = float(slopes.std()) / math.sqrt(2000)
    truth = (divergence(1, RATE + 1e-4) - divergence(1, RATE - 1e-4)) / 2e-4
    assert abs(float(slopes.mean()) - truth) < 4 * error
    assert error < 0.05 * abs(truth)


def test_infinite_divergences_are_told() -> None:
    def sde(level: float, g: Any, noise: Any = "diagonal") -> fs.SDE:
        return fs.SDE(lambda t, y: y * 0 + torch.tensor([level, 1.0]), g, noise=noise)

    def still(t: Tensor, y: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.5]).expand_as(y)

    def pair(a: fs.SDE, b: fs.SDE) -> Tensor:
        both = fs.path_kl(a, b)
        return both.leave(run(both, both.enter(torch.zeros(3, 2)), EulerMaruyama()).y1)[1]

    assert torch.equal(pair(sde(1.0, still), sde(1.0, still)), torch.zeros(3))
    for noise in ("diagonal", "scalar"):
        with pytest.raises(fs.NonFiniteState):
            pair(sde(1.0, still, noise), sde(2.0, still, noise))
    with pytest.raises(fs.NonFiniteState, match="the diffusions of posterior and prior differ"):
        pair(sde(1.0, still), sde(1.0, lambda t, y: 2 * still(t, y)))
    assert torch.equal(
        pair(sde(1.0, still), sde(1.0, lambda t, y: 1.0 * still(t, y))), torch.zeros(3)
    )


def test_gradients_stay_finite_where_neither_moves() -> None:
    size = torch.tensor([0.0, 1.0], requires_grad=True)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return size.expand_as(y)

    a = fs.SDE(lambda t, y: torch.stack((0.0 * size[0] + 0 * y[:, 0], y[:, 1]), -1), g,
               noise="diagonal")  # fmt: skip
    b = fs.SDE(lambda t, y: 0 * y, g, noise="diagonal")
    both = fs.path_kl(a, b)
    kl = both.leave(run(both, both.enter(torch.ones(2, 2)), EulerMaruyama()).y1)[1]
    (slope,) = torch.autograd.grad(kl.sum(), size)
    assert bool(torch.isfinite(slope).all())
    assert float(slope[1]) != 0.0


def test_what_does_not_fit_is_refused_with_the_cure() -> None:
    posterior, prior, _ = ornstein_uhlenbeck("diagonal")
    other, _, _ = ornstein_uhlenbeck("general")
    for pair in (fs.path_kl, fs.girsanov):
        with pytest.raises(TypeError, match="share one diffusion"):
            pair(posterior, other)
        with pytest.raises(TypeError, match="no noise"):
            pair(fs.ODE(lambda t, y: y), prior)
        both = pair(posterior, prior)
        with pytest.raises(TypeError, match="enter"):
            run(both, torch.zeros(3), EulerMaruyama())
        with pytest.raises(ValueError, match="forwards"):
            fs.solve(
                both, torch.zeros(2, 3), 1.0, 0.0, integrator=EulerMaruyama(),
                stepping=fs.Fixed(steps=2), path=fs.Brownian(0),
            )  # fmt: skip
