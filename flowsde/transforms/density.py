"""The density carried along by dynamics, discrete and continuous alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _random
from .._scalar import Scalar, expand, isfinite, log, where, whole
from .._state import State, asked, check_like, entangled, factorable, pullback, pulled
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.discrete import Chain, Map

__all__ = [
    "Divergence", "Exact", "FlowDensity", "HutchPlusPlus", "Hutchinson", "Products", "log_density",
]  # fmt: skip

VectorField = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """f(y), and the products w_i^T J of its Jacobian with probes for which sum_i w_i w_i^T = I.

    Attributes:
        value: f(y), ``(batch, ...)``.
        probes: w_i, ``(n, batch, ...)``, each sample's own; drawn ones make up the identity in the
            mean.
        rows: w_i^T J, shaped as the probes.
    """

    value: Tensor
    probes: Tensor
    rows: Tensor

    def trace(self) -> Tensor:
        """tr J = sum_i w_i^T J w_i, ``(batch,)``."""
        return _flat(self.rows * self.probes).sum((0, 2))

    def norm(self) -> Tensor:
        """|J|_F^2 = sum_i |w_i^T J|^2, ``(batch,)``."""
        return _flat(self.rows.square()).sum((0, 2))


def _flat(x: Tensor) -> Tensor:
    """``(n, batch, size)``, of probes ``(n, batch, ...)``."""
    return x.reshape(*x.shape[:2], x.shape[2:].numel())


class Divergence(ABC):
    """How tr(df/dy) is had, together with f, in one pass: by the probes of ``Products``."""

    random: bool = False
    static: ClassVar[bool] = True  # whether its probes do not go by the field

    def prepare(self, y0: Tensor, seed: int | None) -> Divergence:
        """Draws probes, once a solve: resampling would make the field random."""
        return self

    def select(self, index: Tensor) -> Divergence:
        """That of these rows of the batch alone."""
        return self

    def __call__(self, f: VectorField, y: Tensor) -> tuple[Tensor, Tensor]:
        """f(y) and its divergence ``(batch,)``; differentiable where gradients are asked for."""
        found = self.products(f, y)
        return found.value, found.trace()

    def products(self, f: VectorField, y: Tensor) -> Products:
        """f(y) and what its divergence and its Jacobian's norm are made of."""
        if torch.compiler.is_compiling():
            return self._traced(f, y)
        if torch.is_inference_mode_enabled():
            raise TypeError(
                "a divergence needs autograd: use torch.no_grad(), not inference_mode()"
            )
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            kept = graph and y.requires_grad
            if not kept:
                y = y.detach().requires_grad_()
            out = f(y)
            graph = kept or (graph and asked([out], y))
            if not out.requires_grad:
                none = out.new_zeros((0, *out.shape))
                return Products(out, none, none)
            probes = self.directions(out, y)
            rows = _pull(out, y, probes, graph)
        return Products(out if graph else out.detach(), probes, rows)

    def _traced(self, f: VectorField, y: Tensor) -> Products:
        """The same by transformations that torch.compile traces."""
        out, pull = pullback(f, y)
        probes = self.directions(out, y)
        return Products(out, probes, pull(probes))

    @abstractmethod
    def directions(self, out: Tensor, y: Tensor) -> Tensor:
        """w_i, ``(n, batch, ...)``, constants all; out is f(y), with its graph."""


# Numbers in one batched pass on a CPU: of more, its cache does not hold what comes of them.
_CACHED = 2**16


