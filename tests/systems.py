"""Systems with known answers, shared by the tests."""

from __future__ import annotations

import inspect
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde import Schedule
from flowsde.dynamics import UnderdampedLangevin
from flowsde.integrators import Draws, Integrator
from flowsde.paths import (
    EDM,
    VE,
    VP,
    Cosine,
    Discrete,
    FlowMatching,
    LearnedSchedule,
    SubVP,
    Trigonometric,
)  # fmt: skip

DEVICE = torch.device(os.environ.get("FLOWSDE_TEST_DEVICE", "cpu"))
SCHEDULES = (VP(), VE(sigma_max=20.0), Cosine(), FlowMatching(), EDM(sigma_max=20.0))
EVERY_SCHEDULE = (
    *SCHEDULES, SubVP(), Trigonometric(), Discrete.linear(),
    Discrete.from_alphas_cumprod(Trigonometric().alpha(torch.arange(1, 201) / 200).square()),
    LearnedSchedule(width=8).double().requires_grad_(False).to(DEVICE),
)  # fmt: skip


def catalogue(module: ModuleType, kind: type) -> list[Any]:
    """Every concrete class of a kind that a catalogue exports, as it is made by default."""
    classes = (getattr(module, name) for name in module.__all__)
    return [
        c() for c in classes
        if inspect.isclass(c) and issubclass(c, kind) and not inspect.isabstract(c)
        and c.__name__ not in ("ExplicitRK", "ImplicitRK", "PredictorCorrector")
    ]  # fmt: skip


def admits(method: Integrator, dynamics: fs.Dynamics) -> bool:
    """Whether the dynamics has the structure that the method needs."""
    try:
        method.check(dynamics)
    except TypeError:
        return False
    return True


def suited(method: Integrator, f: Any, y0: Any) -> tuple[fs.Dynamics, Any]:
    """Dynamics made of a field f with a structure that the method admits, and a start for it."""
    systems = (
        (fs.ODE(f, batched_time=True), y0),
        (fs.ODE(f, linear=-1.5, batched_time=True), y0),
        (fs.ODE(lambda t, y: (f(t, y[1]), f(t, y[0])), separable=True), (y0, y0)),
        (fs.SDE(f, lambda t, y: 0.3 + 0.0 * y, noise="diagonal", additive=True), y0),
        (UnderdampedLangevin(f), (y0, y0)),
    )
    return next((d, start) for d, start in systems if admits(method, d))


def increments(path: fs.Brownian, grid: list[float], like: Any) -> Any:
    """W over step n of the grid, as a function of n."""
    source = path.bind(grid, Draws(like))
    return lambda n: source(n, grid[n], grid[n + 1]).w


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(seed)


def slope(errors: list[float], steps: list[int]) -> float:
    """Least-squares order of convergence."""
    x = torch.tensor([-math.log(n) for n in steps], device="cpu")
    y = torch.tensor([math.log(e) for e in errors], device="cpu")
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def log_norm(states: Any) -> float:
    return max(float(x.abs().max()) for x in torch.utils._pytree.tree_leaves(states))


class Mixture:
    """A Gaussian mixture in d dimensions, with the exact law of its noising by any schedule."""

    def __init__(self, weights: Tensor, means: Tensor, std: float) -> None:
        self.weights, self.means, self.std = weights, means, std

    @classmethod
    def two(cls) -> Mixture:
        weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-1.5, 0.5], [1.0, -0.5]])
        return cls(weights.to(DEVICE), means.to(DEVICE), 0.4)

    def _logits(self, x: Tensor, alpha: Any, variance: Any) -> Tensor:
        gaps = x[:, None] - alpha * self.means
        return self.weights.log() - 0.5 * (gaps.square() / variance).sum(-1)

    def log_prob(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        variance = alpha**2 * self.std**2 + sigma**2
        logits = self._logits(x, alpha, variance)
        return logits.logsumexp(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi * variance)

    def denoiser(self, schedule: Schedule) -> Any:
        """E[x0 | x_t], in closed form."""

        def x0(t: Tensor, x: Tensor) -> Tensor:
            alpha, sigma = schedule(t)
            alpha, sigma = (v.reshape(v.shape + (1,) * (x.ndim - v.ndim)) for v in (alpha, sigma))
            variance = alpha**2 * self.std**2 + sigma**2
            part = self._logits(
                x,
                alpha.unsqueeze(-1) if alpha.ndim else alpha,
                variance.unsqueeze(-1) if variance.ndim else variance,
            ).softmax(-1)
            gain = alpha * self.std**2 / variance
            posterior = self.means + gain[..., None] * (
                x[:, None] - (alpha[..., None] if alpha.ndim else alpha) * self.means
            )
            return (part[..., None] * posterior).sum(1)

        return x0

    def sample(self, count: int, seed: int) -> Tensor:
        draws = generator(seed)
        rows = torch.multinomial(self.weights, count, replacement=True, generator=draws)
        noise = torch.randn(count, self.means.shape[1], generator=draws)
        return self.means[rows] + self.std * noise


class Noised(fs.Base):
    """The law of a mixture that has been noised, as the base of a flow."""

    def __init__(self, mixture: Mixture, alpha: float, sigma: float) -> None:
        super().__init__()
        self.mixture, self.alpha, self.sigma = mixture, alpha, sigma
        self.event_shape = mixture.means.shape[1:]

    def log_prob(self, x: Tensor) -> Tensor:
        return self.mixture.log_prob(x, self.alpha, self.sigma)

    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        raise NotImplementedError("only densities are asked for")
