"""Queries of a virtual Brownian tree, beside diffrax's: ``python -m benchmarks.trees``.

How much a tree holds after 10, 1,000 and 100,000 queries at random, one by one, counted in bytes:
what its source reaches, its arrays with their whole storage. Then how long a query takes by the
number of levels: increments between random times, one query at a time, by an eager solve's source
and by a graph, as compiled solves hold it, alternating with those of
``diffrax.VirtualBrownianTree`` (jitted, in a process of its own) of the same depth and size. The
cost of a level is the slope between the shallowest and the deepest tree.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowsde._graph import Calls, Graph
from flowsde._increment import Source
from flowsde.integrators import Draws
from flowsde.paths import BrownianTree

from . import reporting
from .peers import Apart, installed
from .timing import alternate, clock, ratio

DEPTHS = 8, 14, 20
SIZES = (1, 1), (64, 4), (512, 16)
Ends = list[tuple[float, float]]


def times(count: int, seed: int = 0) -> Ends:
    """Ends of random increments within [0, 1]."""
    draws = random.Random(seed)
    starts = [0.9 * draws.random() for _ in range(count)]
    return [(t, t + 0.1 * draws.random()) for t in starts]


def source(size: tuple[int, int], depth: int, options: Any) -> Source:
    state = torch.empty(size, dtype=options.real, device=options.device)
    return BrownianTree(0, 0.0, 1.0, 2.0**-depth).tree(0.0, 1.0, Draws(state))


def compiled(eager: Source) -> Callable[..., Tensor]:
    """The same queries as a graph of their own."""
    calls = Calls(Graph(_query, "inductor", None), None, None, eager.traced())
    return lambda n, t0, t1: calls(*(torch.tensor(t, dtype=torch.float64) for t in (t0, t1)))


def _query(
    _flowsde_method: None, _flowsde_stepping: None, source: Source, t0: Tensor, t1: Tensor
) -> Any:
    return source(0, t0, t1).w


def ask(queries: Callable[..., Any], ends: Ends) -> None:
    for n, (t0, t1) in enumerate(ends):
        queries(n, t0, t1)


def held(root: object) -> int:
    """Bytes of all that an object reaches: containers, attributes, storages of tensors."""
    found, waiting, total = set(), [root], 0
    while waiting:
        x = waiting.pop()
        if id(x) in found or isinstance(x, (type, ModuleType)):
            continue
        found.add(id(x))
        total += sys.getsizeof(x)
        if isinstance(x, Tensor):
            total += x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            waiting += [*x.keys(), *x.values()]
        elif isinstance(x, (tuple, list, set)):
            waiting += x
        else:
            waiting += vars(x).values() if hasattr(x, "__dict__") else ()
    return total


def memory(counts: Sequence[int], options: Any) -> list[dict[str, int]]:
    """The most that one tree held up to so many queries."""
    queries, found, most, done = source(SIZES[0], DEPTHS[-1], options), [], 0, 0
    for count in counts:
        ends = times(count)[done:]
        for start in range(0, len(ends), 10):
            ask(queries, ends[start : start + 10])
            most = max(most, held(queries))
        done = count
        found.append({"queries": count, "bytes": most})
    return found


class _Jitted:
    """diffrax's trees, compiled once for each size and depth."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def seconds(self, size: tuple[int, int], depth: int, double: bool, ends: Ends) -> float:
        """Of as many queries, one after the other."""
        key = size, depth, double
        if key not in self._compiled:
            self._compiled[key] = self._compile(size, depth, double)
            self._compiled[key](*ends[0])
        query, start = self._compiled[key], time.perf_counter()
        for t0, t1 in ends:
            query(t0, t1)
        return time.perf_counter() - start

    @staticmethod
    def _compile(size: tuple[int, int], depth: int, double: bool) -> Callable[..., Any]:
        import diffrax
        import jax
        from jax import numpy as jnp

        jax.config.update("jax_enable_x64", double)
        shape = jax.ShapeDtypeStruct(size, jnp.float64 if double else jnp.float32)
        tree = diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-depth, shape, jax.random.PRNGKey(0))

        @jax.jit
        def run(t0: Any, t1: Any) -> Any:
            return tree.evaluate(t0, t1)

        return lambda t0, t1: jax.block_until_ready(run(t0, t1))


def costs(jitted: Apart | None, count: int, options: Any) -> list[dict[str, Any]]:
    """Microseconds a query and a level, by size and depth."""
    ends, found = times(count), []
    for size in SIZES[:1] if options.small else SIZES:
        us: dict[str, list[float]] = {}
        for depth in DEPTHS:
            trees = source(size, depth, options)
            ways = {"flowsde": trees, "flowsde, compiled": compiled(trees)}
            clocks = {}
            for name, queries in ways.items():
                ask(queries, ends[:2])
                clocks[name] = partial(clock, partial(ask, queries, ends), options.device)
            if jitted is not None:
                question = size, depth, options.dtype == "float64", ends
                clocks["diffrax"] = partial(jitted.ask, "seconds", *question)
                clocks["diffrax"]()
            readings = alternate(clocks, options.turns)
            row = {"size": str(size), "depth": depth}
            for name, own in readings.items():
                us.setdefault(name, []).append(1e6 * statistics.median(own) / count)
                row[name] = us[name][-1]
            if jitted is not None:
                for name in ways:
                    row[f"times faster, {name}"] = ratio(readings["diffrax"], readings[name])
            found.append(row)
        level = {name: (own[-1] - own[0]) / (DEPTHS[-1] - DEPTHS[0]) for name, own in us.items()}
        found.append({"size": str(size), "depth": "a level", **level})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float32"), arguments)
    asked = ["diffrax"] if options.peers is None else options.peers
    names, versions = installed([name for name in asked if name == "diffrax"])
    grown = memory((10, 100) if options.small else (10, 1_000, 100_000), options)
    print("The most that a tree has held\n")
    reporting.table(["queries", "bytes"], ([row["queries"], row["bytes"]] for row in grown))
    found = costs(Apart(_Jitted) if names else None, 10 if options.small else 200, options)
    print("Microseconds a query, medians of alternating turns, one thread\n")
    names = ["flowsde", "flowsde, compiled"]
    head = ["size", "depth", *names, "diffrax", *(f"times faster, {name}" for name in names)]
    reporting.table(head, ([row.get(key) for key in head] for row in found))
    reporting.write("trees", options, {"peers": versions, "memory": grown, "costs": found})


if __name__ == "__main__":
    main()
