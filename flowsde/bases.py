"""Where a flow's noise comes from. Ours, since torch's ``sample`` takes no generator."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from . import _random

__all__ = ["Base", "Componentwise", "Mixture", "Normal"]


class Base(nn.Module, ABC):
    """A law with a density, whose draws are functions of seeds."""

    event_shape: torch.Size

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``(..., *event_shape)``, in nats."""

    @abstractmethod
    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        """``(count, *event_shape)`` from one seed, or from one seed a sample; differentiable by
        the law's parameters.
        """

    def _flat(self, x: Tensor) -> Tensor:
        """``(..., *event_shape)`` as ``(..., components)``."""
        lead = x.ndim - len(self.event_shape)
        if lead < 0 or x.shape[lead:] != self.event_shape:
            raise ValueError(
                f"the law is of samples of shape {tuple(self.event_shape)}; got {tuple(x.shape)}"
            )
        return x.reshape(*x.shape[:lead], self.event_shape.numel())


class Normal(Base):
    """N(0, scale^2) in every component.

    Args:
        shape: of one sample.
        scale: standard deviation (sigma at the horizon, for a diffusion).
    """

    scale: Tensor

    def __init__(self, shape: int | tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale is a standard deviation > 0; got {scale}")
        self.event_shape = torch.Size((shape,) if isinstance(shape, int) else shape)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def log_prob(self, x: Tensor) -> Tensor:
        z = self._flat(x) / self.scale
        volume = z.shape[-1] * (0.5 * math.log(2.0 * math.pi) + self.scale.log())
        return -0.5 * z.square().sum(-1) - volume

    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        key = _random.keys(seed, count, self.scale.device, _random.BASE)
        steps = torch.zeros(1, dtype=torch.int64, device=self.scale.device)
        draw = _random.normal(key, steps, self.event_shape.numel(), self.scale.dtype)
        return self.scale * draw.reshape(count, *self.event_shape)


class Componentwise(Base):
    """Independent components, each by a law of ``torch.distributions`` with parameters of its own.

        Componentwise(torch.distributions.Laplace, loc=torch.zeros(2), scale=torch.ones(2))

    Drawn by inversion, x = icdf(u) with uniform u, so that gradients reach the parameters; those
    given as ``nn.Parameter`` are learned. Outside of the support the log-density is -inf.

    Args:
        law: a class of ``torch.distributions``, of numbers.
        parameters: tensors that broadcast to the shape of one sample.

    Raises:
        TypeError: on a law of vectors, on one that torch cannot invert (no ``icdf``), and on
            parameters that are not floating point.
    """

    def __init__(self, law: Callable[..., Distribution], **parameters: Tensor) -> None:
        super().__init__()
        self.law, self.names = law, tuple(parameters)
        for name, value in parameters.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        if not all(value.is_floating_point() for value in parameters.values()):
            raise TypeError("parameters of a law are floating point: give them as tensor.float()")
        made, kind = law(**parameters), getattr(law, "__name__", "the law")
        if made.event_shape:
            raise TypeError(
                f"{kind} is a law of vectors: take one of numbers, and correlate them by a layer "
                "of the flow"
            )
        self.event_shape = made.batch_shape
        try:
            made.icdf(self._like.new_full((), 0.5))
        except NotImplementedError:
            raise TypeError(
                f"{kind} has no icdf, by which draws follow from seeds: take a law that has one, "
                "such as Normal, Laplace or Uniform, or write a Base"
            ) from None

    @property
    def _like(self) -> Tensor:
        return getattr(self, self.names[0])

    def _made(self) -> Distribution:
        values = {name: getattr(self, name) for name in self.names}
        return self.law(**values, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        self._flat(x)  # of the law's shape
        made = self._made()
        support: Any = made.support
        inside = support.check(x)
        safe = torch.where(inside, x, made.icdf(self._like.new_full((), 0.5)))
        outside = torch.where(x.isnan(), x, -math.inf)
        density = torch.where(inside, made.log_prob(safe), outside)
        return self._flat(density).sum(-1)

    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        key = _random.keys(seed, count, self._like.device, _random.BASE)
        steps = torch.zeros(1, dtype=torch.int64, device=self._like.device)
        u = _random.uniform(key, steps, self.event_shape.numel())
        made = self._made()
        x = made.icdf(u.reshape(count, *self.event_shape)).to(self._like.dtype)
        return _inside(x, made.support)


def _inside(x: Tensor, support: Any) -> Tensor:
    """Draws that were rounded onto a bound of the support, where densities may have no value, one
    number further in.
    """
    if isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    with torch.no_grad():
        low, high = (
            torch.as_tensor(end if bound is None else bound).to(x)
            for end, bound in zip((-math.inf, math.inf), bounds, strict=True)
        )
        inner = x.maximum(torch.nextafter(low, high)).minimum(torch.nextafter(high, low))
        step = torch.where(inner == x, 0.0, inner - x)
    return torch.where(x.isinf(), inner, x + step)


class Mixture(Base):
    """sum_k w_k p_k(x): a base drawn for each sample among several.

    Args:
        weights: ``(K,)``, non-negative; they are divided by their sum, and not learned, since a
            choice among bases has no derivative.
        bases: K of them, of one event shape, none of them a mixture.

    Raises:
        ValueError: on weights or bases that do not fit together.
    """

    log_weights: Tensor

    def __init__(self, weights: Tensor, bases: Iterable[Base]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)
        shapes = {base.event_shape for base in self._each()}
        if len(shapes) != 1 or any(isinstance(base, Mixture) for base in self.bases):
            raise ValueError(f"bases have one event shape and are no mixtures; got {shapes}")
        valid = weights.shape == (len(self.bases),) and bool((weights >= 0).all())
        valid = valid and 0.0 < float(weights.detach().sum()) < math.inf
        if not valid or weights.requires_grad:
            raise ValueError(f"weights are ({len(self.bases)},), >= 0, not all 0, without gradient")
        self.event_shape = shapes.pop()
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def _each(self) -> list[Base]:
        return [base for base in self.bases if isinstance(base, Base)]

    def log_prob(self, x: Tensor) -> Tensor:
        parts = torch.stack([base.log_prob(x) for base in self._each()], dim=-1) + self.log_weights
        outside = (parts == -math.inf).all(-1)  # of every support: its slope is none, not NaN
        parts = parts.masked_fill(outside[..., None], 0.0)
        return parts.logsumexp(-1).masked_fill(outside, -math.inf)

    def sample(self, count: int, seed: int | Tensor) -> Tensor:
        device = self.log_weights.device
        key = _random.keys(seed, count, device, _random.CHOICE)
        u = _random.uniform(key, torch.zeros(1, dtype=torch.int64, device=device), 1)[0]
        edges = self.log_weights.to(u.dtype).exp().cumsum(0)[:-1]
        chosen = torch.searchsorted(edges, u[:, 0])
        draws = torch.stack([base.sample(count, seed) for base in self._each()])
        return draws[chosen, torch.arange(count, device=device)]
