"""What every benchmark takes and leaves: options, a Markdown table, JSON, a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .flow_peers import FLOW_PEERS
from .peers import PEERS, SDE_PEERS
from .sampler_peers import SAMPLER_PEERS

__all__ = ["figure", "options", "parser", "save", "table", "write"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def parser(doc: str | None, dtype: str = "float64", turns: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=DTYPES, default=dtype)
    known = sorted({*PEERS, *SDE_PEERS, *FLOW_PEERS, *SAMPLER_PEERS})
    made.add_argument("--peers", nargs="*", choices=known, help="by default all that apply")
    made.add_argument("--turns", type=int, default=turns, help="alternating timings")
    made.add_argument("--small", action="store_true", help="a few seconds, to see that it runs")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return made


def options(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options, with one thread pinned. ``real`` is the dtype itself."""
    parsed = made.parse_args(arguments)
    parsed.real = DTYPES[parsed.dtype]
    parsed.turns = 1 if parsed.small else parsed.turns
    parsed.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return parsed


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a Markdown table; floats with three digits, None as a dash."""
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row) + " |", flush=True)
    print()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000.0 else f"{value:.3g}"


def write(name: str, parsed: argparse.Namespace, record: dict[str, Any]) -> Path:
    """Writes the record, under what it was measured on, beside its place and then into it."""
    device = torch.cuda.get_device_name() if parsed.device != "cpu" else platform.processor()
    head = {"device": device or platform.machine(), "dtype": parsed.dtype, "turns": parsed.turns}
    path = parsed.out / f"{name}-{parsed.device.replace(':', '')}.json"
    aside = path.with_suffix(".partial")
    aside.write_text(
        json.dumps({**head, "torch": torch.__version__, **record}, indent=1, allow_nan=False) + "\n"
    )
    os.replace(aside, path)
    print(f"figures in {path}")
    return path


def figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes, ``(rows, columns)``, drawn without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    room = {"wspace": 0.25, "hspace": 0.3}
    size = 5.5 * columns, 4.2 * rows
    return plt.subplots(rows, columns, figsize=size, squeeze=False, gridspec_kw=room)


def save(name: str, parsed: argparse.Namespace, drawn: Any) -> Path:
    from matplotlib import pyplot as plt

    path = parsed.out / f"{name}.png"
    drawn.savefig(path.with_suffix(".partial"), dpi=110, format="png", bbox_inches="tight")
    plt.close(drawn)
    os.replace(path.with_suffix(".partial"), path)
    print(f"picture in {path}")
    return path
