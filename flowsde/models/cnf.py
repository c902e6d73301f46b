"""A continuous normalizing flow is an ODE."""

from __future__ import annotations

from ..dynamics.differential import ODE
from ..nn import ConcatSquash

__all__ = ["cnf"]


def cnf(dim: int, width: int = 64, depth: int = 3) -> ODE:
    """dx/dt = ConcatSquash(t, x) with ``depth`` hidden layers of ``width``.

    Put it in ``Flow(Normal(dim), cnf(dim))``; ``log_density`` gives its likelihood.

    Source: Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """
    return ODE(ConcatSquash([dim, *[width] * depth, dim]), batched_time=True)
