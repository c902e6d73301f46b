"""What a Dopri5 step costs beyond its evaluations: ``python -m benchmarks.overhead``.

Counts first: dispatcher operations and host reads per attempted step, outside the field. Then the
ratio of an adaptive solve to its bare evaluations: both libraries and the bare evaluations take
turns in one process, one thread pinned, and ratios are medians over the turns. Beside them stands a
Dopri5 loop written out by hand, without checks, options or statistics: what the dispatcher of the
machine allows an eager solver at all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor, nn

import flowsde as fs
from flowsde.integrators import Dopri5

from .counting import Counter, uncounted

TOLERANCE = 1e-6
SIZES = ((64, 2, 64, 1.35), (256, 16, 128, 1.2), (512, 64, 256, 1.1), (2048, 64, 512, 1.1))


class Field(nn.Module):
    """A tanh network with two hidden layers, turning the state at a brisk pace."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, dim),
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.mul_(1.6)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def ours(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0) -> fs.Solution:
    return fs.solve(
        fs.ODE(f), y0, 0.0, end, integrator=Dopri5(), stepping=fs.Adaptive(TOLERANCE, TOLERANCE)
    )


def theirs(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0) -> Tensor:
    times = torch.tensor([0.0, end], device=y0.device)
    return torchdiffeq.odeint(f, y0, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)


def by_hand(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, end: float = 4.0) -> Tensor:
    """The least that an adaptive Dopri5 solve can be in eager mode; its first step is given."""
    method = Dopri5.tableau
    assert method.error is not None
    t, dt, y, k, size = 0.0, 0.2, y0, f(y0.new_full((), 0.0), y0), y0.abs()
    while t < end:
        last = dt * 1.01 >= end - t
        dt, ks = (end - t if last else dt), [k]
        for c, ((first, weight), *rest) in zip(method.c[1:], method.rows, strict=True):
            y1 = y.add(ks[first], alpha=weight * dt)
            for i, w in rest:
                y1.add_(ks[i], alpha=w * dt)
            ks.append(f(y0.new_full((), t + c * dt), y1))
        (first, weight), *rest = method.error
        error = ks[first].mul(weight * dt)
        for i, w in rest:
            error.add_(ks[i], alpha=w * dt)
        size1 = y1.abs()
        error.div_(torch.maximum(size, size1).mul_(TOLERANCE).add_(TOLERANCE))
        norm = float(torch.linalg.vector_norm(error)) * error.numel() ** -0.5
        factor = min(10.0, max(0.2, 0.9 * max(norm, 1e-10) ** -0.2))
        if norm <= 1.0:
            t, y, k, size = t + dt, y1, ks[-1], size1
        dt *= factor if norm <= 1.0 else min(factor, 0.9)
    return y


SOLVES = {"flowsde": ours, "torchdiffeq": theirs, "by hand": by_hand}


def visited(solve: Callable[..., object], f: nn.Module, y0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The points at which a solve evaluates its field, in order."""
    points = []

    def watched(t: Tensor, y: Tensor) -> Tensor:
        points.append((t.clone(), y.clone()))
        return f(t, y)

    solve(watched, y0)
    return points


def count(device: str) -> dict[str, tuple[float, float]]:
    """Operations and reads per attempted step: the slope between a short and a long solve."""
    f, y0 = Field(2, 64).to(device), torch.randn(64, 2, device=device)
    found = {}
    for name, solve in SOLVES.items():
        marks = []
        for end in (2.0, 20.0):
            counter, calls = Counter(), []
            quiet = uncounted(lambda t, y, calls=calls: (calls.append(1), f(t, y))[1], counter)
            with torch.no_grad(), counter:
                solve(quiet, y0, end)
            marks.append((counter.operations, counter.reads, len(calls) / 6))
        (ops0, reads0, steps0), (ops1, reads1, steps1) = marks
        steps = steps1 - steps0
        found[name] = (ops1 - ops0) / steps, (reads1 - reads0) / steps
    return found


def clock(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(size: tuple[int, int, int, float], turns: int, device: str) -> dict[str, float]:
    """Each library's solve over its own evaluations, made bare at the points it visited."""
    batch, dim, width, bound = size
    f, y0 = Field(dim, width).to(device), torch.randn(batch, dim, device=device)
    row: dict[str, float] = {"bound": bound}
    times: dict[str, list[float]] = {name: [] for name in SOLVES}
    shares: dict[str, list[float]] = {name: [] for name in SOLVES}
    with torch.no_grad():
        points = {name: visited(solve, f, y0) for name, solve in SOLVES.items()}
        for _ in range(turns):
            for name, solve in SOLVES.items():
                bare = clock(lambda n=name: [f(t, y) for t, y in points[n]], device)
                times[name].append(clock(lambda s=solve: s(f, y0), device))
                again = clock(lambda n=name: [f(t, y) for t, y in points[n]], device)
                shares[name].append(2.0 * times[name][-1] / (bare + again))
    for name in SOLVES:
        row[name] = statistics.median(shares[name])
        row[f"{name} evaluations"] = len(points[name])
    pairs = zip(times["flowsde"], times["torchdiffeq"], strict=True)
    row["time"] = statistics.median(a / b for a, b in pairs)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)

    counts = count(options.device)
    print(f"Dopri5, per attempted step beyond the field ({options.device}):")
    for name, (operations, reads) in counts.items():
        print(f"  {name:12s} {operations:6.1f} dispatcher operations {reads:6.2f} host reads")

    print("adaptive solve / bare evaluations (median of alternating turns, one thread):")
    print("  state, width      flowsde (bound)  by hand  torchdiffeq  ours/theirs  evaluations")
    table = {}
    for size in SIZES:
        row = ratios(size, options.turns, options.device)
        table[str(size[:3])] = row
        counts_of = f"{row['flowsde evaluations']:.0f} / {row['torchdiffeq evaluations']:.0f}"
        print(
            f"  ({size[0]:4d}, {size[1]:2d}), {size[2]:3d}    {row['flowsde']:6.3f} ({size[3]:.2f})"
            f"{row['by hand']:10.3f}{row['torchdiffeq']:12.3f}{row['time']:13.3f}    {counts_of}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor()
        record = {"device": device or platform.machine(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**record, "counts": counts, "ratios": table}, indent=1))


if __name__ == "__main__":
    main()
