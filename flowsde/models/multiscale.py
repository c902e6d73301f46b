"""Images at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..dynamics.discrete import Composed, Inverse, Map

__all__ = ["Factored", "Squeeze", "multiscale"]


class Squeeze(Map):
    """Images ``(batch, c, 2 h, 2 w)`` to ``(batch, 4 c, h, w)``: four neighbors become channels.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return functional.pixel_unshuffle(y, 2), y.new_zeros(len(y))

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return functional.pixel_shuffle(y, 2), y.new_zeros(len(y))


class Factored(Map):
    """(a, b) -> (a, inner(b)): the first half of the channels is done, the others go on.

    Args:
        inner: a map that keeps the shape, taken as one step.
    """

    def __init__(self, inner: Map) -> None:
        super().__init__()
        self.inner = Composed([inner])
        self.random = inner.random

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = y.tensor_split(2, 1)
        b, ladj = self.inner.step(0, b, *args)
        return torch.cat((a, b), 1), ladj

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        a, b = y.tensor_split(2, 1)
        b, ladj = self.inner.unstep(0, b, *args)
        return torch.cat((a, b), 1), ladj

    def start(self, y: Tensor, *args: Any) -> Tensor:
        a, b = y.tensor_split(2, 1)
        return torch.cat((a, self.inner.start(b, *args)), 1)

    def prepare(self, y0: Tensor, seed: int | None) -> Factored:
        return Factored(self.inner.prepare(y0, seed)) if self.random else self


def multiscale(levels: Sequence[Map]) -> Composed:
    """Squeezes the image, runs a level, and leaves half of the channels to the levels after it.

    The result has the shape of the image: what is done is put back where it was squeezed from, so
    that a base distribution knows nothing of levels.

    Args:
        levels: maps that keep the shape. Of an image ``(c, h, w)`` the first moves ``(4 c, h / 2,
            w / 2)``, each later one twice the channels of the one before at half the sides.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """
    first, *rest = levels
    deeper = [Factored(multiscale(rest))] if rest else []
    return Composed([Squeeze(), first, *deeper, Inverse(Squeeze())])
