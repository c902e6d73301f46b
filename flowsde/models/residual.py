"""Residual blocks that invert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _random
from .._once import once
from .._scalar import whole
from .._state import factorable, pulled
from ..dynamics.discrete import Map
from ..stepping import max_norm
from .mixing import exactly

__all__ = ["ExactLogDet", "InvertibleResidual", "LogDet", "RouletteLogDet"]


class LogDet(ABC):
    """How log det(I + dg/dx) is had."""

    random: bool = False

    def prepare(self, seed: int | None) -> LogDet:
        """Takes the seed of a solve."""
        return self

    @abstractmethod
    def __call__(self, g: Tensor, x: Tensor, graph: bool) -> Tensor:
        """``(batch,)``, from g(x), x, and whether it is to be differentiated."""


def _pull(g: Tensor, x: Tensor, v: Tensor, graph: bool) -> Tensor:
    """v^T dg/dx."""
    return pulled(g, x, v[None], graph)[0]


@dataclass(frozen=True)
class ExactLogDet(LogDet):
    """The determinant of the whole Jacobian: for few components."""

    def __call__(self, g: Tensor, x: Tensor, graph: bool) -> Tensor:
        size = x.shape[1:].numel()
        one = torch.eye(size, dtype=x.dtype, device=x.device)
        probes = one[:, None].expand(-1, len(x), -1).reshape(size, *x.shape)
        rows = pulled(g, x, probes, graph).flatten(2).transpose(0, 1)
        return torch.linalg.slogdet((one + rows).to(factorable(x.dtype)))[1].to(x.dtype)


@dataclass(frozen=True)
class RouletteLogDet(LogDet):
    """The power series, cut at a random place and weighted so that its mean is right.

        sum_{k=1}^{N} (-1)^(k+1) / (k P(N >= k)) v^T (dg/dx)^k v,    N = terms + geometric(keep)

    v has signs of its own in every sample; N is one for the batch. Unbiased, and of finite variance
    where |dg/dx|^2 < keep.

    Args:
        terms: that are always there.
        keep: the probability of each further one, given those before.
        seed: of the solve; ``prepare`` sets it.

    Source: Chen et al. 2019, "Residual flows", arXiv 1906.02735.
    """

    terms: int = 2
    keep: float = 0.85
    seed: int | None = None
    random = True

    def __post_init__(self) -> None:
        if not whole(self.terms, 0) or not 0 < self.keep < 1:
            raise ValueError(
                f"whole terms >= 0, and keep between 0 and 1; got {self.terms}, {self.keep}"
            )

    def prepare(self, seed: int | None) -> LogDet:
        return replace(self, seed=seed)

    def __call__(self, g: Tensor, x: Tensor, graph: bool) -> Tensor:
        if self.seed is None:
            raise TypeError("a random log-determinant is drawn by a solve: give it generator=...")
        key = _random.keys(self.seed, len(x), x.device, _random.PROBE)
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        v = _random.rademacher(key, first, x.shape[1:].numel(), x.dtype).reshape(x.shape)
        power, total = v, x.new_zeros(len(x))
        for k in range(1, self.terms + self._further() + 1):
            power = _pull(g, x, power, graph)
            weight = (-1) ** (k + 1) / (k * self.keep ** max(0, k - self.terms))
            total = total + weight * (power * v).flatten(1).sum(-1)
        return total

    def _further(self) -> int:
        """Geometric: at least j with probability keep^j."""
        cpu = torch.device("cpu")
        assert self.seed is not None
        key = _random.keys(self.seed, 1, cpu, _random.EXTRA)
        z = _random.normal(key, torch.zeros(1, dtype=torch.int64, device=cpu), 1, torch.float64)
        return int(math.log(0.5 * math.erfc(-float(z) / math.sqrt(2.0))) / math.log(self.keep))


class InvertibleResidual(Map):
    """y = x + g(x), for g with a Lipschitz constant below one.

    The inverse iterates x <- y - g(x) to rounding. Its gradient is that of the fixed point, by the
    same iteration for (I + dg/dx)^-T; it has first derivatives only.

    Args:
        network: g(x, *args), shaped as x, such as ``nn.LipschitzMLP([dim, 64, 64, dim])``.
        log_det: ``ExactLogDet()``, or ``RouletteLogDet()`` for many components.

    Raises:
        RuntimeError: from ``unstep``, where the iteration does not settle: g stretches.

    Source: Behrmann et al. 2019, "Invertible residual networks", arXiv 1811.00995.
    """

    def __init__(self, network: nn.Module, log_det: LogDet = ExactLogDet()) -> None:
        super().__init__()
        self.net, self.log_det = network, log_det
        self.random = log_det.random

    def prepare(self, y0: Tensor, seed: int | None) -> InvertibleResidual:
        return InvertibleResidual(self.net, self.log_det.prepare(seed)) if self.random else self

    @torch.no_grad()
    def start(self, y: Tensor, *args: Any) -> Tensor:
        return y + self.net(y, *args)

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            g, ladj = self._bent(y, args)
        return y + g, ladj

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        def g(x: Tensor) -> Tensor:
            return self.net(x, *args)

        with exactly(y):
            with torch.no_grad():
                x = _settle(g, y.detach(), y.new_ones(len(y)))
            x = _FixedPoint.apply(y - x - g(x), x, g)  # type: ignore[no-untyped-call]
            return x, -self._bent(x, args)[1]

    def _bent(self, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """g(x) and log det(I + dg/dx)."""
        if torch.is_inference_mode_enabled():
            raise TypeError(
                "a residual's determinant needs autograd: use torch.no_grad(), not inference_mode()"
            )
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (graph and x.requires_grad):
                x = x.detach().requires_grad_()
            g = self.net(x, *args)
            ladj = self.log_det(g, x, graph)
        return (g, ladj) if graph else (g.detach(), ladj.detach())


_PATIENCE = 2000  # iterations: enough for a Lipschitz constant of 0.98 in float64


_ROUNDING = 64.0  # times the least rounding: what a network's own may come to


def _peak(x: Tensor) -> Tensor:
    """The greatest entry of each row, ``(batch,)``."""
    return max_norm(x, True)


def _settle(g: Callable[[Tensor], Tensor], y: Tensor, unit: Tensor) -> Tensor:
    """The x with x + g(x) = y, each row to the rounding of numbers of its unit and of x's: until
    it moves by no more than that, or by little more and no longer by less.
    """
    if y.is_meta or not y.numel():
        return y
    x, info = y, torch.finfo(y.dtype)
    before, done = torch.full_like(unit, torch.inf), torch.zeros_like(unit, dtype=torch.bool)
    for _ in range(_PATIENCE):
        x, last = y - g(x), x
        slack = 4.0 * info.eps * (unit + _peak(x)) + info.tiny
        moved = _peak(x - last) / slack
        done |= (moved <= 1.0) | ((moved >= before) & (moved <= _ROUNDING))
        before, most = moved, float(torch.where(done, 0.0, moved).amax())
        if most == 0.0:
            return x
        if not math.isfinite(most):
            break
    raise RuntimeError(
        f"x + g(x) = y does not settle in {_PATIENCE} iterations: g's Lipschitz constant is to be "
        "below one, as that of nn.LipschitzMLP(sizes, bound=0.9) is"
    )


class _FixedPoint(torch.autograd.Function):
    """x + gap, with the derivative (I + dg/dx)^-1 of the fixed point by the gap."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, x: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gap, x)
        ctx.g = g
        return x + gap

    @staticmethod
    @once("an invertible residual's inverse has first derivatives only")
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        _, x = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            bent = ctx.g(x)
        found = _settle(lambda w: _pull(bent, x, w, False), cotangent, _peak(cotangent))
        return found, None, None
