"""Handwritten digits: one score model, six integrators, exact likelihoods beside them.

    python -m examples.digits [--device cuda] [--steps 3500] [--seed 0] [--out out/digits]

Trains a score model on scikit-learn's 8x8 digits, draws from it through the reverse SDE and the
probability flow from one and the same noise, and compares held-out likelihoods with a coupling
stack, a continuous normalizing flow, Gaussians and mixtures. Beside it stand the models of DDPM and
NCSN (``digits_variants``), samplers by evaluations, and solvers fitted to the model
(``digits_samplers``). Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.dynamics import EDMPrediction
from flowsde.integrators import (
    DDIM,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    StochasticHeun,
    Tsit5,
)  # fmt: skip
from flowsde.nn import MLP
from flowsde.paths import EDM, karras

from . import digits_samplers, digits_variants, saving

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS, SIDE, DIM, STEPS = 17, 8, 64, 3500
START, T0 = digits_variants.SPANS[EDM]  # the latter a twelfth of the half-width of a grey level
SCHEDULE = EDM(sigma_max=START)


# --- data -----------------------------------------------------------------------------------------


@dataclass
class Digits:
    """The data, and the coordinates the models work in.

    Grey levels v in 0..16 become x = 2 (v + u) / 17 - 1 with u uniform (dequantisation), then
    z = U^T (x - mean) with U the principal axes of the training set: a rotation, which keeps
    densities, so that log p(x) = log p(z).
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    mean: Tensor
    axes: Tensor
    spread: Tensor

    @classmethod
    def load(cls, seed: int, device: torch.device) -> Digits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = torch.as_tensor(bunch.data, dtype=torch.float32)
        labels = torch.as_tensor(bunch.target)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1400], order[1400:]
        x = (2.0 * (pixels[train].double() + 0.5) / LEVELS) - 1.0
        covariance = torch.cov(x.T) + torch.eye(DIM) * (2.0 / LEVELS) ** 2 / 12.0
        variances, axes = torch.linalg.eigh(covariance)
        parts = (
            pixels[train], pixels[test], labels[train], labels[test], x.mean(0).float(),
            axes.float(), variances.sqrt().float(),
        )  # fmt: skip
        return cls(*(part.to(device) for part in parts))

    @property
    def scale(self) -> float:
        """Root mean square of a coordinate of z."""
        return float(self.spread.square().mean().sqrt())

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
        return (2.0 * (pixels + noise) / LEVELS - 1.0 - self.mean) @ self.axes

    def decode(self, z: Tensor) -> Tensor:
        """Grey levels 0..16."""
        x = z @ self.axes.T + self.mean
        return ((x + 1.0) * (LEVELS / 2.0)).floor().clamp(0, LEVELS - 1)


def bits(log_prob: Tensor) -> Tensor:
    """Bits a pixel from log p(z) in nats; z lives on a scale of 2, pixels on one of 1."""
    return fs.bits_per_dim(log_prob + DIM * math.log(2.0), DIM, LEVELS)


# --- how good are samples? ------------------------------------------------------------------------


