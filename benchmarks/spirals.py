"""Table 2 of the neural ODE paper, forecasts of spirals: ``python -m benchmarks.spirals``.

Series of 100 equally spaced points of two spirals, one clockwise and one not, from places drawn at
random, with noise 0.3; 30, 50 or all of the points are seen. A latent ODE and a recurrent network
that is told the gaps are trained on them, and forecast the next 100 points of other series. The
paper leaves open what it compares them with: here the error is the root mean square over all
coordinates of the forecasts (of the latent ODE the mean of 20 draws) against the next 100 points
*without noise*. Series to train on come from all along the spirals, those to forecast from where
the next points lie on them still. Interrupted, it resumes; a run that has ended is not run again.

Source: Chen et al. 2018, arXiv 1806.07366, section 5.1: latent 4, hidden layers of 20, networks
that recur of 25.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import RK4

from . import reporting

PAPER = {
    "latent ODE": {30: 0.1642, 50: 0.1502, 100: 0.1346},
    "RNN": {30: 0.3937, 50: 0.3202, 100: 0.1813},
}
NOISE, SCALE = 0.3, 5.0  # networks see points over the scale
GAP = 6.0 * math.pi / 999.0  # between points: time is the angle


@dataclass
class Spirals:
    """Times ``(count, kept)`` from 0 and points ``(count, kept, 2)`` that are seen of the first
    100, and those that follow, ``(count, length - 100, 2)``, without noise.
    """

    times: Tensor
    points: Tensor
    ahead: Tensor

    @classmethod
    def of(cls, count: int, kept: int, length: int, seed: int, options: Any) -> Self:
        """r = 15 / (6 pi + 1 - a) about (-5, 0) and r = 0.3 a about (5, 0), at 1000 angles a of
        [0, 6 pi], from any but the first 100 of which there are ``length`` left.
        """
        draws = torch.Generator().manual_seed(seed)
        angle = torch.linspace(0.0, 6.0 * math.pi, 1000)
        back = 6.0 * math.pi + 1.0 - angle
        ways = []
        for r, a, centre in ((15.0 / back, back, -5.0), (0.3 * angle, angle, 5.0)):
            ways.append(torch.stack((r * a.cos() + centre, r * a.sin()), -1))
        first = torch.randint(100, 1001 - length, (count, 1), generator=draws)
        way = torch.randint(2, (count, 1), generator=draws)
        whole = torch.stack(ways)[way, first + torch.arange(length)] / SCALE
        seen = whole[:, :100] + NOISE / SCALE * torch.randn(count, 100, 2, generator=draws)
        places = torch.rand(count, 100, generator=draws).argsort(1)[:, :kept].sort(1).values
        points = seen.gather(1, places[..., None].expand(-1, -1, 2))
        parts = (GAP * places.to(seen.dtype), points, whole[:, 100:])
        return cls(*(part.to(options.device, options.real) for part in parts))


# --- two models -----------------------------------------------------------------------------------


class LatentForecast(nn.Module):
    """The latent ODE's bound, and its forecasts."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = models.LatentODE(
            2, 4, NOISE / SCALE, solver=fs.Solver(RK4(), fs.Fixed(dt=20 * GAP))
        )
        self.bound = objectives.ELBO(self.model, warmup=steps // 10)

    def forward(self, points: Tensor, times: Tensor, *, generator: torch.Generator) -> Tensor:
        """The encoder reads all to half of the points, drawn anew each time, so that it does not
        learn the noise of these series by heart.
        """
        draws = {"generator": generator, "device": points.device}
        most = 0.5 * torch.rand(len(points), 1, **draws)
        hidden = torch.rand(points.shape[:2], **draws) < most
        given = points.masked_fill(hidden[..., None], math.nan)
        return self.bound(points, times, given, generator=generator)

    def forecast(self, points: Tensor, times: Tensor) -> Tensor:
        draws = torch.Generator(device=points.device).manual_seed(0)
        at = GAP * torch.arange(100.0, 200.0, device=points.device, dtype=points.dtype)
        many, own = points.repeat(20, 1, 1), times.repeat(20, 1)
        paths = self.model.infer(many, own, generator=draws, at=at)
        return paths.unflatten(0, (20, -1)).mean(0)


class Recurrent(nn.Module):
    """A recurrent network that foretells the next point from those before and the gap to it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cell, self.readout = nn.RNN(3, 25, batch_first=True), nn.Linear(25, 2)

    def forward(self, points: Tensor, times: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean squared error: its likelihood, but for constants."""
        inputs = torch.cat((points[:, :-1], times.diff(dim=1)[..., None] / GAP), -1)
        return nn.functional.mse_loss(self.readout(self.cell(inputs)[0]), points[:, 1:])

    def forecast(self, points: Tensor, times: Tensor) -> Tensor:
        """Each from its own forecast before it."""
        first = torch.full_like(times[:, :1], 100.0 * GAP)
        gaps = times.diff(dim=1, append=first)[..., None] / GAP
        known, h = self.cell(torch.cat((points, gaps), -1))
        found = [self.readout(known[:, -1])]
        step = torch.ones_like(gaps[:, 0])
        for _ in range(99):
            out, h = self.cell(torch.cat((found[-1], step), -1)[:, None], h)
            found.append(self.readout(out[:, 0]))
        return torch.stack(found, 1)


MODELS: dict[str, Any] = {"latent ODE": LatentForecast, "RNN": Recurrent}
STEPS = {"latent ODE": 18_000, "RNN": 12_000}  # of a training


def run(name: str, kept: int, seed: int, options: Any) -> dict[str, float]:
    """One training: the forecasts' error, and the seconds it took since it was last taken up."""
    from accelerate import Accelerator

    count, tests, steps = (40, 20, 3) if options.small else (1000, 200, STEPS[name])
    train = Spirals.of(count, kept, 100, 2 * seed, options)
    test = Spirals.of(tests, kept, 200, 2 * seed + 1, options)
    torch.manual_seed(seed)
    model = MODELS[name](steps).to(options.device, options.real)
    start = time.perf_counter()
    training.fit(
        model, (train.points, train.times), steps=steps, batch_size=100, seed=seed, lr=1e-2,
        warmup=steps // 50, ema=0.99, accelerator=Accelerator(cpu=options.device == "cpu"),
        checkpoint=options.work / f"{name.replace(' ', '_')}-{kept}-{steps}-{seed}.pt",
        description=f"{name}, {kept} of 100 points, seed {seed}",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    with torch.no_grad():
        missed = SCALE * (model.forecast(test.points, test.times) - test.ahead)
    return {"rmse": float(missed.square().mean().sqrt()), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    made = reporting.parser(__doc__, dtype="float32")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    made.add_argument("--work", type=Path, default=Path("out/spirals"), help="for checkpoints")
    options = reporting.options(made, arguments)
    seeds, kepts = (1, [30]) if options.small else (options.seeds, [30, 50, 100])
    tasks = list(itertools.product(MODELS, kepts, range(seeds)))
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {kept: [] for kept in kepts} for name in MODELS
    }
    for (name, kept, _), result in zip(tasks, results(tasks, options), strict=True):
        found[name][kept].append(result)
    print("Root mean square error of the next 100 points, without noise\n")
    reporting.table(
        ["model", "points seen", "mean", "least", "greatest", "paper"],
        ([name, kept, *spread([r["rmse"] for r in runs]), PAPER[name][kept]]
         for name, of in found.items() for kept, runs in of.items()),
    )  # fmt: skip
    reporting.write("spirals", options, {"found": found})


def results(tasks: Sequence[tuple[str, int, int]], options: Any) -> list[dict[str, float]]:
    """Of all trainings, as many at a time as ``--jobs`` says, each in one thread."""
    if options.jobs == 1:
        return [run(*task, options) for task in tasks]
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        return list(pool.map(partial(run, options=options), *zip(*tasks, strict=True)))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Mean, least and greatest."""
    return statistics.mean(values), min(values), max(values)


if __name__ == "__main__":
    main()
