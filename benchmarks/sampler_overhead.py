"""What a sampler's step costs beyond the network: ``python -m benchmarks.sampler_overhead``.

Dispatcher operations and host reads a step, outside the network; then microseconds a step, with a
network that takes no time, in alternating turns, medians, one thread. Each library samples as its
users have it: ours and diffusers' from a network that predicts noise on VP (its Euler and Heun on
its own ratios of noise to signal), ours and k-diffusion's from one that predicts data on EDM.
Whatever a library does once a solve (grids, tables) is in the times, and not in the counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flowsde as fs
from flowsde.dynamics import Data, NoisePrediction, Prediction
from flowsde.integrators import DDIM, DPMSolverPP, EDMHeun, UniPC
from flowsde.paths import EDM, VP, Schedule, karras, uniform

from . import reporting
from .counting import Counter, uncounted
from .peers import installed
from .sampler_peers import SAMPLER_PEERS, sampling
from .timing import alternate, clock, ratio

SIZES = ((64, 64), (16, 3, 32, 32))
Network = Callable[..., Tensor]
Run = Callable[[Network, Tensor, int], object]  # a network of (t, x), noise and steps


def ours(
    method: fs.Integrator, schedule: Schedule, prediction: Prediction, t1: float,
    grid: Callable[[float, float, int], Tensor],
) -> Run:  # fmt: skip
    def run(network: Network, x: Tensor, steps: int) -> Tensor:
        denoiser = fs.Denoiser(network, schedule, prediction)
        t0 = schedule.horizon
        return fs.solve(
            fs.LinearSDE(schedule).probability_flow(denoiser), x, t0, t1, integrator=method,
            stepping=fs.Grid(grid(t0, t1, steps)),
        ).y1  # fmt: skip

    return run


def diffusers(name: str, **config: Any) -> Run:
    """The loop of its pipelines."""
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)

    def run(network: Network, x: Tensor, steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = network(t, scheduler.scale_model_input(x, t))
            x = scheduler.step(output, t, x).prev_sample
        return x

    return run


def k_diffusion(name: str) -> Run:
    own = sampling()
    function = getattr(own, f"sample_{name}")

    def run(network: Network, x: Tensor, steps: int) -> Tensor:
        sigmas = own.get_sigmas_karras(steps, 0.002, 80.0)[:-1]
        return function(lambda x, sigma: network(sigma, x), x, sigmas, disable=True)

    return run


def contenders(peers: Sequence[str]) -> dict[str, dict[str, Run]]:
    """Of each sampler, who has it."""
    methods = {"DDIM": DDIM(), "DPM++ 2M": DPMSolverPP(), "UniPC": UniPC(), "Heun": EDMHeun()}
    made: dict[str, dict[str, Run]] = {
        name: {
            "flowsde, noise": ours(method, VP(), NoisePrediction(), 1e-3, uniform),
            "flowsde, data": ours(method, EDM(), Data(), 0.002, partial(karras, EDM())),
        }
        for name, method in methods.items()
    }
    if "diffusers" in peers:
        for name, kind in (
            ("DDIM", "DDIM"), ("DPM++ 2M", "DPMSolverMultistep"), ("UniPC", "UniPCMultistep"),
            ("Heun", "HeunDiscrete"),
        ):  # fmt: skip
            made[name]["diffusers"] = diffusers(kind)
    if "k_diffusion" in peers:
        for name, kind in (("DDIM", "euler"), ("DPM++ 2M", "dpmpp_2m"), ("Heun", "heun")):
            made[name]["k_diffusion"] = k_diffusion(kind)
    return made


@torch.no_grad()
def count(run: Run) -> dict[str, float]:
    """Operations and reads that 40 steps more take, over 40."""
    x, marks = torch.randn(8, 4), []
    for steps in (10, 50):
        with Counter() as counter:
            run(uncounted(lambda t, x: 0.5 * x, counter), x, steps)
        marks.append((counter.operations, counter.reads))
    (less, few), (more, many) = marks
    return {"operations": (more - less) / 40, "reads": (many - few) / 40}


def times(runs: Mapping[str, Run], x: Tensor, steps: int, options: Any) -> dict[str, Any]:
    """Microseconds a step of each, and a peer's over ours on the same prediction."""
    output = torch.zeros_like(x)

    @torch.no_grad()
    def sample(run: Run) -> None:
        run(lambda t, x: output, x, steps)

    for run in runs.values():
        sample(run)
    clocks = {name: partial(clock, partial(sample, run), options.device)
              for name, run in runs.items()}  # fmt: skip
    readings = alternate(clocks, options.turns)
    row: dict[str, Any] = {
        name: {"us": 1e6 * statistics.median(own) / steps} for name, own in readings.items()
    }
    for peer, own in (("diffusers", "flowsde, noise"), ("k_diffusion", "flowsde, data")):
        if peer in readings:
            row[peer]["over ours"] = ratio(readings[peer], readings[own])
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    made = reporting.parser(__doc__, dtype="float32", turns=15)
    options = reporting.options(made, arguments)
    asked = SAMPLER_PEERS if options.peers is None else options.peers
    peers, versions = installed([name for name in asked if name in SAMPLER_PEERS])
    steps, samplers = 4 if options.small else 50, contenders(peers)

    counted = {
        name: {who: count(run) for who, run in runs.items()} for name, runs in samplers.items()
    }
    found = {
        str(size): {
            name: times(
                runs, torch.randn(size, dtype=options.real, device=options.device), steps, options
            )
            for name, runs in samplers.items()
        }
        for size in (SIZES[:1] if options.small else SIZES)
    }
    print(f"Per step beyond the network; {steps} steps, medians of alternating turns\n")
    head = ["sampler", "library, prediction", "operations", "host reads"]
    for size in found:
        head += [f"us, {size}", "over ours"]
    rows = []
    for name, runs in samplers.items():
        for who in runs:
            own = [found[size][name][who] for size in found]
            cells = [value for row in own for value in (row["us"], row.get("over ours"))]
            rows.append([name, who, *counted[name][who].values(), *cells])
    reporting.table(head, rows)
    record = {"peers": versions, "steps": steps, "counts": counted, "times": found}
    reporting.write("sampler_overhead", options, record)


if __name__ == "__main__":
    main()