class Judge:
    """A small classifier's 16 features; Frechet distances, confidence and near copies."""

    def __init__(self, data: Digits, seed: int) -> None:
        torch.manual_seed(seed)
        device = data.train.device
        self.features = MLP([DIM, 64, 16], nn.ReLU).to(device)
        self.head = nn.Linear(16, 10).to(device)
        optimizer = torch.optim.Adam([*self.features.parameters(), *self.head.parameters()], 2e-3)
        draws = torch.Generator(device=device).manual_seed(seed)
        for _ in range(1500):
            rows = torch.randint(len(data.train), (128,), generator=draws, device=device)
            noise = 0.02 * torch.randn((128, DIM), generator=draws, device=device)
            logits = self._logits(data.train[rows] + 16.0 * noise)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, data.train_labels[rows]).backward()
            optimizer.step()
        self.data = data
        with torch.no_grad():
            logits = self._logits(data.test)
            self.accuracy = float((logits.argmax(-1) == data.test_labels).float().mean())
            self.near = torch.cdist(data.test, data.train).amin(1).quantile(0.01)

    def _logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels / 8.0 - 1.0).relu())

    def __call__(self, pixels: Tensor) -> dict[str, float]:
        return {
            "distance": self.distance(pixels), "copies": self.copies(pixels),
            "confidence": self.confidence(pixels),
        }  # fmt: skip

    @torch.no_grad()
    def confidence(self, pixels: Tensor) -> float:
        return float(self._logits(pixels).softmax(-1).amax(-1).mean())

    @torch.no_grad()
    def distance(self, pixels: Tensor) -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features, against held-out images."""
        (m1, c1), (m2, c2) = self._moments(pixels), self._moments(self.data.test)
        values, vectors = torch.linalg.eigh(c1)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
        return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2.0 * cross)

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pixels / 8.0 - 1.0).double().cpu()
        return features.mean(0), torch.cov(features.T)

    def copies(self, pixels: Tensor) -> float:
        """Fraction nearer to a training image than 99 % of held-out images are."""
        return float((torch.cdist(pixels, self.data.train).amin(1) < self.near).float().mean())


# --- models ---------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """Trains one model after the other, each with a checkpoint of its own."""

    data: Digits
    out: Path
    seed: int
    scale: float

    def __call__(self, name: str, objective: nn.Module, steps: int, **more: float) -> None:
        steps = max(2, int(steps * self.scale))
        fitted = training.fit(
            objective, self.data.train, steps=steps, batch_size=128, seed=self.seed,
            augment=self.data.encode, checkpoint=self.out / f"{name}.pt", description=name,
            accelerator=accelerator(self.data.train.device), **more,
        )  # fmt: skip
        saving.record(fitted.losses, self.out / f"{name}.losses.json")


def accelerator(device: torch.device) -> object:
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu")


def diffusion(data: Digits, train: Trainer) -> dict[str, fs.Denoiser]:
    """A score model trained with EDM's weighting, and a copy tuned with the likelihood's."""

    def build() -> fs.Denoiser:
        torch.manual_seed(train.seed)
        made = models.score_mlp(DIM, SCHEDULE, EDMPrediction(data.scale), 256, 3)
        return made.to(data.mean.device)

    samples, tuned = build(), build()
    law = objectives.LogNormal(SCHEDULE, -1.0, 1.3)
    train("score", objectives.DenoisingScoreMatching(samples, law), STEPS, lr=2e-3, ema=0.995)
    tuned.load_state_dict(samples.state_dict())
    uniform = objectives.UniformLambda(SCHEDULE, T0, 4.0)
    bound = objectives.DenoisingScoreMatching(tuned, uniform, objectives.noise_weight)
    train("likelihood", bound, 800, lr=3e-4, ema=0.99, weight_decay=0.05)
    return {"diffusion, EDM weighting": samples, "diffusion, likelihood weighting": tuned}


def variants(data: Digits, train: Trainer) -> dict[str, fs.Denoiser]:
    """Score models of the same network, trained as DDPM and as NCSN have it: of z / scale, since
    theirs do not know the data's scale.
    """
    made = {}
    for name, make in (("DDPM", digits_variants.ddpm), ("NCSN", digits_variants.ncsn)):
        torch.manual_seed(train.seed)
        made[name], objective = make(data.spread / data.scale)
        objective = OfScaled(objective, data.scale).to(data.mean.device)
        train(name.lower(), objective, STEPS, lr=2e-3, ema=0.995)
    return made


class Whitened(nn.Module):
    """A flow of z / spread: log p(z) = log p(z / spread) - sum log spread."""

    def __init__(self, flow: fs.Flow, spread: Tensor) -> None:
        super().__init__()
        self.flow, self.spread = flow, spread

    def log_prob(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        inner = self.flow.log_prob(z / self.spread, generator=generator)
        return inner - self.spread.log().sum()


def flows(data: Digits, train: Trainer) -> dict[str, Whitened]:
    """A coupling stack by maximum likelihood, a CNF by flow matching; both are a ``Flow``."""
    device = data.mean.device
    torch.manual_seed(train.seed)
    halves = torch.Generator().manual_seed(train.seed)
    stack = models.realnvp(DIM, 8, 128, generator=halves, dropout=0.3)
    ode = models.cnf(DIM, 128, 3)
    coupling = Whitened(fs.Flow(fs.Normal(DIM), stack).to(device), data.spread)
    tolerance = fs.Solver(Tsit5(), fs.Adaptive(1e-4, 1e-4))
    continuous = Whitened(fs.Flow(fs.Normal(DIM), ode, tolerance).to(device), data.spread)
    train("coupling", objectives.MaximumLikelihood(coupling), 800, lr=1e-3, weight_decay=0.1)
    train(
        "cnf",
        OfScaled(objectives.FlowMatching(ode), data.spread),
        2000,
        lr=1e-3,
        weight_decay=0.05,
    )
    return {"coupling stack": coupling, "CNF": continuous}


class OfScaled(nn.Module):
    """An objective, of z / scale."""

    def __init__(self, objective: nn.Module, scale: Tensor | float) -> None:
        super().__init__()
        self.objective, self.scale = objective, scale

    def forward(self, z: Tensor, *, generator: torch.Generator) -> Tensor:
        return self.objective(z / self.scale, generator=generator)


# --- sampling -------------------------------------------------------------------------------------


@dataclass
class Sampler:
    name: str
    integrator: fs.Integrator
    stepping: fs.Stepping
    stochastic: bool = False


def samplers() -> list[Sampler]:
    def grid(steps: int) -> fs.Grid:
        return fs.Grid(karras(SCHEDULE, SCHEDULE.horizon, T0, steps))

    return [
        Sampler("Euler-Maruyama", EulerMaruyama(), grid(200), True),
        Sampler("stochastic Heun", StochasticHeun(), grid(100), True),
        Sampler("DDIM", DDIM(), grid(20)),
        Sampler("DDIM", DDIM(), grid(200)),
        Sampler("DPM-Solver++(2M)", DPMSolverPP(), grid(20)),
        Sampler("DPM-Solver++(2M)", DPMSolverPP(), grid(200)),
        Sampler("Heun", Heun(), grid(10)),
        Sampler("Heun", Heun(), grid(100)),
        Sampler("Tsit5 adaptive", Tsit5(), fs.Adaptive(1e-3, 1e-3)),
    ]


@torch.no_grad()
def draw(
    sampler: Sampler, denoiser: fs.Denoiser, noise: Tensor, seed: int, save_at: object = None
) -> fs.Solution:
    """From noise to data, by any integrator."""
    process = fs.LinearSDE(SCHEDULE)
    if sampler.stochastic:
        dynamics, path = process.reverse_sde(denoiser), fs.Brownian(seed)
    else:
        dynamics, path = process.probability_flow(denoiser), None
    return fs.solve(
        dynamics, noise, SCHEDULE.horizon, T0, integrator=sampler.integrator,
        stepping=sampler.stepping, path=path, save_at=save_at,
    )  # fmt: skip


def table(data: Digits, denoiser: fs.Denoiser, judge: Judge, count: int, seed: int) -> list[dict]:
    """One row a sampler, all from the same noise."""
    base = fs.Normal(DIM, SCHEDULE.sigma_max).to(data.mean.device)
    noise, rows = base.sample(count, seed), []
    for sampler in samplers():
        start = time.perf_counter()
        solution = draw(sampler, denoiser, noise, seed)
        seconds = time.perf_counter() - start
        pixels = data.decode(solution.y1)
        rows.append({
            "integrator": sampler.name, "evaluations": solution.stats.evaluations,
            "seconds": seconds, **judge(pixels), "pixels": pixels[:40],
        })  # fmt: skip
        say(f"{sampler.name}, {seconds:.1f} s", rows[-1])
    return rows


def comparison(
    data: Digits, denoisers: dict[str, fs.Denoiser], judge: Judge, count: int, seed: int
) -> list[dict]:
    """Each way to train by the sampler that came with it, and by another in 20 evaluations."""
    rows = []
    for name, denoiser in denoisers.items():
        schedule, scale = denoiser.schedule, 1.0 if name == "EDM" else data.scale
        base = fs.Normal(DIM, float(schedule.sigma(schedule.horizon))).to(data.mean.device)
        for sampler, run in digits_variants.SAMPLERS[name].items():
            with torch.no_grad():
                z, evaluations = run(denoiser, base.sample(count, seed), seed)
            pixels = data.decode(scale * z)
            row = {"training": name, "integrator": sampler, "evaluations": evaluations}
            rows.append({**row, **judge(pixels), "pixels": pixels[:40]})
            say(f"{name}, {sampler}", rows[-1])
    return rows


def say(name: str, row: dict) -> None:
    print(
        f"{name:24s} {row['evaluations']:5d} evaluations   distance {row['distance']:6.3f}   "
        f"near copies {row['copies']:6.2%}   confidence {row['confidence']:.3f}", flush=True,
    )  # fmt: skip


def budgets(
    data: Digits, denoiser: fs.Denoiser, judge: Judge, seed: int, small: bool
) -> list[dict]:
    """Samplers by evaluations, and what is fitted."""
    base = fs.Normal(DIM, SCHEDULE.sigma_max).to(data.mean.device)
    floor = judge.distance(data.train)
    table = digits_samplers.Budgets(
        denoiser, T0, base.sample(50 if small else 2000, seed),
        base.sample(16 if small else 512, seed + 1),
        lambda z: judge.distance(data.decode(z)) / floor,
    )  # fmt: skip
    if small:
        table = replace(table, evaluations=(5,), fitted=(5,), iterations=4)
    rows = table.rows()
    for row in rows:
        print(
            f"{row['sampler']:18s} {row['evaluations']:3d} evaluations   "
            f"error {row['error']:.4f}   distance / floor {row['distance']:.2f}"
        )
    return rows


# --- likelihood -----------------------------------------------------------------------------------


def likelihood_flow(denoiser: fs.Denoiser, steps: int = 40, t0: float = T0) -> fs.Flow:
    """The probability flow as a ``Flow``: likelihoods by DPM-Solver++(2M), divergence exact."""
    return fs.Flow(
        fs.Normal(DIM, SCHEDULE.sigma_max),
        fs.LinearSDE(SCHEDULE).probability_flow(denoiser),
        fs.Solver(DPMSolverPP(), fs.Grid(karras(SCHEDULE, t0, SCHEDULE.horizon, steps))),
        t0=t0,
    ).to(next(denoiser.parameters()).device)


@torch.no_grad()
def likelihoods(
    data: Digits, denoisers: dict[str, fs.Denoiser], others: dict[str, Whitened], seed: int,
    count: int,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Held-out bits a pixel, mean and standard error, all on the same dequantised images."""
    device = data.mean.device
    z = data.encode(data.test, torch.Generator(device=device).manual_seed(seed + 1))[:count]
    train = data.encode(
        data.train.repeat(10, 1), torch.Generator(device=device).manual_seed(seed + 2)
    )
    found: dict[str, Callable[[Tensor], Tensor]] = baselines(train, seed)
    found |= {name: likelihood_flow(d).log_prob for name, d in denoisers.items()}
    found |= {name: flow.log_prob for name, flow in others.items()}
    result = {}
    for name, log_prob in found.items():
        values = bits(log_prob(z).double())
        result[name] = float(values.mean()), float(values.std() / math.sqrt(len(z)))
        print(f"{name:32s} {result[name][0]:6.3f} +- {result[name][1]:.3f} bits/dim", flush=True)
    return result


