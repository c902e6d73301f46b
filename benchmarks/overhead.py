"""What a Dopri5 step costs beyond its evaluations: ``python -m benchmarks.overhead``.

Counts first: dispatcher operations and host reads per attempted step, outside the field. Then the
ratio of an adaptive solve to its bare evaluations: both libraries and the bare evaluations take
turns in one process, one thread pinned, and ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor, nn

import flowsde as fs
from flowsde.integrators import Dopri5

from .counting import Counter, uncounted

TOLERANCE = 1e-6
SIZES = ((64, 2, 64, 1.35), (256, 16, 128, 1.2), (512, 64, 256, 1.1), (2048, 64, 512, 1.1))


def field(dim: int, width: int, device: str) -> nn.Module:
    """A tanh network with two hidden layers, turning the state at a brisk pace."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim)
    )
    for parameter in net.parameters():
        parameter.data.mul_(1.6)
    return net.to(device)


def ours(f: nn.Module, y0: Tensor) -> fs.Solution:
    return fs.solve(
        fs.ODE(lambda t, y: f(y)), y0, 0.0, 4.0, integrator=Dopri5(),
        stepping=fs.Adaptive(TOLERANCE, TOLERANCE),
    )  # fmt: skip


def theirs(f: nn.Module, y0: Tensor) -> Tensor:
    times = torch.tensor([0.0, 4.0], device=y0.device)
    return torchdiffeq.odeint(
        lambda t, y: f(y), y0, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
    )


def count(device: str) -> dict[str, tuple[float, float]]:
    """Operations and reads per attempted step: the slope between a short and a long solve."""
    net, y0 = field(2, 64, device), torch.randn(64, 2, device=device)
    found = {}
    for name, solve in (("flowsde", ours), ("torchdiffeq", theirs)):
        marks = []
        for end in (2.0, 20.0):
            counter, calls = Counter(), [0]

            def counted(y: Tensor, counter: Counter = counter, calls: list[int] = calls) -> Tensor:
                calls[0] += 1
                return uncounted(net, counter)(y)

            with torch.no_grad(), counter:
                if name == "flowsde":
                    fs.solve(
                        fs.ODE(lambda t, y: counted(y)), y0, 0.0, end, integrator=Dopri5(),
                        stepping=fs.Adaptive(TOLERANCE, TOLERANCE),
                    )  # fmt: skip
                else:
                    torchdiffeq.odeint(
                        lambda t, y: counted(y), y0, torch.tensor([0.0, end], device=device),
                        method="dopri5", rtol=TOLERANCE, atol=TOLERANCE,
                    )  # fmt: skip
            marks.append((counter.operations, counter.reads, calls[0] / 6))
        (ops0, reads0, steps0), (ops1, reads1, steps1) = marks
        found[name] = (
            (ops1 - ops0) / (steps1 - steps0), (reads1 - reads0) / (steps1 - steps0),
        )  # fmt: skip
        del solve
    return found


def clock(run: object, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()  # type: ignore[operator]
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(size: tuple[int, int, int, float], turns: int, device: str) -> dict[str, float]:
    batch, dim, width, bound = size
    net, y0 = field(dim, width, device), torch.randn(batch, dim, device=device)
    calls = [0]

    def counted(y: Tensor) -> Tensor:
        calls[0] += 1
        return net(y)

    with torch.no_grad():
        evaluations = ours(net, y0).stats.evaluations
        theirs(counted, y0)  # type: ignore[arg-type]
        peer = calls[0]
        most = max(evaluations, peer)
        rows = []
        for _ in range(turns):
            bare = clock(lambda: [net(y0) for _ in range(most)], device) / most
            mine = clock(lambda: ours(net, y0), device) / (evaluations * bare)
            other = clock(lambda: theirs(net, y0), device) / (peer * bare)
            again = clock(lambda: [net(y0) for _ in range(most)], device) / most
            drift = bare / (0.5 * (bare + again))
            rows.append((mine * drift, other * drift, mine * evaluations / (other * peer)))
    columns = [statistics.median(column) for column in zip(*rows, strict=True)]
    return {
        "flowsde": columns[0], "torchdiffeq": columns[1], "time": columns[2],
        "evaluations": evaluations, "peer evaluations": peer, "bound": bound,
    }  # fmt: skip


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
    print("  state, width      flowsde  (bound)  torchdiffeq  time ours/theirs  evaluations")
    table = {}
    for size in SIZES:
        row = ratios(size, options.turns, options.device)
        table[str(size[:3])] = row
        print(
            f"  ({size[0]:4d}, {size[1]:2d}), {size[2]:3d}    {row['flowsde']:6.3f}  "
            f"({size[3]:.2f})   {row['torchdiffeq']:8.3f}   {row['time']:12.3f}     "
            f"{row['evaluations']:.0f} / {row['peer evaluations']:.0f}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor()
        record = {"device": device or platform.machine(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**record, "counts": counts, "ratios": table}, indent=1))


if __name__ == "__main__":
    main()