def _pull(out: Tensor, y: Tensor, probes: Tensor, graph: bool) -> Tensor:
    """w^T J for ``(n, batch, ...)`` probes w, in batched backward passes."""
    size = max(1, _CACHED // max(1, y.numel())) if y.device.type == "cpu" else len(probes)
    parts = [pulled(out, y, part, graph) for part in torch.split(probes, size)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace itself: one vector-Jacobian product a component, vectorised."""

    def directions(self, out: Tensor, y: Tensor) -> Tensor:
        size = y.shape[1:].numel()
        basis = torch.eye(size, dtype=y.dtype, device=y.device)
        return basis[:, None].expand(size, len(y), size).reshape(size, *y.shape)


@dataclass(frozen=True, eq=False)
class _Drawn(Divergence):
    samples: int = 1
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    drawn: Tensor | None = field(default=None, repr=False)
    random = True
    draws = 1  # probes drawn for each of the samples

    def __post_init__(self) -> None:
        if not whole(self.samples, 1) or self.probe not in ("rademacher", "gaussian"):
            raise ValueError(
                f"{type(self).__name__} takes a whole number of samples >= 1, 'rademacher' or "
                f"'gaussian' probes; got {self.samples} and {self.probe!r}"
            )

    def prepare(self, y0: Tensor, seed: int | None) -> Divergence:
        assert seed is not None
        key = _random.keys(seed, len(y0), y0.device, _random.PROBE)
        draw = _random.rademacher if self.probe == "rademacher" else _random.normal
        steps = torch.arange(self.draws * self.samples, device=y0.device)
        drawn = draw(key, steps, y0.shape[1:].numel(), y0.dtype)
        drawn = drawn * self.samples**-0.5
        return replace(self, drawn=drawn.reshape(len(steps), *y0.shape))

    def select(self, index: Tensor) -> Divergence:
        return self if self.drawn is None else replace(self, drawn=self.drawn[:, index])


@dataclass(frozen=True, eq=False)
class Hutchinson(_Drawn):
    """The unbiased estimate mean_i v_i^T J v_i, probes fixed for the solve.

    Args:
        samples: number of probes.
        probe: ``"rademacher"`` (least variance) or ``"gaussian"``.

    Source: Hutchinson 1989; Grathwohl et al. 2019, "FFJORD", arXiv 1810.01367.
    """

    def directions(self, out: Tensor, y: Tensor) -> Tensor:
        assert self.drawn is not None
        return self.drawn


@dataclass(frozen=True, eq=False)
class HutchPlusPlus(_Drawn):
    """Hutchinson's estimate of what a sketch of low rank leaves over.

        Q = orth(J^T S),    P = I - Q Q^T,    tr J ~ tr(Q^T J Q) + mean_i (P v_i)^T J (P v_i)

    Unbiased, for Q is independent of v; exact where ``samples`` is at least the dimension or the
    rank of J. Its error falls as 1 / samples where Hutchinson's falls as 1 / sqrt(samples). The
    identity holds for any fixed Q, so that none of Q's own derivative is missing in the mean of a
    gradient: Q is held constant there, and rank-deficient sketches do no harm. Takes
    3 ``samples`` products in two batched passes.

    Args:
        samples: columns of S, and number of probes v.
        probe: of both, ``"rademacher"`` or ``"gaussian"``.

    Source: Meyer et al. 2021, arXiv 2010.09649.
    """

    draws, static = 2, False

    def directions(self, out: Tensor, y: Tensor) -> Tensor:
        assert self.drawn is not None
        sketch = _pull(out, y, self.drawn[: self.samples], graph=False)
        columns = _flat(sketch).permute(1, 2, 0)
        basis = torch.linalg.qr(columns.to(factorable(columns.dtype))).Q.to(columns.dtype)
        rest = _flat(self.drawn[self.samples :]).permute(1, 2, 0)
        rest = rest - basis @ (basis.mT @ rest)
        both = torch.cat((basis, rest), -1)
        return both.permute(2, 0, 1).reshape(both.shape[-1], *y.shape)


@overload
def log_density(dynamics: Map, divergence: Divergence | None = ...) -> Map: ...
@overload
def log_density(dynamics: Dynamics, divergence: Divergence | None = ...) -> Dynamics: ...
def log_density(dynamics: Dynamics, divergence: Divergence | None = None) -> Dynamics:
    """Dynamics of (y, l): the state, and the log-density that it carries with it.

        d log p / dt = -tr(df/dy)           along an ODE
        log p' = log p - log |det dy'/dy|   through a map

    so that l(t1) - l(t0) = log p_1(y1) - log p_0(y0), whichever way the solve runs. The state is
    a tensor of shape ``(batch, ...)``, l has shape ``(batch,)``.

    Args:
        dynamics: an ODE, a CDE, a probability flow, or a Map.
        divergence: ``Exact()``, ``Hutchinson(n)`` or ``HutchPlusPlus(n)``; by default that of the
            field (``ODE(traced=)``) where it brings one, else ``Exact()``. Maps bring their own
            determinant.

    Raises:
        TypeError: on stochastic dynamics, on chains that do not invert, and in the solve on fields
            that mix samples, as BatchNorm in training does.

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
    return FlowDensity(dynamics, divergence)


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


class FlowDensity(Dynamics):
    """The dynamics of (y, l) along an ODE, from ``log_density``. It has one part, and is split only
    where the rate is a number.
    """

    def __init__(self, dynamics: Dynamics, divergence: Divergence | None) -> None:
        super().__init__()
        self.dynamics, self.divergence = dynamics, divergence or Exact()
        self._own = divergence is None and dynamics.traced() is not None
        self.follow(dynamics)
        self.random = dynamics.random or self.divergence.random
        self.pulls = dynamics.pulls or not (self._own or self.divergence.static)
        self._looked = False

    def prepare(self, y0: State, seed: int | None) -> FlowDensity:
        x = _tensor(y0)
        return self._with(self.dynamics.prepare(x, seed), self.divergence.prepare(x, seed))

    def select(self, index: Tensor) -> Dynamics | None:
        inner = self.dynamics.select(index)
        return None if inner is None else self._with(inner, self.divergence.select(index))

    def _with(self, dynamics: Dynamics, divergence: Divergence) -> FlowDensity:
        return FlowDensity(dynamics, None if self._own else divergence)

    def check_span(self, t0: float, t1: float) -> None:
        self.dynamics.check_span(t0, t1)

    def hint(self, t: float) -> str:
        return self.dynamics.hint(t)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        traced = self.dynamics.traced() if self._own else None
        if traced is not None:
            drift, trace = traced(t, y[0], *args)
        else:
            drift, trace = self.divergence(self.apart(lambda x: self.dynamics(t, x, *args)), y[0])
        return drift, -trace

    def apart(self, f: VectorField) -> VectorField:
        """f, looked at once a solve: where it mixes samples, none has a divergence of its own."""

        def looked(x: Tensor) -> Tensor:
            out = f(x)
            if not torch.compiler.is_compiling() and not self._looked:
                self._looked = True
                if entangled([out], [x]):
                    raise TypeError(
                        "this field mixes the samples of its batch, and a density is that of each "
                        "alone: call eval() on what normalises batches, or take GroupNorm, and put "
                        "what belongs together in one sample"
                    )
            return out

        return looked

    def split(self) -> SemiLinear | None:
        inner = self.dynamics.split()
        if inner is None or isinstance(inner.rate, Tensor):
            return None
        return _DensitySplit(inner, lambda f, y: self.divergence(self.apart(f), y))


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

    def __init__(
        self, inner: SemiLinear, trace: Callable[[VectorField, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self._inner, self._trace, self.rate = inner, trace, inner.rate

    def scale(self, t: Scalar) -> Scalar:
        return self._inner.scale(t)

    def clock(self, t: Scalar) -> Scalar:
        return self._inner.clock(t)

    def time(self, s: Scalar) -> Scalar:
        return self._inner.time(s)

    @property
    def dual(self) -> SemiLinear:
        inner = self._inner.dual
        return self if inner is self._inner else _DensitySplit(inner, self._trace)

    def residual(self, t: Tensor, x: State, *args: Any, now: Scalar | None = None) -> State:
        value, trace = self._trace(lambda v: self._inner.residual(t, v, *args, now=now), x[0])
        return value, -expand(self.scale(t), trace) * trace

    def advance(self, t0: Scalar, t1: Scalar, x: State, residual: State) -> State:
        a, _ = self._inner.weights(t0, t1)
        state, density = x
        size = state.shape[1:].numel()
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