def baselines(train: Tensor, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    from sklearn.mixture import GaussianMixture

    z = train.double().cpu().numpy()

    def mixture(components: int, kind: str) -> Callable[[Tensor], Tensor]:
        model = GaussianMixture(
            components, covariance_type=kind, reg_covar=1e-4, random_state=seed, max_iter=50
        ).fit(z)
        return lambda x: torch.as_tensor(model.score_samples(x.double().cpu().numpy()))

    return {
        "Gaussian, full covariance": mixture(1, "full"),
        "mixture of 10, full": mixture(10, "full"),
        "mixture of 20, diagonal": mixture(20, "diag"),
    }


# --- pictures -------------------------------------------------------------------------------------


def show(axis: Axes, pixels: Tensor, title: str, columns: int) -> None:
    tiles = pixels.cpu().reshape(-1, columns, SIDE, SIDE)
    tiles = nn.functional.pad(tiles, (1, 1, 1, 1), value=8.0)
    axis.imshow(tiles.permute(0, 2, 1, 3).reshape(-1, columns * (SIDE + 2)), cmap="gray_r")
    axis.set_title(title, fontsize=9)


def panels(data: Digits, rows: list[dict], title: str, path: Path) -> None:
    """Images of each row, held-out ones first."""
    from matplotlib import pyplot as plt

    found = [("held-out images", data.test[:40])]
    for row in rows:
        name = ", ".join(row[key] for key in ("training", "integrator") if key in row)
        found.append((f"{name}, {row['evaluations']} ev.", row["pixels"]))
    columns = math.ceil(len(found) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.2 * columns, 5.2))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, pixels) in zip(axes.flat, found, strict=False):
        show(axis, pixels, name, 8 if len(pixels) % 8 == 0 else len(pixels))
    figure.suptitle(title)
    saving.picture(figure, path)


