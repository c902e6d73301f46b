"""Normalizing flows, discrete and continuous, by one class.

    python -m examples.flows [--seed 0] [--parts toys patches tabular posterior] [--out out/flows]

- toys: densities of the plane by a spline flow, trained by maximum likelihood, and by a continuous
  one, trained by flow matching; its field and its paths, forward and back.
- patches: 8x8 patches of two photographs, 63 dimensions.
- tabular: wine, breast cancer and diabetes beside a Gaussian of full covariance.
- posterior: variational inference on a banana, its bound beside the evidence.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import Tsit5

from . import patches, saving
from .toys import TOYS

SOLVER = fs.Solver(Tsit5(), fs.Adaptive(1e-5, 1e-5))


def generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


class Run:
    """What all parts share: seed, size, place, and how they train."""

    def __init__(self, seed: int, small: bool, out: Path) -> None:
        from accelerate import Accelerator

        self.seed, self.small, self.out = seed, small, out
        self.accelerator = Accelerator(cpu=True)

    def fit(self, name: str, objective: nn.Module, data: Tensor, steps: int, **more: Any) -> None:
        training.fit(
            objective, data, steps=4 if self.small else steps, seed=self.seed, description=name,
            accelerator=self.accelerator, **{"batch_size": 256, "lr": 2e-3, "ema": 0.99, **more},
        )  # fmt: skip

    def spline(self, dim: int, depth: int, width: int, **more: Any) -> fs.Flow:
        """A neural spline flow, made from the seed."""
        torch.manual_seed(self.seed)
        stack = models.nsf(dim, depth, width, generator=generator(self.seed))
        return fs.Flow(fs.Normal(dim), stack, **more)


@torch.no_grad()
def held_out(flow: fs.Flow, x: Tensor) -> tuple[float, float]:
    """Mean log-density in nats, and its standard error."""
    values = torch.cat([flow.log_prob(part) for part in x.split(2000)])
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def say(name: str, found: dict[str, tuple[float, float]]) -> None:
    row = "   ".join(f"{kind} {mean:8.3f} +- {error:.3f}" for kind, (mean, error) in found.items())
    print(f"{name:16s} {row}", flush=True)


# --- toys -----------------------------------------------------------------------------------------


def toys(run: Run) -> dict[str, Any]:
    """Two flows of each toy, side by side."""
    found, rows = {}, []
    for name in list(TOYS)[:1] if run.small else TOYS:
        data, held = (TOYS[name](20_000, generator(run.seed + i)) for i in (0, 1))
        spline = run.spline(2, 6, 64, transform=models.Standardize.of(data))
        run.fit(f"{name}, splines", objectives.MaximumLikelihood(spline), data, 1500)
        ode = models.cnf(2, 64, 3)
        continuous = fs.Flow(fs.Normal(2), ode, SOLVER)
        run.fit(f"{name}, matching", objectives.FlowMatching(ode), data, 4000)
        held = held[: 200 if run.small else 4000]
        found[name] = {"splines": held_out(spline, held), "CNF": held_out(continuous, held)}
        say(name, found[name])
        rows.append((name, data, spline, continuous))
    picture_of_toys(rows, run)
    return found


@torch.no_grad()
def picture_of_toys(rows: list[tuple[str, Tensor, fs.Flow, fs.Flow]], run: Run) -> None:
    plt = plots()
    figure, axes = plt.subplots(len(rows), 6, figsize=(18, 3 * len(rows)), squeeze=False)
    count = 30 if run.small else 150
    for line, (name, data, spline, continuous) in zip(axes, rows, strict=True):
        reach = 1.2 * float(data.abs().max())
        at = torch.linspace(-reach, reach, count)
        grid = torch.cartesian_prod(at, at)
        line[0].hist2d(*data.T.tolist(), bins=count, range=[[-reach, reach]] * 2)
        line[0].set_title(f"{name}: data", fontsize=9)
        for axis, flow, title in ((line[1], spline, "splines"), (line[2], continuous, "CNF")):
            density = flow.log_prob(grid).exp().reshape(count, count).T
            axis.imshow(density, origin="lower", extent=(-reach, reach, -reach, reach))
            axis.set_title(f"density, {title}", fontsize=9)
        field(line[3], continuous.dynamics, reach)
        drawn = continuous.base.sample(100, run.seed)
        paths(line[4], continuous, drawn, (1.0, 0.0), "noise to data")
        paths(line[5], continuous, data[:100], (0.0, 1.0), "and back")
        for axis in line:
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect=1.0)
    saving.picture(figure, run.out / "toys.png")


def field(axis: Any, dynamics: fs.Dynamics, reach: float) -> None:
    """The velocity towards data, half way."""
    at = torch.linspace(-reach, reach, 20)
    grid = torch.cartesian_prod(at, at)
    velocity = -dynamics(torch.tensor(0.5), grid)
    axis.quiver(*grid.T.tolist(), *velocity.T.tolist(), velocity.norm(dim=-1).tolist())
    axis.set_title("CNF, field at t = 0.5, towards data", fontsize=9)


def paths(axis: Any, flow: fs.Flow, start: Tensor, span: tuple[float, float], title: str) -> None:
    way = SOLVER.solve(flow.dynamics, start, *span, save_at=torch.linspace(*span, 30)).ys
    axis.plot(*way.unbind(-1), color="0.6", lw=0.5)
    axis.scatter(*way[-1].T.tolist(), s=4, color="#cc3311", zorder=2)
    axis.set_title(f"CNF, {title}", fontsize=9)


def plots() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


# --- patches --------------------------------------------------------------------------------------


def photographs(run: Run) -> dict[str, Any]:
    """Log-likelihoods of held-out patches. Whitened, a flow starts at the Gaussian beside it."""
    train, held = patches.values()
    x = patches.patches(train, generator(run.seed))
    test = patches.patches(held, generator(run.seed + 1))
    order = torch.randperm(len(test), generator=generator(run.seed))
    test = test[order[: 200 if run.small else 5000]]
    flow = run.spline(patches.DIM, 8, 128, transform=models.Whiten.of(x))
    run.fit("patches", objectives.MaximumLikelihood(flow), train, 3000, augment=patches.patches)
    found = {"splines": held_out(flow, test), "Gaussian": gaussian(x, test)}
    say("patches", found)
    plt = plots()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    drawn = flow.sample((100,), seed=run.seed)
    for axis, shown, title in ((axes[0], test[:100], "held out"), (axes[1], drawn, "drawn")):
        tiles = nn.functional.pad(patches.image(shown), (1, 1, 1, 1))
        picture = (
            tiles.reshape(-1, 10, *tiles.shape[1:]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        )
        axis.imshow(picture, cmap="gray", vmin=-0.3, vmax=0.3)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    saving.picture(figure, run.out / "patches.png")
    return found


def gaussian(train: Tensor, test: Tensor) -> tuple[float, float]:
    """Held-out log-density of the normal law with the training data's mean and covariance."""
    x = train.double()
    law = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    values = law.log_prob(test.double())
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


