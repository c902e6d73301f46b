"""Error against evaluations and time: ``python -m benchmarks.work_precision --set nonstiff``.

Every adaptive integrator of the catalogue, and those of the peers, over tolerances a decade apart,
on every problem of a set: ``nonstiff`` or ``stiff`` (benchmarks/problems.py). Errors are those of
the last state against a reference; times are medians of alternating turns. With ``nonstiff`` come
fixed-step samplers on the probability flow of an exact Gaussian-mixture denoiser, whose error is
the median over the samples: one on the border of two Gaussians would outweigh all others.

A method that runs out of evaluations on a problem, or fails there twice in a row in another way,
takes no tighter tolerances. Its last complaint is kept in the JSON.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators.exponential import Exponential
from flowsde.paths import VP, uniform_lambda

from . import reporting
from .peers import Exhausted, Failed, Flowsde, Library, Place, peers
from .problems import NONSTIFF, STIFF, Problem
from .timing import alternate, clock

Point = dict[str, float]
Curve = list[Point]

SETS = {"nonstiff": NONSTIFF, "stiff": STIFF}
DRAWN = {
    "nonstiff": ("D3", "E2", "neural"),
    "stiff": ("Robertson", "van der Pol", "HIRES", "Oregonator"),
}
SMALL = {"nonstiff": ("A3",), "stiff": ("HIRES",)}
WANTED = {"nonstiff": 1e-6, "stiff": 1e-4}  # the error at which costs are compared
COMPILED = {"nonstiff": "Dopri8", "stiff": "Kvaerno5"}
CALLS = {"nonstiff": 6_000, "stiff": 20_000}


def curves(
    problem: Problem, libraries: Sequence[Library], tolerances: Iterable[float], place: Place,
    turns: int,
) -> tuple[dict[str, Curve], dict[str, str]]:  # fmt: skip
    """A curve for each method, and why those that fell out did."""
    entries = {
        f"{library.name} {method}": (library, method)
        for library in libraries
        for method in library.methods(problem.stiff)
    }
    found: dict[str, Curve] = {name: [] for name in entries}
    failures = dict.fromkeys(entries, 0)
    complaints: dict[str, str] = {}
    for rtol in tolerances:
        clocks, points = {}, {}
        for name, (library, method) in entries.items():
            if failures[name] >= 2:
                continue
            solver = library.solver(problem, method, rtol, place)
            try:
                answer = solver.count()
            except Failed as error:
                failures[name] += 2 if isinstance(error, Exhausted) else 1
                complaints[name] = f"rtol {rtol:.0e}: {error}"
                continue
            failures[name], clocks[name] = 0, solver.time
            points[name] = {
                "rtol": rtol, "error": problem.error(answer.y1), "evaluations": answer.calls
            }  # fmt: skip
        for name, readings in alternate(clocks, turns).items():
            found[name].append({**points[name], "seconds": statistics.median(readings)})
    return found, complaints


def cost(curve: Curve, wanted: float, key: str) -> float | None:
    """What reaches the wanted error, log-log between two points; None where nothing does.

    Where the cheapest point is better than wanted already, what that point costs.
    """
    before: Point | None = None
    for point in sorted(curve, key=lambda p: p["evaluations"]):
        if point["error"] <= wanted:
            if before is None or point["error"] == 0.0:
                return float(point[key])
            share = math.log(wanted / before["error"]) / math.log(point["error"] / before["error"])
            return float(before[key] * (point[key] / before[key]) ** share)
        before = point
    return None


Costs = dict[str, dict[str, float | None]]


def costs(found: dict[str, dict[str, Curve]], wanted: float, key: str) -> Costs:
    """By problem and method."""
    return {
        problem: {name: cost(curve, wanted, key) for name, curve in of.items()}
        for problem, of in found.items()
    }


def excess(of: Costs, name: str) -> tuple[int, float | None]:
    """Problems that a method solved, and its geometric mean cost over the cheapest on each."""
    logs = []
    for row in of.values():
        mine = row.get(name)
        if mine is not None:
            logs.append(math.log(mine / min(c for c in row.values() if c is not None)))
    return len(logs), math.exp(statistics.mean(logs)) if logs else None


def report(found: dict[str, dict[str, Curve]], wanted: float) -> None:
    """Three tables: evaluations and milliseconds by problem, then both over the cheapest."""
    evaluations, seconds = (costs(found, wanted, key) for key in ("evaluations", "seconds"))
    names = list(dict.fromkeys(name for row in evaluations.values() for name in row))
    for title, of, scale in (("Evaluations", evaluations, 1.0), ("Milliseconds", seconds, 1e3)):
        print(f"{title} at error {wanted:.0e}\n")
        rows = ([p, *(_scaled(row[n], scale) for n in names)] for p, row in of.items())
        reporting.table(["problem", *names], rows)
    print("Over the cheapest method of each problem, geometric means over the problems solved\n")
    reporting.table(
        ["method", "solved", "evaluations", "time"],
        ([n, *excess(evaluations, n), excess(seconds, n)[1]] for n in names),
    )


def _scaled(x: float | None, scale: float) -> float | None:
    return None if x is None else x * scale


def samplers(small: bool, turns: int) -> dict[str, Curve]:
    """Exponential methods of the catalogue, Heun and RK4, on steps uniform in log-SNR."""
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
    tight = 1e-7 if small else 1e-11
    truth = fs.solve(flow, noise, t0, t1, stepping=fs.Adaptive(tight, tight)).y1

    def curve(method: fs.Integrator) -> Curve:
        found: Curve = []
        for steps in (5, 12, 20) if small else (5, 8, 12, 20, 32, 60, 100, 200, 400):
            grid = fs.Grid(uniform_lambda(schedule, t0, t1, steps))

            def run(grid: fs.Grid = grid) -> fs.Solution:
                return fs.solve(flow, noise, t0, t1, integrator=method, stepping=grid)

            solution = run()
            if solution.stats.evaluations > 400:
                break
            readings = [clock(run) for _ in range(turns)]
            found.append(
                {
                    "error": float((solution.y1 - truth).square().mean(1).sqrt().median()),
                    "evaluations": solution.stats.evaluations,
                    "seconds": statistics.median(readings),
                }
            )
        return found

    exponential = [
        name for name in integrators.__all__
        if isinstance(getattr(integrators, name), type)
        and issubclass(getattr(integrators, name), Exponential)
    ]  # fmt: skip
    with torch.no_grad():
        return {n: curve(getattr(integrators, n)()) for n in (*exponential, "Heun", "RK4")}


def draw(name: str, options: Any, panels: dict[str, dict[str, Curve]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors
    figure, axes = reporting.figure(2, len(panels))
    for column, (title, of) in zip(axes.T, panels.items(), strict=True):
        for axis, key in zip(column, ("evaluations", "seconds"), strict=True):
            for i, (label, curve) in enumerate(of.items()):
                points = [(p[key], p["error"]) for p in curve if p["error"] > 0.0]
                if not points:
                    continue
                theirs = " " in label and not label.startswith("flowsde")
                axis.loglog(
                    *zip(*points, strict=True), "--" if theirs else "-", marker="o", markersize=3,
                    color=colours[i % len(colours)], label=label.removeprefix("flowsde "),
                )  # fmt: skip
            axis.set_xlabel(key)
            axis.set_ylabel("error")
            axis.set_title(title)
            axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    reporting.save(name, options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = reporting.parser(__doc__, turns=3)
    parser.add_argument("--set", choices=SETS, default="nonstiff")
    parser.add_argument("--compiled", action="store_true", help="one method in a graph, too: slow")
    options = reporting.options(parser, arguments)
    kind, small = options.set, options.small
    place = Place(options.device, options.real, 600 if small else CALLS[kind])
    exponents = (2, 4) if small else range(2, 11)
    ours, (others, versions) = Flowsde(), peers(options.peers)
    mine: list[Library] = [ours]
    if options.compiled:
        mine.append(Flowsde(executor=fs.Compiled(), only=(COMPILED[kind],)))
    found, complaints = {}, {}
    for problem in SETS[kind]:
        if small and problem.name not in SMALL[kind]:
            continue
        print(f"{problem.name} ...", flush=True)
        found[problem.name], complaints[problem.name] = curves(
            problem, (*mine, *others), [10.0**-n for n in exponents], place, options.turns
        )
    for name, why in ours.skipped.items():
        print(f"{name} left out: {why}")
    report(found, 1e-2 if small else WANTED[kind])
    panels = {name: found[name] for name in DRAWN[kind] if name in found}
    record: dict[str, Any] = {
        "peers": versions, "skipped": ours.skipped, "curves": found, "complaints": complaints
    }  # fmt: skip
    if kind == "nonstiff" and options.device == "cpu":
        record["samplers"] = panels["probability flow, VP"] = samplers(small, options.turns)
    reporting.write(f"work_precision-{kind}", options, record)
    draw("work_precision" if kind == "nonstiff" else f"work_precision-{kind}", options, panels)


if __name__ == "__main__":
    main()
