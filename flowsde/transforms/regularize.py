"""What makes a flow cheap to solve: penalties that ride along."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from .._state import State
from ..dynamics.base import Dynamics
from ..dynamics.discrete import Chain
from .density import Divergence, FlowDensity, Hutchinson

__all__ = ["Regularized", "regularize"]


def regularize(
    dynamics: Dynamics, *, kinetic: bool = True, jacobian: bool = True,
    divergence: Divergence | None = None,
) -> Regularized:  # fmt: skip
    """Dynamics of (x, k, j): the state x of these, and what its way costs.

        dk/dt = |f|^2,    dj/dt = |df/dy|_F^2

    with y the moved tensor ``(batch, ...)``, sums over its components, and k and j of shape
    ``(batch,)``; the one that is not asked for is left out. On ``log_density(d, divergence)``
    x is (y, l), and |df/dy|_F^2 is estimated by the very products w^T df/dy that the divergence is
    made of: the penalty costs no further evaluation and no further pass. (A field's own trace,
    which knows no such products, then gives way to ``Exact()``.)

    ``enter(x)`` starts it. k and j fall where time runs backwards.

    Args:
        dynamics: an ODE or another one without noise, of a tensor; or the ``log_density`` of one.
        kinetic: whether to gather k.
        jacobian: whether to gather j.
        divergence: what estimates |df/dy|_F^2 of dynamics that bring none; by default
            ``Hutchinson()``.

    Raises:
        TypeError: on stochastic or discrete dynamics; on a second divergence.
        ValueError: if nothing is asked for.

    Source: Finlay et al. 2020, "How to train your neural ODE", arXiv 2002.02798.
    """
    if isinstance(dynamics, Chain) or dynamics.noise is not None:
        raise TypeError("penalties are integrals of a drift: give an ODE or its log_density")
    if not (kinetic or jacobian):
        raise ValueError("regularize gathers kinetic=True, jacobian=True or both")
    if isinstance(dynamics, FlowDensity):
        if divergence is not None:
            raise TypeError("the density has its divergence: leave out regularize's")
        divergence = dynamics.divergence
    return Regularized(dynamics, kinetic, jacobian, divergence or Hutchinson())


@final
class Regularized(Dynamics):
    """The dynamics of (x, k, j), from ``regularize``."""

    def __init__(
        self, dynamics: Dynamics, energy: bool, jacobian: bool, divergence: Divergence
    ) -> None:
        super().__init__()
        self.dynamics, self.divergence = dynamics, divergence
        self._energy, self._jacobian = energy, jacobian
        self.batched_time, self.horizon = dynamics.batched_time, dynamics.horizon
        self.random = dynamics.random or (jacobian and divergence.random)

    def _moved(self, x: State) -> Tensor:
        """y of x."""
        y = x[0] if isinstance(self.dynamics, FlowDensity) else x
        if not isinstance(y, Tensor):
            raise TypeError("penalties are those of a tensor's motion, (batch, ...)")
        return y

    def enter(self, x: State) -> State:
        """(x, k, j) of x, with k = j = 0."""
        y = self._moved(x)
        return x, *(y.new_zeros(len(y)) for _ in range(self._energy + self._jacobian))

    def prepare(self, y0: State, seed: int | None) -> Regularized:
        x, *_ = y0
        inner, divergence = self.dynamics.prepare(x, seed), self.divergence
        if self._jacobian:
            divergence = divergence.prepare(self._moved(x), seed)
        return Regularized(inner, self._energy, self._jacobian, divergence)

    def select(self, index: Tensor) -> Dynamics | None:
        inner, rows = self.dynamics.select(index), self.divergence.select(index)
        return None if inner is None else Regularized(inner, self._energy, self._jacobian, rows)

    def check_span(self, t0: float, t1: float) -> None:
        self.dynamics.check_span(t0, t1)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        x, *_ = y
        costs: list[Tensor] = []
        if self._jacobian:
            slope, norm = self._measured(t, x, args)
            costs.append(norm)
        else:
            slope = self.dynamics(t, x, *args)
        if self._energy:
            costs.insert(0, self._moved(slope).square().flatten(1).sum(-1))
        return slope, *costs

    def _measured(self, t: Tensor, x: State, args: tuple[Any, ...]) -> tuple[State, Tensor]:
        """The drift of x, and |df/dy|_F^2, from one evaluation."""
        inner = self.dynamics
        field = inner.dynamics if isinstance(inner, FlowDensity) else inner
        found = self.divergence.products(lambda v: field(t, v, *args), self._moved(x))
        slope = found.value if field is inner else (found.value, -found.trace())
        return slope, found.norm()
