"""A training step of a continuous flow: ``python -m benchmarks.cnf``.

Forward and gradient of -E log p(x) by all parameters: flowsde's ``Flow`` with ``Direct``, compiled
too where the trace is exact, and with ``Checkpointed``; torchdiffeq's ``odeint_adjoint`` with the
field that its users write (a loop over the components for the exact trace, one vector-Jacobian
product for Hutchinson's); zuko's ``FreeFormJacobianTransform`` (which divides the error of the
log-density by a hundred before it is looked at). One network, one batch, one probe, Dopri5, one
tolerance for all. Alternating turns, medians; ``gap`` is the relative distance of the gradient from
that of the same solve at a thousandth of the tolerance, in float64.

First the counts, which do not wobble: dispatcher operations of one evaluation of field and
divergence with its gradient, and without.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models
from flowsde.integrators import Dopri5

from . import reporting
from .counting import Counter
from .peers import installed
from .timing import alternate, clock, ratio

TOLERANCE = 1e-5
SIZES = ((512, 2, 64), (256, 64, 128))  # batch, dimension, width of three hidden layers
PEERS = ("torchdiffeq", "zuko")


@dataclass(frozen=True, eq=False)
class Task:
    """One network and one batch, with the probe of Hutchinson's trace; None for the exact one."""

    net: nn.Module
    x: Tensor
    probe: Tensor | None

    @classmethod
    def of(cls, size: tuple[int, int, int], exact: bool, options: Any) -> Task:
        batch, dim, width = size
        torch.manual_seed(0)
        net = models.cnf(dim, width).f
        for p in net.parameters():
            p.data.mul_(1.5)  # away from the start, where there is nothing to solve
        x = torch.randn(batch, dim)
        probe = None if exact else torch.randint(2, x.shape).to(x) * 2.0 - 1.0
        place = {"device": options.device, "dtype": options.real}
        return cls(net.to(**place), x.to(**place), None if probe is None else probe.to(**place))

    @cached_property
    def density(self) -> fs.Dynamics:
        """Made once: what an executor compiles lives as long as its dynamics."""
        dynamics = fs.ODE(self.net, traced=self.net.traced)  # type: ignore[arg-type]
        return fs.log_density(dynamics, None if self.probe is None else Given(self.probe))

    def double(self) -> Task:
        probe = None if self.probe is None else self.probe.double()
        return Task(copy.deepcopy(self.net).double(), self.x.double(), probe)

    def loss(self, z: Tensor, change: Tensor) -> Tensor:
        """-E log p(x), with ``change`` = log p(z) - log p(x)."""
        base = -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2.0 * math.pi)
        return (change - base).mean()

    def gradient(self, loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, list(self.net.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])


class Given(fs.Divergence):
    """Hutchinson's estimate with a probe from outside, so that all libraries share it."""

    def __init__(self, probe: Tensor) -> None:
        self.probe = probe

    def directions(self, out: Tensor, y: Tensor) -> Tensor:
        return self.probe[None]


Step = Callable[[Task, float], Tensor]  # (task, tolerance) to the loss


def ours(adjoint: fs.Adjoint, executor: fs.Executor = fs.Eager()) -> Step:
    def step(task: Task, tolerance: float) -> Tensor:
        start = task.x, task.x.new_zeros(len(task.x))
        z, change = fs.solve(
            task.density, start, integrator=Dopri5(), adjoint=adjoint, executor=executor,
            stepping=fs.Adaptive(tolerance, tolerance),
        ).y1  # fmt: skip
        return task.loss(z, change)

    return step


class Usual(nn.Module):
    """The field of (z, log p) as it is written for torchdiffeq."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.probe = task.net, task.probe

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].requires_grad_()
            f = self.net(t, z)
            if self.probe is None:
                columns = (
                    torch.autograd.grad(f[:, i].sum(), z, create_graph=True)[0][:, i]
                    for i in range(z.shape[1])
                )
                return f, -sum(columns, torch.zeros_like(f[:, 0]))
            (row,) = torch.autograd.grad(f, z, self.probe, create_graph=True)
            return f, -(row * self.probe).sum(-1)


def torchdiffeq(task: Task, tolerance: float) -> Tensor:
    from torchdiffeq import odeint_adjoint

    start, ends = (task.x, task.x.new_zeros(len(task.x))), task.x.new_tensor([0.0, 1.0])
    z, change = odeint_adjoint(
        Usual(task), start, ends, rtol=tolerance, atol=tolerance, method="dopri5"
    )
    return task.loss(z[-1], change[-1])


def zuko(task: Task, tolerance: float) -> Tensor:
    """Its estimate draws a probe of its own, in place of which it is given ours."""
    from unittest.mock import patch

    from zuko.transforms import FreeFormJacobianTransform

    transform = FreeFormJacobianTransform(
        task.net, phi=task.net.parameters(), atol=tolerance, rtol=tolerance,
        exact=task.probe is None,
    )  # fmt: skip
    with patch("zuko.transforms.torch.randn_like", lambda x: task.probe):
        z, ladj = transform.call_and_ladj(task.x)
    return task.loss(z, -ladj)


def steps(names: Sequence[str], exact: bool) -> dict[str, Step]:
    """The exact trace is the field's own, which the compiler takes."""
    found: dict[str, Step] = {
        "flowsde Direct": ours(fs.Direct()), "flowsde Checkpointed": ours(fs.Checkpointed())
    }  # fmt: skip
    if exact:
        found["flowsde Direct, Compiled"] = ours(fs.Direct(), fs.Compiled())
    peers: dict[str, Step] = {"torchdiffeq": torchdiffeq, "zuko": zuko}
    return found | {name: peers[name] for name in names}