def pictures(
    out: Path, data: Digits, denoiser: fs.Denoiser, rows: dict[str, list[dict]],
    likelihood: dict[str, tuple[float, float]], seed: int,
) -> None:  # fmt: skip
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    title = "Digits from one score model, the same noise in every panel"
    panels(data, rows["samplers"], title, out / "samples.png")
    title = "Digits from one network, trained in three ways"
    panels(data, rows["variants"], title, out / "variants.png")
    digits_samplers.picture(rows["budgets"], out / "budgets.png")

    noise = fs.Normal(DIM, SCHEDULE.sigma_max).to(data.mean.device).sample(8, seed)
    kept = [row for row in samplers() if row.name in ("Euler-Maruyama", "DPM-Solver++(2M)")][:3:2]
    times = karras(SCHEDULE, SCHEDULE.horizon, T0, 11)
    figure, axes = plt.subplots(1, len(kept), figsize=(13, 5))
    for axis, sampler in zip(axes, kept, strict=True):
        frames = draw(sampler, denoiser, noise, seed, save_at=times).ys
        sizes = (times.to(frames)[:, None, None].square() + 1.0).sqrt()
        x = (frames / sizes) @ data.axes.T + data.mean
        show(axis, ((x + 1.0) * 8.0).clamp(0, 16).transpose(0, 1).flatten(0, 1), sampler.name, 12)
        axis.axis("off")
    figure.suptitle("From noise (left) to digit (right)")
    saving.picture(figure, out / "trajectories.png")

    figure, axis = plt.subplots(figsize=(8, 4))
    order = sorted(likelihood, key=lambda name: likelihood[name][0])
    means = [likelihood[name][0] for name in order]
    axis.barh(order, means, xerr=[likelihood[name][1] for name in order], color="#4477aa")
    axis.set_xlim(min(means) - 0.3, max(means) + 0.2)
    for i, mean in enumerate(means):
        axis.text(mean + 0.04, i, f"{mean:.2f}", va="center", fontsize=9)
    axis.set_xlabel("held-out bits a pixel (lower is better; bars: one standard error)")
    saving.picture(figure, out / "likelihood.png")


