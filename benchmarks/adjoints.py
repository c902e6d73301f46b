"""What a gradient costs: ``python -m benchmarks.adjoints [--table times memory implicit]``.

times: forward and gradient of the squared norm of y(4), by the parameters and y0, at the sizes of
benchmarks/overhead.py: every adjoint that flowsde exports beside torchdiffeq's ``odeint`` (through
its operations) and ``odeint_adjoint`` (backwards in time), at tolerances 1e-6, and backpropagation
through a Dopri5 loop written out by hand. Alternating turns, medians; ``gap`` is the relative
distance of the gradient from Direct's. An adjoint that does not take Dopri5 gets the first
integrator of the catalogue that it takes, with 50 fixed steps where it takes none that adapts; the
reversible form of the wanted one stands before the catalogue.

implicit: the same of implicit integrators on a stiff field, rates up to 1000, over a unit of time,
at tolerances 1e-4 or by 50 steps: eager beside compiled; ``gap`` is from the eager gradient.

memory: the most bytes of tensors alive at once during forward and gradient, over the number of
fixed steps of one span (the allocator's own peak on a GPU).
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import integrators
from flowsde.integrators import RK4, Dopri5, ImplicitEuler, KenCarp4, Kvaerno3, Kvaerno5
from flowsde.integrators.base import Engine

from . import reporting
from .overhead import SIZES, TOLERANCE, TUNED, Field, by_hand, dynamics
from .peers import peers
from .storages import Storages
from .timing import alternate, clock, ratio

END = 4.0
Solve = Callable[[nn.Module, Tensor], Tensor]  # (f, y0) to y(END)


def adjoints() -> tuple[dict[str, fs.Adjoint], dict[str, str]]:
    """Every adjoint that is exported, as made by default; and why others are left out."""
    found: dict[str, fs.Adjoint] = {}
    skipped: dict[str, str] = {}
    for name in fs.__all__:
        entry = getattr(fs, name)
        if not inspect.isclass(entry) or not issubclass(entry, fs.Adjoint):
            continue
        if inspect.isabstract(entry):
            continue
        try:
            found[name] = entry()
        except TypeError as error:
            skipped[name] = str(error)
            continue
        if "budget" in {field.name for field in dataclasses.fields(entry)}:
            found[f"{name}(budget=16)"] = entry(budget=16)
    return found, skipped


def candidates(first: integrators.ExplicitRK) -> list[fs.Integrator]:
    """The wanted one, its reversible form, then the catalogue of ODE integrators."""
    found = [first, integrators.ReversibleRK(first)]
    for name in integrators.__all__:
        entry = getattr(integrators, name)
        if inspect.isclass(entry) and issubclass(entry, fs.Integrator):
            frames = integrators.ExplicitRK, integrators.ImplicitRK  # of which the others are data
            if inspect.isabstract(entry) or issubclass(entry, Engine) or entry in frames:
                continue
            try:
                made = entry()
                made.check(fs.ODE(lambda t, y: -y))
            except TypeError:
                continue
            found.append(made)
    return found


Choice = tuple[fs.Adjoint, fs.Integrator, fs.Stepping]


def choices(
    first: integrators.ExplicitRK, steppings: Sequence[fs.Stepping]
) -> tuple[dict[str, Choice], dict[str, str]]:
    """For each adjoint the first integrator and stepping that it takes; and why some have none."""
    known, skipped = adjoints()
    found: dict[str, Choice] = {}
    for name, adjoint in known.items():
        pair = admitted(adjoint, first, steppings)
        if isinstance(pair, str):
            skipped[name] = pair
            continue
        own = "" if pair[0] == first else f", {type(pair[0]).__name__}"
        own += "" if pair[1] is steppings[0] else ", fixed steps"
        found[f"flowsde {name}{own}"] = adjoint, *pair
    return found, skipped


def admitted(
    adjoint: fs.Adjoint, first: integrators.ExplicitRK, steppings: Sequence[fs.Stepping]
) -> tuple[fs.Integrator, fs.Stepping] | str:
    """The first pair that the adjoint takes, tried on a small solve; else the first complaint."""
    f, y0, complaint = Field(2, 4), torch.ones(3, 2, requires_grad=True), ""
    for stepping in steppings:
        for integrator in candidates(first):
            try:
                gradient(solving(adjoint, integrator, stepping), f, y0)
            except (TypeError, ValueError) as error:
                complaint = complaint or str(error)
                continue
            return integrator, stepping
    return complaint


def solving(
    adjoint: fs.Adjoint, integrator: fs.Integrator, stepping: fs.Stepping,
    executor: fs.Executor = fs.Eager(),
) -> Solve:  # fmt: skip
    return lambda f, y0: fs.solve(
        dynamics(f), y0, 0.0, END, integrator=integrator, stepping=stepping, adjoint=adjoint,
        executor=executor, max_steps=1_000_000,
    ).y1  # fmt: skip


def torchdiffeq_solves(**keywords: Any) -> dict[str, Solve]:
    """Its two gradients: through the operations, and backwards in time."""
    from torchdiffeq import odeint, odeint_adjoint

    def solves(solve: Callable[..., Tensor]) -> Solve:
        def run(f: nn.Module, y0: Tensor) -> Tensor:
            times = torch.tensor([0.0, END], device=y0.device, dtype=y0.dtype)
            return solve(f, y0, times, **keywords)[-1]

        return run

    return {f"torchdiffeq {solve.__name__}": solves(solve) for solve in (odeint, odeint_adjoint)}


def gradient(solve: Solve, f: nn.Module, y0: Tensor) -> Tensor:
    """Of the squared norm of y(END), by parameters and y0, in one vector."""
    inputs = [y0, *f.parameters()]
    grads = torch.autograd.grad(solve(f, y0).square().sum(), inputs)
    return torch.cat([g.reshape(-1) for g in grads])


def times(options: Any, solves: dict[str, Solve]) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each, by size."""
    found = {}
    for batch, dim, width, _ in SIZES[:1] if options.small else SIZES:
        f = Field(dim, width).to(device=options.device, dtype=options.real)
        y0 = torch.randn(batch, dim, device=options.device, dtype=options.real, requires_grad=True)
        grads = {name: gradient(solve, f, y0) for name, solve in solves.items()}
        exact = grads["flowsde Direct"]

        def timer(solve: Solve, f: nn.Module = f, y0: Tensor = y0) -> Callable[[], float]:
            return lambda: clock(lambda: gradient(solve, f, y0), options.device)

        turns = options.turns * (1 if batch * width > 1 << 17 else 5)  # milliseconds scatter
        readings = alternate({n: timer(solve) for n, solve in solves.items()}, turns)
        found[str((batch, dim, width))] = {
            name: {
                "seconds": statistics.median(own),
                "gap": float((grads[name] - exact).norm() / exact.norm()),
                **{
                    f"over {peer}": ratio(own, readings[peer])
                    for peer in ("torchdiffeq odeint", "torchdiffeq odeint_adjoint")
                    if peer in readings
                },
            }
            for name, own in readings.items()
        }
    return found


