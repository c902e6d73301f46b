"""Mathematics on times, which are host floats or tensors.

A solve whose batch shares its time runs on Python floats, the cheapest there is; per-sample and
differentiable times are tensors. Schedules, step controllers and integrators are written once, on
the functions of this page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Scalar",
    "asinh",
    "atan",
    "clamp",
    "cos",
    "exp",
    "expand",
    "expm1",
    "forwarding",
    "forwards",
    "isfinite",
    "log",
    "magnitude",
    "maximum",
    "minimum",
    "moving",
    "narrowed",
    "nonzero",
    "on_host",
    "phi1",
    "power",
    "resolution",
    "rounding",
    "sin",
    "sqrt",
    "sqrt_abs",
    "still",
    "to_float",
    "where",
    "whole",
]

Scalar = float | Tensor


def forwarding() -> bool:
    """Whether forward-mode differentiation may follow tensors."""
    return forward_ad._current_level >= 0


def forwards(x: Tensor) -> bool:
    """Whether it follows this one."""
    if not forwarding():
        return False
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    return unpack(x).tangent is not None


def moving(x: Any) -> bool:
    """Whether this is a tensor by which something is differentiated, backwards or forwards."""
    return isinstance(x, Tensor) and (x.requires_grad or forwards(x))


def whole(x: object, least: int) -> bool:
    """Whether this is a whole number, Python's or numpy's, of at least so much."""
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= least


def narrowed(times: Tensor, dtype: torch.dtype) -> Tensor:
    """Times ``(..., n)`` in this dtype; a ValueError where that rounds their gaps away."""
    if dtype == times.dtype:
        return times
    made, gaps = times.to(dtype), times.detach().diff()
    lost = (made.detach().to(times.dtype).diff() - gaps).abs() > 0.01 * gaps.abs()
    if bool(lost.any()):
        raise ValueError(
            f"{dtype} rounds the gaps between these times away: count them from the first of each "
            "series, or give values in float64"
        )
    return made


def _lift(
    on_float: Callable[[float], float], on_tensor: Callable[[Tensor], Tensor]
) -> Callable[[Scalar], Scalar]:
    def function(x: Scalar) -> Scalar:
        return on_tensor(x) if isinstance(x, Tensor) else on_float(x)

    return function


def _guarded(function: Callable[[float], float], overflow: float) -> Callable[[float], float]:
    """math's functions raise where torch's return an infinity; follow torch."""

    def guarded(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return overflow

    return guarded


exp = _lift(_guarded(math.exp, math.inf), torch.exp)
expm1 = _lift(_guarded(math.expm1, math.inf), torch.expm1)
cos = _lift(math.cos, torch.cos)
sin = _lift(math.sin, torch.sin)
asinh = _lift(math.asinh, torch.asinh)
atan = _lift(math.atan, torch.atan)
sqrt = _lift(lambda x: math.sqrt(x) if x >= 0 else math.nan, torch.sqrt)
log = _lift(lambda x: math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan), torch.log)


def magnitude(x: Scalar) -> Scalar:
    return x.abs() if isinstance(x, Tensor) else abs(x)


def power(x: Scalar, exponent: float) -> Scalar:
    return torch.pow(x, exponent) if isinstance(x, Tensor) else math.pow(x, exponent)


def isfinite(x: Scalar) -> bool | Tensor:
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)


def where(condition: bool | Tensor, a: Scalar, b: Scalar) -> Scalar:
    """``a`` where the condition holds, else ``b``; a tensor condition mixes."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def minimum(a: Scalar, b: Scalar) -> Scalar:
    return where(a < b, a, b)


def nonzero(x: Scalar) -> Scalar:
    """x, or one where it is zero: what may be divided by where the quotient is of no use."""
    return where(x == 0, 1.0 + 0.0 * x, x)


def sqrt_abs(x: Scalar) -> Scalar:
    """sqrt(|x|), with a gradient of zero where x is."""
    size = magnitude(x)
    return where(size > 0, sqrt(nonzero(size)), 0.0 * size)


def phi1(z: Scalar) -> Scalar:
    """(e^z - 1) / z, 1 at 0; near 0 by its series, whose derivatives cancel nothing."""
    if not isinstance(z, Tensor):
        return expm1(z) / z if z else 1.0
    near = z.detach().abs() < 0.5
    small, large = torch.where(near, z, 0.0), torch.where(near, 1.0, z)
    series = torch.zeros_like(small)
    for n in range(14, 0, -1):
        series = series * small + 1.0 / math.factorial(n)
    return torch.where(near, series, expm1(large) / large)


def maximum(a: Scalar, b: Scalar) -> Scalar:
    return where(a < b, b, a)


def clamp(x: Scalar, low: float, high: float) -> Scalar:
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


def still(x: Scalar) -> Scalar:
    """The same, off the record."""
    return x.detach() if isinstance(x, Tensor) else x


def to_float(x: Scalar) -> float:
    """The host's reading of one shared time."""
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def on_host(t: Tensor) -> Any:
    """A row of times as numpy's numbers, where looking at a few is cheaper than on any device.

    By way of a list: within torch.func's transformations there is no ``numpy()``.
    """
    return np.array(t.detach().tolist(), dtype=np.float64)


def rounding(t: object) -> float:
    """Slack, as a part of a span, with which a time given in this form is compared."""
    return 1e-6 if _narrow(t) else 1e-9


def resolution(t: object) -> float:
    """Relative rounding of a time given in this form."""
    return 4.0 * torch.finfo(t.dtype if _narrow(t) else torch.float64).eps  # type: ignore[attr-defined]


def _narrow(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64


@overload
def expand(x: Tensor, like: Tensor) -> Tensor: ...
@overload
def expand(x: Scalar, like: Tensor) -> Scalar: ...
def expand(x: Scalar, like: Tensor) -> Scalar:
    """A float, 0-d or ``(batch,)`` scalar, ready to multiply ``like`` of shape ``(batch, ...)``."""
    if not isinstance(x, Tensor) or (x.ndim == 0 and like.ndim > 0):
        return x
    real = like.dtype.to_real() if like.is_complex() else like.dtype
    dtype = real if x.is_floating_point() else x.dtype
    return x.to(dtype).reshape(x.shape + (1,) * (like.ndim - x.ndim))