# --- the whole ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the score model; scales all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    device = torch.device(options.device)
    steps = 25 if options.small else options.steps
    count, held = (100, 20) if options.small else (2000, 397)
    out = options.out / f"seed{options.seed}-steps{steps}"
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    data = Digits.load(options.seed, device)
    judge = Judge(data, options.seed)
    trainer = Trainer(data, out, options.seed, steps / STEPS)
    denoisers = diffusion(data, trainer)
    denoiser = denoisers["diffusion, EDM weighting"]
    trained = {"EDM": denoiser, **variants(data, trainer)}
    others = flows(data, trainer)

    floor = judge.distance(data.train)
    print("One score model by several integrators")
    rows = {"samplers": table(data, denoiser, judge, count, options.seed)}
    print(
        f"floor: training against held-out images {floor:.3f}; classifier accuracy "
        f"{judge.accuracy:.3f}, confidence on held-out images {judge.confidence(data.test):.3f}"
    )
    print("One network trained in several ways")
    rows["variants"] = comparison(data, trained, judge, count, options.seed)
    print("Few evaluations: distances over the floor, errors to fine trajectories")
    rows["budgets"] = budgets(data, denoiser, judge, options.seed, options.small)
    print("Held-out likelihood")
    likelihood = likelihoods(data, denoisers, others, options.seed, held)
    pictures(out, data, denoiser, rows, likelihood, options.seed)
    record = {
        "floor": floor, "accuracy": judge.accuracy, "confidence": judge.confidence(data.test),
        **{
            name: [{k: v for k, v in row.items() if k != "pixels"} for row in own]
            for name, own in rows.items()
        },
        "bits per dim": likelihood, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    saving.record(record, out / "results.json")
    print(f"pictures and figures in {out}, {record['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
