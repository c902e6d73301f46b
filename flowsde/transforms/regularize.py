"""What makes a flow cheap to solve: penalties that ride along."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from .._state import State, pushforward, squared
from ..dynamics.base import Dynamics
from ..dynamics.discrete import Chain
from .density import Divergence, FlowDensity, Hutchinson

__all__ = ["Regularized", "regularize"]


def regularize(
    dynamics: Dynamics, *, kinetic: bool = True, jacobian: bool = True, taylor: int | None = None,
    divergence: Divergence | None = None,
) -> Regularized:  # fmt: skip
    """Dynamics of (x, k, j, r): the state x of these, and what its way costs.

        dk/dt = |f|^2,    dj/dt = |df/dy|_F^2,    dr/dt = |d^K y/dt^K|^2,  K = taylor

    with y the moved tensor ``(batch, ...)``, sums over its components, and k, j and r of shape
    ``(batch,)``; what is not asked for is left out. On ``log_density(d, divergence)``
    x is (y, l), and |df/dy|_F^2 is estimated by the very products w^T df/dy that the divergence is
    made of: the penalty costs no further evaluation and no further pass. (A field's own trace,
    which knows no such products, then gives way to ``Exact()``.)

    ``enter(x)`` starts it. Where time runs backwards the costs fall.

    Args:
        dynamics: an ODE or another one without noise, of a tensor; or the ``log_density`` of one.
        kinetic: whether to gather k.
        jacobian: whether to gather j.
        taylor: the order K >= 2 of the derivative in r, along the solution: what a solver of order
            K - 1 errs by. By nested forward derivatives, which cost far more than k and j.
        divergence: what estimates |df/dy|_F^2 of dynamics that bring none; by default
            ``Hutchinson()``.

    Raises:
        TypeError: on stochastic or discrete dynamics; on a second divergence.
        ValueError: if nothing is asked for, or a derivative of order below two.

    Source: Finlay et al. 2020, "How to train your neural ODE", arXiv 2002.02798; Kelly et al. 2020
    (r), arXiv 2007.04504.
    """
    if isinstance(dynamics, Chain) or dynamics.noise is not None:
        raise TypeError("penalties are integrals of a drift: give an ODE or its log_density")
    if not (kinetic or jacobian or taylor is not None):
        raise ValueError("regularize gathers kinetic=True, jacobian=True, taylor=2 or several")
    if taylor is not None and taylor < 2:
        raise ValueError(f"taylor is an order >= 2, the first being kinetic; got {taylor}")
    if isinstance(dynamics, FlowDensity):
        if divergence is not None:
            raise TypeError("the density has its divergence: leave out regularize's")
        divergence = dynamics.divergence
    return Regularized(dynamics, (kinetic, jacobian, taylor), divergence or Hutchinson())


@final
class Regularized(Dynamics):
    """The dynamics of (x, k, j, r), from ``regularize``."""

    def __init__(
        self, dynamics: Dynamics, asked: tuple[bool, bool, int | None], divergence: Divergence
    ) -> None:
        super().__init__()
        self.dynamics, self.divergence, self._asked = dynamics, divergence, asked
        self.follow(dynamics)
        self.random = dynamics.random or (asked[1] and divergence.random)
        self.pulls = dynamics.pulls or (asked[1] and not divergence.static)

    @property
    def _field(self) -> Dynamics:
        """That of y alone."""
        inner = self.dynamics
        return inner.dynamics if isinstance(inner, FlowDensity) else inner

    def _moved(self, x: State) -> Tensor:
        """y of x."""
        y = x[0] if isinstance(self.dynamics, FlowDensity) else x
        if not isinstance(y, Tensor):
            raise TypeError("penalties are those of a tensor's motion, (batch, ...)")
        return y

    def enter(self, x: State) -> State:
        """(x, k, j, r) of x, with zeros for what is gathered."""
        y = self._moved(x)
        return x, *(y.new_zeros(len(y)) for asked in self._asked if asked)

    def prepare(self, y0: State, seed: int | None) -> Regularized:
        if not isinstance(y0, tuple) or len(y0) != 1 + sum(map(bool, self._asked)):
            raise TypeError("regularize moves a state and its costs: start it with enter(x)")
        inner, divergence = self.dynamics.prepare(y0[0], seed), self.divergence
        if self._asked[1]:
            divergence = divergence.prepare(self._moved(y0[0]), seed)
        return Regularized(inner, self._asked, divergence)

    def select(self, index: Tensor) -> Dynamics | None:
        inner, rows = self.dynamics.select(index), self.divergence.select(index)
        return None if inner is None else Regularized(inner, self._asked, rows)

    def check_span(self, t0: float, t1: float) -> None:
        self.dynamics.check_span(t0, t1)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        x, (kinetic, jacobian, taylor) = y[0], self._asked
        slope, norm = self._drift(t, x, args) if jacobian else (self.dynamics(t, x, *args), None)
        costs = [squared(self._moved(slope))] if kinetic else []
        if norm is not None:
            costs.append(norm)
        if taylor is not None:
            costs.append(squared(self._derivative(taylor, t, self._moved(x), args)))
        return slope, *costs

    def _drift(self, t: Tensor, x: State, args: tuple[Any, ...]) -> tuple[State, Tensor]:
        """That of x, and |df/dy|_F^2, from one evaluation."""

        def f(v: Tensor) -> Tensor:
            return self._field(t, v, *args)

        if not isinstance(self.dynamics, FlowDensity):
            found = self.divergence.products(f, self._moved(x))
            return found.value, found.norm()
        found = self.divergence.products(self.dynamics.apart(f), self._moved(x))
        return (found.value, -found.trace()), found.norm()

    def _derivative(self, order: int, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        """d^order y / dt^order along the solution."""

        def f(t: Tensor, y: Tensor) -> Tensor:
            return self._field(t, y, *args)

        ahead: Callable[[Tensor, Tensor], Tensor] = f
        for _ in range(order - 1):
            ahead = partial(_along, f, ahead)
        return ahead(t, y)


def _along(
    f: Callable[[Tensor, Tensor], Tensor], g: Callable[[Tensor, Tensor], Tensor], t: Tensor,
    y: Tensor,
) -> Tensor:  # fmt: skip
    """The derivative of g(t, y(t)) where dy/dt = f(t, y)."""
    _, push = pushforward(lambda at: g(*at), (t, y))
    slope: Tensor = push((torch.ones_like(t), f(t, y)))
    return slope
