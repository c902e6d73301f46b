"""Neural CDEs: which way does a spiral turn, when most of its points are missing?

    python -m examples.neural_cde [--seed 0] [--out out/neural_cde] [--small]

Trains a neural CDE on the natural cubic spline through the points that are left, and beside it a
GRU that is told the gaps between them, with none, 30, 50 and 70 % of the points dropped. Prints the
accuracy on other spirals by epoch, and draws it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import training
from flowsde.integrators import Midpoint
from flowsde.models import NeuralCDE
from flowsde.paths import NaturalCubic

from . import saving

BATCH = 32
COLORS = {"neural CDE": "#4477aa", "GRU": "#cc3311"}


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Spirals:
    """Values ``(count, n, 3)``, the time first; points that were dropped are NaN."""

    times: Tensor
    values: Tensor
    classes: Tensor
    kept: Tensor

    @classmethod
    def of(cls, count: int, n: int, dropped: float, seed: int) -> Spirals:
        """(cos, sin)(phi + t) / (1 + t/2) with noise 0.01; half of them mirrored."""
        draws = torch.Generator().manual_seed(seed)
        t = torch.linspace(0.0, 4.0 * torch.pi, n)
        angle = 2.0 * torch.pi * torch.rand(count, 1, generator=draws) + t
        mirrored = torch.arange(count) < count // 2
        side = torch.where(mirrored, -1.0, 1.0)[:, None]
        points = torch.stack((side * angle.cos(), angle.sin()), -1) / (1.0 + 0.5 * t)[:, None]
        points = points + 0.01 * torch.randn(points.shape, generator=draws)
        order = torch.rand(count, n, generator=draws).argsort(1)
        kept = order[:, : round((1.0 - dropped) * n)].sort(1).values
        gone = torch.ones(count, n, dtype=torch.bool).scatter(1, kept, False)
        points = points.masked_fill(gone[..., None], torch.nan)
        values = torch.cat((t.expand(count, -1)[..., None], points), -1)
        return cls(t, values, mirrored.long(), kept)


# --- two classifiers ------------------------------------------------------------------------------


class SplineCDE(nn.Module):
    """A neural CDE on splines that are made once."""

    def __init__(self, train: Spirals, test: Spirals) -> None:
        super().__init__()
        self.net = NeuralCDE(3, 2, solver=fs.Solver(Midpoint(), fs.Grid(train.times.double())))
        self.train_path, self.test_path = (NaturalCubic(s.times, s.values) for s in (train, test))

    def forward(self, rows: Tensor | None) -> Tensor:
        """Logits of these training spirals, or of all test ones."""
        return self.net(self.test_path if rows is None else self.train_path.select(rows))


class GapGRU(nn.Module):
    """A GRU over the points that are left, each with the time since the one before, in units of the
    mean gap; positions are in units of their deviation.
    """

    def __init__(self, train: Spirals, test: Spirals) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRU(3, 48, batch_first=True), nn.Linear(48, 2)
        raw = [self._inputs(s) for s in (train, test)]
        gap, size = raw[0][:, 1:, 0].mean(), raw[0][..., 1:].std()
        self.inputs = [x / torch.stack((gap, size, size)) for x in raw]

    @staticmethod
    def _inputs(spirals: Spirals) -> Tensor:
        index = spirals.kept[..., None].expand(-1, -1, 3)
        left = spirals.values.gather(1, index)
        gaps = left[..., :1].diff(dim=1, prepend=torch.zeros(len(left), 1, 1))
        return torch.cat((gaps, left[..., 1:]), -1)

    def forward(self, rows: Tensor | None) -> Tensor:
        """Logits of these training spirals, or of all test ones."""
        train, test = self.inputs
        return self.readout(self.cell(test if rows is None else train[rows])[0][:, -1])


class Classification(nn.Module):
    """Cross-entropy; looks at the test spirals after every epoch."""

    def __init__(self, model: nn.Module, train: Spirals, test: Spirals) -> None:
        super().__init__()
        self.model, self.classes, self.test_classes = model, train.classes, test.classes
        self.accuracies: list[float] = []
        self.seen = 0

    def forward(self, rows: Tensor, *, generator: torch.Generator) -> Tensor:
        if self.seen and self.seen % len(self.classes) == 0:
            self.look()
        self.seen += len(rows)
        return nn.functional.cross_entropy(self.model(rows), self.classes[rows])

    @torch.no_grad()
    def look(self) -> None:
        right = self.model(None).argmax(-1) == self.test_classes
        self.accuracies.append(float(right.float().mean()))


def accuracies(
    kind: type[nn.Module], train: Spirals, test: Spirals, epochs: int, seed: int, name: str
) -> list[float]:
    """On the test spirals, after each epoch."""
    from accelerate import Accelerator

    torch.manual_seed(seed)
    objective = Classification(kind(train, test), train, test)
    training.fit(
        objective, torch.arange(len(train.values)), steps=epochs * len(train.values) // BATCH,
        batch_size=BATCH, seed=seed, lr=1e-2, warmup=4, ema=0.0, description=name,
        accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    objective.look()
    return objective.accuracies


# --- pictures -------------------------------------------------------------------------------------


def pictures(found: dict[str, dict[str, list[float]]], shown: list[Spirals], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6.6), squeeze=False)
    for spirals, title, axis, below in zip(shown, found, *axes, strict=True):
        path = NaturalCubic(spirals.times, spirals.values)
        line = torch.linspace(0.0, float(spirals.times[-1]), 500)
        for row, color in ((0, "#4477aa"), (-1, "#228833")):
            x, y = torch.stack([path.evaluate(t)[row, 1:] for t in line]).T
            axis.plot(x, y, color=color, lw=0.9)
            axis.plot(*spirals.values[row, :, 1:].T, ".", color=color, ms=4)
        axis.set(title=title, aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
        for name, values in found[title].items():
            below.plot(range(1, len(values) + 1), values, color=COLORS[name], label=name)
        below.set(xlabel="epoch", ylim=(0.4, 1.02))
        below.grid(alpha=0.3)
    axes[1][0].set_ylabel("accuracy on other spirals")
    axes[1][0].legend(fontsize=8)
    saving.picture(figure, out / "spirals.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/neural_cde"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    n, epochs, rates = (20, 2, (0.0, 0.5)) if options.small else (
        100, options.epochs, (0.0, 0.3, 0.5, 0.7)
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)

    start, found, shown = time.perf_counter(), {}, []
    for rate in rates:
        train, test = (
            Spirals.of(128, n, rate, 2 * options.seed + part) for part in range(2)
        )  # fmt: skip
        title = f"{rate:.0%} dropped"
        found[title] = {
            name: accuracies(kind, train, test, epochs, options.seed, f"{name}, {title}")
            for name, kind in (("neural CDE", SplineCDE), ("GRU", GapGRU))
        }
        shown.append(train)
        for name, values in found[title].items():
            first = next((i for i, a in enumerate(values, 1) if a == 1.0), None)
            whole = f", all right from epoch {first}" if first else ""
            print(f"{title}, {name}: accuracy {values[-1]:.1%}{whole}")
    pictures(found, shown, options.out)
    seconds = time.perf_counter() - start
    saving.record({"accuracy": found, "seconds": seconds}, options.out / "results.json")
    print(f"picture and figures in {options.out}, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
