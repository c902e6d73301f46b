"""Latent SDEs: paths under noisy series, and a prior to draw new ones from.

    python -m examples.latent_sde [--seed 0] [--out out/latent_sde] [--small]

Checks the divergence between two Ornstein-Uhlenbeck laws against its closed form. Then trains a
latent SDE twice, on Ornstein-Uhlenbeck series at irregular times and on the stochastic Lorenz
attractor, with a third of the points held out, and prints how often the posterior's bands cover
them. Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import EulerMaruyama, StochasticHeun

from . import saving

HELD = 1 / 3  # of the points, hidden from the model
BANDS = (0.5, 0.9)


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Series:
    """Series ``(count, n, channels)`` at shared times, and the noise they are seen through."""

    name: str
    times: Tensor
    values: Tensor
    noise: float

    def split(self, tests: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Training series and test series with points held out, and the test series whole."""
        draws = torch.Generator().manual_seed(seed)
        hidden = torch.rand(self.values.shape[:2], generator=draws) < HELD
        shown = self.values.masked_fill(hidden[..., None], torch.nan)
        return shown[tests:], shown[:tests], self.values[:tests]


def ornstein_uhlenbeck(count: int, seed: int) -> Series:
    """dy = -y dt + 0.8 dW from rest, at 20 irregular times of [0, 3], seen with noise 0.2."""
    draws, noise = torch.Generator().manual_seed(seed), 0.2
    times = torch.cat((torch.zeros(1), 3.0 * torch.rand(19, generator=draws).sort().values))
    sde = fs.SDE(
        lambda t, y: -y, lambda t, y: torch.full_like(y, 0.8), noise="diagonal", additive=True
    )
    start = 0.8 / math.sqrt(2.0) * torch.randn(count, 1, generator=draws)
    ys = fs.solve(
        sde, start, 0.0, float(times[-1]), integrator=EulerMaruyama(), stepping=fs.Grid(times),
        save_at=times, generator=draws,
    ).ys  # fmt: skip
    values = ys.transpose(0, 1)
    seen = values + noise * torch.randn(values.shape, generator=draws)
    return Series("Ornstein-Uhlenbeck", times, seen, noise)


def approach(times: Tensor, rest: float, ratio: float = 1.3) -> Tensor:
    """The times, and steps between them that shrink as the next one nears.

    The law of a path given y(t_i) + noise is pulled there in proportion to 1 / (rest + t_i - t),
    with rest = (noise / g)^2. The noise of a step is not pulled back within it, and a bound on
    the evidence pays for it by a smaller g and narrow bands: steps of a size in the logarithm of
    rest + t_i - t pay the least.
    """
    cut = []
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        span = math.log1p((end - start) / rest)
        count = max(1, math.ceil(span / math.log(ratio)))
        left = torch.linspace(span, 0.0, count + 1)[1:-1]
        cut += [torch.tensor([start]), end - rest * torch.expm1(left)]
    return torch.cat((*cut, times[-1:]))


