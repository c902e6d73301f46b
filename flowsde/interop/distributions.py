"""Flows as distributions, and dynamics as transforms, of ``torch.distributions``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints
from torch.types import _size

from .._batch import conditions, rows
from .._state import fits, tree_map
from ..dynamics.base import Dynamics
from ..flow import Flow
from ..solve import Solver
from ..transforms.density import Divergence, log_density

__all__ = ["FlowDistribution", "FlowTransform"]


def _real(dims: int) -> constraints.Constraint:
    """Real numbers in a shape of so many dimensions."""
    return constraints.independent(constraints.real, dims)  # type: ignore[no-untyped-call]


class FlowDistribution(Distribution):
    """A ``Flow`` at given conditions as a distribution of torch's.

    For code that calls ``sample()`` and knows nothing of generators: each call draws on from the
    one given here. Works within torch's ``Independent``, ``MixtureSameFamily`` and
    ``TransformedDistribution``.

    Args:
        flow: what it is the law of.
        args: conditions; their rows are the ``batch_shape``.
        generator: of all draws. Without it there is a density and no sampling.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(
        self, flow: Flow, *args: Any, generator: torch.Generator | None = None,
        validate_args: bool | None = None,
    ) -> None:  # fmt: skip
        self.flow, self.args, self.generator = flow, args, generator
        super().__init__(torch.Size(conditions(args)), flow.event_shape, validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers in the shape of an event."""
        return _real(len(self.event_shape))

    def expand(self, batch_shape: _size, _instance: Distribution | None = None) -> FlowDistribution:
        """The same law in more dimensions of the batch; those in front are drawn as samples are."""
        given, batch = conditions(self.args), torch.Size(batch_shape)
        if not fits(self.batch_shape, batch):
            raise ValueError(f"{tuple(self.batch_shape)} does not expand to {tuple(batch)}")
        if given == (1,) and batch and batch[-1] != 1:
            given = batch[-1:]
        if batch[len(batch) - len(given) :] != given:
            raise ValueError(f"{tuple(self.batch_shape)} does not expand to {tuple(batch)}")
        args = tree_map(
            lambda x: x.expand(*given, *x.shape[1:]) if isinstance(x, Tensor) and x.ndim else x,
            self.args,
        )
        made = FlowDistribution(self.flow, *args, generator=self.generator, validate_args=False)
        made._batch_shape, made._validate_args = batch, self._validate_args
        return made

    def log_prob(self, value: Tensor) -> Tensor:
        """Of ``(..., *event_shape)``, which broadcasts against the batch."""
        if self._validate_args:
            self._validate_sample(value)
        found = self.flow.log_prob(value, *self.args, generator=self.generator)
        shape = torch.broadcast_shapes(found.shape, self.batch_shape)  # type: ignore[no-untyped-call]
        return found.expand(shape)

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """``(*sample_shape, *batch_shape, *event_shape)``, with gradients to the parameters.

        Raises:
            TypeError: without a generator.
        """
        if self.generator is None:
            raise TypeError("sampling draws: give FlowDistribution(flow, generator=...)")
        extra = self.batch_shape[: len(self.batch_shape) - len(conditions(self.args))]
        return self.flow.rsample((*sample_shape, *extra), *self.args, generator=self.generator)

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """``rsample`` without gradients."""
        return self.rsample(sample_shape)


class FlowTransform(Transform):
    """Invertible dynamics from t0 to t1 as a transform; ``inv`` is that from t1 to t0.

    By default from data to noise, so that
    ``TransformedDistribution(noise, FlowTransform(dynamics).inv)`` is a law of data. The log of
    ``|det dy/dx|`` comes with y from one solve in ``call_and_ladj``, and takes one of its own in
    ``log_abs_det_jacobian``.

    Args:
        dynamics: what ``log_density`` takes: a map, an ODE, a probability flow.
        args: conditions; their rows meet the last dimension of the batch.
        t0, t1: floats; the dynamics' horizon is the end by default.
        event_dim: dimensions of one sample.
        solver: how it is integrated; by default as ``solve`` would.
        divergence: by which the determinant of continuous dynamics is had, as of ``log_density``.
        generator: for dynamics and divergences that draw.
    """

    bijective = True

    def __init__(
        self,
        dynamics: Dynamics,
        *args: Any,
        t0: float = 0.0,
        t1: float | None = None,
        event_dim: int = 1,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.span = t0, dynamics.horizon if t1 is None else t1
        self.dynamics, self.args, self.generator = dynamics, args, generator
        self.density = log_density(dynamics, divergence)
        self.solver = solver or Solver()
        self.domain = self.codomain = _real(event_dim)

    @property
    def inv(self) -> FlowTransform:
        """The same dynamics the other way; ``t.inv.inv is t``."""
        if self._inv is None:
            self._inv = self._copy(self.span[::-1], self._cache_size)
            self._inv._inv = self
        return self._inv  # type: ignore[return-value]

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same, which remembers its last call where the size is 1, as torch's transforms do."""
        return self if cache_size == self._cache_size else self._copy(self.span, cache_size)

    def _copy(self, span: tuple[float, float], cache_size: int) -> FlowTransform:
        made = copy.copy(self)
        made.span = span
        Transform.__init__(made, cache_size)  # of its own cache and inverse
        return made

    def _call(self, x: Tensor) -> Tensor:
        flat, args, batch = rows(x, self._event(x), self.args)
        probes = self.generator if self.dynamics.random else None
        y = self.solver.solve(self.dynamics, flat, *self.span, args=args, generator=probes).y1
        return y.reshape(*batch, *y.shape[1:])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the log of |det dy/dx| in the batch's shape."""
        flat, args, batch = rows(x, self._event(x), self.args)
        start = flat, flat.new_zeros(len(flat))
        y, change = self.solver.solve(
            self.density, start, *self.span, args=args, generator=self.generator
        ).y1
        return y.reshape(*batch, *y.shape[1:]), -change.reshape(batch)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of |det dy/dx|, worked out from x."""
        return self.call_and_ladj(x)[1]

    def _event(self, x: Tensor) -> torch.Size:
        return x.shape[x.ndim - self.event_dim :]
