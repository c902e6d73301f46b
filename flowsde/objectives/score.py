"""Score matching without noise: by the divergence of the score, whole or along slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _random
from .._state import check_like
from ..transforms.density import Divergence, Exact, Hutchinson

__all__ = ["EnergyScore", "ScoreMatching", "SlicedScoreMatching"]


class EnergyScore(nn.Module):
    """s(x) = -grad E(x), the score of p = exp(-E) / Z.

    Args:
        energy: ``E(x, *args)``, a number a sample, ``(batch,)``.
    """

    def __init__(self, energy: Callable[..., Tensor]) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise TypeError(
                "a slope of an energy needs autograd: use no_grad(), not inference_mode()"
            )
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            energy = self.energy(x, *args)
            if energy.shape != x.shape[:1]:
                raise TypeError(
                    f"an energy is one number a sample, {tuple(x.shape[:1])}; got "
                    f"{tuple(energy.shape)}"
                )
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=graph)
        return -slope


class _Implicit(nn.Module, ABC):
    """E[ half a squared norm of s + its divergence ]."""

    def __init__(self, score: Callable[..., Tensor], divergence: Divergence) -> None:
        super().__init__()
        self.score, self.divergence = score, divergence

    @abstractmethod
    def square(self, s: Tensor, divergence: Divergence) -> Tensor:
        """The squared norm, ``(batch,)``."""

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        divergence = self.divergence
        if divergence.random:
            divergence = divergence.prepare(x, _random.draw_seed(generator))
        s, trace = divergence(lambda y: check_like(self.score(y, *args), y, "the score"), x)
        return (0.5 * self.square(s, divergence) + trace).mean()


class ScoreMatching(_Implicit):
    """E[ |s(x)|^2 / 2 + tr(ds/dx) ]: up to a constant, half the squared error of the score.

    Args:
        score: ``s(x, *args)``, shaped as x; ``EnergyScore(energy)`` for an energy.
        divergence: ``Exact()`` by default; ``Hutchinson(n)`` is sliced score matching of reduced
            variance, with new probes each call.

    Source: Hyvarinen 2005.
    """

    def __init__(self, score: Callable[..., Tensor], divergence: Divergence | None = None) -> None:
        super().__init__(score, divergence or Exact())

    def square(self, s: Tensor, divergence: Divergence) -> Tensor:
        return s.flatten(1).square().sum(1)


class SlicedScoreMatching(_Implicit):
    """E[ (v . s(x))^2 / 2 + v^T (ds/dx) v ] over random v with E v v^T = 1.

    Equal in expectation to ``ScoreMatching``.

    Args:
        score: ``s(x, *args)``, shaped as x.
        slices: how many v a sample, and their law.

    Source: Song et al. 2019, arXiv 1905.07088.
    """

    def __init__(self, score: Callable[..., Tensor], slices: Hutchinson = Hutchinson()) -> None:
        super().__init__(score, slices)

    def square(self, s: Tensor, divergence: Divergence) -> Tensor:
        assert isinstance(divergence, Hutchinson)
        assert divergence.drawn is not None
        return (divergence.drawn * s).flatten(2).sum(-1).square().sum(0)
