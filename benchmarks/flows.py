"""Normalizing flows beside zuko, nflows and normflows: ``python -m benchmarks.flows``.

``--table likelihood``: held-out log-likelihood of the toys of the plane and of image patches, after
as much wall clock for each flow (``--budget``), with as many parameters (``--parameters``). They
train in turns of a twentieth of it, by Adam with a cosine, on the same whitened data; a step that
is longer than a turn is let to its end, so that slow flows have more.

``--table steps``: a training step of eight couplings, affine and rational quadratic, dimension 64,
batch 512, by number of dispatcher operations and in milliseconds; alternating turns, medians, one
thread. Networks are the same in all libraries, and stand alone in the first row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples import patches
from examples.toys import TOYS
from flowsde.models import Whiten

from . import reporting
from .counting import Counter
from .flow_peers import FLOW_PEERS, LIBRARIES, Density, Library, networks_alone, parameters, sized
from .peers import installed
from .timing import alternate, clock, ratio

DIM, BATCH = 64, 512  # of the steps that are timed
ALONE = "the networks alone"
Sampler = Callable[[int, torch.Generator], Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- likelihood -----------------------------------------------------------------------------------


class Trainee:
    """A flow that trains until its time is up."""

    def __init__(self, flow: Density, budget: float, seed: int, batch: int = 512) -> None:
        self.flow, self.budget, self.batch = flow.train(), budget, batch
        self.draws, self.used, self.steps = generator(seed), 0.0, 0
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)

    def train(self, data: Sampler, whiten: Whiten, seconds: float) -> None:
        end = self.used + seconds
        while self.used < end:
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = 5e-4 * (1.0 + math.cos(math.pi * min(1.0, self.used / self.budget)))
            self.optimizer.zero_grad()
            x, _ = whiten.step(0, data(self.batch, self.draws))
            self.flow.loss(x, self.draws).backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), 5.0)
            self.optimizer.step()
            self.used += time.perf_counter() - start
            self.steps += 1

    @torch.no_grad()
    def score(self, x: Tensor) -> float:
        self.flow.eval()
        return float(torch.cat([self.flow(part) for part in x.split(1000)]).mean())


def sets(name: str) -> tuple[Sampler, Sampler]:
    """Draws of the training data and of the data held out."""
    if name in TOYS:
        return TOYS[name], TOYS[name]

    def rows(values: Tensor, count: int, draws: torch.Generator) -> Tensor:
        index = torch.randint(len(values), (count,), generator=draws)
        return patches.patches(values[index], draws)

    train, held = patches.values()
    return partial(rows, train), partial(rows, held)


def likelihood(name: str, libraries: Sequence[Library], options: Any) -> dict[str, dict[str, Any]]:
    """Scores of every flow on one set, over seeds."""
    train, held = sets(name)
    scores: dict[str, dict[str, Any]] = {}
    for seed in range(options.seeds):
        whiten = Whiten.of(train(20_000, generator(1000 + seed)))
        test, change = whiten.step(0, held(options.held, generator(2000 + seed)))
        trainees = {}
        for library in libraries:
            for kind, make in library.flows(test.shape[1]).items():
                torch.manual_seed(seed)
                flow = sized(make, options.parameters)
                trainees[f"{library.name} {kind}"] = Trainee(flow, options.budget, seed)
        for _ in range(options.parts):
            for trainee in trainees.values():
                trainee.train(train, whiten, options.budget / options.parts)
        for kind, trainee in trainees.items():
            row = scores.setdefault(
                kind, {"parameters": parameters(trainee.flow), "scores": [], "steps": []}
            )
            row["scores"].append(trainee.score(test) + float(change.mean()))
            row["steps"].append(trainee.steps)
    for row in scores.values():
        values, count = row["scores"], len(row["scores"])
        row["mean"] = statistics.mean(values)
        row["error"] = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return scores


def likelihoods(libraries: Sequence[Library], options: Any) -> dict[str, Any]:
    found = {}
    for name in options.sets:
        found[name] = likelihood(name, libraries, options)
        print(f"{name}: held-out log-likelihood in nats, {options.budget:g} s of training each\n")
        head = ["", "parameters", "steps", "log-likelihood", "standard error, seeds"]
        rows = sorted(found[name].items(), key=lambda item: -item[1]["mean"])
        reporting.table(
            head,
            (
                [kind, row["parameters"], round(statistics.mean(row["steps"])), row["mean"],
                 row["error"]]
                for kind, row in rows
            ),
        )  # fmt: skip
    draw(found, options)
    return found


def draw(found: dict[str, Any], options: Any) -> None:
    columns = min(3, len(found))
    figure, axes = reporting.figure(-(-len(found) // columns), columns)
    axes[0, 0].get_gridspec().update(wspace=0.75)  # room for the names
    for axis, (name, scores) in zip(axes.flat, found.items(), strict=False):
        for i, row in enumerate(scores.values()):
            axis.errorbar(row["mean"], i, xerr=row["error"] or 0.0, marker="o")
        axis.set_yticks(range(len(scores)), list(scores))
        axis.set(title=name, xlabel="held-out log-likelihood, nats")
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    reporting.save("flows_likelihood", options, figure)


# --- steps ----------------------------------------------------------------------------------------


class Step:
    """A training step, optimizer included."""

    def __init__(self, flow: Density, x: Tensor, *, compiled: bool = False) -> None:
        self.flow, self.x = flow, x
        self._log_prob = torch.compile(flow) if compiled else flow
        self._optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)

    def loss(self) -> None:
        """Forward and back."""
        self._optimizer.zero_grad()
        (-self._log_prob(self.x).mean()).backward()

    def __call__(self) -> None:
        self.loss()
        self._optimizer.step()


def steps(spline: bool, libraries: Sequence[Library], options: Any) -> dict[str, dict[str, Any]]:
    """Parameters, operations and milliseconds of each library's step; ours compiled, too."""
    batch = 16 if options.small else BATCH
    x = torch.randn(batch, DIM, dtype=options.real, device=options.device)
    made: dict[str, Step] = {}
    makes = {library.name: library.couplings for library in libraries}
    for name, make in {ALONE: networks_alone, **makes}.items():
        flow = make(DIM, spline).to(device=options.device, dtype=options.real)
        made[name] = Step(flow, x)
        if name == "flowsde" and not options.small:
            made["flowsde, compiled"] = Step(flow, x, compiled=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, step in made.items():
        step()
        step()
        rows[name] = {"parameters": parameters(step.flow)}
        if "compiled" not in name:
            with Counter() as counter:
                step.loss()
            rows[name]["operations"], rows[name]["reads"] = counter.operations, counter.reads
    if len({row["parameters"] for row in rows.values()}) > 1:
        raise RuntimeError(f"numbers of parameters differ: {rows}")
    clocks = {name: partial(clock, step, options.device) for name, step in made.items()}
    readings = alternate(clocks, options.turns if options.small else 10 * options.turns)
    for name, own in readings.items():
        rows[name]["ms"] = 1e3 * statistics.median(own)
    peers = [name for name in made if name not in (ALONE, "flowsde", "flowsde, compiled")]
    if peers:
        best = min(peers, key=lambda name: rows[name]["ms"])
        for name, row in rows.items():
            row["times faster"] = ratio(readings[best], readings[name])
    return rows


def all_steps(libraries: Sequence[Library], options: Any) -> dict[str, Any]:
    found = {}
    for spline in (False, True):
        name = "rational-quadratic couplings" if spline else "affine couplings"
        found[name] = steps(spline, libraries, options)
        print(f"A training step of {name}, dimension {DIM}, batch {BATCH}\n")
        head = ["", "parameters", "dispatcher operations", "host reads", "ms",
                "times faster than the best peer"]  # fmt: skip
        keys = "parameters", "operations", "reads", "ms", "times faster"
        reporting.table(head, ([n, *(row.get(k) for k in keys)] for n, row in found[name].items()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = reporting.parser(__doc__, dtype="float32")
    parser.add_argument("--table", choices=("likelihood", "steps"), help="by default both")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of training a flow")
    parser.add_argument("--parameters", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held", type=int, default=10_000, help="samples held out")
    parser.add_argument("--sets", nargs="*", choices=[*TOYS, "patches"], default=[*TOYS, "patches"])
    options = reporting.options(parser, arguments)
    options.parts = 2 if options.small else 20  # of a budget, so that a slow minute strikes all
    if options.small:
        options.budget, options.parameters, options.seeds = 0.05, 4_000, 1
        options.held, options.sets = 200, options.sets[:1]
    asked = FLOW_PEERS if options.peers is None else options.peers
    names, versions = installed([name for name in FLOW_PEERS if name in asked])
    libraries = [LIBRARIES[name]() for name in ("flowsde", *names)]
    for name, table in (("likelihood", likelihoods), ("steps", all_steps)):
        if options.table in (None, name):
            found = table(libraries, options)
            record = {"peers": versions, "budget": options.budget, "seeds": options.seeds}
            reporting.write(f"flows_{name}", options, {**record, "found": found})


if __name__ == "__main__":
    main()
