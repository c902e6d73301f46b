"""Latent ODEs: what periodic series did between their few points, and what they will do.

    python -m examples.latent_ode [--seed 0] [--out out/latent_ode] [--small]

Series x(t) = c + sin(2 pi f t) with frequencies and levels of their own, seen with noise at 20 of
100 irregular times, each at its own, and in the first half of their span alone. Trains a latent ODE
with either encoder, a GRU that is told the gaps and an ODE-RNN, and prints its error on other
series, between the points and beyond them, and how often the posterior's 90 % band holds the truth.
Interrupted, it resumes.

Source: Rubanova et al. 2019, arXiv 1907.03907, section 4.1.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import RK4
from flowsde.models import ODERNN, GapGRU, LatentODE

from . import saving

NOISE, SPAN = 0.1, 5.0
ENCODERS = {"GRU": GapGRU, "ODE-RNN": ODERNN}


@dataclass
class Periodic:
    """Times ``(count, n)`` of each series's own, values ``(count, n, 1)``, and the truth."""

    times: Tensor
    values: Tensor
    level: Tensor
    frequency: Tensor

    @classmethod
    def of(cls, grid: Tensor, count: int, seed: int) -> Periodic:
        """Each seen at 20 times of the grid's first half."""
        draws = torch.Generator().manual_seed(seed)
        frequency = 0.4 + 0.4 * torch.rand(count, 1, generator=draws)
        level = 1.0 + 0.1 * torch.randn(count, 1, generator=draws)
        early = grid[grid < 0.5 * SPAN]
        places = torch.rand(count, len(early), generator=draws).argsort(1)[:, :20].sort(1).values
        made = cls(early[places], torch.zeros(count, 20, 1), level, frequency)
        truth = made.truth(made.times)
        made.values = truth + NOISE * torch.randn(truth.shape, generator=draws)
        return made

    def truth(self, times: Tensor) -> Tensor:
        return (self.level + (2.0 * torch.pi * self.frequency * times).sin())[..., None]


def fit(kind: type[models.Encoder], data: Periodic, steps: int, seed: int, path: Path) -> LatentODE:
    from accelerate import Accelerator

    torch.manual_seed(seed)
    model = LatentODE(1, 4, NOISE, encoder=kind(1), solver=fs.Solver(RK4(), fs.Fixed(dt=0.25)))
    training.fit(
        objectives.ELBO(model, warmup=steps // 4), (data.values, data.times), steps=steps,
        batch_size=50, seed=seed, lr=1e-2, warmup=steps // 20, ema=0.98, clip=10.0,
        accelerator=Accelerator(cpu=True), checkpoint=path, description=path.stem,
    )  # fmt: skip
    return model


@torch.no_grad()
def posterior(model: LatentODE, data: Periodic, at: Tensor, draws: int, seed: int) -> Tensor:
    """Paths under the series, ``(draws, count, n)``."""
    many, own = data.values.repeat(draws, 1, 1), data.times.repeat(draws, 1)
    paths = model.infer(many, own, generator=torch.Generator().manual_seed(seed), at=at)
    return paths.unflatten(0, (draws, -1))[..., 0]


def report(paths: Tensor, truth: Tensor, at: Tensor) -> dict[str, float]:
    """Root mean square error of the mean path and coverage, between the points and beyond."""
    low, high = paths.quantile(torch.tensor([0.05, 0.95]), dim=0)
    found = {}
    for name, part in (("between", at < 0.5 * SPAN), ("beyond", at >= 0.5 * SPAN)):
        inside = (low <= truth) & (truth <= high)
        found[f"error {name}"] = float((paths.mean(0) - truth)[:, part].square().mean().sqrt())
        found[f"coverage {name}"] = float(inside[:, part].float().mean())
    return found


def picture(test: Periodic, at: Tensor, paths: dict[str, Tensor], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(paths), 3, figsize=(12.0, 2.8 * len(paths)), squeeze=False)
    truth = test.truth(at)[..., 0]
    for (name, drawn), row in zip(paths.items(), axes, strict=True):
        for i, axis in enumerate(row):
            low, high = drawn[:, i].quantile(torch.tensor([0.05, 0.95]), dim=0)
            axis.fill_between(at, low, high, color="#4477aa", alpha=0.3, lw=0)
            axis.plot(at, drawn[:, i].mean(0), color="#4477aa", lw=1.2)
            axis.plot(at, truth[i], "--", color="#222222", lw=0.8)
            axis.plot(test.times[i], test.values[i, :, 0], ".", color="#cc3311")
            axis.set(title=name, ylim=(-0.6, 2.6))
    saving.picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("out/latent_ode"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    count, steps, draws = (50, 2, 4) if options.small else (800, options.steps, 40)
    out, seed = options.out, options.seed
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    start, draw = time.perf_counter(), torch.Generator().manual_seed(seed)
    at = torch.cat((torch.zeros(1), SPAN * torch.rand(99, generator=draw).sort().values))
    train, test = (
        Periodic.of(at, n, 2 * seed + part) for part, n in enumerate((count, count // 4))
    )
    found, paths = {}, {}
    for name, kind in ENCODERS.items():
        model = fit(kind, train, steps, seed, out / f"{name}.pt")
        paths[name] = posterior(model, test, at, draws, seed)
        found[name] = report(paths[name], test.truth(at)[..., 0], at)
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name].items()))
    picture(test, at, paths, out / "periodic.png")
    seconds = time.perf_counter() - start
    saving.record({**found, "seconds": seconds}, out / "results.json")
    print(f"picture and figures in {out}, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