# --- tabular --------------------------------------------------------------------------------------


def tabular(run: Run) -> dict[str, Any]:
    """Small sets: what a flow adds to a Gaussian, where it does not overfit."""
    from sklearn import datasets

    found = {}
    for name in ("wine", "breast_cancer", "diabetes"):
        x = torch.as_tensor(getattr(datasets, f"load_{name}")().data, dtype=torch.float32)
        kept = [i for i in range(x.shape[1]) if len(x[:, i].unique()) > 30]  # no density otherwise
        x = x[torch.randperm(len(x), generator=generator(run.seed))][:, kept]
        train, test = x[: 4 * len(x) // 5], x[4 * len(x) // 5 :]
        torch.manual_seed(run.seed)
        stack = models.realnvp(len(kept), 4, 32, generator=generator(run.seed), dropout=0.3)
        flow = fs.Flow(fs.Normal(len(kept)), stack, transform=models.Whiten.of(train))
        run.fit(name, objectives.MaximumLikelihood(flow), train, 400, batch_size=64,
                lr=5e-4, weight_decay=1.0)  # fmt: skip
        found[name] = {"RealNVP": held_out(flow, test), "Gaussian": gaussian(train, test)}
        say(name, found[name])
    return found


# --- posterior ------------------------------------------------------------------------------------


def joint(z: Tensor, x: Tensor) -> Tensor:
    """log p(z) + log p(x | z) of z ~ N(0, 1) and x ~ N(z_1^2 + z_2, 0.3^2)."""
    noise = torch.distributions.Normal(z[:, 0].square() + z[:, 1], 0.3)
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + noise.log_prob(x[:, 0])


class Bound(nn.Module):
    """E [log q(z) - log p(z, x)] over z ~ q, a draw for each row of x: minus the ELBO."""

    def __init__(self, flow: fs.Flow, joint: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow, self.joint = flow, joint

    def forward(self, x: Tensor, *, generator: Generator) -> Tensor:
        z, density = self.flow.rsample_and_log_prob((len(x),), generator=generator)
        return (density - self.joint(z, x)).mean()


def posterior(run: Run) -> dict[str, Any]:
    """The bound approaches the evidence, which a grid gives."""
    x = torch.tensor([[1.0]])
    at = torch.linspace(-6.0, 6.0, 1201)
    grid = torch.cartesian_prod(at, at)
    exact = joint(grid, x)
    evidence = float(exact.logsumexp(0) + 2.0 * (at[1] - at[0]).log())
    flow = run.spline(2, 6, 32)
    objective = Bound(flow, joint)
    run.fit("posterior", objective, x, 1500)
    with torch.no_grad():
        z, density = flow.sample_and_log_prob((20_000,), generator=generator(run.seed))
        gap = joint(z, x) - density
    bound = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    say("posterior", {"ELBO": bound, "evidence": (evidence, 0.0)})
    plt = plots()
    figure, axis = plt.subplots(figsize=(5, 4.6))
    axis.scatter(*z[:3000].T.tolist(), s=2, color="#cc3311")
    levels = exact.exp().max() * torch.linspace(0.1, 0.9, 5)
    shown = exact.exp().reshape(len(at), -1).T
    axis.contour(at, at, shown, levels=levels.tolist(), colors="k", linewidths=0.7)
    axis.set(xlim=(-3, 3), ylim=(-4, 3), title="posterior: exact (lines), drawn (points)")
    saving.picture(figure, run.out / "posterior.png")
    return {"ELBO": bound, "evidence": evidence}


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "toys": toys, "patches": photographs, "tabular": tabular, "posterior": posterior,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/flows"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    out = options.out / f"seed{options.seed}{'-small' if options.small else ''}"
    out.mkdir(parents=True, exist_ok=True)
    run, start = Run(options.seed, options.small, out), time.perf_counter()
    found: dict[str, Any] = {name: PARTS[name](run) for name in options.parts}
    found["seconds"] = time.perf_counter() - start
    saving.record(found, out / "results.json")
    print(f"pictures and figures in {out}, {found['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
