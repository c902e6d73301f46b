"""A residual network, and the differential equation of which it takes six Euler steps.

    python -m examples.neural_ode [--seed 0] [--steps 400] [--out out/neural_ode] [--small]

The classifier of Chen et al. 2018 (arXiv 1806.07366, section 3) on scikit-learn's 8x8 digits: a
stem, then six residual blocks, or a neural ODE of one such block, or that with channels added
(Dupont et al. 2019), then pooling and a linear map. Prints test errors, parameters and evaluations;
draws the losses, what a looser tolerance saves, and the memory that a gradient takes by adjoint and
number of steps. Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import flowsde as fs
from benchmarks.storages import Storages
from flowsde import models, training
from flowsde.integrators import Midpoint, ReversibleRK

from . import saving

CHANNELS, EXTRA, BLOCKS = 32, 8, 6
TOLERANCE = 1e-3  # of training, as the paper's
ADJOINTS: dict[str, tuple[fs.Integrator, fs.Adjoint]] = {
    "Direct": (Midpoint(), fs.Direct()),
    "Checkpointed": (Midpoint(), fs.Checkpointed()),
    "Checkpointed, 1 MiB": (Midpoint(), fs.Checkpointed(budget=2**20)),
    "Reversible": (ReversibleRK(Midpoint()), fs.Reversible()),
    "Backsolve": (Midpoint(), fs.Backsolve()),
}


# --- data -----------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Training and test rows: 64 pixels in [0, 1], then the label."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.as_tensor(bunch.data, dtype=torch.float32) / 16.0
    rows = torch.cat((pixels, torch.as_tensor(bunch.target)[:, None]), 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return rows[:1400], rows[1400:]


def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    return rows[:, :64].reshape(-1, 1, 8, 8), rows[:, 64].long()


# --- models ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """f(t, z): twice norm, SiLU, and a convolution that sees the time as a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2)
        )

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            channel = t.expand(len(z), 1, *z.shape[2:])
            z = conv(torch.cat((functional.silu(norm(z)), channel), 1))
        return z


class Stack(nn.Module):
    """z + f_k(k, z), block after block."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(CHANNELS) for _ in range(blocks))

    def forward(self, z: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            z = z + block(z.new_tensor(float(k)), z)
        return z


class Classifier(nn.Module):
    """Stem, body, head; as an objective, the cross-entropy of rows."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 4, stride=2, padding=1)
        self.body = body
        self.head = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Flatten())
        self.last = nn.Linear(16 * channels, 10)

    def logits(self, images: Tensor) -> Tensor:
        return self.last(self.head(self.body(self.stem(images))))

    def forward(self, rows: Tensor, *, generator: torch.Generator) -> Tensor:
        images, labels = parts(rows)
        return functional.cross_entropy(self.logits(images), labels)


def neural_ode(extra: int) -> models.NeuralODE:
    solver = fs.Solver(stepping=fs.Adaptive(TOLERANCE, TOLERANCE))
    return models.NeuralODE(fs.ODE(Block(CHANNELS + extra)), extra, solver)


BODIES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "residual network": lambda: (Stack(BLOCKS), CHANNELS),
    "neural ODE": lambda: (neural_ode(0), CHANNELS),
    "augmented neural ODE": lambda: (neural_ode(EXTRA), CHANNELS + EXTRA),
}


# --- one model ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained classifier and what it is worth."""

    name: str
    model: Classifier
    losses: list[float]

    @classmethod
    def of(cls, name: str, train: Tensor, steps: int, out: Path, seed: int) -> Run:
        from accelerate import Accelerator

        torch.manual_seed(seed)
        model = Classifier(*BODIES[name]())
        fitted = training.fit(
            model, train, steps=steps, batch_size=64, seed=seed, lr=3e-3, weight_decay=1e-2,
            warmup=steps // 10, ema=0.95, accelerator=Accelerator(cpu=True),
            checkpoint=out / f"{name.replace(' ', '_')}.pt", description=name,
        )  # fmt: skip
        model.eval()
        return cls(name, model, fitted.losses)

    @torch.no_grad()
    def report(self, test: Tensor) -> dict[str, float]:
        images, labels = parts(test)
        wrong = self.model.logits(images).argmax(-1) != labels
        report = {
            "test error in percent": 100.0 * float(wrong.float().mean()),
            "parameters of the body": float(sum(p.numel() for p in self.model.body.parameters())),
        }
        body = self.model.body
        if isinstance(body, models.NeuralODE):
            solution = body.solve(self.model.stem(images))
            report["evaluations"] = float(solution.stats.evaluations)
        else:
            report["evaluations"] = float(BLOCKS)
        return report


