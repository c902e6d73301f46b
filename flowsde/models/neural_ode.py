"""A neural ODE as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics.base import Dynamics
from ..solution import Solution
from ..solve import Solver

__all__ = ["NeuralODE"]


class NeuralODE(nn.Module):
    """x to z(T),    dz/dt = f(t, z),    z(0) = [x, 0].

    A residual stack, read as Euler's method with steps of one: any solver takes its place. With
    ``extra`` zeros beside x trajectories need not cross (an augmented neural ODE), which lets z(T)
    be any function of x, and mostly saves evaluations.

    Args:
        dynamics: of z, ``(batch, features + extra, ...)``; T is its horizon.
        extra: features, or channels of images, that are added.
        solver: of every solve; by default as ``solve`` would.

    Source: Chen et al. 2018, arXiv 1806.07366; Dupont et al. 2019, "Augmented neural ODEs", arXiv
    1904.01681.
    """

    def __init__(self, dynamics: Dynamics, extra: int = 0, solver: Solver = Solver()) -> None:
        super().__init__()
        if extra < 0:
            raise ValueError(f"extra is a number of features >= 0; got {extra}")
        self.dynamics, self.extra, self.solver = dynamics, extra, solver

    def enter(self, x: Tensor) -> Tensor:
        """[x, 0]."""
        zeros = x.new_zeros((len(x), self.extra, *x.shape[2:]))
        return torch.cat((x, zeros), dim=1) if self.extra else x

    def solve(self, x: Tensor, *args: Any, **more: Any) -> Solution:
        """The whole solution; ``more`` are keywords of ``solve``, such as ``save_at``."""
        return self.solver.solve(self.dynamics, self.enter(x), args=args, **more)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.solve(x, *args).y1
