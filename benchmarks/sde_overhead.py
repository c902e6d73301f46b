"""What an SDE step costs, and its gradient: ``python -m benchmarks.sde_overhead``.

Counts first: dispatcher operations and host reads per step, outside drift and diffusion, and how
many of them draw the path. Then times: 200 steps over a unit of time, forward and with the gradient
of the squared norm of y(1) by y0 and all parameters, in alternating turns, medians, one thread.
Beside flowsde stand torchsde, diffrax (jitted, in a process of its own, with its tree and without)
and a loop written out by hand, which draws with ``torch.randn``: what the dispatcher of the machine
allows an eager solver at all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import (
    SRI2,
    Draws,
    EulerMaruyama,
    ReversibleHeun,
    StochasticMidpoint,
)  # fmt: skip

from . import reporting
from .counting import Counter, uncounted
from .overhead import TUNED
from .peers import SDE_PEERS, Apart, installed
from .sde_problems import Pair, TorchSDEForm, diffrax_form
from .timing import alternate, clock, ratio

SIZES = ((64, 4), (512, 16))
Field = Callable[..., Tensor]
Solve = Callable[[Field, Field, Tensor, int], Tensor]  # (f, g, y0, steps) to y(1)


@cache
def dynamics(f: Field, g: Field, stratonovich: bool) -> fs.SDE:
    """Made once: what an executor compiles lives as long as its dynamics."""
    return fs.SDE(f, g, noise="diagonal", stratonovich=stratonovich)


def ours(integrator: fs.Integrator, **keywords: Any) -> Solve:
    stratonovich = getattr(integrator, "calculus", "ito") == "stratonovich"
    return lambda f, g, y0, steps: fs.solve(
        dynamics(f, g, stratonovich), y0, 0.0, 1.0, integrator=integrator,
        stepping=fs.Fixed(steps=steps), path=fs.Brownian(1), **keywords,
    ).y1  # fmt: skip


def torchsde(method: str, adjoint: str | None = None) -> Solve:
    """Its solve with its own Brownian motion; gradients by operations, or by its adjoint."""
    from torchsde import sdeint, sdeint_adjoint

    calculus = "ito" if method in ("euler", "srk") else "stratonovich"

    def run(f: Field, g: Field, y0: Tensor, steps: int) -> Tensor:
        sde, times = TorchSDEForm(f, g, calculus), torch.tensor([0.0, 1.0], device=y0.device)
        if adjoint is None:
            return sdeint(sde, y0, times, method=method, dt=1.0 / steps)[-1]
        return sdeint_adjoint(
            sde, y0, times, method=method, adjoint_method=adjoint, dt=1.0 / steps
        )[-1]  # fmt: skip

    return run


def by_hand(f: Field, g: Field, y0: Tensor, steps: int) -> Tensor:
    """The least that an eager Euler-Maruyama solve can be."""
    y, dt, deviation = y0, 1.0 / steps, steps**-0.5
    for n in range(steps):
        t = y0.new_full((), n * dt)
        y = y.add(f(t, y), alpha=dt).addcmul(g(t, y), torch.randn_like(y), value=deviation)
    return y


FORWARD: dict[str, Solve] = {
    "by hand Euler": by_hand,
    "flowsde Euler": ours(EulerMaruyama()),
    "flowsde Euler, Compiled": ours(EulerMaruyama(), executor=fs.Compiled()),
    "flowsde Euler, Compiled, tuned": ours(EulerMaruyama(), executor=fs.Compiled(options=TUNED)),
    "flowsde SRI2": ours(SRI2()),
    "flowsde SRI2, Compiled": ours(SRI2(), executor=fs.Compiled()),
}
GRADIENT: dict[str, Solve] = {
    "by hand Euler": by_hand,
    "flowsde Euler, Direct": ours(EulerMaruyama()),
    "flowsde Euler, Direct, Compiled": ours(EulerMaruyama(), executor=fs.Compiled()),
    "flowsde Euler, Direct, Compiled, tuned": ours(
        EulerMaruyama(), executor=fs.Compiled(options=TUNED)
    ),
    "flowsde Euler, Checkpointed": ours(EulerMaruyama(), adjoint=fs.Checkpointed()),
    "flowsde Midpoint, Direct": ours(StochasticMidpoint()),
    "flowsde Midpoint, Direct, Compiled": ours(StochasticMidpoint(), executor=fs.Compiled()),
    "flowsde Midpoint, Direct, Compiled, tuned": ours(
        StochasticMidpoint(), executor=fs.Compiled(options=TUNED)
    ),
    "flowsde Midpoint, Checkpointed": ours(StochasticMidpoint(), adjoint=fs.Checkpointed()),
    "flowsde Midpoint, Backsolve": ours(StochasticMidpoint(), adjoint=fs.Backsolve()),
    "flowsde ReversibleHeun, Reversible": ours(ReversibleHeun(), adjoint=fs.Reversible()),
}
BESIDE = {  # what each is measured against
    "forward": {"flowsde SRI2": "torchsde srk", "": "torchsde euler"},
    "gradient": {
        "flowsde Euler": "torchsde euler, backprop", "": "torchsde midpoint, sdeint_adjoint",
    },
}  # fmt: skip


class _Jitted:
    """diffrax's solves, compiled once for each size and question."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[[], Any]] = {}

    def seconds(
        self, weights: dict[str, np.ndarray], y0: np.ndarray, steps: int, tree: bool, slope: bool
    ) -> float:
        """Of one solve, or of one with its gradient."""
        key = y0.shape, y0.dtype, steps, tree, slope
        if key not in self._compiled:
            self._compiled[key] = self._compile(weights, y0, steps, tree, slope)
            self._compiled[key]()
        start = time.perf_counter()
        self._compiled[key]()
        return time.perf_counter() - start

    @staticmethod
    def _compile(
        weights: dict[str, np.ndarray], y0: np.ndarray, steps: int, tree: bool, slope: bool
    ) -> Callable[[], Any]:
        import diffrax
        import jax
        from jax import numpy as jnp

        jax.config.update("jax_enable_x64", y0.dtype == np.float64)

        f, g = diffrax_form()

        def solve(y: Any, p: Any, key: Any) -> Any:
            shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
            path = (
                diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, shape, key) if tree
                else diffrax.UnsafeBrownianPath(shape, key)
            )  # fmt: skip
            adjoint = diffrax.RecursiveCheckpointAdjoint() if tree else diffrax.DirectAdjoint()
            terms = diffrax.MultiTerm(diffrax.ODETerm(f), diffrax.ControlTerm(g, path))
            return diffrax.diffeqsolve(
                terms, diffrax.Euler(), 0.0, 1.0, 1.0 / steps, y, p, max_steps=steps + 2,
                adjoint=adjoint,
            ).ys[-1]  # fmt: skip

        def loss(y: Any, p: Any, key: Any) -> Any:
            return jnp.sum(solve(y, p, key) ** 2)

        run = jax.jit(jax.grad(loss, argnums=(0, 1)) if slope else solve)
        given = jnp.asarray(y0), {name: jnp.asarray(w) for name, w in weights.items()}
        return lambda: jax.block_until_ready(run(*given, jax.random.PRNGKey(0)))