@torch.no_grad()
def savings(run: Run, test: Tensor) -> list[tuple[float, float, float]]:
    """(tolerance, evaluations, greatest change of a probability) of a solve that is looser than it
    was trained with, or tighter.
    """
    model, body = run.model, run.model.body
    assert isinstance(body, models.NeuralODE)
    z, found = model.stem(parts(test)[0]), []

    def solved(tolerance: float) -> tuple[int, Tensor]:
        sol = body.solve(z, stepping=fs.Adaptive(tolerance, tolerance))
        return sol.stats.evaluations, model.last(model.head(sol.y1)).softmax(-1)

    _, truth = solved(1e-6)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        evaluations, probabilities = solved(tolerance)
        error = float((probabilities - truth).abs().max())
        found.append((tolerance, float(evaluations), error))
    return found


def memory(run: Run, test: Tensor, numbers: list[int]) -> dict[str, dict[int, float]]:
    """Peak MiB of a gradient through the body, by adjoint and number of fixed steps."""
    body = run.model.body
    assert isinstance(body, models.NeuralODE)
    z = run.model.stem(parts(test[:32])[0]).detach().requires_grad_()
    found: dict[str, dict[int, float]] = {name: {} for name in ADJOINTS}
    for name, (integrator, adjoint) in ADJOINTS.items():
        for steps in numbers:
            with Storages() as storages:
                end = body.solve(
                    z, integrator=integrator, adjoint=adjoint, stepping=fs.Fixed(steps=steps)
                ).y1  # fmt: skip
                torch.autograd.grad(end.square().sum(), [z, *body.parameters()])
                del end
            found[name][steps] = storages.peak / 2**20
    return found


def picture(
    runs: list[Run], saved: list[tuple[float, float, float]],
    peaks: dict[str, dict[int, float]], path: Path,
) -> None:  # fmt: skip
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4))
    for run in runs:
        smooth = torch.tensor(run.losses)[: len(run.losses) // 5 * 5].reshape(-1, 5).mean(1)
        left.semilogy(torch.arange(len(smooth)) * 5, smooth, label=run.name)
    left.set(xlabel="training step", ylabel="cross-entropy")
    middle.loglog([row[2] for row in saved], [row[1] for row in saved], "o-")
    for tolerance, evaluations, error in saved:
        middle.annotate(f"{tolerance:g}", (error, evaluations), fontsize=8)
    middle.set(xlabel="greatest error of a probability", ylabel="evaluations, by tolerance")
    for name, curve in peaks.items():
        right.loglog(list(curve), list(curve.values()), "o-", ms=3, label=name)
    right.set(xlabel="midpoint steps", ylabel="peak MiB of a gradient")
    for axis in (left, right):
        axis.legend(fontsize=8)
    saving.picture(figure, path)


# --- the whole ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of training, for each model")
    parser.add_argument("--out", type=Path, default=Path("out/neural_ode"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    steps, numbers = (5, [4, 8]) if options.small else (options.steps, [5, 10, 20, 40, 80, 160])
    out = options.out / f"seed{options.seed}-steps{steps}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    train, test = digits(options.seed)
    runs, record = [], {}
    for name in BODIES:
        run = Run.of(name, train, steps, out, options.seed)
        report = run.report(test)
        record[name] = report | {"last loss": run.losses[-1]}
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in report.items()), flush=True)
        runs.append(run)
    saved, peaks = savings(runs[1], test[:100]), memory(runs[1], test, numbers)
    for name, curve in peaks.items():
        print(f"peak MiB, {name}: " + ", ".join(f"{n} steps {v:.1f}" for n, v in curve.items()))
    picture(runs, saved, peaks, out / "neural_ode.png")
    found = {"models": record, "tolerances": saved, "peak MiB": peaks}
    saving.record(found | {"seconds": time.perf_counter() - start}, out / "results.json")
    (out / "losses.json").write_text(json.dumps({run.name: run.losses for run in runs}))
    print(f"picture and figures in {out}, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
