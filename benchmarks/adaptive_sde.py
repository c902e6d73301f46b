"""Adaptive against fixed steps on a reverse SDE: ``python -m benchmarks.adaptive_sde``.

The score is exact: data are a ring of eight Gaussians, wide or narrow, noised by VP, in whose time
even steps suit wide ones. All solves start from the same noise and follow the same Brownian paths,
and so does a fine one, which stands for the exact answer: the sliced Wasserstein distance (of
order 1: a sample that ends at another Gaussian counts by its mass) between the samples of a solve
and those of the fine one does not drown in the noise of sampling. The strong error of the same
samples is in the JSON.

Fixed steps are even in t, or in log(alpha / sigma), which takes knowledge of the schedule; adaptive
ones are given tolerances only. A second table is of the gains of the step controller, on a double
well in which each sample has steps of its own: work is attempts a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import SRA1, EulerMaruyama, Integrator, StepDoubling, StochasticHeun
from flowsde.paths import VP, BrownianTree, uniform_lambda

from . import reporting
from .work_precision import Curve, cost

SPAN = 1.0, 1e-3
STDS = 0.1, 0.02
GAINS = ((0.0, 1.0), (0.0, 0.5), (0.1, 0.3), (0.2, 0.4))


def ring(like: Tensor) -> Tensor:
    """The means, ``(8, 2)``."""
    angles = torch.arange(8, device=like.device, dtype=like.dtype) * (math.pi / 4)
    return torch.stack((angles.cos(), angles.sin()), 1)


def denoiser(std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x0 | x_t], in closed form, at a time that the batch shares."""

    def x0(t: Tensor, x: Tensor) -> Tensor:
        (alpha, sigma), means = VP()(t), ring(x)
        variance = (alpha * std) ** 2 + sigma**2
        near = -(x[:, None] - alpha * means).square().sum(-1) / (2.0 * variance)
        return (near.softmax(-1) @ means * sigma**2 + alpha * std**2 * x) / variance

    return x0


def distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein distance of order 1, over 32 directions of the plane."""
    angles = torch.arange(32, device=x.device, dtype=x.dtype) * (math.pi / 32)
    ways = torch.stack((angles.cos(), angles.sin()))
    return float(((x @ ways).sort(0).values - (y @ ways).sort(0).values).abs().mean())


@dataclass
class Race:
    """One start, one set of paths, one fine answer."""

    std: float
    x: Tensor
    path: BrownianTree
    fine: Tensor

    @classmethod
    def of(cls, std: float, count: int, steps: int, options: Any) -> Race:
        draws = torch.Generator(device=options.device).manual_seed(0)
        x = torch.randn(count, 2, generator=draws, dtype=options.real, device=options.device)
        path = BrownianTree(1, 0.0, 1.0, levy="H")
        race = cls(std, x, path, x)
        race.fine = race.run(SRA1(), race.even(steps)).y1
        return race

    @staticmethod
    def even(steps: int) -> fs.Grid:
        """Steps of one size in log(alpha / sigma)."""
        return fs.Grid(uniform_lambda(VP(), *SPAN, steps))

    def run(self, method: Integrator, stepping: fs.Stepping) -> fs.Solution:
        sde = fs.LinearSDE(VP()).reverse_sde(denoiser(self.std))
        with torch.no_grad():
            return fs.solve(
                sde, self.x, *SPAN, integrator=method, stepping=stepping, path=self.path
            )

    def point(self, method: Integrator, stepping: fs.Stepping) -> dict[str, Any]:
        solution = self.run(method, stepping)
        strong = float((solution.y1 - self.fine).square().sum(-1).mean().sqrt())
        stats = solution.stats
        return {
            "error": distance(solution.y1, self.fine), "strong": strong,
            "evaluations": stats.evaluations, "steps": stats.accepted, "rejected": stats.rejected,
        }  # fmt: skip


def curves(race: Race, counts: Sequence[int], tolerances: Sequence[float]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for method in (EulerMaruyama(), StochasticHeun(), SRA1()):
        name = type(method).__name__
        found[f"{name}, fixed in t"] = [race.point(method, fs.Fixed(steps=n)) for n in counts]
        found[f"{name}, even in lambda"] = [race.point(method, race.even(n)) for n in counts]
        own = method.error_order is not None
        adaptive = method if own else StepDoubling(method)
        label = name if own else f"StepDoubling({name})"
        found[f"{label}, adaptive"] = [
            race.point(adaptive, fs.Adaptive(tol, tol, pcoeff=0.1, icoeff=0.3))
            for tol in tolerances
        ]
    return found


def gains(count: int, powers: Sequence[int], options: Any) -> list[dict[str, Any]]:
    """Error times work, on a double well: a method of order one trades one for the other."""
    well = fs.SDE(
        lambda t, y: 4.0 * y * (1.0 - y * y), lambda t, y: 0.5 * torch.ones_like(y),
        noise="diagonal", additive=True, batched_time=True, rowwise=True,
    )  # fmt: skip
    y0 = torch.linspace(0.2, 1.0, count, dtype=options.real, device=options.device)[:, None]
    path = BrownianTree(torch.arange(count, device=options.device), 0.0, 2.0)
    method, found = StepDoubling(StochasticHeun()), []

    def run(stepping: fs.Stepping, by: Integrator) -> fs.Solution:
        return fs.solve(well, y0, 0.0, 2.0, integrator=by, stepping=stepping, path=path)

    fine = run(fs.Fixed(steps=2 ** (max(powers) + 2)), StochasticHeun()).y1
    for p, i in GAINS:
        for n in powers:
            stepping = fs.Adaptive(2.0**-n, 2.0**-n, per_sample=True, pcoeff=p, icoeff=i)
            solution = run(stepping, method)
            accepted, rejected = (
                float(torch.as_tensor(x).double().mean())
                for x in (solution.stats.accepted, solution.stats.rejected)
            )
            error = float((solution.y1 - fine).square().mean().sqrt())
            found.append(
                {"pcoeff": p, "icoeff": i, "tol": 2.0**-n, "error": error, "accepted": accepted,
                 "rejected": rejected, "product": error * (accepted + rejected)}
            )  # fmt: skip
    return found


def report(std: float, found: dict[str, Curve], wanted: Sequence[float]) -> None:
    print(f"Gaussians of spread {std}: evaluations at a sliced Wasserstein distance of\n")
    head = ["steps", *(f"{level:.0e}" for level in wanted)]
    reporting.table(
        head, ([name, *(cost(of, x, "evaluations") for x in wanted)] for name, of in found.items())
    )


def draw(options: Any, found: dict[float, dict[str, Curve]]) -> None:
    figure, axes = reporting.figure(1, len(found))
    for axis, (std, curves) in zip(axes[0], found.items(), strict=True):
        for name, curve in curves.items():
            style = "-" if name.endswith("adaptive") else "--" if name.endswith("lambda") else ":"
            points = zip(*((p["evaluations"], p["error"]) for p in curve), strict=True)
            axis.loglog(*points, style, marker="o", markersize=3, label=name)
        axis.set_title(f"spread {std}")
        axis.set_xlabel("evaluations")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("sliced Wasserstein distance")
    axes[0, 0].legend(fontsize=7)
    reporting.save("adaptive_sde", options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__), arguments)
    small = options.small
    counts = (16, 64) if small else (8, 16, 32, 64, 128)
    tolerances = [2.0**-n for n in ((2, 4) if small else range(6))]
    found = {}
    for std in STDS:
        race = Race.of(std, *((64, 128) if small else (1024, 512)), options)
        found[std] = curves(race, counts, tolerances)
        report(std, found[std], (1e-1, 3e-2, 1e-2))
    trials = gains(*((8, (3, 5)) if small else (64, (3, 5, 7))), options)
    print("Error times work, by the gains of the controller\n")
    head = list(trials[0])
    reporting.table(head, ([trial[key] for key in head] for trial in trials))
    reporting.write("adaptive_sde", options, {"curves": found, "gains": trials})
    draw(options, found)


if __name__ == "__main__":
    main()
