"""What flow matching saves: ``python -m benchmarks.flow_matching [--table rectified likelihood]``.

rectified: by toy, the straightness of a matched flow before and after reflow (Liu et al. 2022,
arXiv 2209.03003), and the sliced Wasserstein distance of its samples, by Euler's method in few
steps, from held-out data. Two samples of the data are at the distance of the last column.

likelihood: by toy, the training time of one and the same continuous flow until its held-out
log-likelihood is that which maximum likelihood ends at: by maximum likelihood, and by flow
matching to stable targets. Same network and optimizer (Muon for the hidden layers' matrices, Adam
for the rest, rates that fall with the root of the steps), each with the batch, the rates and the
law of times that suit it; evaluations are left out of the clock.

Means over the seeds, with standard errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import flowsde as fs
from examples.measures import sliced_wasserstein
from examples.toys import TOYS
from flowsde import models, objectives, training
from flowsde.integrators import Euler
from flowsde.objectives import LogitNormal, LowDiscrepancy

from . import reporting, timing

STEPS = (1, 2, 4, 8, 32)  # of Euler's method
Reading = tuple[float, float]  # mean and standard error


def summary(values: Sequence[float]) -> Reading:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread / math.sqrt(len(values))


def shown(reading: Reading) -> str:
    return f"{reading[0]:.3g} ± {reading[1]:.1g}"


def network(seed: int, options: Any) -> fs.ODE:
    torch.manual_seed(seed)  # the start of its parameters
    return models.cnf(2, options.width, 3).to(device=options.device, dtype=options.real)


def draws(seed: int, options: Any) -> torch.Generator:
    return torch.Generator(device=options.device).manual_seed(seed)


def base(options: Any) -> fs.Normal:
    return fs.Normal(2).to(device=options.device, dtype=options.real)


@dataclass
class Data:
    """A toy's samples to train on, and others to compare with."""

    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, name: str, seed: int, options: Any) -> Data:
        generator = draws(1000 + seed, options)
        counts = options.samples, options.tests
        train, test = (TOYS[name](count, generator).to(options.real) for count in counts)
        return cls(train, test)


# --- rectified flow -------------------------------------------------------------------------------


def match(ode: fs.ODE, data: Tensor | tuple[Tensor, Tensor], seed: int, options: Any) -> fs.Flow:
    objective = objectives.FlowMatching(ode, paired=isinstance(data, tuple))
    training.fit(
        objective, data, steps=options.steps, batch_size=1024, seed=seed, lr=1e-2,
        description=f"flow matching, seed {seed}",
    )  # fmt: skip
    return fs.Flow(base(options), ode)


@torch.no_grad()
def distances(flow: fs.Flow, x1: Tensor, test: Tensor, options: Any) -> dict[str, float]:
    """Of Euler's samples from the test data, by the number of steps."""
    found = {}
    for steps in STEPS:
        stepping = fs.Fixed(steps=steps)
        x0 = fs.solve(flow.dynamics, x1, 1.0, 0.0, integrator=Euler(), stepping=stepping).y1
        found[str(steps)] = sliced_wasserstein(x0, test, draws(0, options))
    return found


def rectify(name: str, seed: int, options: Any) -> dict[str, Any]:
    """One flow, and the one that its pairs lead to."""
    data, ode = Data.of(name, seed, options), network(seed, options)
    x1 = base(options).sample(len(data.test), seed)
    found: dict[str, Any] = {"straightness": {}, "distance": {}}
    for when in ("before", "after"):
        if when == "before":
            flow = match(ode, data.train, seed, options)
        else:
            pairs = models.reflow(flow, len(data.train), generator=draws(seed, options))
            flow = match(ode, pairs, seed + 1, options)
        found["straightness"][when] = float(models.straightness(flow, x1).mean())
        found["distance"][when] = distances(flow, x1, data.test, options)
    again = TOYS[name](len(data.test), draws(2000 + seed, options)).to(options.real)
    found["floor"] = sliced_wasserstein(again, data.test, draws(0, options))
    return found


