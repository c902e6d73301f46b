"""Neural processes that learn a Gaussian process from its functions, beside the exact one.

    python -m examples.neural_process [--seed 0] [--out out/neural_process] [--small]

Trains a neural process, an attentive one and a neural ODE process on functions of a Gaussian
process, and prints for each, given 2, 5 and 10 points of functions that it never saw: the
log-likelihood of the rest in nats a point, how far its mean is from the exact posterior's, and how
many points lie within its 90 % band. The exact posterior is scikit-learn's. Interrupted, it
resumes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import Tensor
from torch.distributions import Normal

from flowsde import models, objectives, training

from . import saving

LENGTH, NOISE, REACH = 0.4, 0.02, 2.0  # of the kernel, of an observation, and of x
NEAR = 1.645  # deviations of a 90 % band
SPLIT = models.ContextSplit(context=(1, 10), extra=(0, 10))
Prediction = tuple[Tensor, Tensor]


def draw(count: int, seed: int) -> Tensor:
    """Rows (x, y) of functions of the Gaussian process, ``(count, 64, 2)``."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.linspace(-REACH, REACH, 64, dtype=torch.float64)
    covariance = (-0.5 * ((x[:, None] - x) / LENGTH).square()).exp()
    root = torch.linalg.cholesky(covariance + NOISE**2 * torch.eye(64, dtype=torch.float64))
    y = torch.randn(count, 64, generator=draws, dtype=torch.float64) @ root.T
    return torch.stack((x.expand(count, -1), y), -1).float()


def processes() -> dict[str, models.NeuralProcess]:
    return {
        "neural process": models.neural_process(least=NOISE, split=SPLIT),
        "attentive": models.attentive_process(least=NOISE, split=SPLIT),
        "neural ODE process": models.neural_ode_process(-REACH, least=NOISE, split=SPLIT),
    }


def exact(context: Tensor, x: Tensor) -> Prediction:
    """The posterior's mean and deviation of an observation, function by function."""
    means, stds = [], []
    for points, at in zip(context.double(), x.double(), strict=True):
        gp = GaussianProcessRegressor(RBF(LENGTH), alpha=NOISE**2, optimizer=None)
        mean, std = gp.fit(points[:, :1], points[:, 1]).predict(at, return_std=True)
        means.append(torch.as_tensor(mean))
        stds.append(torch.as_tensor(std).square().add(NOISE**2).sqrt())
    return torch.stack(means)[..., None].float(), torch.stack(stds)[..., None].float()


def report(found: Prediction, truth: Prediction, y: Tensor) -> dict[str, float]:
    mean, std = found
    return {
        "log-likelihood": float(Normal(mean, std).log_prob(y).mean()),
        "mean off by": float((mean - truth[0]).square().mean().sqrt()),
        "90 % band covers": float(((y - mean).abs() <= NEAR * std).float().mean()),
    }


def picture(nets: dict[str, models.NeuralProcess], context: Tensor, path: Path, seed: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    x = torch.linspace(-REACH, REACH, 100).reshape(1, -1, 1)
    bands = {"exact Gaussian process": exact(context, x)}
    figure, axes = plt.subplots(1, len(nets) + 1, figsize=(4.5 * (len(nets) + 1), 3.5), sharey=True)
    for axis, name in zip(axes, [*bands, *nets], strict=True):
        if name in nets:
            draws, net = torch.Generator().manual_seed(seed), nets[name]
            drawn = net.functions(context, x, samples=20, generator=draws).mean
            axis.plot(x.flatten(), drawn[:, 0, :, 0].T, color="#4477aa", lw=0.6)
            bands[name] = net.predict(context, x, samples=50, generator=draws)
        mean, std = (v.flatten() for v in bands[name])
        low, high = mean - NEAR * std, mean + NEAR * std
        axis.fill_between(x.flatten(), low, high, color="#4477aa", alpha=0.2, lw=0)
        axis.plot(x.flatten(), mean, color="#cc3311", lw=1.2)
        axis.plot(*context[0].T, "k.", ms=8)
        axis.set_title(f"{name}, 90 % band", fontsize=10)
    saving.picture(figure, path)


def main() -> None:
    from accelerate import Accelerator

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000, help="of training, for each process")
    parser.add_argument("--out", type=Path, default=Path("out/neural_process"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    seed, steps = options.seed, 5 if options.small else options.steps
    count, tests = (100, 5) if options.small else (20_000, 100)
    out = options.out / f"seed{seed}-steps{steps}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    train, test = draw(count, seed), draw(tests, seed + 1)
    torch.manual_seed(seed)
    nets = processes()
    for name, net in nets.items():
        training.fit(
            objectives.ELBO(net), train, steps=steps, batch_size=32, seed=seed, ema=0.99,
            accelerator=Accelerator(cpu=True), checkpoint=out / f"{name.replace(' ', '_')}.pt",
            description=name,
        )  # fmt: skip
    record: dict[str, object] = {}
    x, y = test.split(1, -1)
    with torch.no_grad():
        for seen in (2, 5, 10):
            draws = torch.Generator().manual_seed(seed)
            context, _ = models.ContextSplit((seen, seen), (0, 0)).draw(test, draws)
            truth = exact(context, x)
            for name, found in {
                "exact": truth,
                **{k: net.predict(context, x, generator=draws) for k, net in nets.items()},
            }.items():
                record[f"{name}, {seen} points"] = of = report(found, truth, y)
                print(f"{name}, {seen} points: " + ", ".join(f"{k} {v:.3f}" for k, v in of.items()))
        picture(nets, context[:1, :5], out / "functions.png", seed)
    record["seconds"] = time.perf_counter() - start
    saving.record(record, out / "results.json")
    print(f"picture and figures in {out}, {record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
