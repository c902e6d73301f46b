"""What a Dopri5 step costs beyond its evaluations: ``python -m benchmarks.overhead``.

Counts first: dispatcher operations and host reads per attempted step, outside the field. Then the
ratio of an adaptive solve to its bare evaluations: both libraries and the bare evaluations take
turns in one process, one thread pinned, and ratios are medians over the turns. Beside them stands a
Dopri5 loop written out by hand, without checks, options or statistics: what the dispatcher of the
machine allows an eager solver at all. ``--executor`` adds flowsde's solve as others run it, and the
seconds of its first solve, which may compile.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import flowsde as fs
from flowsde.integrators import Dopri5

from . import reporting
from .counting import Counter, uncounted
from .timing import alternate, clock, ratio

TOLERANCE = 1e-6
TUNED = {"cpp.use_decompose_tanh": True}  # see Compiled
SIZES = ((64, 2, 64, 1.25), (256, 16, 128, 1.12), (512, 64, 256, 1.05), (2048, 64, 512, 1.05))


class Field(nn.Module):
    """A tanh network with two hidden layers, turning the state at a brisk pace."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, dim),
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.mul_(1.6)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


@cache
def dynamics(f: Callable[[Tensor, Tensor], Tensor]) -> fs.ODE:
    """Made once: what an executor compiles lives as long as its dynamics."""
    return fs.ODE(f)


def ours(
    f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0,
    executor: fs.Executor = fs.Eager(),
) -> fs.Solution:  # fmt: skip
    return fs.solve(
        dynamics(f), y0, 0.0, end, integrator=Dopri5(), executor=executor,
        stepping=fs.Adaptive(TOLERANCE, TOLERANCE),
    )  # fmt: skip


def theirs(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0) -> Tensor:
    times = torch.tensor([0.0, end], device=y0.device, dtype=y0.dtype)
    return torchdiffeq.odeint(f, y0, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)


def by_hand(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0) -> Tensor:
    """The least that an adaptive Dopri5 solve can be in eager mode; its first step is given, so
    that it takes as many steps as the others.
    """
    method = Dopri5.tableau
    assert method.error is not None
    t, dt, y, k, size = 0.0, 0.05, y0, f(y0.new_full((), 0.0), y0), y0.detach().abs()
    while t < end:
        last = dt * 1.01 >= end - t
        dt, ks = (end - t if last else dt), [k]
        for c, ((first, weight), *rest) in zip(method.c[1:], method.rows, strict=True):
            y1 = y.add(ks[first], alpha=weight * dt)
            for i, w in rest:
                y1.add_(ks[i], alpha=w * dt)
            ks.append(f(y0.new_full((), t + c * dt), y1))
        with torch.no_grad():
            (first, weight), *rest = method.error
            error = ks[first].mul(weight * dt)
            for i, w in rest:
                error.add_(ks[i], alpha=w * dt)
            size1 = y1.abs()
            error.div_(torch.maximum(size, size1).mul_(TOLERANCE).add_(TOLERANCE))
            norm = float(torch.linalg.vector_norm(error)) * error.numel() ** -0.5
        factor = min(10.0, max(0.2, 0.9 * max(norm, 1e-10) ** -0.2))
        if norm <= 1.0:
            t, y, k, size = t + dt, y1, ks[-1], size1
        dt *= factor if norm <= 1.0 else min(factor, 0.9)
    return y


Solve = Callable[..., object]
SOLVES: dict[str, Solve] = {"flowsde": ours, "torchdiffeq": theirs, "by hand": by_hand}


