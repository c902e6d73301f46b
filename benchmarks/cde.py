"""What neural CDEs cost beside torchcde: ``python -m benchmarks.cde``.

Three readings, medians, one thread, in alternating turns. The coefficients of natural cubic
splines, of short series with a third of their values missing and of long ones without. One training
step of the spiral classifier, loss and gradient, on a spline made before: with torchcde's own
defaults (dopri5 and the continuous adjoint), with its backpropagation, and with the midpoint rule
from point to point, where both sides take the same steps and gradients are equal. ``gap`` is the
greatest difference from the gradient at tight tolerances, or from ours by the same steps, over its
norm.

And what the log-ODE method spares on series of 5,000 points, which walk at random and circle once
in ten points, one way or the other: only the area that they sweep tells which. A neural CDE learns
it point by point, and from the log-signatures of windows of 50, without that area (depth 1) and
with it (depth 2).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchcde
from torch import Tensor, nn

import flowsde as fs
from flowsde.integrators import Dopri5, Euler, Midpoint
from flowsde.models import NeuralCDE
from flowsde.paths import Linear, LogSignature, NaturalCubic, Piecewise

from . import reporting
from .timing import alternate, clock, ratio

SERIES = (("missing values", 128, 100, 0.3), ("long", 128, 2000, 0.0))
Step = Callable[[], list[Tensor]]


def series(batch: int, n: int, missing: float, options: Any) -> tuple[Tensor, Tensor]:
    """Times and values ``(batch, n, 3)``."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, 3, generator=draws, dtype=options.real).cumsum(1)
    x = x.masked_fill(torch.rand(x.shape, generator=draws) < missing, torch.nan)
    t = torch.linspace(0.0, float(n - 1), n, dtype=options.real)
    return t.to(options.device), x.to(options.device)


