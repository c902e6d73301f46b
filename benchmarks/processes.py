"""Neural ODE processes beside neural processes: ``python -m benchmarks.processes``.

The one-dimensional families of Norcliffe et al. 2021, arXiv 2103.12413: 500 functions of 100
points, a ~ U(-1, 1), b ~ U(-1/2, 1/2), 490 to train on. Each process is trained on contexts of 1 to
10 points, and asked for all 100 given such contexts of the functions left out, several of each. The
table has the mean square error of the mean, times 100: mean and standard error over the seeds.

The training is the paper's: 30 epochs of RMSprop in batches of 5, at a rate of 1e-3 that does not
fall, and the weights that it ends with. All processes of a seed have the same functions, contexts
and targets to be asked for, so the last column has what they differ by, seed by seed. Neural
processes start slowly: with larger batches and rates that fall all come far lower, and the plain
one comes level on the oscillators.

Every run is a function of its seed and is kept in ``--work``; interrupted, the benchmark resumes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from examples import saving
from flowsde import models, objectives, training

from . import reporting

HELD = 10  # functions left out
SPLIT = models.ContextSplit(context=(1, 10), extra=(0, 5))


@dataclass(frozen=True)
class Family:
    """Functions y = f(x; a, b) on [low, high], and where a path to them starts."""

    f: Callable[[Tensor, Tensor, Tensor], Tensor]
    low: float
    high: float
    start: float

    def draw(self, count: int, seed: int) -> Tensor:
        """Rows (x, y) of so many functions, ``(count, 100, 2)``."""
        draws = torch.Generator().manual_seed(seed)
        a = 2.0 * torch.rand(count, 1, generator=draws) - 1.0
        b = torch.rand(count, 1, generator=draws) - 0.5
        x = torch.linspace(self.low, self.high, 100)
        return torch.stack((x.expand(count, -1), self.f(x, a, b)), -1)


FAMILIES = {
    "sine": Family(lambda x, a, b: a * (x - b).sin(), -math.pi, math.pi, -3.2),
    "exponential": Family(lambda x, a, b: a / 60.0 * (x - b).exp(), -1.0, 4.0, -1.1),
    "linear": Family(lambda x, a, b: a * x + b, 0.0, 5.0, -0.1),
    "oscillator": Family(
        lambda x, a, b: a * (x - b).sin() * (-0.5 * x).exp(), 0.0, 5.0, -0.1
    ),
}  # fmt: skip
Make = Callable[[Family], models.NeuralProcess]
PROCESSES: dict[str, Make] = {
    "CNP": lambda family: models.conditional_process(split=SPLIT),
    "NP": lambda family: models.neural_process(split=SPLIT),
    "NDP": lambda family: models.neural_ode_process(family.start, split=SPLIT),
    "ND2P": lambda family: models.neural_ode_process(family.start, second_order=True, split=SPLIT),
}


@dataclass(frozen=True)
class Run:
    """One process on one family, with one seed."""

    family: str
    process: str
    seed: int
    options: Any

    @property
    def place(self) -> Path:
        name = f"{self.family}-{self.process}-{self.seed}"
        budget = f"{self.options.functions}x{self.options.epochs}-{self.options.batch}"
        return self.options.work / f"{name}-{budget}-{self.options.lr:g}"

    def trained(self) -> tuple[models.NeuralProcess, Tensor]:
        """The process and its test functions; trained now, or as far as it was not yet."""
        family = FAMILIES[self.family]
        points = family.draw(HELD + self.options.functions, self.seed)
        torch.manual_seed(self.seed)
        net, path = PROCESSES[self.process](family), self.place / "network.pt"
        if path.exists():
            net.load_state_dict(training.load_checkpoint(path))
        else:
            self._train(net, points[HELD:])
            training.save_checkpoint(path, net.state_dict())
        return net, points[:HELD]

    def _train(self, net: models.NeuralProcess, functions: Tensor) -> None:
        draws, objective = torch.Generator().manual_seed(self.seed), objectives.ELBO(net)
        optimizer = torch.optim.RMSprop(net.parameters(), self.options.lr)
        about = f"{self.process}, {self.family}, seed {self.seed}"
        for _ in tqdm(range(self.options.epochs), desc=about):
            order = torch.randperm(len(functions), generator=draws)
            for rows in order.split(self.options.batch):
                optimizer.zero_grad()
                objective(functions[rows], generator=draws).backward()
                optimizer.step()

    def error(self) -> float:
        """Mean square error of the mean; read where it was written before."""
        path = self.place / "error.json"
        if not path.exists():
            net, test = self.trained()
            draws = torch.Generator().manual_seed(self.seed)
            test = test.repeat(self.options.contexts, 1, 1)
            context, _ = SPLIT.draw(test, draws)
            with torch.no_grad():
                mean, _ = net.predict(context, test[..., :1], samples=20, generator=draws)
            path.parent.mkdir(parents=True, exist_ok=True)
            saving.record(float((mean - test[..., 1:]).square().mean()), path)
        return json.loads(path.read_text())


def picture(options: Any) -> None:
    """Functions of the posterior, of the first seed, given 5 points of the one that was left out
    and varies most.
    """
    figure, axes = reporting.figure(len(options.families), len(options.processes))
    for row, family in zip(axes, options.families, strict=True):
        for axis, process in zip(row, options.processes, strict=True):
            net, test = Run(family, process, 0, options).trained()
            draws = torch.Generator().manual_seed(1)
            one = test[test[..., 1].std(1).argmax()][None]
            context, _ = models.ContextSplit((5, 5), (0, 0)).draw(one, draws)
            x, y = one.split(1, -1)
            with torch.no_grad():
                many = net.functions(context, x, samples=20, generator=draws).mean
                mean, std = net.predict(context, x, samples=50, generator=draws)
            t, m, s = (v.flatten() for v in (x, mean, std))
            axis.fill_between(t, m - 2.0 * s, m + 2.0 * s, color="#4477aa", alpha=0.2, lw=0)
            axis.plot(t, many[:, 0, :, 0].T, color="#4477aa", lw=0.6)
            axis.plot(t, y.flatten(), "k--", lw=1.0)
            axis.plot(*context[0].T, "ko", ms=4)
            axis.set_title(f"{family}, {process}", fontsize=10)
    reporting.save("processes", options, figure)


def parse(arguments: Sequence[str] | None) -> Any:
    made = reporting.parser(__doc__, dtype="float32")
    made.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    made.add_argument("--processes", nargs="*", choices=PROCESSES, default=["CNP", "NP", "NDP"])
    made.add_argument("--functions", type=int, default=490, help="to train on")
    made.add_argument("--epochs", type=int, default=30)
    made.add_argument("--contexts", type=int, default=20, help="of each function left out")
    made.add_argument("--work", type=Path, default=Path("out/processes"), help="for checkpoints")
    made.add_argument("--batch", type=int, default=5)
    made.add_argument("--lr", type=float, default=1e-3)
    options = reporting.options(made, arguments)
    if options.small:
        options.families, options.epochs, options.contexts = ["sine"], 1, 1
        options.functions = 15
    return options


def read(values: list[float]) -> dict[str, Any]:
    """Their mean, and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    error = spread / math.sqrt(len(values))
    return {"errors": values, "mean": statistics.mean(values), "standard error": error}


def main(arguments: Sequence[str] | None = None) -> None:
    """``--turns`` is the number of seeds."""
    options = parse(arguments)
    found: dict[str, dict[str, Any]] = {}
    for family in options.families:
        found[family] = {}
        for process in options.processes:
            runs = map(partial(Run, family, process, options=options), range(options.turns))
            found[family][process] = read([100.0 * run.error() for run in runs])
        if {"NP", "NDP"} <= found[family].keys():
            pairs = zip(*(found[family][name]["errors"] for name in ("NDP", "NP")), strict=True)
            found[family]["NDP - NP"] = read([a - b for a, b in pairs])
    print(f"\nTest mean square error, times 100, over {options.turns} seeds\n")
    reporting.table(
        ["", *next(iter(found.values()))],
        (
            [family, *(f"{row['mean']:.3g} ± {row['standard error']:.1g}" for row in of.values())]
            for family, of in found.items()
        ),
    )
    reporting.write(
        "processes",
        options,
        {"epochs": options.epochs, "batch": options.batch, "lr": options.lr, "found": found},
    )
    picture(options)


if __name__ == "__main__":
    main()
