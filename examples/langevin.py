"""NCSN's toy: Langevin dynamics that forgets how much is where, annealed, and as a corrector.

    python -m examples.langevin [--chains 20000] [--seed 0] [--out out/langevin] [--small]

Four fifths of the data are about one point, one fifth about another, and the score is exact.
Langevin dynamics never crosses from the one to the other; through noise it does (Song and Ermon
2019, arXiv 1907.05600). As a corrector it mends a sampler of few steps (Song et al. 2021, arXiv
2011.13456), in 16 dimensions, where norms say how large a score is; beside it stand the predictor
alone in as many steps, and with as many evaluations.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flowsde as fs
from flowsde.dynamics import Langevin
from flowsde.integrators import DDIM, EulerMaruyama, PredictorCorrector
from flowsde.paths import EDM, VP, Schedule, uniform

from . import saving
from .measures import sliced_wasserstein

WEIGHTS = torch.tensor([0.8, 0.2])
EPS, LEVELS, STEPS = 0.1, 10, 1000  # of a step, of noise from 20 to 1, of both dynamics


@dataclass(frozen=True)
class TwoModes:
    """.8 N(m, 1) + .2 N(-m, 1) with |m| = sqrt(50): in the plane m is (5, 5)."""

    dim: int

    @property
    def means(self) -> Tensor:
        m = torch.full((self.dim,), math.sqrt(50.0 / self.dim))
        return torch.stack((m, -m))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
        return self.means[rows] + torch.randn(count, self.dim, generator=generator)

    def mean(self, x: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
        """That of the modes of alpha x0 + noise, as likely as they are at x."""
        gaps = (x[:, None] - alpha * self.means).square().sum(-1)
        return (WEIGHTS.log() - 0.5 * gaps / variance).softmax(-1) @ self.means

    def score(self, t: Tensor, x: Tensor) -> Tensor:
        one = torch.ones(())
        return self.mean(x, one, one) - x

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t], exact."""

        def x0(t: Tensor, x: Tensor) -> Tensor:
            alpha, sigma = schedule(t)
            variance = alpha**2 + sigma**2
            return (sigma**2 * self.mean(x, alpha, variance) + alpha * x) / variance

        return x0


def share(x: Tensor) -> float:
    """Of samples on the side of the greater mode."""
    return float((x.sum(-1) > 0.0).double().mean())


def plain(law: TwoModes, x: Tensor, seed: int) -> Tensor:
    """dx = score dt + sqrt(2) dW."""
    return fs.solve(
        Langevin(law.score), x, 0.0, 0.5 * EPS * STEPS, integrator=EulerMaruyama(),
        stepping=fs.Fixed(steps=STEPS), path=fs.Brownian(seed),
    ).y1  # fmt: skip


def annealed(law: TwoModes, x: Tensor, seed: int) -> Tensor:
    """As many steps, an equal part at each level of noise; that of the last is left in."""
    schedule = EDM(sigma_max=20.0)
    levels = torch.logspace(math.log10(schedule.sigma_max), 0.0, LEVELS)
    dynamics = fs.LinearSDE(schedule).annealed_langevin(
        law.denoiser(schedule), levels, STEPS // LEVELS, EPS
    )
    return fs.solve(
        dynamics, x, integrator=EulerMaruyama(), stepping=fs.Fixed(dt=1.0), path=fs.Brownian(seed)
    ).y1


def correction(chains: int, seed: int) -> list[dict]:
    """A corrected sampler beside its predictor; distances are sliced Wasserstein, to fresh data."""
    law, schedule = TwoModes(16), VP()
    flow = fs.LinearSDE(schedule).probability_flow(law.denoiser(schedule))
    noise = fs.Normal(law.dim).sample(chains, seed)
    data = law.sample(chains, torch.Generator().manual_seed(seed))

    def distance(method: fs.Integrator, steps: int) -> float:
        x = fs.solve(
            flow, noise, 1.0, 1e-3, integrator=method, path=fs.Brownian(seed + 1),
            stepping=fs.Grid(uniform(1.0, 1e-3, steps)),
        ).y1  # fmt: skip
        return sliced_wasserstein(x, data, torch.Generator().manual_seed(seed))

    predictor = DDIM(1.0)
    return [
        {
            "steps": steps, "predictor": distance(predictor, steps),
            "corrected": distance(PredictorCorrector(predictor), steps),
            "predictor, twice the steps": distance(predictor, 2 * steps),
        }
        for steps in (10, 20, 30)
    ]  # fmt: skip


def pictures(out: Path, clouds: dict[str, Tensor], rows: Sequence[dict]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(clouds) + 1, figsize=(4.0 * (len(clouds) + 1), 4.0))
    for axis, (name, x) in zip(axes, clouds.items(), strict=False):
        axis.scatter(*x[:4000].T, s=1.0, alpha=0.4, color="#4477aa", linewidths=0.0)
        axis.set(xlim=(-10, 10), ylim=(-10, 10), aspect="equal", title=f"{name}: {share(x):.3f}")
    steps = [row["steps"] for row in rows]
    for name in [name for name in rows[0] if name != "steps"]:
        axes[-1].plot(steps, [row[name] for row in rows], marker="o", label=name)
    axes[-1].set(xlabel="steps", title="sliced Wasserstein, 16 dimensions", ylim=(0.0, None))
    axes[-1].legend(fontsize=8)
    saving.picture(figure, out / "langevin.png")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--chains", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/langevin"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    chains, seed = 1000 if options.small else options.chains, options.seed
    options.out.mkdir(parents=True, exist_ok=True)

    law, draws = TwoModes(2), torch.Generator().manual_seed(seed)
    start = 16.0 * torch.rand(chains, 2, generator=draws) - 8.0
    clouds = {
        "data": law.sample(chains, draws),
        "Langevin": plain(law, start, seed),
        "annealed Langevin": annealed(law, start, seed),
    }
    error = math.sqrt(float(WEIGHTS.prod()) / chains)
    print(
        f"share of the greater mode, {chains} chains of {STEPS} steps (exact 0.8, +- {error:.4f})"
    )
    for name, x in clouds.items():
        print(f"  {name:18s} {share(x):.4f}")
    rows = correction(chains, seed)
    print("sliced Wasserstein to data in 16 dimensions, ancestral steps on VP")
    for row in rows:
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    pictures(options.out, clouds, rows)
    shares = {name: share(x) for name, x in clouds.items()}
    saving.record({"chains": chains, "shares": shares, "rows": rows}, options.out / "results.json")
    print(f"picture and figures in {options.out}")


if __name__ == "__main__":
    main()
