"""The continuous adjoint of a differential equation, as dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._state import State, asked, leaves, tree_map, unflatten
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field

__all__ = ["costate"]


def costate(dynamics: Dynamics, targets: Sequence[Tensor] = ()) -> Dynamics:
    """The state (y, a, (h_1, ..)) of an equation, its costate, and integrals over its parameters.

        dy   =  f(t, y) dt          +  sum_j g_j(t, y) o dW_j
        da   = -(df/dy)^T a dt      -  sum_j (dg_j/dy)^T a o dW_j
        dh_i = -(df/dtheta_i)^T a dt  -  sum_j (dg_j/dtheta_i)^T a o dW_j

    Solved from t1 to t0, on the same Brownian path, with a = dL/dy1 and h = 0 it ends in
    a = dL/dy0 and h_i = dL/dtheta_i. Its noise is known by its products with dW alone, and commutes
    where that of y does: the columns are the Hamiltonian fields of a . g_j.

    Args:
        dynamics: without noise, with Stratonovich or with additive noise.
        targets: the tensors theta_i, as the field uses them: parameters, or tensors among args.

    Raises:
        TypeError: on Ito noise that is not additive.

    Source: Pontryagin et al. 1962; Chen et al. 2018, arXiv 1806.07366; Li et al. 2020, arXiv
    2001.01328.
    """
    return _Costate(dynamics, targets)


class _CostateNoise(Noise):
    """The noise of y, which drives the costate too."""

    by_products = True

    def shapes(self, y: State) -> State:
        return super().shapes(y[0])


@final
class _Costate(Dynamics):
    def __init__(self, dynamics: Dynamics, targets: Sequence[Tensor]) -> None:
        super().__init__()
        noise = dynamics.noise
        if noise is not None:
            if noise.ito and not noise.additive:
                raise TypeError(
                    "the costate of an Ito SDE would look ahead: give to_stratonovich(dynamics)"
                )
            self.noise = _CostateNoise(
                noise.kind, False, noise.additive, noise.commutative, noise.size
            )
        self.dynamics, self.horizon, self.pulls = dynamics, dynamics.horizon, True
        self._targets = tuple(targets)
        self.batched_time = dynamics.batched_time and not targets
        self.precise_time = dynamics.precise_time

    def forward(self, t: Tensor, state: State, *args: Any) -> State:
        return self._turn(state, lambda y: self.dynamics(t, y, *args))

    def product(self, t: Tensor, state: State, dw: State, args: tuple[Any, ...]) -> State:
        return self._turn(state, lambda y: Field(self.dynamics, args, y).noise_term(t, y, dw))

    def _turn(self, state: State, field: Callable[[State], State]) -> State:
        """(k, -(dk/dy)^T a, (-(dk/dtheta_i)^T a, ..)) of a field k(y).

        Where gradients are recorded so are those of all of it: implicit methods go by its Jacobian.
        """
        (given, a, _), recorded = state, torch.is_grad_enabled()
        if recorded and self._targets and any(x.grad_fn is not None for x in leaves(given)):
            raise TypeError(
                "a state with a history leads to the targets by that, too, so that their integrals "
                "would be too large: solve under torch.no_grad(), or leave out the targets"
            )
        with torch.enable_grad():
            y = tree_map(lambda x: x if recorded and x.requires_grad else _leaf(x), given)
            k = field(y)
            if recorded and not any(x.requires_grad for x in leaves((given, a))):
                recorded = asked(leaves(k), y)
            pairs = [(v, w) for v, w in zip(leaves(k), leaves(a), strict=True) if v.requires_grad]
            wanted = [*leaves(y), *self._targets]
            slopes: Sequence[Tensor] = [torch.zeros_like(x) for x in wanted]
            if pairs:
                outputs, weights = zip(*pairs, strict=True)
                slopes = torch.autograd.grad(
                    outputs, wanted, weights, materialize_grads=True, create_graph=recorded
                )
        back = [-g for g in slopes]
        count = len(leaves(y))
        k = k if recorded else tree_map(torch.detach, k)
        return k, unflatten(back[:count], y), tuple(back[count:])


def _leaf(x: Tensor) -> Tensor:
    """One that starts a graph."""
    return x.detach().requires_grad_()