def splines(options: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of the coefficients, and the greatest difference between them."""
    found = {}
    for name, batch, n, missing in SERIES:
        if options.small:
            batch, n = 4, n // 10
        t, x = series(batch, n, missing, options)
        x[:, -1] = x[:, -1].nan_to_num()  # a row without values ends a sample of ours
        mine = NaturalCubic(t, x).pieces.permute(2, 0, 1, 3).flatten(-2)
        theirs = torchcde.natural_cubic_coeffs(x, t)
        readings = alternate(
            {
                "flowsde": partial(clock, partial(NaturalCubic, t, x), options.device),
                "torchcde": partial(
                    clock, partial(torchcde.natural_cubic_coeffs, x, t), options.device
                ),
            },
            options.turns,
        )
        found[f"{name} {tuple(x.shape)}"] = {
            **{side: 1e3 * statistics.median(own) for side, own in readings.items()},
            "times faster": ratio(readings["torchcde"], readings["flowsde"]),
            "gap": float((mine - theirs).abs().max() / theirs.abs().max()),
        }
    return found


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times, ``(count, 100, 3)`` values with the time first, and classes: which way they turn."""
    draws = torch.Generator().manual_seed(seed)
    t = torch.linspace(0.0, 4.0 * torch.pi, 100)
    angle = 2.0 * torch.pi * torch.rand(count, 1, generator=draws) + t
    turns = torch.arange(count) < count // 2
    points = torch.stack((angle.cos() * torch.where(turns, -1.0, 1.0)[:, None], angle.sin()), -1)
    points = points / (1.0 + 0.5 * t)[:, None]
    points = points + 0.01 * torch.randn(points.shape, generator=draws)
    return t, torch.cat((t.expand(count, -1)[..., None], points), -1), turns.long()


class Ours:
    """One training step of a classifier of spirals."""

    def __init__(self, options: Any) -> None:
        torch.manual_seed(0)
        t, x, self.classes = spirals(32, 0)
        self.t, self.x = t.to(options.real), x.to(options.real)
        self.net = NeuralCDE(3, 2).to(options.real)
        self.path = NaturalCubic(self.t, self.x)

    def gradient(self, logits: Tensor) -> list[Tensor]:
        loss = nn.functional.cross_entropy(logits, self.classes)
        return list(torch.autograd.grad(loss, list(self.net.parameters())))

    def step(self, solver: fs.Solver | None) -> list[Tensor]:
        self.net.solver = solver
        return self.gradient(self.net(self.path))


class Field(nn.Module):
    """The same field in torchcde's form, a matrix."""

    def __init__(self, net: NeuralCDE) -> None:
        super().__init__()
        self.net = net.field[0].net

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.net(h).tanh().unflatten(-1, (h.shape[-1], -1))


class Theirs(Ours):
    """The same step by torchcde."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        coefficients = torchcde.natural_cubic_coeffs(self.x, self.t)
        self.spline = torchcde.CubicSpline(coefficients, self.t)
        self.field = Field(self.net)

    def step(self, keywords: dict[str, Any]) -> list[Tensor]:  # type: ignore[override]
        h0 = self.net.initial(self.spline.evaluate(self.t[0]))
        times = self.t[[0, -1]]
        ends = torchcde.cdeint(X=self.spline, func=self.field, z0=h0, t=times, **keywords)
        return self.gradient(self.net.readout(ends[:, -1]))


def gap(found: list[Tensor], exact: list[Tensor]) -> float:
    """The difference between two gradients over the norm of the second."""
    a, b = (torch.cat([g.flatten() for g in side]) for side in (found, exact))
    return float((a - b).norm() / b.norm())


def training(options: Any) -> dict[str, dict[str, float]]:
    ours, theirs = Ours(options), Theirs(options)
    t = ours.t
    tight = fs.Adaptive(1e-7, 1e-8, step_at=t) if options.real == torch.float64 else None
    tight = tight or fs.Adaptive(1e-5, 1e-6, step_at=t)
    exact = ours.step(fs.Solver(stepping=tight))
    midpoint = fs.Solver(Midpoint(), fs.Grid(t.double()))
    fixed = {"method": "midpoint", "options": {"grid_constructor": lambda f, y, s: t}}
    loose = fs.Solver(Dopri5(), fs.Adaptive(1e-4, 1e-6))
    steps: dict[str, tuple[Step, str]] = {
        "flowsde, default": (partial(ours.step, None), "torchcde, default"),
        "flowsde, Dopri5 without knots": (partial(ours.step, loose), "torchcde, default"),
        "torchcde, default": (partial(theirs.step, {}), ""),
        "torchcde, dopri5, backpropagation": (partial(theirs.step, {"adjoint": False}), ""),
        "flowsde, Midpoint": (
            partial(ours.step, midpoint), "torchcde, midpoint, backpropagation",
        ),
        "torchcde, midpoint, backpropagation": (
            partial(theirs.step, {"adjoint": False, **fixed}), "",
        ),
    }  # fmt: skip
    same = ours.step(midpoint)
    gaps = {
        name: gap(run(), same if "idpoint" in name else exact) for name, (run, _) in steps.items()
    }
    clocks = {name: partial(clock, run, options.device) for name, (run, _) in steps.items()}
    readings = alternate(clocks, options.turns)
    found = {}
    for name, (_, peer) in steps.items():
        found[name] = {"ms": 1e3 * statistics.median(readings[name]), "gap": gaps[name]}
        if peer:
            found[name]["times faster"] = ratio(readings[peer], readings[name])
    return found


def circling(count: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times, ``(count, n, 3)`` values with the time first, and which way they circle: once in ten
    points, while they walk at random.
    """
    draws = torch.Generator().manual_seed(seed)
    t, way = torch.linspace(0.0, 1.0, n), torch.arange(count) % 2
    turns = torch.rand(count, 1, generator=draws) + (2 * way[:, None] - 1) * t * (n / 10)
    circle = 0.1 * torch.stack(((2.0 * torch.pi * turns).cos(), (2.0 * torch.pi * turns).sin()), -1)
    walk = 0.01 * torch.randn(count, n, 2, generator=draws).cumsum(1)
    return t, torch.cat((t.expand(count, -1)[..., None], circle + walk), -1), way


class Watcher:
    """A classifier of what circles, as one kind of path shows it, in training."""

    def __init__(self, path: Callable[..., Piecewise], integrator: fs.Integrator, n: int) -> None:
        (t, x, self.way), (_, other, self.truth) = (circling(64, n, seed) for seed in range(2))
        self.seen, self.unseen, self.evaluations = path(t, x), path(t, other), 0
        channels = self.seen.evaluate(t[0]).shape[-1]
        solver = fs.Solver(integrator, fs.Grid(self.seen.times.double()))
        torch.manual_seed(0)
        self.net = NeuralCDE(channels, 2, hidden=8, width=16, depth=1, solver=solver)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)

    def step(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.seen), self.way).backward()
        self.optimizer.step()

    def accuracy(self) -> float:
        """On other series; counts evaluations on the way."""

        def count(*_: object) -> None:
            self.evaluations += 1

        with torch.no_grad(), self.net.field.register_forward_hook(count):
            return float((self.net(self.unseen).argmax(-1) == self.truth).float().mean())


def watched(options: Any) -> dict[str, dict[str, float]]:
    """Seconds of a training step, and what was learned in ten."""
    n, window, steps = (200, 20, 1) if options.small else (5000, 50, 10)
    watchers = {"point by point": Watcher(Linear, Euler(), n)} | {
        f"log-ODE, depth {depth}": Watcher(
            partial(LogSignature, depth=depth, window=window), Midpoint(), n
        )
        for depth in (1, 2)
    }
    clocks = {name: partial(clock, watcher.step) for name, watcher in watchers.items()}
    readings, found = alternate(clocks, steps), {}
    for name, watcher in watchers.items():
        found[name] = {
            "accuracy": watcher.accuracy(),
            "evaluations": watcher.evaluations,
            "seconds": statistics.median(readings[name]),
            "times faster": ratio(readings["point by point"], readings[name]),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float32"), arguments)
    made = splines(options)
    print("Coefficients of natural cubic splines, milliseconds\n")
    reporting.table(
        ["", "flowsde", "torchcde", "times faster", "gap"],
        ([name, *row.values()] for name, row in made.items()),
    )
    trained = training(options)
    print("One training step on 32 spirals of 100 points\n")
    reporting.table(
        ["", "ms", "gap of the gradient", "times faster"],
        ([name, row["ms"], row["gap"], row.get("times faster")] for name, row in trained.items()),
    )
    long = watched(options)
    print("64 long series, ten training steps on the CPU in float32\n")
    reporting.table(
        ["", "accuracy", "evaluations a pass", "seconds a training step", "times faster"],
        ([name, *row.values()] for name, row in long.items()),
    )
    reporting.write("cde", options, {"splines": made, "training": trained, "long": long})


if __name__ == "__main__":
    main()
