"""Time grids for ``Grid(times)``, from ``t0`` to ``t1`` in either direction, both ends exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedule import Schedule

__all__ = ["karras", "uniform", "uniform_lambda"]


def uniform(t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` float64 times, evenly spaced."""
    _check(steps)
    return torch.linspace(t0, t1, steps + 1, dtype=torch.float64)


def uniform_lambda(schedule: Schedule, t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` times, evenly spaced in lambda = log(alpha / sigma).

    Raises:
        ValueError: where lambda is infinite at an end.

    Source: Lu et al. 2022, "DPM-Solver", arXiv 2206.00927.
    """
    first, last = _lambdas(schedule, t0, t1)
    return _through(schedule, uniform(first, last, steps), t0, t1)


def karras(schedule: Schedule, t0: float, t1: float, steps: int, rho: float = 7.0) -> Tensor:
    """``steps + 1`` times whose noise-to-signal ratio s = sigma / alpha is even in s^(1/rho).

    Raises:
        ValueError: where the ratio is zero or infinite at an end.

    Source: Karras et al. 2022, arXiv 2206.00364, equation 5.
    """
    first, last = (math.exp(-lam / rho) for lam in _lambdas(schedule, t0, t1))
    return _through(schedule, -rho * uniform(first, last, steps).log(), t0, t1)


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a grid has at least one step; got steps={steps}")


def _lambdas(schedule: Schedule, t0: float, t1: float) -> tuple[float, float]:
    first, last = float(schedule.half_log_snr(t0)), float(schedule.half_log_snr(t1))
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(
            f"lambda runs from {first} to {last}: move the end away from where the signal or "
            "the noise is zero (1e-3 is usual), and add that end as a last step of its own"
        )
    return first, last


def _through(schedule: Schedule, lambdas: Tensor, t0: float, t1: float) -> Tensor:
    times = schedule.time(lambdas)
    assert isinstance(times, Tensor)
    times[0], times[-1] = t0, t1
    return times
