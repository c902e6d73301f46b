"""A batch of unlike samples: ``python -m benchmarks.heterogeneous``.

256 van der Pol oscillators, mu log-uniform in [0.1, 30]: the stiffest takes some twenty times the
steps of the mildest. Methods that step per sample against those that share one step, at equal
measured error of the last state (root mean square over the batch; the worst sample is in the JSON).

Costs are seconds, and rows: the sum over the calls of the field of the rows it was called with,
finished ones included. ``needed`` are the rows that had not finished, which is what compaction can
come down to. mu is a component of the state that stands still, so that a row needs no other.
``--compiled`` adds compiled steps, of all rows until the last has finished: their rows are not
told. The first solve at each tolerance, which compiles, is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

import flowsde as fs

from . import reporting
from .peers import Failed, Flowsde, Library, Place, peers
from .problems import oscillators
from .timing import alternate
from .work_precision import Curve, cost

BASE = "flowsde per sample Tsit5"
COMPILED = "flowsde per sample, compiled Tsit5"


def entries(others: Sequence[Library], compiled: bool) -> dict[str, tuple[Library, str]]:
    """Methods of order five, by how they step."""
    by_step = {"flowsde per sample": Flowsde(per_sample=True), "flowsde shared": Flowsde()}
    by_step |= {peer.name: peer for peer in others}
    found: dict[str, tuple[Library, str]] = {
        f"{name} {method}": (library, method)
        for name, library in by_step.items()
        for method in library.methods(stiff=False)
        if method.lower() in ("dopri5", "tsit5")
    }
    if compiled:
        found[COMPILED] = Flowsde(per_sample=True, executor=fs.Compiled()), "Tsit5"
    return found


def measure(
    count: int, end: float, tolerances: Sequence[float], place: Place, turns: int,
    others: Sequence[Library], compiled: bool,
) -> tuple[dict[str, Curve], dict[str, str]]:  # fmt: skip
    problem = oscillators(count, end)
    found: dict[str, Curve] = {}
    complaints: dict[str, str] = {}
    for rtol in tolerances:
        clocks, points = {}, {}
        for name, (library, method) in entries(others, compiled).items():
            solver = library.solver(problem, method, rtol, place)
            try:
                answer = solver.count()
            except Failed as error:
                complaints[name] = f"rtol {rtol:.0e}: {error}"
                continue
            errors = np.sqrt(np.mean(problem.errors(answer.y1) ** 2, -1))
            clocks[name] = solver.time
            if name == COMPILED:
                solver.time()
            points[name] = {
                "rtol": rtol, "error": problem.error(answer.y1), "worst": float(errors.max()),
                "evaluations": answer.calls, "needed": None if name == COMPILED else answer.needed,
                "rows": None if name == COMPILED else answer.rows,
            }  # fmt: skip
        for name, readings in alternate(clocks, turns).items():
            point = {**points[name], "seconds": statistics.median(readings)}
            found.setdefault(name, []).append(point)
    return found, complaints


def report(found: dict[str, Curve], wanted: float) -> None:
    def at(name: str, key: str) -> float | None:
        known = name in found and found[name][0][key] is not None
        return cost(found[name], wanted, key) if known else None

    def share(name: str, key: str) -> float | None:
        mine, base = at(name, key), at(BASE, key)
        return None if mine is None or base is None else mine / base

    rows: list[list[Any]] = []
    for name in found:
        seconds, kilo = at(name, "seconds"), [at(name, key) for key in ("rows", "needed")]
        rows.append(
            [name, None if seconds is None else 1e3 * seconds, share(name, "seconds"),
             *(None if k is None else k / 1e3 for k in kilo), share(name, "rows")]
        )  # fmt: skip
    print(f"At error {wanted:.0e}; shares are of {BASE}\n")
    head = ["method", "ms", "share", "thousand rows", "needed", "share"]
    reporting.table(head, rows)


def draw(options: Any, found: dict[str, Curve]) -> None:
    figure, axes = reporting.figure(1, 2)
    for axis, key in zip(axes[0], ("rows", "seconds"), strict=True):
        for name, curve in found.items():
            if curve[0][key] is None:
                continue
            style = "-" if name.startswith("flowsde") else "--"
            points = zip(*((p[key], p["error"]) for p in curve), strict=True)
            axis.loglog(*points, style, marker="o", markersize=3, label=name)
        axis.set_xlabel(key)
        axis.set_ylabel("error")
        axis.grid(alpha=0.3)
    axes[0, 1].legend(fontsize=8)
    reporting.save("heterogeneous", options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    made = reporting.parser(__doc__, turns=3)
    made.add_argument("--compiled", action="store_true")
    options = reporting.options(made, arguments)
    small = options.small
    asked = ["torchdiffeq", "torchode"] if options.peers is None else options.peers
    others, versions = peers(asked)
    place = Place(options.device, options.real)
    tolerances = [10.0**-n for n in ((3, 5) if small else range(2, 9))]
    count, end = (16, 4.0) if small else (256, 20.0)
    found, complaints = measure(
        count, end, tolerances, place, options.turns, others, options.compiled
    )
    report(found, 1e-4)
    reporting.write(
        "heterogeneous", options, {"peers": versions, "curves": found, "complaints": complaints}
    )
    draw(options, found)


if __name__ == "__main__":
    main()
