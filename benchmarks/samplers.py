"""Diffusion samplers beside their peers, by evaluations: ``python -m benchmarks.samplers``.

Denoisers are exact: of Gaussian mixtures in 2 and 16 dimensions and of the empirical law of
scikit-learn's digits in 64. Trajectory error is the root mean square distance to where tight
tolerances end, from the same noises; sliced Wasserstein is to fresh data (the reading for the
trajectories themselves is the floor). Every fixed sampler takes every grid of its library, and the
nearest of each library are read again on more and other noises: of many that were tried the best is
partly the luckiest, and where few trajectories end at another point, these are most of the error.
The best of what was read again is kept, by either measure. Fitted solvers are fitted on noises of a
third seed. Libraries beside ours run on z = x / alpha, in which a probability flow does not know
its schedule.
k-diffusion is compared with where it is installed; its formulas are among ours in any case (Heun,
DPM++ 2M, linear multistep up to three steps). The whole takes hours of one core: ``--parts DIR``
keeps what is done, and takes from there what was done with the same settings, also by runs of other
laws beside this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from examples import saving
from examples.measures import sliced_wasserstein
from flowsde.fitting import distill_solver, optimize_grid
from flowsde.integrators import (
    DDIM,
    DEIS,
    Dopri8,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMHeun,
    ExponentialAdams,
    Integrator,
    UniPC,
)
from flowsde.integrators.exponential import Exponential
from flowsde.paths import (
    EDM,
    VP,
    Schedule,
    aligned,
    beta,
    karras,
    quadratic,
    uniform,
    uniform_lambda,
    uniform_sigma,
)

from . import reporting
from .peers import installed
from .sampler_peers import SAMPLER_PEERS

SPANS: dict[Schedule, tuple[float, float]] = {VP(): (1.0, 1e-3), EDM(): (80.0, 0.002)}
STARTS: list[Exponential] = [  # of fits
    DDIM(), *(make(order) for make in (DPMSolverPP, DEIS, ExponentialAdams) for order in (2, 3)),
    *(ExponentialAdams(order, dual=True) for order in (2, 3)),
    *(UniPC(p, bh=bh) for p, bh in ((1, 2), (1, 1), (2, 2), (2, 1), (3, 2))),
]  # fmt: skip
SAMPLERS: list[tuple[Exponential, int]] = [
    *((method, 1) for method in STARTS), (EDMHeun(), 2), (DPMSolver(2), 2), (DPMSolver(3), 3),
    (DPMSolverPPSingle(2), 2), (DPMSolverPPSingle(3), 3),
    *((make(order, final=1), 1) for make in (DPMSolverPP, UniPC) for order in (2, 3)),
    (DEIS(3, final=1), 1),
]  # fmt: skip


def beta_sigma(schedule: Schedule, t0: float, t1: float, steps: int) -> Tensor:
    """Beta quantiles in s, as diffusers has them."""
    first, last = (math.exp(-float(schedule.half_log_snr(t))) for t in (t0, t1))
    inner = torch.as_tensor(schedule.time(-beta(first, last, steps)[1:-1].log()))
    return torch.cat([inner.new_tensor([t0]), inner, inner.new_tensor([t1])])


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform t": lambda schedule, *span: uniform(*span),
    "quadratic": lambda schedule, *span: quadratic(*span),
    "beta": lambda schedule, *span: beta(*span),
    "uniform lambda": uniform_lambda,
    "uniform sigma": uniform_sigma,
    "karras": karras,
    "karras 3": partial(karras, rho=3.0),
    "beta sigma": beta_sigma,
    **{f"aligned {d}": partial(aligned, sigma_data=d) for d in (0.25, 0.5, 1.0, 2.0)},
}
FITTED = (5, 8, 10)


@dataclass(frozen=True, eq=False)
class Points:
    """Gaussians of one width at given points, ``(n, d)``; of none, the empirical law."""

    points: Tensor
    std: float = 0.0

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t], exact."""
        squares = self.points.square().sum(-1)

        def x0(t: Tensor, x: Tensor) -> Tensor:
            alpha, sigma = schedule(t)
            variance = (alpha * self.std) ** 2 + sigma**2
            logits = (alpha * (x @ self.points.T) - 0.5 * alpha**2 * squares) / variance
            gain = alpha * self.std**2 / variance
            return gain * x + (1.0 - alpha * gain) * (logits.softmax(-1) @ self.points)

        return x0

    def sample(self, count: int, draws: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.points), (count,), generator=draws)
        noise = torch.randn(count, self.points.shape[1], generator=draws, dtype=self.points.dtype)
        return self.points[rows] + self.std * noise


