"""Time grids for ``Grid(times)``, from ``t0`` to ``t1`` in either direction, both ends exact.

All are data: no gradient goes through them. s = sigma / alpha is the noise-to-signal ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._scalar import whole
from .schedule import Schedule

__all__ = [
    "aligned", "beta", "karras", "quadratic", "resampled", "uniform", "uniform_lambda",
    "uniform_sigma",
]  # fmt: skip


def uniform(t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` float64 times, evenly spaced.

    Raises:
        ValueError: here as in every grid, where the times are not one after the other.
    """
    return _between(t0, t1, _ramp(t0, t1, steps))


def quadratic(t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` times whose roots are evenly spaced: shorter steps towards data.

    Source: Song et al. 2021, "DDIM", arXiv 2010.02502, appendix D.2.
    """
    if min(t0, t1) < 0.0:
        raise ValueError(f"times of a quadratic grid are not negative; got {t0} and {t1}")
    return _between(t0, t1, _ramp(math.sqrt(t0), math.sqrt(t1), steps).square())


def beta(t0: float, t1: float, steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """``steps + 1`` times at the even quantiles of Beta(a, b), 0 the end that is nearer to data.

    With a, b < 1 steps are short at both ends. Source: Lee et al. 2024, arXiv 2407.12173.
    """
    if not (a > 0.0 and b > 0.0):
        raise ValueError(f"a Beta law has a, b > 0; got {a} and {b}")
    low, high = min(t0, t1), max(t0, t1)
    times = low + (high - low) * _beta_quantile(_ramp(0.0, 1.0, steps), a, b)
    return _between(t0, t1, times if t0 < t1 else times.flip(0))


def uniform_lambda(schedule: Schedule, t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` times, evenly spaced in lambda = log(alpha / sigma), so geometric in s.

    Raises:
        ValueError: where lambda is infinite at an end.

    Source: Lu et al. 2022, "DPM-Solver", arXiv 2206.00927; elsewhere called exponential.
    """
    return _at(schedule, t0, t1, _ramp(*_lambdas(schedule, t0, t1), steps))


def karras(schedule: Schedule, t0: float, t1: float, steps: int, rho: float = 7.0) -> Tensor:
    """``steps + 1`` times whose noise-to-signal ratio s is even in s^(1/rho).

    Raises:
        ValueError: where the ratio is zero or infinite at an end.

    Source: Karras et al. 2022, arXiv 2206.00364, equation 5.
    """
    if not rho > 0.0:
        raise ValueError(f"rho > 0; got {rho}")
    first, last = (math.exp(-lam / rho) for lam in _lambdas(schedule, t0, t1))
    return _at(schedule, t0, t1, -rho * _ramp(first, last, steps).log())


def uniform_sigma(schedule: Schedule, t0: float, t1: float, steps: int) -> Tensor:
    """``steps + 1`` times, evenly spaced in s: ``karras`` with rho = 1."""
    return karras(schedule, t0, t1, steps, rho=1.0)


def aligned(
    schedule: Schedule, t0: float, t1: float, steps: int, sigma_data: float = 0.5
) -> Tensor:
    """``steps + 1`` times, evenly spaced in the angle arctan(s / sigma_data).

    For data N(0, sigma_data^2) these are the times at which DDIM errs least: a step multiplies
    the exact result by the cosine of its angle. Ends without noise or signal are no trouble.

    Source: Sabour et al. 2024, "Align your steps", arXiv 2404.14507, for Gaussian data.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data is a standard deviation > 0; got {sigma_data}")
    ends = torch.tensor(_lambdas(schedule, t0, t1, finite=False), dtype=torch.float64)
    first, last = torch.atan2((-ends).exp(), ends.new_tensor(sigma_data)).tolist()
    return _at(schedule, t0, t1, -(sigma_data * _ramp(first, last, steps).tan()).log())


def resampled(schedule: Schedule, ratios: Sequence[float], steps: int) -> Tensor:
    """``steps + 1`` times along a table of s, log s linear between its entries: a published
    schedule, such as one found by optimisation, at any number of steps.

    Args:
        schedule: turns ratios into times.
        ratios: s at the times of the table's own steps, in their order.
        steps: wanted.

    Source: Sabour et al. 2024, arXiv 2404.14507.
    """
    table = -torch.tensor(ratios, dtype=torch.float64).log()
    if len(table) < 2 or not bool(table.isfinite().all()):
        raise ValueError("ratios is a table of two finite sigma / alpha > 0, or more")
    place = _ramp(0.0, len(table) - 1.0, steps)
    left = place.long().clamp(max=len(table) - 2)
    lambdas = table[left].lerp(table[left + 1], place - left)
    with torch.no_grad():
        t0, t1 = (float(schedule.time(lam)) for lam in (float(table[0]), float(table[-1])))
    return _at(schedule, t0, t1, lambdas)


def _ramp(first: float, last: float, steps: int) -> Tensor:
    if not whole(steps, 1):
        raise ValueError(f"a grid has at least one step, a whole number; got steps={steps}")
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


@torch.no_grad()
def _lambdas(schedule: Schedule, t0: float, t1: float, finite: bool = True) -> tuple[float, float]:
    first, last = float(schedule.half_log_snr(t0)), float(schedule.half_log_snr(t1))
    if finite and not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(
            f"lambda runs from {first} to {last}: move the end away from where the signal or "
            "the noise is zero (1e-3 is usual), and add that end as a last step of its own"
        )
    return first, last


@torch.no_grad()
def _at(schedule: Schedule, t0: float, t1: float, lambdas: Tensor) -> Tensor:
    return _between(t0, t1, torch.as_tensor(schedule.time(lambdas)))


def _between(t0: float, t1: float, times: Tensor) -> Tensor:
    """The times, their ends made exact."""
    times[0], times[-1] = t0, t1
    gaps = times.diff()
    if not (math.isfinite(t0) and bool((gaps > 0).all() | (gaps < 0).all())):
        raise ValueError(
            f"{len(gaps)} steps from {t0} to {t1} do not each lead further: give two ends that "
            "differ, and no more steps than float64 tells apart"
        )
    return times


def _beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """The x at which Beta(a, b) has mass u, by bisection."""
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        x = 0.5 * (low + high)
        below = _beta_mass(x, a, b) < u
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return 0.5 * (low + high)


def _beta_mass(x: Tensor, a: float, b: float) -> Tensor:
    """The regularised incomplete beta function, by its series (DLMF 8.17.8) on the nearer side."""
    near = x * (a + b + 2.0) < a + 1.0
    x, p = torch.where(near, x, 1.0 - x), torch.where(near, x.new_tensor(a), x.new_tensor(b))
    q = a + b - p
    norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    first = (p * x.log() + q * torch.log1p(-x) + norm).exp() / p
    n = torch.arange(int(40.0 * (a + b + 2.0)), dtype=x.dtype, device=x.device)[:, None]
    total = first * (1.0 + (x * (a + b + n) / (p + 1.0 + n)).cumprod(0).sum(0))
    return torch.where(near, total, 1.0 - total)
