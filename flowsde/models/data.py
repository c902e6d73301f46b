"""From data as it comes to where a flow starts: maps for ``Flow(..., transform=)``."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from .. import _random
from .._state import State, by_row, factorable, mapped
from ..dynamics.discrete import Map
from .mixing import exactly

__all__ = ["Dequantize", "Logit", "Standardize", "Whiten"]


class Standardize(Map):
    """y = (x - mean) / std, component by component; not learned.

    The identity until ``start`` sees data, or ``Standardize.of(data)``: then what leaves it has
    mean 0 and variance 1 over the data.

    Args:
        shape: of one sample, or one that broadcasts to it, such as ``(3, 1, 1)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @classmethod
    def of(cls, data: Tensor) -> Self:
        """That of data ``(n, ...)``, in its dtype.

        Raises:
            ValueError: on components that are constant.
        """
        made = cls(tuple(data.shape[1:])).to(data)
        made.start(data)
        return made

    @torch.no_grad()
    def start(self, y: Tensor, *args: Any) -> Tensor:
        alike = (1,) * (y.ndim - 1 - self.mean.ndim) + tuple(self.mean.shape)
        axes = [0, *(i for i, n in enumerate(alike, 1) if n == 1)]
        mean, std = (x.reshape(self.mean.shape) for x in (y.mean(axes), y.std(axes)))
        if not bool((std > 16.0 * torch.finfo(y.dtype).eps * mean.abs()).all()):
            raise ValueError("a component is constant over the data, to rounding: leave it out")
        self.mean.copy_(mean)
        self.std.copy_(std)
        return self.step(0, y)[0]

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return (y - self.mean) / self.std, -self._volume(y)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return y * self.std + self.mean, self._volume(y)

    def _volume(self, y: Tensor) -> Tensor:
        alike = y.shape[1:].numel() // self.std.numel()  # components that share a number
        return (alike * self.std.log().sum()).expand(len(y))


