"""Solvers from outside, as integrators like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._scalar import Scalar
from .._state import State, leaves, unflatten
from ..dynamics.field import Field
from ..stepping import Adaptive, Fixed, Stepping
from .base import Carry, Engine, Step

__all__ = ["TorchDiffEq"]

_ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
_FIXED = frozenset(("euler", "midpoint", "heun2", "heun3", "rk4", *_ADAMS))


@dataclass(frozen=True)
class TorchDiffEq(Engine):
    """torchdiffeq's ``odeint``, from one save time to the next.

    Args:
        method: torchdiffeq's name of it, such as ``"dopri8"`` or ``"implicit_adams"``.
        options: torchdiffeq's own options.

    ``Adaptive(rtol, atol)`` gives its tolerances, ``Fixed(dt=...)`` its step size. Gradients run
    through its operations (``Direct``). Source: https://github.com/rtqichen/torchdiffeq.
    """

    method: str = "dopri5"
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict, repr=False)
    order = 1
    dense_order = 0

    def bind(self, stepping: Stepping) -> Engine:
        fixed = self.method in _FIXED
        if isinstance(stepping, Adaptive) and not (stepping.per_sample or fixed):
            keywords: dict[str, Any] = {"rtol": stepping.rtol, "atol": stepping.atol}
        elif isinstance(stepping, Fixed) and stepping.dt is not None and fixed:
            keywords = {"options": {"step_size": stepping.dt, **self.options}}
        else:
            wanted = "Fixed(dt=...)" if fixed else "Adaptive(rtol, atol)"
            raise TypeError(f"torchdiffeq's {self.method} steps by itself: give {wanted}")
        return replace(self, keywords={"options": dict(self.options), **keywords})

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: State | None, carry: Carry
    ) -> Step:
        from torchdiffeq import odeint

        flat = tuple(leaves(y))

        def f(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(leaves(field.drift(t, unflatten(state, y))))

        times = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in (t0, t1)])
        ends = odeint(f, flat, times.to(flat[0].device), method=self.method, **self.keywords)
        return _Span(unflatten([end[-1] for end in ends], y))


class _Span(Step):
    __slots__ = ()

    def dense(self, theta: Scalar) -> State:
        raise TypeError("an outside engine has no dense output: name the times in save_at")
