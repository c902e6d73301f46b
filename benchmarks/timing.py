"""Wall clocks that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

__all__ = ["alternate", "clock", "ratio"]

T = TypeVar("T")


def clock(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one run, whatever it left on the device included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(clocks: Mapping[str, Callable[[], T]], turns: int) -> dict[str, list[T]]:
    """The readings of each clock; they take turns, so that a slow minute strikes them all."""
    readings: dict[str, list[T]] = {name: [] for name in clocks}
    for _ in range(turns):
        for name, read in clocks.items():
            readings[name].append(read())
    return readings


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