# --- counts and times -----------------------------------------------------------------------------


def counts(task: Task) -> dict[str, list[int]]:
    """Dispatcher operations of one evaluation, and of one with its gradient by the parameters."""
    t, start = task.x.new_tensor(0.3), (task.x, task.x.new_zeros(len(task.x)))
    fields = {"flowsde": task.density}
    if task.probe is None:
        fields["flowsde Exact()"] = fs.log_density(fs.ODE(task.net), fs.Exact())
    found = {}
    for name, field in {**fields, "torchdiffeq": Usual(task)}.items():
        with Counter() as alone, torch.no_grad():
            field(t, start)
        with Counter() as both:
            value, rate = field(t, start)
            task.gradient(value.square().sum() + rate.sum())
        found[name] = [alone.operations, both.operations]
    return found


def times(task: Task, compared: dict[str, Step], options: Any) -> dict[str, dict[str, float]]:
    truth = task.double()
    exact = truth.gradient(compared["flowsde Direct"](truth, 1e-3 * TOLERANCE))

    def timer(step: Step) -> Callable[[], float]:
        return lambda: clock(lambda: task.gradient(step(task, TOLERANCE)), options.device)

    gaps = {
        name: float((task.gradient(step(task, TOLERANCE)).double() - exact).norm() / exact.norm())
        for name, step in compared.items()
    }  # and warms them up
    readings = alternate({name: timer(step) for name, step in compared.items()}, options.turns)
    return {
        name: {
            "seconds": statistics.median(own),
            "gap": gaps[name],
            **{f"{peer} over it": ratio(readings[peer], own) for peer in PEERS if peer in readings},
        }
        for name, own in readings.items()
    }


def draw(options: Any, found: dict[str, Any]) -> None:
    figure, axes = reporting.figure(1, 1)
    names, width = list(next(iter(found.values()))["times"]), 0.16
    for i, name in enumerate(names):
        own = {
            j: row["times"][name] for j, row in enumerate(found.values()) if name in row["times"]
        }
        seconds = [row["seconds"] for row in own.values()]
        axes[0, 0].bar([j + i * width for j in own], seconds, width, label=name)
    axes[0, 0].set_xticks([j + 2 * width for j in range(len(found))], list(found), fontsize=7)
    axes[0, 0].set(yscale="log", ylabel="seconds, forward and gradient")
    axes[0, 0].legend(fontsize=7)
    reporting.save("cnf", options, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float32"), arguments)
    names, versions = installed(PEERS)
    found = dict[str, Any]()
    for size in ((16, 2, 8),) if options.small else SIZES:
        for exact in (True, False):
            task = Task.of(size, exact, options)
            label = f"{size}, {'exact' if exact else 'Hutchinson'}"
            own = times(task, steps(names, exact), options)
            found[label] = {"operations": counts(task), "times": own}
    print("Dispatcher operations of field and divergence: alone, and with the gradient\n")
    reporting.table(
        ["batch, dimension, width; trace", "field", "alone", "with gradient"],
        (
            [label, name, *row]
            for label, of in found.items()
            for name, row in of["operations"].items()
        ),
    )
    print("A training step\n")
    over = [f"{peer} over it" for peer in names]
    reporting.table(
        ["batch, dimension, width; trace", "solve", "ms", *over, "gap"],
        (
            [label, name, 1e3 * row["seconds"], *(row[key] for key in over), row["gap"]]
            for label, of in found.items()
            for name, row in of["times"].items()
        ),
    )
    reporting.write("cnf", options, {"peers": versions, "tolerance": TOLERANCE, "found": found})
    draw(options, found)


if __name__ == "__main__":
    main()
