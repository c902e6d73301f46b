"""An SDE trained as a GAN: paths drawn by a neural SDE, judged by a neural CDE.

    python -m examples.sde_gan [--seed 0] [--steps 1000] [--out out/sde_gan] [--small]

The data are the time-dependent Ornstein-Uhlenbeck paths of Kidger et al. 2021. The critic is kept
from stretching by clipping alone. Marginal means and deviations, and the sliced Wasserstein
distance of whole paths, are printed beside those of held-out data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import flowsde as fs
from flowsde import models, training
from flowsde.integrators import EulerMaruyama, StochasticHeun

from . import saving

POINTS = 32


def paths(count: int, seed: int) -> Tensor:
    """dy = (0.02 t - 0.1 y) dt + 0.4 dW on [0, 31] from U[-1, 1], ``(count, 32, 1)``."""
    draws = torch.Generator().manual_seed(seed)
    sde = fs.SDE(
        lambda t, y: 0.02 * t - 0.1 * y, lambda t, y: torch.full_like(y, 0.4), noise="diagonal",
        additive=True,
    )  # fmt: skip
    ys = fs.solve(
        sde, 2.0 * torch.rand(count, 1, generator=draws) - 1.0, 0.0, POINTS - 1.0,
        integrator=EulerMaruyama(), stepping=fs.Fixed(dt=0.125),
        save_at=torch.arange(float(POINTS)), generator=draws,
    ).ys  # fmt: skip
    return ys.transpose(0, 1)


class Game:
    """Generator and critic, in turn: a Wasserstein game on batches drawn by seed and step.

    Learning rates fall linearly to zero over the steps: at a constant rate the means swing.
    """

    def __init__(self, data: Tensor, seed: int, batch: int, steps: int) -> None:
        torch.manual_seed(seed)
        times = torch.linspace(0.0, 1.0, POINTS)
        solver = fs.Solver(StochasticHeun(), fs.Grid(times))
        self.data, self.seed, self.batch, self.steps = data, seed, batch, steps
        self.generator = models.PathGenerator(times, 1, solver=solver)
        with torch.no_grad():  # a start with about the data's noise: a game hardly finds it
            for p in self.generator.sde.parameters():
                p.mul_(3.0)
            self.generator.readout.weight.mul_(2.0)
        self.critic = models.PathDiscriminator(times, 1)
        self.critic.clip()
        self.players = (
            torch.optim.Adam(self.generator.parameters(), 1e-3, betas=(0.0, 0.99)),
            torch.optim.Adam(self.critic.parameters(), 1e-2, betas=(0.0, 0.99)),
        )
        self.rates = [
            torch.optim.lr_scheduler.PolynomialLR(player, total_iters=steps)
            for player in self.players
        ]
        self.average = training.EMA(self.generator, 0.97)

    def step(self, n: int) -> float:
        """Two steps of the critic, the second with one of the generator; the critic's estimate of
        the distance.
        """
        for i in range(2):
            draws = torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * n + i)
            rows = torch.randint(len(self.data), (self.batch,), generator=draws)
            with torch.set_grad_enabled(i == 1):
                drawn = self.generator(self.batch, generator=draws)
            scores = self.critic(torch.cat((drawn, self.data[rows]))).chunk(2)
            gap = scores[0].mean() - scores[1].mean()
            for player in self.players:
                player.zero_grad()
            gap.backward()
            for p in self.critic.parameters():
                p.grad = -p.grad  # the critic climbs what the generator descends
            for player in self.players[1 - i :]:
                player.step()
            self.critic.clip()
        for rate in self.rates:
            rate.step()
        self.average.update(self.generator)
        return float(gap.detach())

    def play(self) -> list[float]:
        from tqdm.auto import tqdm

        bar, gaps = tqdm(range(self.steps), desc="SDE-GAN", mininterval=0.5), []
        for n in bar:
            gaps.append(self.step(n))
            if n % 20 == 0:
                bar.set_postfix(gap=f"{gaps[-1]:.4f}")
        self.average.copy_to(self.generator)
        return gaps

    @torch.no_grad()
    def draw(self, count: int, seed: int) -> Tensor:
        return self.generator(count, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor, seed: int, directions: int = 200) -> float:
    """Sliced Wasserstein-1 distance of as many paths as vectors, a point a component."""
    draws = torch.Generator().manual_seed(seed)
    ways = torch.randn(a[0].numel(), directions, generator=draws)
    ways = ways / ways.norm(dim=0)
    ends = [(x.flatten(1) @ ways).sort(0).values for x in (a, b)]
    return float((ends[0] - ends[1]).abs().mean())


def report(drawn: Tensor, data: Tensor, seed: int) -> dict[str, float]:
    steps = drawn.diff(dim=1).std() / data.diff(dim=1).std()
    return {
        "mean off by": float((drawn.mean(0) - data.mean(0)).abs().mean()),
        "deviation off by": float((drawn.std(0) - data.std(0)).abs().mean()),
        "steps' deviation, ratio": float(steps),
        "sliced Wasserstein": distance(drawn, data, seed),
    }


def picture(drawn: Tensor, data: Tensor, gaps: list[float], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    axes[0].plot(data[:40, :, 0].T, color="0.5", lw=0.6)
    axes[0].plot(drawn[:40, :, 0].T, color="#cc3311", lw=0.6)
    axes[0].set_title("data (grey) and draws (red), over the data's spread", fontsize=9)
    for x, color, name in ((data, "0.3", "data"), (drawn, "#cc3311", "drawn")):
        axes[1].plot(x.mean(0)[:, 0], color=color, label=f"{name}, mean")
        axes[1].plot(x.std(0)[:, 0], color=color, ls="--", label=f"{name}, deviation")
    axes[1].legend(fontsize=8)
    axes[2].plot(gaps, lw=0.5)
    axes[2].set_title("the critic's gap", fontsize=9)
    saving.picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("out/sde_gan"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    steps, seed = 8 if options.small else options.steps, options.seed
    count, batch = (400, 64) if options.small else (4000, 128)
    out = options.out / f"seed{seed}-steps{steps}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    train, held = paths(count, seed), paths(count, seed + 1)
    mean, spread = train.mean(), train.std()
    train, held = (train - mean) / spread, (held - mean) / spread
    game = Game(train, seed, batch, steps)
    before = report(game.draw(count, seed), held, seed)
    gaps = game.play()
    drawn = game.draw(count, seed)
    rows = {
        "untrained": before, "trained": report(drawn, held, seed),
        "data": report(train, held, seed),
    }  # fmt: skip
    for name, row in rows.items():
        print(f"{name:10s}" + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
    picture(drawn, held, gaps, out / "paths.png")
    record = rows | {"seconds": time.perf_counter() - start}
    saving.record(record, out / "results.json")
    print(f"picture and figures in {out}, {record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
