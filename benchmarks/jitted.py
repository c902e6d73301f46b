"""Beside diffrax, jitted: ``python -m benchmarks.jitted``.

An adaptive Dopri5 solve at tolerance 1e-6, and its gradient by y0 and all parameters, at the sizes
of benchmarks/overhead.py. diffrax runs in a process of its own, on one thread, compiled beforehand,
its gradient by its default adjoint (recursive checkpoints); flowsde runs eagerly, and compiled with
the faster tanh of benchmarks/overhead.py, its gradient through the operations (``Direct``). Each is
also set over its own bare evaluations: as many calls of the field as the solve made, one after the
other, jitted there and eager here. Alternating turns, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flowsde as fs

from . import reporting
from .adjoints import END, gradient
from .overhead import SIZES, TOLERANCE, TUNED, Field, ours, visited
from .peers import Apart, installed
from .timing import alternate, clock, ratio

KINDS = "forward", "gradient"
EXECUTORS = {"flowsde": fs.Eager(), "flowsde, Compiled": fs.Compiled(options=TUNED)}


class _Jitted:
    """diffrax's solves and bare evaluations, compiled once for each size and question."""

    def __init__(self) -> None:
        self._made: dict[Any, Callable[[], Any]] = {}

    def evaluations(self, weights: list[np.ndarray], y0: np.ndarray) -> int:
        """Of one solve: six an attempt, and two to choose the first step."""
        return 6 * int(self._run("count", weights, y0)()) + 2

    def seconds(self, what: str, weights: list[np.ndarray], y0: np.ndarray, calls: int) -> float:
        """Of a solve, of one with its gradient, or of so many bare evaluations."""
        run = self._run(what, weights, y0, calls)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _run(
        self, what: str, weights: list[np.ndarray], y0: np.ndarray, calls: int = 0
    ) -> Callable[[], Any]:
        key = what, y0.shape, y0.dtype, calls
        if key not in self._made:
            self._made[key] = self._compile(what, weights, y0, calls)
            self._made[key]()
        return self._made[key]

    @staticmethod
    def _compile(
        what: str, weights: list[np.ndarray], y0: np.ndarray, calls: int
    ) -> Callable[[], Any]:
        import diffrax
        import jax
        from jax import numpy as jnp

        jax.config.update("jax_enable_x64", y0.dtype == np.float64)

        def f(t: Any, y: Any, p: Any) -> Any:
            for i in range(0, len(p) - 2, 2):
                y = jnp.tanh(y @ p[i].T + p[i + 1])
            return y @ p[-2].T + p[-1]

        def solve(y: Any, p: Any) -> Any:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(f), diffrax.Dopri5(), 0.0, END, None, y, p, max_steps=4096,
                stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
            )  # fmt: skip

        asked: dict[str, Callable[..., Any]] = {
            "count": lambda y, p: solve(y, p).stats["num_steps"],
            "forward": lambda y, p: solve(y, p).ys[-1],
            "gradient": jax.grad(lambda y, p: jnp.sum(solve(y, p).ys[-1] ** 2), argnums=(0, 1)),
            "bare": lambda y, p: jax.lax.fori_loop(0, calls, lambda n, k: f(0.0, k, p), y),
        }
        run, given = jax.jit(asked[what]), (jnp.asarray(y0), [jnp.asarray(w) for w in weights])
        return lambda: jax.block_until_ready(run(*given))


def bare(f: nn.Module, y0: Tensor, calls: int) -> None:
    t, k = y0.new_zeros(()), y0
    with torch.no_grad():
        for _ in range(calls):
            k = f(t, k)


def forward(run: Callable[..., fs.Solution], f: nn.Module, y0: Tensor) -> None:
    with torch.no_grad():
        run(f, y0, END)


def measure(
    size: tuple[int, int, int], jitted: Apart | None, options: Any
) -> dict[str, dict[str, float]]:
    """Of each library: evaluations, milliseconds of a solve and of a gradient, over its bare."""
    batch, dim, width = size
    f = Field(dim, width).to(options.real)
    y0 = torch.randn(batch, dim, dtype=options.real)
    with torch.no_grad():
        calls = {"flowsde": len(visited(ours, f, y0))}
    clocks: dict[str, Callable[[], float]] = {
        "flowsde bare": lambda: clock(lambda: bare(f, y0, calls["flowsde"]))
    }
    start = y0.clone().requires_grad_()
    for name, executor in EXECUTORS.items():
        solve = partial(ours, executor=executor)
        calls[name] = calls["flowsde"]
        runs = (
            partial(forward, solve, f, y0),
            partial(gradient, lambda f, y, solve=solve: solve(f, y, END).y1, f, start),
        )
        for kind, run in zip(KINDS, runs, strict=True):
            run()  # compiles
            clocks[f"{name} {kind}"] = partial(clock, run)
    if jitted is not None:
        given = [p.detach().numpy() for p in f.parameters()], y0.numpy()
        calls["diffrax"] = jitted.ask("evaluations", *given)
        for kind in ("bare", *KINDS):
            clocks[f"diffrax {kind}"] = partial(
                jitted.ask, "seconds", kind, *given, calls["diffrax"]
            )
            clocks[f"diffrax {kind}"]()
    readings = alternate(clocks, options.turns)
    found = {}
    for name, count in calls.items():
        own, base = readings[f"{name} forward"], readings[f"{name.split(',')[0]} bare"]
        found[name] = {
            "evaluations": count, "bare ms": 1e3 * statistics.median(base),
            **{f"{kind} ms": 1e3 * statistics.median(readings[f"{name} {kind}"]) for kind in KINDS},
            "over bare": ratio(own, base),
        }  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = reporting.parser(__doc__, dtype="float32", turns=15)
    options = reporting.options(parser, arguments)
    names, versions = installed(["diffrax"] if options.peers is None else options.peers)
    jitted = Apart(_Jitted) if "diffrax" in names else None
    sizes = [size[:3] for size in (SIZES[:1] if options.small else SIZES)]
    found = {str(size): measure(size, jitted, options) for size in sizes}
    columns = list(next(iter(next(iter(found.values())).values())))
    rows = (
        [size, name, *(row[key] for key in columns)]
        for size, of in found.items() for name, row in of.items()
    )  # fmt: skip
    reporting.table(["batch, dimension, width", "", *columns], rows)
    reporting.write("jitted", options, {"peers": versions, "found": found})


if __name__ == "__main__":
    main()