def rectified(options: Any) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name in options.toys:
        runs = [rectify(name, seed, options) for seed in range(options.turns)]
        record[name] = {
            "straightness": {
                when: summary([run["straightness"][when] for run in runs])
                for when in ("before", "after")
            },
            "distance": {
                when: {
                    steps: summary([run["distance"][when][steps] for run in runs])
                    for steps in map(str, STEPS)
                }
                for when in ("before", "after")
            },
            "floor": summary([run["floor"] for run in runs]),
        }
    print("\nReflow: straightness, and sliced Wasserstein distance by Euler steps\n")
    columns = [f"{n} step{'s' * (n > 1)}" for n in STEPS]
    rows = [
        [f"{name}, {when}", shown(of["straightness"][when]),
         *(shown(of["distance"][when][str(n)]) for n in STEPS), shown(of["floor"])]
        for name, of in record.items() for when in ("before", "after")
    ]  # fmt: skip
    reporting.table(["toy", "straightness", *columns, "data"], rows)
    return record


# --- likelihood -----------------------------------------------------------------------------------


SLOW, FAST = "maximum likelihood", "flow matching"


@dataclass
class Recipe:
    """Of either training, the best of the few that were tried."""

    batch: int
    muon: float  # its rate
    steady: int  # steps before rates fall
    every: int  # steps between evaluations
    adam: float = 2e-2  # its rate

    def optimizers(self, module: nn.Module) -> tuple[Optimizer, ...]:
        hidden = [p for p in module.parameters() if p.ndim == 2 and min(p.shape) > 2]
        those = set(hidden)
        rest = [p for p in module.parameters() if p not in those]
        return (
            torch.optim.Muon(hidden, self.muon, weight_decay=0.0),
            torch.optim.Adam(rest, self.adam, betas=(0.9, 0.99)),
        )

    def part(self, n: int) -> float:
        """Of the rates, at step n."""
        return min(1.0, (self.steady / (n + 1)) ** 0.5)


@dataclass
class Curve:
    """Held-out log-likelihood in nats by seconds of training."""

    seconds: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    def until(self, level: float) -> float:
        """Seconds until it was first reached; all of them where it was not."""
        reached = (s for s, n in zip(self.seconds, self.nats, strict=True) if n >= level)
        return next(reached, self.seconds[-1])


@torch.no_grad()
def held_out(average: training.EMA, seed: int, data: Data, options: Any) -> float:
    ode = network(seed, options)
    average.copy_to(ode)
    return float(fs.Flow(base(options), ode).log_prob(data.test).mean())


