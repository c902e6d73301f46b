"""Laws by which a coupling or an autoregressive map moves each number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.nn import functional

from .._scalar import whole

__all__ = ["Additive", "Affine", "Elementwise", "FromTorch", "RationalQuadraticSpline"]


class Elementwise(ABC):
    """An increasing function y(x; p) of each number, with numbers p of its own.

    x has shape ``(batch, *sample)``, p ``(batch, count, *sample)``. At p = 0 it is the identity.
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """How many numbers p are."""

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, both shaped as x."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dy, both shaped as y."""


@dataclass(frozen=True)
class Additive(Elementwise):
    """y = x + p. Source: Dinh et al. 2015, "NICE", arXiv 1410.8516."""

    @property
    def count(self) -> int:
        return 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[:, 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params[:, 0], torch.zeros_like(y)


@dataclass(frozen=True)
class Affine(Elementwise):
    """y = exp(s) x + m, with s = bound tanh(p_0 / bound) and m = p_1.

    Args:
        bound: of ``|s|``.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """

    bound: float = 2.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound is > 0; got {self.bound}")

    @property
    def count(self) -> int:
        return 2

    def _law(self, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params.unbind(1)
        return self.bound * torch.tanh(raw / self.bound), shift

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._law(params)
        return log_scale.exp() * x + shift, log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._law(params)
        return (y - shift) * (-log_scale).exp(), -log_scale


_LEAST = 1e-3  # of a bin's share of the span, and of a slope
_STEEPEST = -math.log(_LEAST)


@dataclass(frozen=True)
class RationalQuadraticSpline(Elementwise):
    """A monotone spline of rational quadratics on [-tail, tail], the identity beyond.

    In a bin of width w and height h, with s = h / w, slopes d0 and d1 at its ends, z = (x - x0) / w
    and u = 1 - z:

        y = y0 + h z e / (z e + u f),    dy/dx = s^2 (z f + u e) / (z e + u f)^2,
        e = s z + d0 u,    f = d1 z + s u

    in which no two terms cancel.
    Shares of widths and heights are softmaxes, at least 1e-3; slopes lie in [1e-3, 1e3] and are one
    at both ends. The inverse takes the root of the quadratic that does not cancel.

    Args:
        bins: their number.
        tail: half of the span.

    Source: Durkan et al. 2019, "Neural spline flows", arXiv 1906.04032.
    """

    bins: int = 8
    tail: float = 3.0

    def __post_init__(self) -> None:
        if not (whole(self.bins, 1) and self.bins < 1.0 / _LEAST and 0 < self.tail < math.inf):
            raise ValueError(
                f"a spline has 1 to 999 bins and a finite tail > 0; got {self.bins}, {self.tail}"
            )

    @property
    def count(self) -> int:
        return 3 * self.bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside, at = self._within(x)
        (x0, y0, d0), (x1, y1, d1) = self._ends(at, params, 0)
        w, h = x1 - x0, y1 - y0
        share, ladj = _rise(h / w, (at - x0) / w, d0, d1)
        return torch.where(inside, torch.addcmul(y0, h, share), x), torch.where(inside, ladj, 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside, at = self._within(y)
        (x0, y0, d0), (x1, y1, d1) = self._ends(at, params, 1)
        w, h, rise = x1 - x0, y1 - y0, at - y0
        s = h / w
        bent = rise * (d0 + d1 - 2.0 * s)
        # a z^2 + b z = s rise; a > 0 where b < 0
        b, c = h * d0 - bent, s * rise
        a = h * s - b  # as it is rounded: where b < 0, z is a / b's and not to leave the bin
        square = (b * b + 4.0 * a * c).clamp(min=torch.finfo(y.dtype).tiny)
        far, positive = b.abs() + square.sqrt(), b >= 0.0
        z = torch.where(positive, 2.0 * c / far, far / torch.where(positive, 1.0, 2.0 * a))
        ladj = -_rise(s, z, d0, d1)[1]
        return torch.where(inside, torch.addcmul(x0, w, z), y), torch.where(inside, ladj, 0.0)

    def _within(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the spline applies, and where to evaluate it: safely, where it does not."""
        return x.abs() < self.tail, x.clamp(-self.tail, self.tail)

    def _ends(self, at: Tensor, params: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """(x, y, slope) at the left and the right end of the bin in which x, or y, stands."""
        k, flat = self.bins, (0, 0) * (at.ndim - 1)
        shares = torch.unflatten(params[:, : 2 * k], 1, (2, k)).softmax(2).cumsum(2)
        span, spare = 2.0 * self.tail, 1.0 - k * _LEAST
        least = torch.linspace(
            -self.tail, self.tail - span * spare, k + 1, dtype=at.dtype, device=at.device
        ).reshape(k + 1, *(1,) * (at.ndim - 1))
        knots = torch.add(least, functional.pad(shares, (*flat, 1, 0)), alpha=span * spare)
        slopes = (_STEEPEST * torch.tanh(params[:, 2 * k :] / _STEEPEST)).exp()
        slopes = functional.pad(slopes, (*flat, 1, 1), value=1.0)
        table = torch.cat((knots, slopes[:, None]), 1)
        bin_ = (at[:, None] >= knots[:, axis, 1:-1]).sum(1, keepdim=True)
        index = torch.stack((bin_, bin_ + 1), 2).expand(-1, 3, -1, *at.shape[1:])
        left, right = table.gather(2, index).unbind(2)
        return left.unbind(1), right.unbind(1)  # type: ignore[return-value]


def _rise(s: Tensor, z: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """(y - y0) / h and log dy/dx, within a bin."""
    u = 1.0 - z
    e, f = torch.addcmul(s * z, d0, u), torch.addcmul(s * u, d1, z)
    ahead = z * e
    below = torch.addcmul(ahead, u, f)
    ratio = s / below
    return ahead / below, (ratio * ratio * torch.addcmul(z * f, u, e)).log()


@dataclass(frozen=True)
class FromTorch(Elementwise):
    """Any elementwise transform of ``torch.distributions``, zuko's among them.

        FromTorch(lambda p: AffineTransform(p[..., 0], p[..., 1].exp()), 2)

    It is the identity at p = 0 if the transform is.

    Args:
        factory: makes the transform of numbers p of shape ``(batch, *sample, numbers)``.
        numbers: how many it takes.

    Raises:
        TypeError: where the transform is not elementwise, when first used.
    """

    factory: Callable[[Tensor], Transform]
    numbers: int

    @property
    def count(self) -> int:
        return self.numbers

    def _made(self, params: Tensor) -> Transform:
        transform = self.factory(params.movedim(1, -1))
        if transform.domain.event_dim or transform.codomain.event_dim:
            raise TypeError(
                f"{type(transform).__name__} mixes components: a law is an elementwise transform"
            )
        return transform

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        transform = self._made(params)
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y)  # type: ignore[no-untyped-call]

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        transform = self._made(params)
        x = transform.inv(y)
        return x, -transform.log_abs_det_jacobian(x, y)  # type: ignore[no-untyped-call]
