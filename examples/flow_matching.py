"""Flows trained without a single solve, and how few steps they then need.

    python -m examples.flow_matching [--seed 0] [--steps 3000] [--out out/flow_matching] [--small]

Eight Gaussians from noise: by flow matching with independent noise, with optimally coupled noise,
and by rectified flow. Then a Schroedinger bridge from the pinwheel to the moons, sampled as an ODE
and as an SDE with the same marginals. Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.integrators import Euler, EulerMaruyama
from flowsde.models import StochasticInterpolant, reflow, straightness
from flowsde.paths import Coupling, Independent, Interpolant, OptimalTransport, Sinkhorn

from . import saving, toys
from .measures import sliced_wasserstein

BRIDGE = 0.7  # diffusion of the Schroedinger bridge
FEW = 2  # Euler steps


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Run:
    """What all trainings share."""

    seed: int
    steps: int
    batch: int
    samples: int
    out: Path

    def fit(self, objective: objectives.FlowMatching, data: Any, name: str) -> None:
        training.fit(
            objective, data, steps=self.steps, batch_size=self.batch, seed=self.seed, lr=3e-3,
            checkpoint=self.out / f"{name}.pt", description=name,
        )  # fmt: skip

    def network(self) -> fs.ODE:
        torch.manual_seed(self.seed)
        return models.cnf(2, 64, 3)

    def matched(self, data: Tensor, coupling: Coupling, name: str) -> fs.Flow:
        ode = self.network()
        self.fit(objectives.FlowMatching(ode, coupling=coupling), data, name)
        return fs.Flow(fs.Normal(2), ode)

    def rectified(self, flow: fs.Flow) -> fs.Flow:
        ode = self.network()
        ode.load_state_dict(flow.dynamics.state_dict())
        pairs = reflow(flow, self.samples, generator=draws(self.seed))
        self.fit(objectives.FlowMatching(ode, paired=True), pairs, "rectified")
        return fs.Flow(fs.Normal(2), ode)

    def bridge(self, x0: Tensor, x1: Tensor) -> tuple[fs.ODE, fs.ODE]:
        """The velocity and the denoiser of the bridge between two data sets."""
        torch.manual_seed(self.seed)
        velocity, denoiser = models.cnf(2, 64, 3), models.cnf(2, 64, 3)
        objective = objectives.FlowMatching(
            velocity, Interpolant(bridge=BRIDGE), source=x1, coupling=Sinkhorn(2.0 * BRIDGE**2),
            denoiser=denoiser,
        )  # fmt: skip
        self.fit(objective, x0, "bridge")
        return velocity, denoiser


@torch.no_grad()
def report(flow: fs.Flow, test: Tensor, seed: int) -> dict[str, float]:
    """How straight a flow is, and what it gives in a few steps and in as many as it takes."""
    x1 = fs.Normal(2).sample(len(test), seed)
    few = fs.solve(
        flow.dynamics, x1, 1.0, 0.0, integrator=Euler(), stepping=fs.Fixed(steps=FEW)
    ).y1  # fmt: skip
    x0 = flow.sample((len(test),), seed=seed)
    return {
        "straightness": float(straightness(flow, x1).mean()),
        f"distance after {FEW} Euler steps": sliced_wasserstein(few, test, draws(seed)),
        "distance": sliced_wasserstein(x0, test, draws(seed)),
        "log-likelihood": float(flow.log_prob(test).mean()),
    }


@torch.no_grad()
def cross(velocity: fs.ODE, denoiser: fs.ODE, x1: Tensor, seed: int) -> dict[str, Tensor]:
    """Paths ``(times, count, 2)`` from one data set to the other, by the ODE and by the SDE."""
    t1, t0 = 0.999, 0.001
    times = torch.linspace(t1, t0, 51)
    sde = StochasticInterpolant(velocity, denoiser, Interpolant(bridge=BRIDGE))
    ode = fs.solve(velocity, x1, t1, t0, save_at=times)
    noisy = fs.solve(
        sde, x1, t1, t0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=200), save_at=times,
        path=fs.Brownian(seed),
    )  # fmt: skip
    return {"ODE": ode.ys, "SDE": noisy.ys}


# --- pictures -------------------------------------------------------------------------------------


def picture(flows: dict[str, fs.Flow], paths: dict[str, Tensor], x0: Tensor, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def show(axis: plt.Axes, ys: Tensor, title: str) -> None:
        axis.plot(*ys[:, :60].unbind(-1), color="0.6", lw=0.5)
        axis.scatter(*ys[0].T, s=2, color="#4477aa")
        axis.scatter(*ys[-1].T, s=2, color="#cc3311")
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])

    noise, times = fs.Normal(2).sample(1000, seed=0), torch.linspace(1.0, 0.0, 31)
    figure, axes = plt.subplots(2, 3, figsize=(12, 8))
    for axis, (name, flow) in zip(axes[0], flows.items(), strict=True):
        with torch.no_grad():
            show(axis, fs.solve(flow.dynamics, noise, 1.0, 0.0, save_at=times).ys, name)
    for axis, (name, ys) in zip(axes[1], paths.items(), strict=False):
        show(axis, ys[:, :1000], f"Schroedinger bridge, {name}")
    axes[1, 2].scatter(*x0[:1000].T, s=2, color="0.3")
    axes[1, 2].set(title="moons, held out", aspect="equal", xticks=[], yticks=[])
    saving.picture(figure, path)


# --- the whole ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out/flow_matching"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    steps, batch = (8, 32) if options.small else (options.steps, 256)
    samples, tests = (500, 200) if options.small else (20_000, 2000)
    seed = options.seed
    run = Run(seed, steps, batch, samples, options.out / f"seed{seed}-steps{steps}")
    run.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    data, test = (toys.eight_gaussians(n, draws(seed + n)) for n in (samples, tests))
    flows = {
        "independent": run.matched(data, Independent(), "independent"),
        "optimal transport": run.matched(data, OptimalTransport(), "optimal_transport"),
    }
    flows["rectified"] = run.rectified(flows["independent"])
    record: dict[str, object] = {}
    for name, flow in flows.items():
        found = record[name] = report(flow, test, seed)
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))

    moons, pinwheel = (toy(samples + tests, draws(seed)) for toy in (toys.moons, toys.pinwheel))
    networks = run.bridge(moons[tests:], pinwheel[tests:])
    paths = cross(*networks, pinwheel[:tests], seed)
    for name, ys in paths.items():
        record[name] = off = sliced_wasserstein(ys[-1], moons[:tests], draws(seed))
        print(f"Schroedinger bridge, {name}: distance {off:.3f}")
    picture(flows, paths, moons[:tests], run.out / "paths.png")
    record["seconds"] = time.perf_counter() - start
    saving.record(record, run.out / "results.json")
    print(f"picture and figures in {run.out}, {record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
