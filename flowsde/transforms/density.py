"""The density carried along by dynamics, discrete and continuous alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _random
from .._scalar import Scalar, expand, isfinite, log, where
from .._state import State, check_like
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.discrete import Chain, Map

__all__ = ["Divergence", "Exact", "Hutchinson", "log_density"]

VectorField = Callable[[Tensor], Tensor]


class Divergence(ABC):
    """How tr(df/dy) is had, together with f, in one pass."""

    random: bool = False

    def prepare(self, y0: Tensor, seed: int | None) -> Divergence:
        """Draws probes, once a solve: resampling would make the field random."""
        return self

    def select(self, index: Tensor) -> Divergence:
        """That of these rows of the batch alone."""
        return self

    def __call__(self, f: VectorField, y: Tensor) -> tuple[Tensor, Tensor]:
        """f(y) and its divergence ``(batch,)``; differentiable where gradients are asked for."""
        if torch.is_inference_mode_enabled():
            raise TypeError(
                "a divergence needs autograd: use torch.no_grad(), not inference_mode()"
            )
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (graph and y.requires_grad):
                y = y.detach().requires_grad_()
            out = f(y)
            if not out.requires_grad:
                return out, out.new_zeros(len(out))
            trace = self.trace(out, y, graph)
        return (out, trace) if graph else (out.detach(), trace.detach())

    @abstractmethod
    def trace(self, out: Tensor, y: Tensor, graph: bool) -> Tensor:
        """tr(d out / dy), ``(batch,)``."""


def _pull(out: Tensor, y: Tensor, probes: Tensor, graph: bool) -> Tensor:
    """v^T J for ``(n, batch, ...)`` probes v, in one batched backward pass."""
    (pulled,) = torch.autograd.grad(
        out, y, probes, is_grads_batched=True, create_graph=graph, retain_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    return pulled


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace itself: one vector-Jacobian product a component, vectorised."""

    def trace(self, out: Tensor, y: Tensor, graph: bool) -> Tensor:
        size = y[0].numel()
        basis = torch.eye(size, dtype=y.dtype, device=y.device)
        probes = basis[:, None].expand(size, len(y), size)
        pulled = _pull(out, y, probes.reshape(size, *y.shape), graph)
        return pulled.reshape(size, len(y), size).diagonal(dim1=0, dim2=2).sum(-1)


@dataclass(frozen=True, eq=False)
class Hutchinson(Divergence):
    """The unbiased estimate mean_i v_i^T J v_i, probes fixed for the solve.

    Args:
        samples: number of probes.
        probe: ``"rademacher"`` (least variance) or ``"gaussian"``.

    Source: Hutchinson 1989; Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """

    samples: int = 1
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    probes: Tensor | None = None
    random = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.probe not in ("rademacher", "gaussian"):
            raise ValueError("Hutchinson takes samples >= 1, 'rademacher' or 'gaussian' probes")

    def prepare(self, y0: Tensor, seed: int | None) -> Divergence:
        assert seed is not None
        key = _random.keys(seed, len(y0), y0.device, _random.PROBE)
        draw = _random.rademacher if self.probe == "rademacher" else _random.normal
        steps = torch.arange(self.samples, device=y0.device)
        probes = draw(key, steps, y0[0].numel(), y0.dtype)
        return replace(self, probes=probes.reshape(self.samples, *y0.shape))

    def select(self, index: Tensor) -> Divergence:
        return self if self.probes is None else replace(self, probes=self.probes[:, index])

    def trace(self, out: Tensor, y: Tensor, graph: bool) -> Tensor:
        assert self.probes is not None
        pulled = _pull(out, y, self.probes, graph)
        return (pulled * self.probes).flatten(2).sum(-1).mean(0)


@overload
def log_density(dynamics: Map, divergence: Divergence = ...) -> Map: ...
@overload
def log_density(dynamics: Dynamics, divergence: Divergence = ...) -> Dynamics: ...
def log_density(dynamics: Dynamics, divergence: Divergence | None = None) -> Dynamics:
    """Dynamics of (y, l): the state, and the log-density that it carries with it.

        d log p / dt = -tr(df/dy)           along an ODE
        log p' = log p - log |det dy'/dy|   through a map

    so that l(t1) - l(t0) = log p_1(y1) - log p_0(y0), whichever way the solve runs. The state is
    a tensor of shape ``(batch, ...)``, l has shape ``(batch,)``.

    Args:
        dynamics: an ODE, a CDE, a probability flow, or a Map.
        divergence: ``Exact()`` or ``Hutchinson(n)``; maps bring their own determinant.

    Raises:
        TypeError: on stochastic dynamics, and on chains that do not invert.

    Source: Chen et al. 2018, "Neural ordinary differential equations", arXiv 1806.07366.
    """
    if isinstance(dynamics, Map):
        return _MapDensity(dynamics)
    if isinstance(dynamics, Chain):
        raise TypeError("a density needs steps that invert: make the chain a Map")
    if dynamics.noise is not None:
        raise TypeError(
            "an SDE's density does not follow its paths: use "
            "LinearSDE(...).probability_flow(denoiser), the ODE with the same marginals"
        )
    return _FlowDensity(dynamics, divergence or Exact())