def train(
    objective: nn.Module, ode: fs.ODE, how: Recipe, data: Data, seed: int, options: Any,
    done: Callable[[Curve], bool],
) -> Curve:  # fmt: skip
    """Steps; the average of the weights is judged now and then, until it is done."""
    generator, curve, seconds = draws(seed, options), Curve(), 0.0
    optimizers, average = how.optimizers(ode), training.EMA(ode, 0.999)
    rates = [LambdaLR(optimizer, how.part) for optimizer in optimizers]
    rows = {"size": (how.batch,), "generator": generator, "device": options.device}

    def step() -> None:
        ode.zero_grad()
        batch = data.train[torch.randint(len(data.train), **rows)]
        objective(batch, generator=generator).backward()
        nn.utils.clip_grad_norm_(ode.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        average.update(ode)

    while not curve.nats or not done(curve):
        for _ in range(how.every):
            seconds += timing.clock(step, options.device)
        curve.seconds.append(seconds)
        curve.nats.append(held_out(average, seed, data, options))
    return curve


def race(name: str, seed: int, options: Any) -> dict[str, Curve]:
    """Maximum likelihood for its steps; then matching up to its end, or for as long at the most."""
    data, parts = Data.of(name, seed, options), 2 if options.small else 20
    how = Recipe(256, 2e-2, 75, options.likelihood_steps // parts)
    ode = network(seed, options)
    slow = objectives.MaximumLikelihood(fs.Flow(base(options), ode))
    first = train(slow, ode, how, data, seed, options, lambda curve: len(curve.nats) == parts)

    def done(curve: Curve) -> bool:
        return curve.nats[-1] >= first.nats[-1] or curve.seconds[-1] > first.seconds[-1]

    ode, how = network(seed, options), Recipe(1024, 4e-2, 100, 20 if options.small else 50)
    times = LowDiscrepancy(LogitNormal(-1.0, 1.5))  # more of them near the data
    matching = objectives.FlowMatching(ode, times=times, points=256)
    return {SLOW: first, FAST: train(matching, ode, how, data, seed, options, done)}


def likelihood(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    record, curves, rows = {}, {}, []
    for name in options.toys:
        races = curves[name] = [race(name, seed, options) for seed in range(options.turns)]
        levels = [run[SLOW].nats[-1] for run in races]
        slow, fast = (
            [run[which].until(level) for run, level in zip(races, levels, strict=True)]
            for which in (SLOW, FAST)
        )
        part = [b / a for a, b in zip(slow, fast, strict=True)]
        readings = {"nats": levels, SLOW: slow, FAST: fast, "part": part}
        record[name] = {key: summary(values) for key, values in readings.items()}
        rows.append([name, *(shown(of) for of in record[name].values())])
    print(
        "\nSeconds of training to the log-likelihood that maximum likelihood ends at (a part of 1"
    )
    print("and more: not reached in its time)\n")
    reporting.table(["toy", "nats", SLOW, FAST, "part"], rows)
    return record, curves


# --- pictures -------------------------------------------------------------------------------------


def draw_rectified(record: dict[str, Any], options: Any) -> None:
    figure, axes = reporting.figure(1, len(record))
    for axis, (name, of) in zip(axes[0], record.items(), strict=True):
        for when, curve in of["distance"].items():
            means, errors = zip(*curve.values(), strict=True)
            bend = shown(of["straightness"][when])
            axis.errorbar(STEPS, means, errors, marker="o", label=f"{when}, straightness {bend}")
        axis.axhline(of["floor"][0], color="gray", linestyle=":", label="two samples of the data")
        axis.set(xscale="log", yscale="log", title=name, xlabel="Euler steps")
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("sliced Wasserstein distance")
    reporting.save("flow_matching-rectified", options, figure)


def draw_likelihood(curves: dict[str, list[dict[str, Curve]]], options: Any) -> None:
    figure, axes = reporting.figure(1, len(curves))
    for axis, (name, races) in zip(axes[0], curves.items(), strict=True):
        for run in races:
            for color, (label, curve) in enumerate(run.items()):
                first = label if run is races[0] else None
                axis.plot(curve.seconds, curve.nats, color=f"C{color}", marker=".", label=first)
            axis.axhline(run[SLOW].nats[-1], color="gray", linewidth=0.5)
        axis.set(xscale="log", title=name, xlabel="seconds of training")
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("held-out log-likelihood, nats")
    reporting.save("flow_matching-likelihood", options, figure)


def parse(arguments: Sequence[str] | None) -> Any:
    made = reporting.parser(__doc__, dtype="float32", turns=3)
    made.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    made.add_argument("--toys", nargs="+", choices=TOYS, default=list(TOYS))
    made.add_argument("--steps", type=int, default=3000, help="of flow matching, for reflow")
    made.add_argument("--likelihood-steps", type=int, default=300, help="of maximum likelihood")
    made.add_argument("--width", type=int, default=64)
    options = reporting.options(made, arguments)
    options.samples, options.tests = 50_000, 4000
    if options.small:
        options.toys, options.steps, options.likelihood_steps = options.toys[:1], 20, 4
        options.samples, options.tests, options.width = 500, 200, 16
    return options


def table_rectified(options: Any) -> None:
    record = rectified(options)
    reporting.write("flow_matching-rectified", options, {"toys": record})
    draw_rectified(record, options)


def table_likelihood(options: Any) -> None:
    record, curves = likelihood(options)
    reporting.write("flow_matching-likelihood", options, {"toys": record})
    draw_likelihood(curves, options)


TABLES = {"rectified": table_rectified, "likelihood": table_likelihood}


def main(arguments: Sequence[str] | None = None) -> None:
    """``--turns`` is the number of seeds."""
    options = parse(arguments)
    for name in options.table:
        TABLES[name](options)


if __name__ == "__main__":
    main()
