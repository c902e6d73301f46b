"""Score models trained as DDPM and as NCSN have it, beside EDM's: a part of ``examples.digits``.

The network is the same in all. Each is drawn from by the sampler that it came with, and by
DPM-Solver++(2M) in some 20 evaluations: a denoiser takes any.
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
from flowsde.paths import EDM, VE, Cosine, Schedule, karras, uniform

__all__ = ["SAMPLERS", "SPANS", "ddpm", "ncsn"]

SPANS: dict[type[Schedule], tuple[float, float]] = {  # from noise to where data stands
    EDM: (40.0, 0.005), Cosine: (0.999, 0.005), VE: (1.0, 0.0),
}  # fmt: skip
LEVELS, EACH, STRIDE = 16, 10, 0.3  # of noise; Langevin steps at each; a step over its variance
Drawn = tuple[Tensor, int]


class Corrected(nn.Module):
    """Noise as it is predicted for data N(0, spread^2), plus what a network adds to it.

        sigma x / (alpha^2 spread^2 + sigma^2) + net(t, x / (alpha^2 + sigma^2)^(1/2))

    Without the first term a small dense network spends its training on it.

    Args:
        spread: of each coordinate, ``(dim,)``.
    """

    spread: Tensor

    def __init__(self, spread: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.net, self.schedule = TimeMLP(len(spread)), schedule
        self.register_buffer("spread", spread)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = (torch.as_tensor(v).reshape(-1, 1) for v in self.schedule(t))
        gain = sigma / ((alpha * self.spread).square() + sigma.square())
        return gain * x + self.net(t, x / torch.hypot(alpha, sigma))


def _predictor(spread: Tensor, schedule: Schedule) -> fs.Denoiser:
    return fs.Denoiser(Corrected(spread, schedule), schedule, NoisePrediction())


def ddpm(spread: Tensor) -> tuple[fs.Denoiser, nn.Module]:
    """Noise prediction by the simple loss, at any time. Source: Ho et al. 2020, arXiv 2006.11239,
    on the schedule of Nichol and Dhariwal 2021, which spends fewer times where no signal is left.
    """
    denoiser = _predictor(spread, Cosine())
    times = objectives.UniformTime(*reversed(SPANS[Cosine]))
    return denoiser, objectives.DenoisingScoreMatching(denoiser, times)


def ncsn(spread: Tensor) -> tuple[fs.Denoiser, nn.Module]:
    """A score over sigma, weighed by sigma^2, at levels of noise. Source: Song and Ermon 2020,
    arXiv 2006.09011.
    """
    denoiser = _predictor(spread, VE(0.05, 8.0))
    levels = objectives.Levels(tuple(_levels(denoiser).tolist()))
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


def _span(denoiser: fs.Denoiser) -> tuple[float, float]:
    return SPANS[type(denoiser.schedule)]


def _levels(denoiser: fs.Denoiser) -> Tensor:
    return uniform(*_span(denoiser), LEVELS - 1)


def heun(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """EDM's."""
    return _flow(denoiser, noise, EDMHeun(), karras(denoiser.schedule, *_span(denoiser), 18))


def ancestral(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """DDPM's, in 200 steps."""
    times = uniform(*_span(denoiser), 200)
    return _flow(denoiser, noise, DDIM(1.0), times, fs.Brownian(seed))


def annealed(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """NCSN's: Langevin steps at each level, and the mean of the data at the last one."""
    schedule, levels = denoiser.schedule, _levels(denoiser).to(noise)
    eps = STRIDE * float(schedule.sigma(levels[-1])) ** 2
    solution = fs.solve(
        fs.LinearSDE(schedule).annealed_langevin(denoiser, levels, EACH, eps), noise,
        integrator=EulerMaruyama(), stepping=fs.Fixed(dt=1.0), path=fs.Brownian(seed),
    )  # fmt: skip
    return denoiser(levels[-1], solution.y1), solution.stats.evaluations + 1


def few(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """DPM-Solver++(2M) in 20 steps."""
    return _flow(denoiser, noise, DPMSolverPP(), karras(denoiser.schedule, *_span(denoiser), 20))


def few_levels(denoiser: fs.Denoiser, noise: Tensor, seed: int) -> Drawn:
    """DPM-Solver++(2M) from each level to the next: a network knows no others."""
    return _flow(denoiser, noise, DPMSolverPP(), _levels(denoiser))


SAMPLERS: dict[str, dict[str, Callable[[fs.Denoiser, Tensor, int], Drawn]]] = {
    "EDM": {"Heun": heun, "DPM-Solver++(2M)": few},
    "DDPM": {"ancestral": ancestral, "DPM-Solver++(2M)": few},
    "NCSN": {"annealed Langevin": annealed, "DPM-Solver++(2M)": few_levels},
}