class Stiff(nn.Module):
    """-r y + h(y), with rates r from 1 to 1000."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.others = Field(dim, width)
        self.register_buffer("rates", torch.logspace(0.0, 3.0, dim))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.others(t, y) - self.rates * y


def implicit(options: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of forward and gradient, eager and compiled, by size and method."""
    chosen = () if options.small else (Kvaerno3(), Kvaerno5(), KenCarp4())
    methods: dict[fs.Integrator, fs.Stepping] = dict.fromkeys(chosen, fs.Adaptive(1e-4, 1e-4))
    methods[ImplicitEuler()] = fs.Fixed(steps=50)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for batch, dim, width in ((64, 4, 32),) if options.small else ((64, 4, 32), (256, 16, 64)):
        f = Stiff(dim, width).to(device=options.device, dtype=options.real)
        y0 = torch.randn(batch, dim, device=options.device, dtype=options.real, requires_grad=True)
        executors = {"eager": fs.Eager(), "compiled": fs.Compiled()}
        dynamics = fs.ODE(f.others, implicit=lambda t, y, f=f: -f.rates * y)
        row = found[str((batch, dim, width))] = {}
        for method, stepping in methods.items():
            whole = dynamics if isinstance(method, KenCarp4) else fs.ODE(f)

            def solve(
                executor: fs.Executor, f: nn.Module, y0: Tensor, whole: fs.ODE = whole,
                method: fs.Integrator = method, stepping: fs.Stepping = stepping,
            ) -> Tensor:  # fmt: skip
                return fs.solve(
                    whole, y0, 0.0, 1.0, integrator=method, stepping=stepping, executor=executor
                ).y1

            runs = {
                name: partial(gradient, partial(solve, executor), f, y0)
                for name, executor in executors.items()
            }
            exact, other = (run() for run in runs.values())
            clocks = {name: partial(clock, run, options.device) for name, run in runs.items()}
            readings = alternate(clocks, options.turns)
            row[type(method).__name__] = {
                **{name: statistics.median(own) for name, own in readings.items()},
                "times faster": ratio(*readings.values()),
                "gap": float((other - exact).norm() / exact.norm()),
            }
    return found


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes alive at once, beyond what was there before."""
    if device == "cpu":
        with Storages() as storages:
            run()
        return storages.peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def memory(options: Any, with_peer: bool) -> dict[str, dict[str, int]]:
    """Peak bytes, by adjoint and number of steps."""
    found: dict[str, dict[str, int]] = {}
    batch, dim, width, _ = SIZES[0]
    f = Field(dim, width).to(device=options.device, dtype=options.real)
    y0 = torch.randn(batch, dim, device=options.device, dtype=options.real, requires_grad=True)
    chosen, _ = choices(RK4(), [fs.Fixed(steps=10)])
    for steps in (10, 30) if options.small else (100, 300, 1000):
        solves = {
            name: solving(adjoint, integrator, fs.Fixed(steps=steps))
            for name, (adjoint, integrator, _) in chosen.items()
        }
        if with_peer:
            solves |= torchdiffeq_solves(method="rk4", options={"step_size": END / steps})
        for name, solve in solves.items():
            bytes_ = peak(lambda solve=solve: gradient(solve, f, y0), options.device)
            found.setdefault(name, {})[str(steps)] = bytes_
    return found


def draw(
    name: str, options: Any, curves: dict[str, tuple[list[Any], list[float]]], **labels: str
) -> None:
    """The (x, y) of each adjoint."""
    figure, axes = reporting.figure(1, 1)
    axis = axes[0, 0]
    for label, (x, y) in curves.items():
        style = "-" if label.startswith("flowsde") else "--"
        axis.plot(x, y, style, marker="o", markersize=3, label=label)
    axis.set(yscale="log", **labels)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    reporting.save(name, options, figure)


def table_times(options: Any, with_peer: bool) -> dict[str, Any]:
    steppings = [fs.Adaptive(TOLERANCE, TOLERANCE), fs.Fixed(steps=50)]
    chosen, skipped = choices(Dopri5(), steppings)
    solves = {name: solving(*choice) for name, choice in chosen.items()}
    compiled = fs.Compiled()
    tuned = fs.Compiled(options=TUNED)
    solves["flowsde Direct, Compiled"] = solving(fs.Direct(), Dopri5(), steppings[0], compiled)
    solves["flowsde Direct, Compiled, tuned"] = solving(fs.Direct(), Dopri5(), steppings[0], tuned)
    solves["by hand"] = by_hand
    if with_peer:
        solves |= torchdiffeq_solves(method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
    for name, why in skipped.items():
        print(f"{name} left out: {why}")
    found = times(options, solves)
    over = [f"over torchdiffeq {name}" for name in ("odeint", "odeint_adjoint") if with_peer]
    print("Forward and gradient, milliseconds, over torchdiffeq's; gap to Direct's gradient\n")
    rows = (
        [size, name, 1e3 * row["seconds"], *(row[key] for key in over), row["gap"]]
        for size, of in found.items()
        for name, row in of.items()
    )
    reporting.table(["batch, dimension, width", "adjoint", "ms", *over, "gap"], rows)
    curves = {
        name: (list(found), [row[name]["seconds"] for row in found.values()]) for name in solves
    }
    labels = {"xlabel": "batch, dimension, width", "ylabel": "seconds, forward and gradient"}
    draw("adjoints-times", options, curves, **labels)
    return {"skipped": skipped, "times": found}


def table_memory(options: Any, with_peer: bool) -> dict[str, Any]:
    found = memory(options, with_peer)
    print("Peak KiB of live tensors, by fixed steps\n")
    head = ["adjoint", *next(iter(found.values()))]
    reporting.table(
        head, ([name, *(b / 2**10 for b in row.values())] for name, row in found.items())
    )
    curves = {
        name: ([int(n) for n in row], [b / 2**20 for b in row.values()])
        for name, row in found.items()
    }
    labels = {"xlabel": "fixed steps", "ylabel": "peak MiB of live tensors", "xscale": "log"}
    draw("adjoints-memory", options, curves, **labels)
    return {"peak bytes": found}


def table_implicit(options: Any, with_peer: bool) -> dict[str, Any]:
    found = implicit(options)
    print("Forward and gradient of implicit integrators, milliseconds\n")
    rows = (
        [size, name, 1e3 * row["eager"], 1e3 * row["compiled"], row["times faster"], row["gap"]]
        for size, of in found.items()
        for name, row in of.items()
    )
    head = ["batch, dimension, width", "", "eager", "compiled", "times faster", "gap"]
    reporting.table(head, rows)
    return {"implicit": found}


TABLES = {"times": table_times, "memory": table_memory, "implicit": table_implicit}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = reporting.parser(__doc__, dtype="float32")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    options = reporting.options(parser, arguments)
    asked = ["torchdiffeq"] if options.peers is None else options.peers
    found, versions = peers([name for name in asked if name == "torchdiffeq"])
    for name in options.table:
        record = TABLES[name](options, bool(found))
        reporting.write(f"adjoints-{name}", options, {"peers": versions, **record})


if __name__ == "__main__":
    main()