class _MapDensity(Map):
    def __init__(self, map_: Map) -> None:
        super().__init__()
        self.map = map_

        self.random = map_.random

    def __len__(self) -> int:
        return len(self.map)

    def prepare(self, y0: State, seed: int | None) -> _MapDensity:
        return _MapDensity(self.map.prepare(_tensor(y0), seed))

    def step(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        x, ladj = self.map.step(k, y[0], *args)
        return (x, y[1] - check_like(ladj, y[1], "the log-determinant")), ladj

    def unstep(self, k: int, y: State, *args: Any) -> tuple[State, Tensor]:
        x, ladj = self.map.unstep(k, y[0], *args)
        return (x, y[1] - check_like(ladj, y[1], "the log-determinant")), ladj


class _FlowDensity(Dynamics):
    def __init__(self, dynamics: Dynamics, divergence: Divergence) -> None:
        super().__init__()
        self.dynamics, self.divergence = dynamics, divergence
        self.batched_time, self.horizon = dynamics.batched_time, dynamics.horizon
        self.random = dynamics.random or divergence.random

    def prepare(self, y0: State, seed: int | None) -> _FlowDensity:
        x = _tensor(y0)
        inner = self.dynamics.prepare(x, seed)
        return _FlowDensity(inner, self.divergence.prepare(x, seed))

    def select(self, index: Tensor) -> Dynamics | None:
        inner = self.dynamics.select(index)
        return None if inner is None else _FlowDensity(inner, self.divergence.select(index))

    def check_span(self, t0: float, t1: float) -> None:
        self.dynamics.check_span(t0, t1)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        drift, trace = self.divergence(lambda x: self.dynamics(t, x, *args), y[0])
        return drift, -trace

    def split(self) -> SemiLinear | None:
        inner = self.dynamics.split()
        if inner is None or isinstance(inner.rate, Tensor):
            return None
        return _DensitySplit(inner, self.divergence)


def _tensor(y0: State) -> Tensor:
    if not isinstance(y0, tuple) or len(y0) != 2 or not isinstance(y0[0], Tensor):
        raise TypeError("log_density moves a pair (y, l) of tensors")
    if y0[0].ndim < 1 or y0[1].shape != y0[0].shape[:1]:
        raise TypeError(
            f"in (y, l), y is (batch, ...) and l (batch,); got {tuple(y0[0].shape)} and "
            f"{tuple(y0[1].shape)}"
        )
    return y0[0]


class _DensitySplit(SemiLinear):
    """The density of an exponential step: x as ever, and l in the clock at rate 0.

    l1 = l0 - d log A + h r,    r = -scale tr(d residual / dx),    A the linear weight of x
    """

    def __init__(self, inner: SemiLinear, divergence: Divergence) -> None:
        self._inner, self._divergence, self.rate = inner, divergence, inner.rate

    def scale(self, t: Scalar) -> Scalar:
        return self._inner.scale(t)

    def clock(self, t: Scalar) -> Scalar:
        return self._inner.clock(t)

    def time(self, s: Scalar) -> Scalar:
        return self._inner.time(s)

    @property
    def dual(self) -> SemiLinear:
        inner = self._inner.dual
        return self if inner is self._inner else _DensitySplit(inner, self._divergence)

    def residual(self, t: Tensor, x: State, *args: Any, now: Scalar | None = None) -> State:
        value, trace = self._divergence(lambda v: self._inner.residual(t, v, *args, now=now), x[0])
        return value, -expand(self.scale(t), trace) * trace

    def advance(self, t0: Scalar, t1: Scalar, x: State, residual: State) -> State:
        a, _ = self._inner.weights(t0, t1)
        state, density = x
        size = state[0].numel()
        h = self.clock(t1) - self.clock(t0)
        shift = expand(h, density) * residual[1] - expand(size * log(a), density)
        return self._inner.advance(t0, t1, state, residual[0]), density + shift

    def bend(
        self, t0: Scalar, t1: Scalar, x: State, weights: Callable[[Scalar], Sequence[Scalar]],
        changes: Sequence[State],
    ) -> State:  # fmt: skip
        h = self.clock(t1) - self.clock(t0)
        h, density = where(isfinite(h), h, 0.0), x[1]
        for weight, (_, change) in zip(weights(0.0), changes, strict=True):
            density = self._inner.add(density, h * weight, change)
        return self._inner.bend(t0, t1, x[0], weights, [c for c, _ in changes]), density