class Whiten(Map):
    """y = L^-1 (x - mean) of vectors, with L L^T the covariance; not learned.

    The identity until ``start`` sees data, or ``Whiten.of(data)``: a flow over it starts at the
    normal law of full covariance.

    Args:
        dim: components of a sample.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.eye(dim))

    @classmethod
    def of(cls, data: Tensor) -> Self:
        """That of data ``(n, dim)``, in its dtype.

        Raises:
            torch.linalg.LinAlgError: on components that depend on each other: leave some out.
        """
        made = cls(data.shape[1]).to(data)
        made.start(data)
        return made

    @torch.no_grad()
    def start(self, y: Tensor, *args: Any) -> Tensor:
        vectors = self._vectors(y).flatten(0, -2)
        covariance = torch.cov(vectors.double().mT)
        factor = torch.linalg.cholesky(covariance)
        part = factor.diagonal() / covariance.diagonal().sqrt()  # that the others do not tell
        if not bool((part > max(16.0 * torch.finfo(y.dtype).eps, 1e-7)).all()):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "components depend on each other: leave some out"
            )
        self.factor.copy_(factor)
        self.mean.copy_(vectors.mean(0))
        return self.step(0, y)[0]

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        wide = factorable(y.dtype)
        off = (self._vectors(y) - self.mean).flatten(0, -2).mT.to(wide)
        z = torch.linalg.solve_triangular(self.factor.to(wide), off, upper=False)
        return z.mT.reshape(y.shape).to(y.dtype), -self._volume(y)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with exactly(y):
            return self._vectors(y) @ self.factor.mT + self.mean, self._volume(y)

    def _vectors(self, y: Tensor) -> Tensor:
        if y.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"vectors have {len(self.mean)} components; got samples of {tuple(y.shape[1:])}"
            )
        return y

    def _volume(self, y: Tensor) -> Tensor:
        return (self.factor.diagonal().log().sum() * y.shape[1:-1].numel()).expand(len(y))


class Logit(Map):
    """y = logit(margin + (1 - 2 margin) x) of x in [0, 1].

    Args:
        margin: in [0, 1/2), by which finite y stand for 0 and 1.

    Source: Dinh et al. 2017, arXiv 1605.08803; Papamakarios et al. 2017, arXiv 1705.07057.
    """

    def __init__(self, margin: float = 0.05) -> None:
        super().__init__()
        if not 0.0 <= margin < 0.5:
            raise ValueError(f"margin lies in [0, 1/2); got {margin}")
        self.margin = margin

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        share = self.margin + (1.0 - 2.0 * self.margin) * y
        _within(
            (share > 0.0) & (share < 1.0), "numbers in [0, 1]",
            "Dequantize brings whole ones there; 0 and 1 themselves need a margin",
        )  # fmt: skip
        z = torch.logit(share)
        return z, self._volume(z)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return (y.sigmoid() - self.margin) / (1.0 - 2.0 * self.margin), -self._volume(y)

    def _volume(self, z: Tensor) -> Tensor:
        """log |dz/dx| = log(1 - 2 margin) - log sigmoid(z) - log sigmoid(-z), summed."""
        slope = functional.softplus(z) + functional.softplus(-z) + math.log1p(-2.0 * self.margin)
        return by_row(slope, len(slope))[0].sum(-1)


class Dequantize(Map):
    """y = (v + u) / levels of whole numbers v in 0 .. levels - 1, u uniform on (0, 1).

    A flow then gives the log-density of v + u, of which the mean over u is at most the
    log-probability of v: ``bits_per_dim(log_prob, dims)`` as it stands. u is drawn once a solve,
    from its generator, and kept from 1 by as much as makes v exact on the way back. There v needs
    no draw; it has no derivative, so that ``rsample`` is refused.

    Args:
        levels: number of values.

    Source: Theis et al. 2016, arXiv 1511.01844.
    """

    random = True

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels is the number of values, at least 2; got {levels}")
        self.levels = levels
        self._seed: int | None = None

    def prepare(self, y0: State, seed: int | None) -> Dequantize:
        if self._most(y0.dtype) < 0.9:
            raise TypeError(
                f"{y0.dtype} does not hold {self.levels} levels and a draw: give data.float()"
            )
        made = Dequantize(self.levels)
        made._seed = seed
        return made

    def _most(self, dtype: torch.dtype) -> float:
        """The largest u that leaves a number exact on the way back."""
        return 1.0 - 2.0 * self.levels * torch.finfo(dtype).eps

    def _drawn(self, y: Tensor) -> Tensor:
        """u for each number of y, whose shape may be another than that of the solve's start."""
        if self._seed is None:
            raise TypeError("Dequantize draws once a solve: prepare it, as solve and Flow do")
        key = _random.keys(self._seed, len(y), y.device, _random.EXTRA)
        steps = torch.zeros(1, dtype=torch.int64, device=y.device)
        u = _random.uniform(key, steps, y.shape[1:].numel()).reshape(y.shape).to(y.dtype)
        return u.clamp(max=self._most(y.dtype))

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        u = self._drawn(y)
        whole = (y >= 0.0) & (y < self.levels) & (y == y.floor())
        last = self.levels - 1
        _within(whole, f"whole numbers 0 to {last}", f"multiply by {last} what lies in [0, 1]")
        return (y + u) / self.levels, -self._volume(y)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if y.requires_grad:
            raise TypeError(
                "whole numbers have no derivative: use sample(), or a Flow without Dequantize"
            )
        return (y * self.levels).floor().clamp(0, self.levels - 1), self._volume(y)

    def _volume(self, y: Tensor) -> Tensor:
        return y.new_full((len(y),), y.shape[1:].numel() * math.log(self.levels))


def _within(fine: Tensor, what: str, cure: str) -> None:
    """Refuses data that the map does not take."""
    if torch.compiler.is_compiling() or fine.is_meta or mapped(fine):
        return
    if not bool(fine.all()):
        raise ValueError(f"the map takes {what}: {cure}")