def lorenz(count: int, seed: int) -> Series:
    """The stochastic Lorenz attractor of Li et al. 2020, over its spread, seen with noise 0.1."""
    draws, noise = torch.Generator().manual_seed(seed), 0.1
    times = torch.linspace(0.0, 1.0, 41)

    def drift(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack((10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c), -1)

    sde = fs.SDE(drift, lambda t, y: torch.full_like(y, 0.15), noise="diagonal", additive=True)
    ys = fs.solve(
        sde, torch.randn(count, 3, generator=draws), 0.0, 1.0, integrator=StochasticHeun(),
        stepping=fs.Fixed(steps=400), save_at=times, generator=draws,
    ).ys  # fmt: skip
    values = ys.transpose(0, 1)
    values = (values - values.mean((0, 1))) / values.std((0, 1))
    seen = values + noise * torch.randn(values.shape, generator=draws)
    return Series("stochastic Lorenz", times, seen, noise)


def divergence_check(seed: int, paths: int) -> tuple[float, float, float]:
    """KL of dy = -(y - 1) dt + dW from dy = -y/2 dt + dW, on [0, 1] from 0: Monte Carlo, its
    standard error, and the closed form.
    """

    def g(t: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y)

    posterior = fs.SDE(lambda t, y: 1.0 - y, g, noise="diagonal", additive=True)
    prior = fs.SDE(lambda t, y: -0.5 * y, g, noise="diagonal", additive=True)
    both = fs.path_kl(posterior, prior)
    end = fs.solve(
        both, both.enter(torch.zeros(paths, 1, dtype=torch.float64)), 0.0, 1.0,
        integrator=StochasticHeun(), stepping=fs.Fixed(steps=100), path=fs.Brownian(seed),
    ).y1  # fmt: skip
    kl = both.leave(end)[1]
    # u = 1 - y/2, y ~ N(1 - e^-t, (1 - e^-2t) / 2): u has mean (1 + e^-t) / 2
    mean = 0.25 * (1.0 + 2.0 * (1.0 - math.exp(-1.0)) + 0.5 * (1.0 - math.exp(-2.0)))
    variance = 0.125 * (1.0 - 0.5 * (1.0 - math.exp(-2.0)))
    return float(kl.mean()), float(kl.std()) / math.sqrt(paths), 0.5 * (mean + variance)


# --- one model ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A latent SDE on one data set."""

    series: Series
    model: models.LatentSDE
    train: Tensor
    shown: Tensor
    whole: Tensor

    @classmethod
    def of(cls, series: Series, seed: int, latent: int, width: int, rest: float) -> Run:
        """``rest``: (noise / g)^2 or less, of which ``approach`` makes the steps."""
        torch.manual_seed(seed)
        model = models.LatentSDE(
            series.times, series.values.shape[-1], series.noise, latent=latent, width=width,
            solver=fs.Solver(EulerMaruyama(), fs.Grid(approach(series.times, rest))),
        )  # fmt: skip
        return cls(series, model, *series.split(50, seed))

    def fit(self, steps: int, out: Path, seed: int) -> None:
        from accelerate import Accelerator

        objective = objectives.ELBO(self.model, warmup=steps // 10)
        fitted = training.fit(
            objective, self.train, steps=steps, batch_size=64, seed=seed, lr=1e-2, clip=10.0,
            warmup=steps // 20, ema=0.98, accelerator=Accelerator(cpu=True),
            checkpoint=out / f"{self.slug}.pt", description=self.series.name,
        )  # fmt: skip
        (out / f"{self.slug}.losses.json").write_text(json.dumps(fitted.losses))

    @property
    def slug(self) -> str:
        return self.series.name.replace(" ", "_").lower()

    @torch.no_grad()
    def posterior(self, paths: int, seed: int) -> Tensor:
        """Paths under the test series, ``(paths, count, n, channels)``."""
        draws = torch.Generator().manual_seed(seed)
        many = self.shown.repeat(paths, 1, 1)
        return self.model.infer(many, generator=draws).unflatten(0, (paths, -1))

    def calibration(self, paths: Tensor, seed: int) -> dict[str, float]:
        """How many held-out points lie in the posterior's bands, which are to hold what they say;
        and the error of its mean over that of no model at all.
        """
        draws = torch.Generator().manual_seed(seed)
        hidden = torch.isnan(self.shown) & ~torch.isnan(self.whole)
        seen = paths + self.series.noise * torch.randn(paths.shape, generator=draws)
        report = {}
        for band in BANDS:
            ends = torch.tensor([0.5 - band / 2, 0.5 + band / 2])
            low, high = torch.quantile(seen, ends, dim=0)
            inside = (low <= self.whole) & (self.whole <= high)
            report[f"{band:.0%} band covers"] = float(inside[hidden].float().mean())
        error = (paths.mean(0) - self.whole)[hidden].square().mean().sqrt()
        report["error / spread"] = float(error / self.whole[hidden].std())
        return report

    def moments(self, seed: int) -> dict[str, float]:
        """Prior series beside the data: how far means and deviations are off, at the worst time."""
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            drawn = self.model.sample(1000, generator=draws)
        drawn = drawn + self.series.noise * torch.randn(drawn.shape, generator=draws)
        data = self.series.values
        return {
            "prior mean off by": float((drawn.mean(0) - data.mean(0)).abs().max()),
            "prior deviation off by": float((drawn.std(0) - data.std(0)).abs().max()),
        }


def picture(runs: list[Run], paths: list[Tensor], seed: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(runs), 2, figsize=(12, 3.5 * len(runs)), squeeze=False)
    for (left, right), run, drawn in zip(axes, runs, paths, strict=True):
        t, hidden = run.series.times, torch.isnan(run.shown[0, :, 0])
        low, high = torch.quantile(drawn[:, 0, :, 0], torch.tensor([0.05, 0.95]), dim=0)
        left.fill_between(t, low, high, color="#4477aa", alpha=0.3, lw=0)
        left.plot(t, drawn[:5, 0, :, 0].T, color="#4477aa", lw=0.7)
        left.plot(t[~hidden], run.whole[0, ~hidden, 0], "k.", ms=5, label="seen")
        left.plot(t[hidden], run.whole[0, hidden, 0], ".", color="#cc3311", label="held out")
        left.set_title(f"{run.series.name}: posterior, 90 % band", fontsize=10)
        left.legend(fontsize=8)
        with torch.no_grad():
            prior = run.model.sample(8, generator=torch.Generator().manual_seed(seed))
        right.plot(t, run.series.values[:8, :, 0].T, color="0.6", lw=0.8)
        right.plot(t, prior[..., 0].T, color="#228833", lw=0.9)
        right.set_title("data (grey) and draws of the prior (green)", fontsize=10)
    saving.picture(figure, path)


# --- the whole ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="of training, for each data set")
    parser.add_argument("--out", type=Path, default=Path("out/latent_sde"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    steps = 8 if options.small else options.steps
    count, draws, seed = (150, 20, options.seed) if options.small else (1000, 200, options.seed)
    out = options.out / f"seed{seed}-steps{steps}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    found, error, truth = divergence_check(seed, 500 if options.small else 20_000)
    print(f"divergence of Ornstein-Uhlenbeck paths: {found:.4f} +- {error:.4f}, exact {truth:.4f}")
    runs = [
        Run.of(ornstein_uhlenbeck(count, seed), seed, latent=1, width=32, rest=0.06),
        Run.of(lorenz(count, seed), seed, latent=4, width=64, rest=0.1),
    ]
    record: dict[str, object] = {"divergence": [found, error, truth]}
    paths = []
    for run in runs:
        run.fit(steps, out, seed)
        paths.append(run.posterior(draws, seed))
        report = run.calibration(paths[-1], seed) | run.moments(seed)
        record[run.series.name] = report
        print(f"{run.series.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in report.items()))
    picture(runs, paths, seed, out / "paths.png")
    record["seconds"] = time.perf_counter() - start
    saving.record(record, out / "results.json")
    print(f"picture and figures in {out}, {record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
