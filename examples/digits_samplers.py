"""Samplers of a score model by evaluations, and solvers fitted to it: for ``examples.digits``.

Errors are root mean squares to where trajectories of tight tolerances end, from the same noises:
distances between laws of few images are noisy. What is fitted has seen other noises alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde.fitting import distill_solver, optimize_grid
from flowsde.integrators import DDIM, DPMSolverPP, EDMHeun, Tsit5, UniPC
from flowsde.paths import karras

from . import saving

__all__ = ["Budgets", "picture"]

FINE = fs.Solver(Tsit5(), fs.Adaptive(1e-5, 1e-5))
SAMPLERS = {  # and how often each asks in a step
    "DDIM": (DDIM(), 1),
    "Heun": (EDMHeun(), 2),
    "DPM-Solver++(2M)": (DPMSolverPP(), 1),
    "DPM-Solver++(3M)": (DPMSolverPP(3), 1),
    "UniPC": (UniPC(), 1),
}


@dataclass
class Budgets:
    """What the table is made of.

    Args:
        denoiser: the model.
        t1: where data stands.
        noise: what is sampled from, the first ``known`` of it for the error.
        other: noise to fit on.
        distance: of samples from the data, over its floor.
        evaluations: fixed samplers are given.
        fitted: evaluations that solvers are fitted for.
        iterations: of fitting.
    """

    denoiser: fs.Denoiser
    t1: float
    noise: Tensor
    other: Tensor
    distance: Callable[[Tensor], float]
    evaluations: tuple[int, ...] = (5, 10, 20, 50)
    fitted: tuple[int, ...] = (5, 10)
    iterations: int = 120
    known: int = 500

    def rows(self) -> list[dict]:
        """One a sampler and budget."""
        from tqdm.auto import tqdm

        schedule = self.denoiser.schedule
        flow = fs.LinearSDE(schedule).probability_flow(self.denoiser)
        span = schedule.horizon, self.t1
        with torch.no_grad():
            exact = FINE.solve(flow, self.noise[: self.known], *span).y1
        rows, total = [], len(SAMPLERS) * len(self.evaluations) + 2 * len(self.fitted)
        for name, solver in tqdm(self._solvers(flow, *span), total=total, desc="samplers"):
            with torch.no_grad():
                solution = solver.solve(flow, self.noise, *span)
            gap = solution.y1[: self.known] - exact
            rows.append({
                "sampler": name, "evaluations": solution.stats.evaluations,
                "error": float(gap.square().mean().sqrt()), "distance": self.distance(solution.y1),
            })  # fmt: skip
        return rows

    def _solvers(self, flow: Any, t0: float, t1: float) -> Iterator[tuple[str, fs.Solver]]:
        for budget in self.evaluations:
            for name, (method, asks) in SAMPLERS.items():
                times = karras(flow.denoiser.schedule, t0, t1, budget // asks)
                yield name, fs.Solver(method, fs.Grid(times))
        method, count = UniPC(), self.iterations
        for budget in self.fitted:
            grid = optimize_grid(
                flow, method, budget, self.other, t0, t1, fine=FINE, iterations=count // 4
            )
            yield "UniPC, fitted grid", fs.Solver(method, grid)
            starts = [fs.Solver(method, grid)]
            fitted = distill_solver(flow, starts, self.other, fine=FINE, iterations=count)
            yield "fitted solver", fitted.solver


def picture(rows: list[dict], path: Path) -> None:
    """Error and distance over evaluations."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    ticks = sorted({row["evaluations"] for row in rows})
    for axis, key, title in (
        (axes[0], "error", "trajectory error"), (axes[1], "distance", "distance / floor"),
    ):  # fmt: skip
        for name in dict.fromkeys(row["sampler"] for row in rows):
            own = [(row["evaluations"], row[key]) for row in rows if row["sampler"] == name]
            style = "*--" if "fitted" in name else ".-"
            axis.plot(*zip(*own, strict=True), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="evaluations", title=title)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    saving.picture(figure, path)