def laws(dtype: torch.dtype) -> dict[str, Points]:
    from sklearn.datasets import load_digits

    draws = torch.Generator().manual_seed(0)
    made = {}
    for d, n in ((2, 6), (16, 10)):
        points = torch.randn(n, d, generator=draws, dtype=torch.float64)
        made[f"mixture {d}"] = Points(points.to(dtype), 0.15)
    digits = torch.from_numpy(load_digits().data) / 8.0 - 1.0
    return {**made, "digits 64": Points(digits.to(dtype))}


@dataclass(frozen=True, eq=False)
class Problem:
    """One law, one schedule, and noises of one seed."""

    law: Points
    schedule: Schedule
    count: int
    seed: int

    @cached_property
    def flow(self) -> Any:
        return fs.LinearSDE(self.schedule).probability_flow(self.law.denoiser(self.schedule))

    @property
    def span(self) -> tuple[float, float]:
        return SPANS[self.schedule]

    @cached_property
    def noises(self) -> Tensor:
        draws = torch.Generator().manual_seed(self.seed)
        shape, dtype = (self.count, self.law.points.shape[1]), self.law.points.dtype
        noise = torch.randn(shape, generator=draws, dtype=dtype)
        return noise * self.schedule.sigma(self.span[0])

    @cached_property
    def ends(self) -> Tensor:
        """Where the trajectories end, to 1e-10."""
        return self.ours(fs.Solver(Dopri8(), fs.Adaptive(1e-10, 1e-10)))

    def grid(self, name: str, steps: int) -> Tensor:
        return GRIDS[name](self.schedule, *self.span, steps)

    @torch.no_grad()
    def ours(self, solver: fs.Solver) -> Tensor:
        """Where a solver of ours ends."""
        return solver.solve(self.flow, self.noises, *self.span).y1

    @torch.no_grad()
    def theirs(self, run: Any, times: Tensor) -> tuple[Tensor, int]:
        """Where a peer ends, and how often it asked."""
        denoiser, asked = self.flow.denoiser, 0

        def ask(s: Tensor, z: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            t = torch.as_tensor(self.schedule.time(-s.log()))
            return denoiser(t, torch.as_tensor(self.schedule.alpha(t)) * z)

        ratios = torch.exp(-torch.as_tensor(self.schedule.half_log_snr(times)))
        z = run(ask, ratios, self.noises / self.schedule.alpha(self.span[0]))
        return z * self.schedule.alpha(self.span[1]), asked

    def error(self, x: Tensor) -> float:
        return float((x - self.ends).square().mean().sqrt())

    def distance(self, x: Tensor) -> float:
        draws = torch.Generator().manual_seed(self.seed + 100)
        return sliced_wasserstein(x, self.law.sample(self.count, draws).to(x), draws)

    def row(self, budget: int, case: Case, x: Tensor) -> dict[str, Any]:
        own = dict(zip(("library", "sampler", "grid"), case, strict=True))
        return {"evaluations": budget, **own, "error": self.error(x), "distance": self.distance(x)}


Case = tuple[str, str, str]  # library, sampler, grid


def cases(
    budget: int, grids: Sequence[str], peers: Sequence[str]
) -> dict[Case, Callable[[Problem], Tensor]]:
    """Every sampler on every grid of its library, of as many steps as the budget has."""
    found: dict[Case, Callable[[Problem], Tensor]] = {}

    def ours(method: Integrator, grid: str, steps: int, problem: Problem) -> Tensor:
        return problem.ours(fs.Solver(method, fs.Grid(problem.grid(grid, steps))))

    def theirs(sampler: Any, grid: str, steps: int, problem: Problem) -> Tensor:
        asks, run = sampler
        x, asked = problem.theirs(run, problem.grid(grid, steps))
        assert asked == steps * asks, (sampler, asked)
        return x

    for method, asks in SAMPLERS:
        for grid in grids if budget >= asks else ():
            found["flowsde", str(method), grid] = partial(ours, method, grid, budget // asks)
    for name in peers:
        for label, sampler in SAMPLER_PEERS[name].samplers().items():
            for grid in SAMPLER_PEERS[name].grids if budget >= sampler[0] else ():
                found[name, label, grid] = partial(theirs, sampler, grid, budget // sampler[0])
    return found


def read(
    problem: Problem, budget: int, known: dict[Case, Callable[[Problem], Tensor]]
) -> Iterator[dict[str, Any]]:
    """A row of each that ends at finite states."""
    for case, end in known.items():
        if bool((x := end(problem)).isfinite().all()):
            yield problem.row(budget, case, x)


def nearest(rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Of each library three by the error, and the one that is nearest to the data."""
    found: list[Case] = []
    for library in {row["library"]: None for row in rows}:
        own = [row for row in rows if row["library"] == library]
        for by, count in (("error", 3), ("distance", 1)):
            best = sorted(own, key=itemgetter(by))[:count]
            found += [(library, row["sampler"], row["grid"]) for row in best]
    return list(dict.fromkeys(found))


def fitted(problem: Problem, train: Problem, budget: int, options: Any) -> Iterator[dict[str, Any]]:
    """The best multistep method on a grid fitted for it, and the solver fitted from them all.

    An eighth of the noises tells which is best and fits the grid, which is of few numbers.
    """
    few = replace(train, count=max(1, train.count // 8))
    starts = [
        fs.Solver(method, fs.Grid(train.grid(name, budget)))
        for method in STARTS for name in options.grids
    ]  # fmt: skip
    best = min(starts, key=lambda start: few.error(few.ours(start))).integrator
    assert best is not None
    grid = optimize_grid(
        few.flow, best, budget, few.noises, *train.span, iterations=options.iterations // 4
    )
    fine = fs.Solver(Dopri8(), fs.Adaptive(1e-7, 1e-7))
    solver = distill_solver(
        train.flow, starts, train.noises, fine=fine, iterations=options.iterations
    )
    for name, found in (
        ("fitted grid", fs.Solver(best, grid)), ("fitted solver", solver.solver),
    ):  # fmt: skip
        case = name, type(found.integrator).__name__, "fitted"
        yield problem.row(budget, case, problem.ours(found))


def kept(path: Path | None, settings: dict[str, Any], rows: Iterable[Any]) -> list[Any]:
    """What is at this path, if it was made with these settings; else the rows, put there."""
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found["rows"]
    made = list(rows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        saving.record({"settings": settings, "rows": made}, path)
    return made


def best(
    rows: Sequence[dict[str, Any]], *libraries: str, by: str = "error"
) -> dict[str, Any] | None:
    own = [row for row in rows if row["library"] in libraries]
    return min(own, key=itemgetter(by)) if own else None


def leaders(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each budget and library the nearest to the trajectories, and the nearest to the data."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["evaluations"], row["library"]), []).append(row)
    found = [
        min(own, key=itemgetter(by)) for own in groups.values() for by in ("error", "distance")
    ]
    return list({id(row): row for row in found}.values())


def summary(rows: Sequence[dict[str, Any]], peers: Sequence[str], floor: float) -> list[list[Any]]:
    """A line a budget: the best of ours, of the peers, and what was fitted, over the best peer."""
    lines = []
    for budget in sorted({row["evaluations"] for row in rows}):
        now = [row for row in rows if row["evaluations"] == budget]
        ours, peer = best(now, "flowsde"), best(now, *peers)
        cells: list[Any] = [budget]
        for found in (ours, peer):
            cells += (
                [f"{found['sampler']}, {found['grid']}", found["error"]] if found else [None] * 2
            )
        for found in (ours, best(now, "fitted grid"), best(now, "fitted solver")):
            cells.append(found["error"] / peer["error"] if found and peer else None)
        for libraries in (["flowsde"], peers, ["fitted solver"]):
            nearest = best(now, *libraries, by="distance")
            cells.append(nearest["distance"] / floor if nearest else None)
        lines.append(cells)
    return lines


HEAD = (
    "evaluations", "best of ours", "error", "best peer", "error", "ours / peer",
    "fitted grid / peer", "fitted solver / peer", "distance / floor: ours", "peer", "fitted",
)  # fmt: skip


def draw(record: dict[str, Any], peers: Sequence[str], options: Any) -> None:
    figure, axes = reporting.figure(1, len(record))
    for axis, (name, found) in zip(axes[0], record.items(), strict=True):
        for label, libraries in (
            ("best of ours", ["flowsde"]), ("best peer", peers), ("fitted grid", ["fitted grid"]),
            ("fitted solver", ["fitted solver"]),
        ):  # fmt: skip
            points = {}
            for budget in sorted({row["evaluations"] for row in found["rows"]}):
                now = [row for row in found["rows"] if row["evaluations"] == budget]
                if (row := best(now, *libraries)) is not None:
                    points[budget] = row["error"]
            axis.plot(list(points), list(points.values()), marker=".", label=label)
        axis.set(xscale="log", yscale="log", title=name, xlabel="evaluations")
        axis.set_xticks(options.budgets, [str(budget) for budget in options.budgets])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("trajectory error")
    axes[0, 0].legend(fontsize=8)
    reporting.save("samplers", options, figure)


def parse(arguments: Sequence[str] | None) -> Any:
    made = reporting.parser(__doc__)
    made.add_argument("--budgets", type=int, nargs="+", default=[5, 8, 10, 15, 20, 30, 50])
    made.add_argument("--laws", nargs="+", default=["mixture 2", "mixture 16", "digits 64"])
    made.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS), help="of ours")
    made.add_argument("--count", type=int, default=512, help="noises that all are read on")
    made.add_argument("--again", type=int, default=2048, help="noises that the nearest are read on")
    made.add_argument("--train", type=int, default=1024, help="noises that are fitted on")
    made.add_argument("--iterations", type=int, default=400, help="of fitting")
    made.add_argument("--parts", type=Path, help="where to keep what is done, and to go on from")
    options = reporting.options(made, arguments)
    options.spans = list(SPANS)
    if options.small:
        options.laws, options.budgets, options.spans = options.laws[:1], [5], options.spans[:1]
        options.grids = ["quadratic", "aligned 1.0"]
        options.count, options.again, options.train, options.iterations = 32, 64, 32, 30
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    known = SAMPLER_PEERS if options.peers is None else options.peers
    peers, versions = installed([name for name in known if name in SAMPLER_PEERS])
    settings = {"dtype": options.dtype, "count": options.count, "grids": options.grids}
    again = {**settings, "again": options.again}
    fitting = {**again, "train": options.train, "iterations": options.iterations}
    record: dict[str, Any] = {}
    for name, law in laws(options.real).items():
        for schedule in options.spans if name in options.laws else ():
            label = f"{name}, {type(schedule).__name__}"
            problem, train, others = (
                Problem(law, schedule, count, seed)
                for seed, count in enumerate((options.count, options.train, options.again))
            )
            rows: list[dict[str, Any]] = []

            def part(kind: str, label: str = label) -> Path | None:
                return options.parts and options.parts / f"{label}, {kind}.json"

            for budget in options.budgets:
                every, of = cases(budget, options.grids, peers), {"peers": versions}
                first = kept(part(f"{budget}"), {**settings, **of}, read(problem, budget, every))
                few = {case: every[case] for case in nearest(first)}
                rows += kept(part(f"{budget} again"), {**again, **of}, read(others, budget, few))
                if budget in FITTED:
                    made = fitted(others, train, budget, options)
                    rows += kept(part(f"{budget} fitted"), fitting, made)
            floor = others.distance(others.ends)
            print(f"### {label}, distance of the trajectories themselves {floor:.3g}\n")
            reporting.table(HEAD, summary(rows, peers, floor))
            record[label] = {"rows": leaders(rows), "floor": floor}
    reporting.write("samplers", options, {"peers": versions, **fitting, "problems": record})
    draw(record, peers, options)


if __name__ == "__main__":
    main()
