"""Whether gradients of SDEs are those of the solve: ``python -m benchmarks.sde_gradients``.

The figure of Kidger et al. 2021, arXiv 2105.13493: on their test problem, by step size, how far the
gradient of an adjoint is from that through the operations of the very same solve,

    sum |adjoint - direct| / max(sum |adjoint|, sum |direct|),

over y0 and all parameters, in float64. torchsde's ``sdeint_adjoint`` and flowsde's ``Backsolve``
solve an equation backwards in time and err with the step; ``Checkpointed`` takes the steps again,
``Reversible`` takes them back, and both err by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import ReversibleHeun, StochasticHeun, StochasticMidpoint

from . import reporting
from .peers import installed
from .sde_problems import MatrixPair, TorchSDEForm

BATCH = 32
Solve = Callable[[MatrixPair, Tensor, int], Tensor]  # (pair, y0, steps) to y(1)


def ours(integrator: fs.Integrator, adjoint: fs.Adjoint) -> Solve:
    def run(pair: MatrixPair, y0: Tensor, steps: int) -> Tensor:
        sde = fs.SDE(pair.f, pair.g, noise="general", stratonovich=True, noise_size=pair.noise)
        sde.pair = pair  # methods are no modules: this registers their parameters
        return fs.solve(
            sde, y0, 0.0, 1.0, integrator=integrator, stepping=fs.Fixed(steps=steps),
            adjoint=adjoint, path=fs.Brownian(1),
        ).y1  # fmt: skip

    return run


def torchsde(method: str, adjoint: str | None) -> Solve:
    """By its adjoint; through the operations for None. One path for both."""
    from torchsde import BrownianInterval, sdeint, sdeint_adjoint

    def run(pair: MatrixPair, y0: Tensor, steps: int) -> Tensor:
        sde = TorchSDEForm(pair.f, pair.g, "stratonovich", "general")
        sde.pair = pair
        size = (len(y0), pair.noise)
        path = BrownianInterval(0.0, 1.0, size=size, dtype=y0.dtype, device=y0.device, entropy=1)
        solve = sdeint if adjoint is None else partial(sdeint_adjoint, adjoint_method=adjoint)
        times = torch.tensor([0.0, 1.0], device=y0.device)
        return solve(sde, y0, times, bm=path, method=method, dt=1.0 / steps)[-1]

    return run


PAIRS: dict[str, tuple[Solve, Solve]] = {  # an adjoint, and the same solve through its operations
    f"flowsde {type(integrator).__name__}, {type(adjoint).__name__}": (
        ours(integrator, adjoint), ours(integrator, fs.Direct()),
    )
    for integrator, adjoint in (
        (StochasticMidpoint(), fs.Backsolve()), (StochasticHeun(), fs.Backsolve()),
        (StochasticHeun(), fs.Checkpointed()),
        (ReversibleHeun(), fs.Reversible()),
    )
}  # fmt: skip


def peer() -> dict[str, tuple[Solve, Solve]]:
    adjoints = {"midpoint": "midpoint", "heun": "heun"}
    adjoints |= {"reversible_heun": "adjoint_reversible_heun"}
    return {
        f"torchsde {method}, sdeint_adjoint": (torchsde(method, adjoint), torchsde(method, None))
        for method, adjoint in adjoints.items()
    }


def gradient(solve: Solve, pair: MatrixPair, y0: Tensor, steps: int) -> Tensor:
    """Of the sum of y(1), by y0 and all parameters, in one vector."""
    y0 = y0.detach().requires_grad_()
    grads = torch.autograd.grad(solve(pair, y0, steps).sum(), [y0, *pair.parameters()])
    return torch.cat([g.reshape(-1) for g in grads])


def errors(
    solves: dict[str, tuple[Solve, Solve]], numbers: Sequence[int], options: Any
) -> dict[str, dict[str, float]]:
    pair = MatrixPair().to(device=options.device, dtype=options.real)
    y0 = torch.randn(BATCH, 32, device=options.device, dtype=options.real)
    found: dict[str, dict[str, float]] = {}
    for name, (adjoint, direct) in solves.items():
        for steps in numbers:
            a, b = (gradient(solve, pair, y0, steps) for solve in (adjoint, direct))
            size = max(float(a.abs().sum()), float(b.abs().sum()))
            found.setdefault(name, {})[str(steps)] = float((a - b).abs().sum()) / size
    return found


def draw(options: Any, found: dict[str, dict[str, float]]) -> None:
    figure, axes = reporting.figure(1, 1)
    for name, curve in found.items():
        style = "-" if name.startswith("flowsde") else "--"
        sizes = [1.0 / int(steps) for steps in curve]
        shown = [max(error, 1e-17) for error in curve.values()]
        axes[0, 0].loglog(sizes, shown, style, marker="o", markersize=3, label=name)
    axes[0, 0].set(xlabel="step size", ylabel="relative error of the gradient")
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    reporting.save("sde_gradients", options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float64"), arguments)
    wanted = options.peers is None or "torchsde" in options.peers
    names, versions = installed(["torchsde"] if wanted else [])
    solves = PAIRS | (peer() if names else {})
    numbers = (1, 4) if options.small else (1, 4, 16, 64, 256, 1024)
    found = errors(solves, numbers, options)
    print("Relative error of the gradient, by the number of steps\n")
    head = ["solve, adjoint", *(str(steps) for steps in numbers)]
    reporting.table(head, ([name, *curve.values()] for name, curve in found.items()))
    reporting.write("sde_gradients", options, {"peers": versions, "errors": found})
    draw(options, found)


if __name__ == "__main__":
    main()
