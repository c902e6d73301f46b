"""A continuous normalizing flow is an ODE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..dynamics.differential import ODE
from ..nn import MLP, ConcatSquash, ConvConcatSquash
from ..nn._conditions import joined

__all__ = ["cnf", "planar_cnf"]


def cnf(
    shape: int | Sequence[int], width: int = 64, depth: int = 3, *, condition: int = 0
) -> ODE:  # fmt: skip
    """dx/dt = ConcatSquash(t, x) with ``depth`` hidden layers of ``width``.

    Put it in ``Flow(Normal(dim), cnf(dim))``; ``log_density`` gives its likelihood. That of vectors
    knows its trace; for images, and for vectors of many dimensions, give ``Hutchinson()``.

    Args:
        shape: the dimension of vectors, or (channels, height, width) of images.
        width, depth: of the hidden layers; channels, for images.
        condition: size of a further input ``(batch, condition)``, given as ``args``; 0 for none.

    Source: Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """
    hidden = [width] * depth
    if isinstance(shape, int):
        net = ConcatSquash([shape, *hidden, shape], condition)
        return ODE(net, batched_time=True, traced=net.traced)
    channels, _, _ = shape
    return ODE(ConvConcatSquash([channels, *hidden, channels], condition), batched_time=True)


def planar_cnf(dim: int, width: int = 64, hyper: int = 32, *, condition: int = 0) -> ODE:
    """The continuous planar flow: ``width`` planes, moved about by time.

        dz/dt = mean_n u_n(t) tanh(w_n(t) . z + b_n(t))
        tr df/dz = mean_n (1 - tanh^2) u_n . w_n

    Args:
        dim: of z ``(batch, dim)``.
        width: number of planes.
        hyper: width of the two hidden layers of the network of t that gives u, w and b.
        condition: size of a further input of that network, ``(batch, condition)``, given as
            ``args``; 0 for none.

    Source: Chen et al. 2018, "Neural ordinary differential equations", arXiv 1806.07366.
    """
    net = _Planar(dim, width, hyper, condition)
    return ODE(net, batched_time=True, traced=net.traced)


class _Planar(nn.Module):
    def __init__(self, dim: int, width: int, hyper: int, condition: int) -> None:
        super().__init__()
        self.sizes, self.condition = [width * dim, width * dim, width], condition
        self.hyper = MLP([1 + condition, hyper, hyper, sum(self.sizes)], nn.Tanh)

    def _planes(self, t: Tensor, z: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """u and w ``(..., width, dim)``, b ``(..., width)``."""
        if args or self.condition:
            told = joined(t.expand(len(z))[:, None], args, self.condition)
        else:
            told = t[..., None]
        u, w, b = self.hyper(told).split(self.sizes, dim=-1)
        shape = (b.shape[-1], -1)
        return u.unflatten(-1, shape), w.unflatten(-1, shape), b

    def forward(self, t: Tensor, z: Tensor, *args: Any) -> Tensor:
        u, w, b = self._planes(t, z, args)
        return _move(u, _side(w, b, z))

    def traced(self, t: Tensor, z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        u, w, b = self._planes(t, z, args)
        h = _side(w, b, z)
        return _move(u, h), ((1.0 - h * h) * (u * w).sum(-1)).mean(-1)


def _side(w: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """tanh(w_n . z + b_n), ``(batch, width)``."""
    return ((z.unsqueeze(-2) @ w.mT).squeeze(-2) + b).tanh()


def _move(u: Tensor, h: Tensor) -> Tensor:
    """mean_n u_n h_n, ``(batch, dim)``."""
    return (h.unsqueeze(-2) @ u).squeeze(-2) / h.shape[-1]