def gradient(solve: Solve, pair: Pair, y0: Tensor, steps: int) -> tuple[Tensor, ...]:
    y0 = y0.detach().requires_grad_()
    loss = solve(pair.f, pair.g, y0, steps).square().sum()
    return torch.autograd.grad(loss, [y0, *pair.parameters()])


def counts(solves: dict[str, Solve], options: Any) -> dict[str, dict[str, float]]:
    """Operations and reads per step: the slope between a short and a long solve."""
    batch, dim = SIZES[0]
    pair, y0 = Pair(dim).to(options.real), torch.randn(batch, dim, dtype=options.real)
    found = {}
    for name, solve in solves.items():
        marks = []
        for steps in (20, 60):
            counter = Counter()
            quiet = [uncounted(h, counter) for h in (pair.f, pair.g)]
            with torch.no_grad(), counter:
                solve(*quiet, y0, steps)
            marks.append((counter.operations, counter.reads))
        (ops0, reads0), (ops1, reads1) = marks
        found[name] = {"operations": (ops1 - ops0) / 40, "reads": (reads1 - reads0) / 40}
    for name, levy in (("flowsde Euler", "W"), ("flowsde SRI2", "H")):
        if name in found:
            found[name]["of the draw"] = drawing(y0, levy)
    return found


def drawing(y: Tensor, levy: Any) -> float:
    """Operations by which one step's increment is drawn."""
    marks = []
    for steps in (20, 60):
        grid = [n / steps for n in range(steps + 1)]
        source = fs.Brownian(1).bind(grid, Draws(y, levy))
        with Counter() as counter:
            for n in range(steps):
                source(n, grid[n], grid[n + 1])
        marks.append(counter.operations)
    return (marks[1] - marks[0]) / 40


