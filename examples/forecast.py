"""Forecasts with bands that hold what they say: the carbon dioxide of the air, week by week.

    python -m examples.forecast [--seed 0] [--out out/forecast] [--small]

Mauna Loa's record of 1958 to 2001, which ships with statsmodels, some of its weeks missing. A
latent ODE reads two years and forecasts the third; it learns, with its weights, the noise about
forecasts, from the years before 1990, and is then left alone. Of the years after, unseen, it prints
the error of its forecasts, beside that of last year's values and of statsmodels' exponential
smoothing, which is fitted anew to the ten years before each forecast; and how often its bands of 50
and 90 % hold what was measured. Interrupted, it resumes.

Source: Keeling and Whorf, Scripps Institution of Oceanography; Rubanova et al. 2019, arXiv
1907.03907.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import objectives, training
from flowsde.integrators import Dopri5
from flowsde.models import Encoder, LatentODE

from . import saving

YEAR, SPLIT = 52, 1990.0
SEEN, AHEAD = 2 * YEAR, YEAR
LATENT, STEPS = 6, 300
BANDS = (0.5, 0.9)


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Record:
    """Weekly values ``(n,)``, NaN where a week is missing, and their times in years."""

    years: Tensor
    values: Tensor

    @classmethod
    def read(cls) -> Record:
        from statsmodels.datasets import co2

        frame = co2.load().data
        years = torch.tensor((frame.index.year + (frame.index.day_of_year - 1) / 365.25).to_numpy())
        return cls(years, torch.tensor(frame["co2"].to_numpy(), dtype=torch.float32))

    def windows(self, since: float, until: float, every: int) -> Windows:
        """Of three years each, between these times, one starting so many weeks after another."""
        inside = self.values[(self.years >= since) & (self.years < until)]
        return Windows.of(inside.unfold(0, SEEN + AHEAD, every))

    def before(self, window: int, since: float, every: int) -> Tensor:
        """Ten years of values until that window's forecast begins, missing ones filled in."""
        end = int((self.years < since).sum()) + window * every + SEEN
        return filled(self.values[end - 10 * YEAR : end])


def filled(values: Tensor) -> Tensor:
    """Missing values, on the line between those on either side."""
    import numpy as np

    array, at = values.double().numpy(), np.arange(len(values))
    seen = ~np.isnan(array)
    return torch.from_numpy(np.interp(at, at[seen], array[seen]))


@dataclass
class Windows:
    """Values ``(count, SEEN + AHEAD, 1)``, about the mean ``level`` of the part that is seen."""

    values: Tensor
    level: Tensor

    UNIT = 3.0  # parts per million, about the swing of the seasons
    TIMES = torch.arange(SEEN + AHEAD) / YEAR

    @classmethod
    def of(cls, values: Tensor) -> Windows:
        level = values[:, :SEEN].nanmean(1, keepdim=True)
        return cls(((values - level) / cls.UNIT)[..., None], level)

    @property
    def seen(self) -> Tensor:
        """What is read: the values of the first two years."""
        return self.values.masked_fill((torch.arange(SEEN + AHEAD) >= SEEN)[:, None], torch.nan)

    @property
    def ahead(self) -> Tensor:
        """What is to be forecast: those of the third."""
        return self.values.masked_fill((torch.arange(SEEN + AHEAD) < SEEN)[:, None], torch.nan)

    def measured(self, scaled: Tensor) -> Tensor:
        """Of scaled values ``(..., count, n)``, those in parts per million."""
        return self.level + self.UNIT * scaled

    @property
    def truth(self) -> Tensor:
        """What was to be forecast, ``(count, AHEAD)``."""
        return self.measured(self.values[:, SEEN:, 0])


# --- the model ------------------------------------------------------------------------------------


class Moments(Encoder):
    """Means of what was seen, times a line and the waves of a year and of half a year."""

    width = LATENT

    def forward(self, x: Tensor, times: Tensor, to: float) -> Tensor:
        seen, angle = ~x.isnan(), math.tau * times
        waves = [wave(n * angle) for n in (1, 2) for wave in (torch.cos, torch.sin)]
        basis = torch.stack((torch.ones_like(times), times, *waves), -1)
        return (torch.where(seen, x, 0.0) * basis).sum(1) / seen.sum(1)


