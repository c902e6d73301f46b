"""The continuous adjoint of an ODE, as dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._state import State, leaves, tree_map, unflatten
from ..dynamics.base import Dynamics

__all__ = ["costate"]


def costate(dynamics: Dynamics, targets: Sequence[Tensor] = ()) -> Dynamics:
    """The state (y, a, (g_1, ..)) of an ODE, its costate, and integrals over its parameters.

        dy/dt = f(t, y),    da/dt = -(df/dy)^T a,    dg_i/dt = -(df/dtheta_i)^T a

    Solved from t1 to t0 with a = dL/dy1 and g = 0 it ends in a = dL/dy0 and g_i = dL/dtheta_i.

    Args:
        dynamics: without noise.
        targets: the tensors theta_i, as the field uses them: parameters, or tensors among args.

    Raises:
        TypeError: on stochastic dynamics, whose costate has a noise of its own.

    Source: Pontryagin et al. 1962; Chen et al. 2018, arXiv 1806.07366.
    """
    return _Costate(dynamics, targets)


@final
class _Costate(Dynamics):
    def __init__(self, dynamics: Dynamics, targets: Sequence[Tensor]) -> None:
        if dynamics.noise is not None:
            raise TypeError("costate takes an ODE or a CDE; an SDE takes adjoint=Checkpointed()")
        super().__init__()
        self.dynamics, self.horizon = dynamics, dynamics.horizon
        self._targets = tuple(targets)
        self.batched_time = dynamics.batched_time and not targets

    def forward(self, t: Tensor, state: State, *args: Any) -> State:
        y, a, _ = state
        with torch.enable_grad():
            y = tree_map(lambda x: x.detach().requires_grad_(), y)
            k = self.dynamics(t, y, *args)
            pairs = [(v, w) for v, w in zip(leaves(k), leaves(a), strict=True) if v.requires_grad]
            wanted = [*leaves(y), *self._targets]
            slopes: Sequence[Tensor] = [torch.zeros_like(x) for x in wanted]
            if pairs:
                outputs, weights = zip(*pairs, strict=True)
                slopes = torch.autograd.grad(outputs, wanted, weights, materialize_grads=True)
        back = [-g for g in slopes]
        count = len(leaves(y))
        return tree_map(torch.detach, k), unflatten(back[:count], y), tuple(back[count:])
