"""A continuous normalizing flow is an ODE."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..dynamics.differential import ODE
from ..nn import MLP, ConcatSquash, ConvConcatSquash

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


def planar_cnf(dim: int, width: int = 64, hyper: int = 32) -> ODE:
    """The continuous planar flow: ``width`` planes, moved about by time.

        dz/dt = mean_n u_n(t) tanh(w_n(t) . z + b_n(t))
        tr df/dz = mean_n (1 - tanh^2) u_n . w_n

    Args:
        dim: of z ``(batch, dim)``.
        width: number of planes.
        hyper: width of the two hidden layers of the network of t that gives u, w and b.

    Source: Chen et al. 2018, "Neural ordinary differential equations", arXiv 1806.07366.
    """
    net = _Planar(dim, width, hyper)
    return ODE(net, batched_time=True, traced=net.traced)


class _Planar(nn.Module):
    def __init__(self, dim: int, width: int, hyper: int) -> None:
        super().__init__()
        self.sizes = [width * dim, width * dim, width]
        self.hyper = MLP([1, hyper, hyper, sum(self.sizes)], nn.Tanh)

    def _planes(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u and w ``(..., width, dim)``, b ``(..., width)``."""
        u, w, b = self.hyper(t[..., None]).split(self.sizes, dim=-1)
        shape = (b.shape[-1], -1)
        return u.unflatten(-1, shape), w.unflatten(-1, shape), b

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        u, w, b = self._planes(t)
        return _move(u, _side(w, b, z))

    def traced(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b = self._planes(t)
        h = _side(w, b, z)
        return _move(u, h), ((1.0 - h * h) * (u * w).sum(-1)).mean(-1)


def _side(w: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """tanh(w_n . z + b_n), ``(batch, width)``."""
    return ((z.unsqueeze(-2) @ w.mT).squeeze(-2) + b).tanh()


def _move(u: Tensor, h: Tensor) -> Tensor:
    """mean_n u_n h_n, ``(batch, dim)``."""
    return (h.unsqueeze(-2) @ u).squeeze(-2) / h.shape[-1]
