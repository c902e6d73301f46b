"""The demo's figures over seeds, and what its bits are made of: ``python -m benchmarks.digits``.

Runs ``examples.digits`` once a seed (resuming what is there), prints means and standard deviations,
then takes the first seed's held-out likelihood apart: weighting, integration error, dequantisation
edges and overfitting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from examples.digits import STEPS, Digits, Trainer, bits, diffusion, likelihood_flow

NAMES = "training", "integrator", "evaluations"


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):7.3f} +- {deviation:.3f}"


def summary(records: list[dict]) -> None:
    print(f"{len(records)} seeds, mean +- standard deviation")
    for name in ("floor", "accuracy", "confidence", "seconds"):
        print(f"  {name:34s} {spread([r[name] for r in records])}")
    print("  sampler, evaluations: distance, distance / floor, near copies, confidence")
    for table in ("samplers", "variants"):
        for rows in zip(*(r[table] for r in records), strict=True):
            names = [str(rows[0][key]) for key in NAMES if key in rows[0]]
            ratio = [row["distance"] / r["floor"] for row, r in zip(rows, records, strict=True)]
            columns = [spread([row[key] for row in rows]) for key in ("copies", "confidence")]
            distance = spread([row["distance"] for row in rows])
            label = ", ".join(names)
            print(f"  {label:34s} {distance}  {spread(ratio)}  {columns[0]}  {columns[1]}")
    print("  sampler, evaluations: trajectory error, distance / floor")
    for rows in zip(*(r["budgets"] for r in records), strict=True):
        label = f"{rows[0]['sampler']}, {rows[0]['evaluations']}"
        columns = [spread([row[key] for row in rows]) for key in ("error", "distance")]
        print(f"  {label:34s} {columns[0]}  {columns[1]}")
    print("  held-out bits/dim")
    for name in records[0]["bits per dim"]:
        print(f"  {name:34s} {spread([r['bits per dim'][name][0] for r in records])}")


@torch.no_grad()
def parts(out: Path, seed: int, count: int) -> None:
    """The same images under one change at a time."""
    device = torch.device("cpu")
    data = Digits.load(seed, device)
    denoisers = diffusion(data, Trainer(data, out, seed, 1.0))
    samples, tuned = denoisers.values()
    draws = torch.Generator().manual_seed(seed + 1)
    test = data.encode(data.test, draws)[:count]
    train = data.encode(data.train, draws)[:count]
    cases = {
        "held-out, EDM weighting, 40 steps": (samples, test, {}),
        "  likelihood weighting": (tuned, test, {}),
        "  160 steps (integration)": (samples, test, {"steps": 160}),
        "  data at t0 = 0.02 (edges)": (samples, test, {"t0": 0.02}),
        "  training images (overfitting)": (samples, train, {}),
    }
    print(f"bits/dim of {count} images, seed {seed}")
    for name, (denoiser, z, more) in cases.items():
        flow = likelihood_flow(denoiser, **more)
        print(f"  {name:36s} {float(bits(flow.log_prob(z)).mean()):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--save", type=Path, default=None, help="write the records as JSON")
    options = parser.parse_args()
    records = []
    for seed in options.seeds:
        result = options.out / f"seed{seed}-steps{STEPS}" / "results.json"
        if not result.exists():
            command = [sys.executable, "-m", "examples.digits", "--seed", str(seed)]
            subprocess.run([*command, "--out", str(options.out)], check=True)
        records.append(json.loads(result.read_text()))
    summary(records)
    parts(options.out / f"seed{options.seeds[0]}-steps{STEPS}", options.seeds[0], 200)
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
