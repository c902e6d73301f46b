"""Error against evaluations: ``python -m benchmarks.work_precision``; draws them.

Left, the adaptive Runge-Kutta methods on a Kepler orbit of eccentricity 0.5, beside
torchdiffeq's. Right, samplers on the probability flow of an exact Gaussian-mixture denoiser.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor

import flowsde as fs
from flowsde.integrators import (
    DDIM,
    RK4,
    Bosh3,
    Dopri5,
    Dopri8,
    DPMSolverPP,
    Heun,
    Tsit5,
)  # fmt: skip
from flowsde.paths import VP, uniform_lambda

Curve = list[tuple[int, float]]


def orbit(t: Tensor, y: Tensor) -> Tensor:
    """A Kepler orbit of eccentricity 0.5."""
    q, p = y[..., :2], y[..., 2:]
    return torch.cat((p, -q / q.norm(dim=-1, keepdim=True) ** 3), -1)


def adaptive() -> dict[str, Curve]:
    y0, end = torch.tensor([[0.5, 0.0, 0.0, math.sqrt(3.0)]], dtype=torch.float64), 4.0 * math.pi
    tolerances = [10.0**-n for n in range(3, 11)]
    curves: dict[str, Curve] = {}
    for method in (Bosh3(), Dopri5(), Tsit5(), Dopri8()):
        name = type(method).__name__
        curves[name] = []
        for tolerance in tolerances[: 5 if name == "Bosh3" else None]:
            sol = fs.solve(
                fs.ODE(orbit), y0, 0.0, end, integrator=method, max_steps=100_000,
                stepping=fs.Adaptive(tolerance, tolerance),
            )  # fmt: skip
            curves[name].append((sol.stats.evaluations, float((sol.y1 - y0).norm())))
    for method in ("dopri5", "dopri8"):
        curves[f"torchdiffeq {method}"] = []
        for tolerance in tolerances:
            calls = [0]

            def counted(t: Tensor, y: Tensor, calls: list[int] = calls) -> Tensor:
                calls[0] += 1
                return orbit(t, y)

            times = torch.tensor([0.0, end], dtype=torch.float64)
            y1 = torchdiffeq.odeint(
                counted, y0, times, rtol=tolerance, atol=tolerance, method=method
            )[-1]
            curves[f"torchdiffeq {method}"].append((calls[0], float((y1 - y0).norm())))
    return curves


def samplers() -> dict[str, Curve]:
    schedule = VP()
    means = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = 0.3

    def denoiser(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        variance = alpha**2 * spread**2 + sigma**2
        gaps = x[:, None] - alpha * means
        part = (-0.5 * gaps.square().sum(-1) / variance).softmax(-1)[..., None]
        return (part * (means + alpha * spread**2 / variance * gaps)).sum(1)

    flow = fs.LinearSDE(schedule).probability_flow(denoiser)
    noise, (t0, t1) = fs.Normal(16).sample(200, seed=0).double(), (1.0, 1e-3)
    truth = fs.solve(flow, noise, t0, t1, stepping=fs.Adaptive(1e-11, 1e-11)).y1

    def curve(method: fs.Integrator, make: Callable[[int], fs.Grid], stages: int) -> Curve:
        found = []
        for evaluations in (8, 12, 20, 32, 60, 100, 200, 400):
            sol = fs.solve(
                flow, noise, t0, t1, integrator=method, stepping=make(evaluations // stages)
            )
            error = float((sol.y1 - truth).square().mean().sqrt())
            found.append((sol.stats.evaluations, error))
        return found

    def grid(steps: int) -> fs.Grid:
        return fs.Grid(uniform_lambda(schedule, t0, t1, steps))

    return {
        "DDIM": curve(DDIM(), grid, 1), "DPM-Solver++(2M)": curve(DPMSolverPP(), grid, 1),
        "Heun": curve(Heun(), grid, 2), "RK4": curve(RK4(), grid, 4),
    }  # fmt: skip


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    panels = (("Kepler orbit, two turns", adaptive()), ("probability flow, VP", samplers()))
    for axis, (title, curves) in zip(axes, panels, strict=True):
        print(title)
        for name, points in curves.items():
            dashed = "--" if name.startswith("torchdiffeq") else "-"
            axis.loglog(*zip(*points, strict=True), dashed, marker="o", markersize=3, label=name)
            print(f"  {name:20s}", "  ".join(f"{n}: {error:.1e}" for n, error in points))
        axis.set_xlabel("evaluations")
        axis.set_ylabel("error")
        axis.set_title(title)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out / "work_precision.png", dpi=110)
    print(f"picture in {options.out / 'work_precision.png'}")


if __name__ == "__main__":
    main()