def times(
    kind: str, size: tuple[int, int], solves: dict[str, Solve], jitted: Apart | None, options: Any,
    steps: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Microseconds a step of each, and how many times the peer's that is."""
    batch, dim = size
    pair = Pair(dim).to(device=options.device, dtype=options.real)
    y0 = torch.randn(batch, dim, device=options.device, dtype=options.real)

    def forward(solve: Solve) -> None:
        with torch.no_grad():
            solve(pair.f, pair.g, y0, steps)

    clocks: dict[str, Callable[[], float]] = {}
    for name, solve in solves.items():
        run = partial(forward, solve)
        if kind == "gradient":
            run = partial(gradient, solve, pair, y0, steps)
        run()  # compiles
        clocks[name] = partial(clock, run, options.device)
    if jitted is not None:
        weights = {name: p.detach().cpu().numpy() for name, p in pair.named_parameters()}
        forms = {"diffrax Euler, tree": True}
        if kind == "forward":  # without its tree diffrax has no gradients
            forms["diffrax Euler"] = False
        for name, tree in forms.items():
            question = weights, y0.cpu().numpy(), steps, tree, kind == "gradient"
            clocks[name] = partial(jitted.ask, "seconds", *question)
            clocks[name]()
    readings = alternate(clocks, options.turns)
    row = {name: {"us": 1e6 * statistics.median(own) / steps} for name, own in readings.items()}
    for name, own in readings.items():
        peer = next(peer for start, peer in BESIDE[kind].items() if name.startswith(start))
        if peer in readings:
            row[name]["times faster"] = ratio(readings[peer], own)
    return row


def draw(options: Any, found: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    from matplotlib import colormaps

    figure, axes = reporting.figure(1, len(found))
    colours = colormaps["tab20"].colors
    for axis, (kind, by_size) in zip(axes.flat, found.items(), strict=True):
        axis.set_prop_cycle(color=colours)
        for name in next(iter(by_size.values())):
            style = "-" if name.startswith("flowsde") else "--"
            each = [row[name]["us"] for row in by_size.values()]
            axis.semilogy(list(by_size), each, style, marker="o", markersize=3, label=name)
        axis.set(xlabel="batch, dimension", ylabel=f"microseconds a step, {kind}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    reporting.save("sde_overhead", options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float32"), arguments)
    asked = SDE_PEERS if options.peers is None else options.peers
    names, versions = installed([name for name in asked if name in SDE_PEERS])
    solves = {"forward": dict(FORWARD), "gradient": dict(GRADIENT)}
    if "torchsde" in names:
        solves["forward"] |= {f"torchsde {method}": torchsde(method) for method in ("euler", "srk")}
        solves["gradient"] |= {
            "torchsde euler, backprop": torchsde("euler"),
            "torchsde midpoint, sdeint_adjoint": torchsde("midpoint", "midpoint"),
            "torchsde reversible_heun, sdeint_adjoint": torchsde(
                "reversible_heun", "adjoint_reversible_heun"
            ),
        }
    jitted = Apart(_Jitted) if "diffrax" in names else None
    steps = 8 if options.small else 200

    counted = counts(
        {name: s for name, s in solves["forward"].items() if "Compiled" not in name}, options
    )
    print("Per step beyond drift and diffusion\n")
    head = ["", "dispatcher operations", "of them the draw", "host reads"]
    columns = "operations", "of the draw", "reads"
    reporting.table(head, ([n, *(row.get(c) for c in columns)] for n, row in counted.items()))

    found = {
        kind: {
            str(size): times(kind, size, own, jitted, options, steps)
            for size in (SIZES[:1] if options.small else SIZES)
        }
        for kind, own in solves.items()
    }
    for kind, by_size in found.items():
        print(f"{kind.capitalize()}, {steps} steps, medians of alternating turns, one thread\n")
        rows = (
            [size, name, row["us"], row.get("times faster")]
            for size, of in by_size.items()
            for name, row in of.items()
        )
        reporting.table(["batch, dimension", "", "us a step", "times faster than torchsde"], rows)
    record = {"peers": versions, "steps": steps, "counts": counted, **found}
    reporting.write("sde_overhead", options, record)
    draw(options, found)


if __name__ == "__main__":
    main()