def visited(solve: Solve, f: nn.Module, y0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The points at which a solve evaluates its field, in order."""
    points = []

    def watched(t: Tensor, y: Tensor) -> Tensor:
        points.append((t.clone(), y.clone()))
        return f(t, y)

    solve(watched, y0)
    return points


def count(
    solves: dict[str, Solve], device: str, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Operations and reads per attempted step: the slope between a short and a long solve."""
    f = Field(2, 64).to(device=device, dtype=dtype)
    y0 = torch.randn(64, 2, device=device, dtype=dtype)
    found = {}
    for name, solve in solves.items():
        marks = []
        for end in (2.0, 20.0):
            counter, calls = Counter(), []
            quiet = uncounted(lambda t, y, calls=calls: (calls.append(1), f(t, y))[1], counter)
            with torch.no_grad(), counter:
                solve(quiet, y0, end)
            marks.append((counter.operations, counter.reads, len(calls) / 6))
        (ops0, reads0, steps0), (ops1, reads1, steps1) = marks
        steps = steps1 - steps0
        found[name] = (ops1 - ops0) / steps, (reads1 - reads0) / steps
    return found


@torch.no_grad()
def ratios(
    size: tuple[int, int, int, float], solves: dict[str, Solve], executors: dict[str, Solve],
    options: Any,
) -> dict[str, float]:  # fmt: skip
    """Each solve over its own evaluations, made bare at the points it visited.

    Executors visit the points that flowsde's eager solve does; their first solve, which may
    compile, is timed by itself.
    """
    batch, dim, width, bound = size
    f = Field(dim, width).to(device=options.device, dtype=options.real)
    y0 = torch.randn(batch, dim, device=options.device, dtype=options.real)
    points = {name: visited(solve, f, y0) for name, solve in solves.items()}
    row: dict[str, float] = {"bound": bound}
    for name, solve in executors.items():
        row[f"{name} first, seconds"] = clock(partial(solve, f, y0), options.device)
        points[name] = points["flowsde"]

    def share(name: str, solve: Solve) -> tuple[float, float]:
        bare = partial(clock, lambda: [f(t, y) for t, y in points[name]], options.device)
        before = bare()
        taken = clock(lambda: solve(f, y0), options.device)
        return taken, 2.0 * taken / (before + bare())

    readings = alternate(
        {name: partial(share, name, solve) for name, solve in (solves | executors).items()},
        options.turns,
    )
    for name, pairs in readings.items():
        row[name] = statistics.median(part for _, part in pairs)
        row[f"{name} evaluations"] = len(points[name])
    seconds = {name: [taken for taken, _ in pairs] for name, pairs in readings.items()}
    if "torchdiffeq" in seconds:
        row["time"] = ratio(seconds["flowsde"], seconds["torchdiffeq"])
    for name in executors:
        row[f"{name} time"] = ratio(seconds[name], seconds["flowsde"])
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    known = {
        name: entry for name in fs.__all__
        if isinstance(entry := getattr(fs, name), type) and issubclass(entry, fs.Executor)
        and entry not in (fs.Executor, fs.Eager)
    }  # fmt: skip
    parser = reporting.parser(__doc__, dtype="float32", turns=15)
    parser.add_argument("--executor", nargs="*", choices=known, default=[])
    options = reporting.options(parser, arguments)
    solves = dict(SOLVES)
    if options.peers is not None and "torchdiffeq" not in options.peers:
        del solves["torchdiffeq"]
    executors = {
        f"flowsde, {name}": partial(ours, executor=known[name]()) for name in options.executor
    }
    if "Compiled" in options.executor and options.device == "cpu":
        executors["flowsde, Compiled, tuned"] = partial(ours, executor=fs.Compiled(options=TUNED))

    counts = count(solves, options.device, options.real)
    print(f"Dopri5, per attempted step beyond the field ({options.device})\n")
    head = ["", "dispatcher operations", "host reads"]
    reporting.table(head, ([name, *pair] for name, pair in counts.items()))

    print("Adaptive solve over bare evaluations, median of alternating turns, one thread\n")
    sizes = SIZES[:1] if options.small else SIZES
    table = {str(size[:3]): ratios(size, solves, executors, options) for size in sizes}
    columns = [key for key in next(iter(table.values())) if not key.endswith("evaluations")]
    rows = (
        [
            size, *(row[key] for key in columns),
            " / ".join(str(row[f"{name} evaluations"]) for name in solves),
        ]
        for size, row in table.items()
    )  # fmt: skip
    reporting.table(["batch, dimension, width", *columns, "evaluations"], rows)
    reporting.write("overhead", options, {"counts": counts, "ratios": table})


if __name__ == "__main__":
    main()
