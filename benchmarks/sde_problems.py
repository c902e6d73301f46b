"""The SDEs of the benchmarks, in the words of each library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WIDTH", "Diffusion", "Drift", "MatrixPair", "Pair", "TorchSDEForm", "diffrax_form"]

WIDTH = 32


class Drift(nn.Module):
    """A tanh network that pulls back to the origin."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, WIDTH), nn.Linear(WIDTH, dim)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)))


class Diffusion(nn.Module):
    """A sigmoid of each component."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(dim) / math.sqrt(dim))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * y)


class Pair(nn.Module):
    """Drift and diagonal diffusion with the same parameters in every run."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g = Drift(dim), Diffusion(dim)


def diffrax_form() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same two for diffrax, ``(t, y, p)``, p being the parameters of a pair by name."""
    import jax
    import lineax
    from jax import numpy as jnp

    def f(t: Any, y: Any, p: Any) -> Any:
        h = jnp.tanh(y @ p["f.inner.weight"].T + p["f.inner.bias"])
        return h @ p["f.outer.weight"].T + p["f.outer.bias"]

    def g(t: Any, y: Any, p: Any) -> Any:
        return lineax.DiagonalLinearOperator(jax.nn.sigmoid(p["g.slope"] * y))

    return f, g


class MatrixPair(nn.Module):
    """The test problem of Kidger et al. 2021, arXiv 2105.13493, figure 2: general noise."""

    def __init__(self, dim: int = 32, noise: int = 16, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drift, self.matrix = (
            nn.Sequential(nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, out), nn.Sigmoid())
            for out in (dim, dim * noise)
        )
        self.noise = noise

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(self._input(t, y))

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.matrix(self._input(t, y)).unflatten(-1, (-1, self.noise))

    @staticmethod
    def _input(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat((t.to(y).expand(len(y), 1), y), -1)


class TorchSDEForm(nn.Module):
    """A pair of fields as torchsde takes it."""

    def __init__(
        self, f: Callable[..., Tensor], g: Callable[..., Tensor], sde_type: str = "ito",
        noise_type: str = "diagonal",
    ) -> None:  # fmt: skip
        super().__init__()
        self.f, self.g, self.sde_type, self.noise_type = f, g, sde_type, noise_type
