"""An end of time that is learned."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from .._scalar import expand
from .._state import State, tree_map
from ..dynamics.base import Dynamics, VectorField
from ..dynamics.discrete import Chain

__all__ = ["learn_horizon"]


def learn_horizon(dynamics: Dynamics, end: float | None = None) -> Dynamics:
    """The dynamics in the time s = t / T of [0, 1], with T a parameter.

        dx/ds = T f(T s, x),    T = root^2

    Every solve from 0 to 1 then reaches T, and every adjoint finds the gradient by it.

    Args:
        dynamics: an ODE or another one without noise.
        end: T at the start; by default the dynamics' horizon.

    Raises:
        TypeError: on stochastic or discrete dynamics.
        ValueError: unless T > 0.

    Source: Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367, where T is trained so.
    """
    if isinstance(dynamics, Chain) or dynamics.noise is not None:
        raise TypeError("the end of time is learned by a drift alone: give an ODE")
    end = dynamics.horizon if end is None else end
    if not end > 0:
        raise ValueError(f"end is a time T > 0; got {end}")
    return _Stretched(dynamics, nn.Parameter(torch.tensor(float(end)).sqrt()))


@final
class _Stretched(Dynamics):
    def __init__(self, dynamics: Dynamics, root: nn.Parameter) -> None:
        super().__init__()
        self.dynamics, self.root = dynamics, root
        self.follow(dynamics)
        self.horizon = 1.0

    def prepare(self, y0: State, seed: int | None) -> _Stretched:
        return _Stretched(self.dynamics.prepare(y0, seed), self.root)

    def select(self, index: Tensor) -> Dynamics | None:
        inner = self.dynamics.select(index)
        return None if inner is None else _Stretched(inner, self.root)

    def check_span(self, t0: float, t1: float) -> None:
        end = float(self.root.detach().square())
        self.dynamics.check_span(end * t0, end * t1)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        end = self.root.square()
        return tree_map(lambda k: expand(end, k) * k, self.dynamics(end * t, y, *args))

    def traced(self) -> VectorField | None:
        return None if self.dynamics.traced() is None else self._traced

    def _traced(self, t: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        traced, end = self.dynamics.traced(), self.root.square()
        assert traced is not None
        drift, trace = traced(end * t, y, *args)
        return end * drift, end * trace