class Seasons(nn.Module):
    """dz/dt = A z, where A turns four of the components once and twice a year, to start with."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(LATENT, LATENT))
        with torch.no_grad():
            for i, turns in ((0, 1.0), (2, 2.0)):
                self.rate[i, i + 1], self.rate[i + 1, i] = math.tau * turns, -math.tau * turns

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.rate.T


def fit(data: Windows, steps: int, seed: int, path: Path) -> LatentODE:
    from accelerate import Accelerator

    torch.manual_seed(seed)
    field = Seasons()
    model = LatentODE(
        1, LATENT, nn.Parameter(torch.tensor([math.log(0.3)])), encoder=Moments(),
        dynamics=fs.ODE(field, batched_time=True, rowwise=True), decoder=nn.Linear(LATENT, 1),
        solver=fs.Solver(Dopri5(), fs.Adaptive(1e-3, 1e-4), fs.Direct()),
    )  # fmt: skip
    with torch.no_grad():
        model.starter.bias[LATENT:] = -2.0  # draws of the posterior are to be close from the start
    training.fit(
        objectives.ELBO(model, warmup=steps // 4),
        (data.ahead, data.TIMES.expand(len(data.values), -1), data.seen), steps=steps,
        batch_size=32, seed=seed, lr=3e-2, warmup=steps // 20, ema=0.98, clip=10.0,
        accelerator=Accelerator(cpu=True), checkpoint=path, description="latent ODE",
    )  # fmt: skip
    return model


@torch.no_grad()
def forecast(model: LatentODE, data: Windows, draws: int, seed: int) -> Tensor:
    """Values as they may be measured, ``(draws, count, AHEAD)``."""
    generator = torch.Generator().manual_seed(seed)
    paths = model.infer(
        data.seen.repeat(draws, 1, 1), data.TIMES, generator=generator, at=data.TIMES[SEEN:]
    )
    seen = paths + model.noise * torch.randn(paths.shape, generator=generator)
    return data.measured(seen.unflatten(0, (draws, -1))[..., 0])


# --- what to compare it with ----------------------------------------------------------------------


def smoothing(record: Record, since: float, every: int, count: int) -> Tensor:
    """Forecasts of exponential smoothing with trend and seasons, ``(count, AHEAD)``."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    made = []
    for window in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of each fit that did not settle
            fitted = ExponentialSmoothing(
                record.before(window, since, every).numpy(), trend="add", seasonal="add",
                seasonal_periods=YEAR, initialization_method="heuristic",
            ).fit()  # fmt: skip
        made.append(torch.from_numpy(fitted.forecast(AHEAD)))
    return torch.stack(made).float()


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square, of what was measured."""
    return float((found - truth).square().nanmean().sqrt())


def coverage(drawn: Tensor, truth: Tensor) -> dict[str, float]:
    """How much of what was measured the bands hold."""
    found = {}
    for band in BANDS:
        low, high = drawn.quantile(torch.tensor([0.5 - band / 2, 0.5 + band / 2]), dim=0)
        inside = ((low <= truth) & (truth <= high))[~truth.isnan()]
        found[f"{band:.0%} band holds"] = float(inside.float().mean())
    return found


# --- the whole ------------------------------------------------------------------------------------


def picture(test: Windows, drawn: Tensor, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.0, 3.6))
    measured, shown = test.measured(test.values[..., 0]), [0, len(drawn[0]) // 2, len(drawn[0]) - 1]
    for axis, i in zip(axes, shown, strict=True):
        for band in BANDS:
            ends = torch.tensor([0.5 - band / 2, 0.5 + band / 2])
            low, high = drawn[:, i].quantile(ends, dim=0)
            axis.fill_between(test.TIMES[SEEN:], low, high, color="#4477aa", alpha=0.3, lw=0)
        axis.plot(test.TIMES[SEEN:], drawn[:, i].mean(0), color="#4477aa", label="forecast")
        axis.plot(test.TIMES, measured[i], "k.", ms=2, label="measured")
        axis.axvline(float(test.TIMES[SEEN]), color="0.6", lw=0.8)
        axis.set(xlabel="years", ylabel="parts per million")
    axes[0].legend(fontsize=8)
    saving.picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("out/forecast"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    steps, draws, every = (3, 20, 150) if options.small else (options.steps, 400, 13)
    out, seed = options.out, options.seed
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    start, record = time.perf_counter(), Record.read()
    train, test = record.windows(0.0, SPLIT, 1), record.windows(SPLIT, math.inf, every)
    model = fit(train, steps, seed, out / f"steps{steps}-seed{seed}.pt")
    drawn, truth = forecast(model, test, draws, seed), test.truth
    last = test.measured(test.values[:, SEEN - YEAR : SEEN, 0])
    smooth = smoothing(record, SPLIT, every, len(truth))
    found: dict[str, object] = {
        "forecasts": len(truth),
        "error of the latent ODE": error(drawn.mean(0), truth),
        "error of last year's values": error(last, truth),
        "error of exponential smoothing": error(smooth, truth),
        **coverage(drawn, truth),
    }
    print(", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    picture(test, drawn, out / "forecast.png")
    found["seconds"] = time.perf_counter() - start
    saving.record(found, out / "results.json")
    print(f"picture and figures in {out}, {found['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
