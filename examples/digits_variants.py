"""Score models trained as DDPM and as NCSN have it, beside EDM's: a part of ``examples.digits``.

The network is the same in all. Each is drawn from by the sampler that it came with, and by
DPM-Solver++(2M) in 20 evaluations: a denoiser takes any.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import objectives
from flowsde.dynamics import NoisePrediction
from flowsde.integrators import DDIM, DPMSolverPP, EDMHeun, EulerMaruyama
from flowsde.nn import TimeMLP
from flowsde.paths import EDM, VE, VP, Schedule, karras, uniform

__all__ = ["SAMPLERS", "ddpm", "ncsn"]

T0: dict[type[Schedule], float] = {EDM: 0.005, VP: 1e-3, VE: 0.0}  # where data stands
LEVELS, EACH, STRIDE = 20, 10, 0.3  # of noise; Langevin steps at each; a step over its variance
Drawn = tuple[Tensor, int]


class Corrected(nn.Module):
    """Noise as it is predicted for data N(0, 1), plus what a network adds to it.

        sigma x / (alpha^2 + sigma^2) + net(t, x)

    Without the first term a small dense network spends its training on it.
    """

    def __init__(self, dim: int, schedule: Schedule) -> None:
        super().__init__()
        self.net, self.schedule = TimeMLP(dim), schedule

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = map(torch.as_tensor, self.schedule(t))
        gain = sigma / (alpha.square() + sigma.square())
        return gain.reshape(-1, *(1,) * (x.ndim - 1)) * x + self.net(t, x)


def _predictor(dim: int, schedule: Schedule) -> fs.Denoiser:
    return fs.Denoiser(Corrected(dim, schedule), schedule, NoisePrediction())


def ddpm(dim: int) -> tuple[fs.Denoiser, nn.Module]:
    """Noise prediction on VP by the simple loss, at any time. Source: Ho et al. 2020."""
    denoiser = _predictor(dim, VP())
    times = objectives.UniformTime(T0[VP], 1.0)
    return denoiser, objectives.DenoisingScoreMatching(denoiser, times)


def ncsn(dim: int) -> tuple[fs.Denoiser, nn.Module]:
    """A score over sigma, weighed by sigma^2, at levels of noise. Source: Song and Ermon 2020."""
    denoiser = _predictor(dim, VE(0.02, 10.0))
    levels = objectives.Levels(tuple(uniform(0.0, 1.0, LEVELS - 1).tolist()))
    return denoiser, objectives.DenoisingScoreMatching(denoiser, levels, objectives.noise_weight)


def _flow(
    denoiser: fs.Denoiser, noise: Tensor, method: fs.Integrator, times: Tensor,
    path: fs.Brownian | None = None,
) -> Drawn:  # fmt: skip
    flow = fs.LinearSDE(denoiser.schedule).probability_flow(denoiser)
    solution = fs.solve(
        flow, noise, float(times[0]), float(times[-1]), integrator=method,
        stepping=fs.Grid(times), path=path,
    )  # fmt: skip
    return solution.y1, solution.stats.evaluations


def _span(denoiser: fs.Denoiser) -> tuple[Schedule, float, float]:
    schedule = denoiser.schedule
    return schedule, schedule.horizon, T0[type(schedule)]


def heun(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """EDM's."""
    return _flow(denoiser, noise, EDMHeun(), karras(*_span(denoiser), 18))


def ancestral(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """DDPM's, in 200 steps."""
    _, t0, t1 = _span(denoiser)
    return _flow(denoiser, noise, DDIM(1.0), uniform(t0, t1, 200), fs.Brownian(seed))


def annealed(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """NCSN's: Langevin steps at each level, and the mean of the data at the last one."""
    schedule, t0, t1 = _span(denoiser)
    levels = uniform(t0, t1, LEVELS - 1).to(noise)
    eps = STRIDE * float(schedule.sigma(t1)) ** 2
    solution = fs.solve(
        fs.LinearSDE(schedule).annealed_langevin(denoiser, levels, EACH, eps), noise,
        integrator=EulerMaruyama(), stepping=fs.Fixed(dt=1.0), path=fs.Brownian(seed),
    )  # fmt: skip
    return denoiser(levels[-1], solution.y1), solution.stats.evaluations + 1


def few(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """DPM-Solver++(2M)."""
    return _flow(denoiser, noise, DPMSolverPP(), karras(*_span(denoiser), 20))


SAMPLERS: dict[str, dict[str, Callable[[fs.Denoiser, Tensor, int], Drawn]]] = {
    "EDM": {"Heun": heun, "DPM-Solver++(2M)": few},
    "DDPM": {"ancestral": ancestral, "DPM-Solver++(2M)": few},
    "NCSN": {"annealed Langevin": annealed, "DPM-Solver++(2M)": few},
}
