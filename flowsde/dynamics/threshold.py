"""Denoisers whose x0 is kept within the data's range: a denoiser in, a denoiser out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._scalar import expand
from .denoiser import Data, Denoiser

__all__ = ["clip", "dynamic_threshold"]


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """x0 cut off at the ends of the data's range.

    The noise is that of the x0 that is left, so that both make up the state, as in diffusers' DDIM
    with ``use_clipped_model_output=True`` (by default it keeps the network's own noise).

    Raises:
        ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"the data's range has low < high; got {low} and {high}")
    return _kept(denoiser, _Clipped, low, high)


def dynamic_threshold(denoiser: Denoiser, quantile: float = 0.995, bound: float = 1.0) -> Denoiser:
    """x0 cut off at -c and c, and scaled by bound / c: c is the greater of the bound and this
    quantile of a sample's |x0|, so that strong guidance does not saturate all components at once.

    Args:
        denoiser: of data within [-bound, bound].
        quantile: from 0 to 1; its value is linear between two components'.
        bound: of the data.

    Raises:
        ValueError: on a quantile or a bound out of range.

    Source: Saharia et al. 2022, "Imagen", arXiv 2205.11487, section 2.3.
    """
    if not (0.0 <= quantile <= 1.0 and bound > 0.0):
        raise ValueError(f"quantile in [0, 1] and bound > 0; got {quantile} and {bound}")
    return _kept(denoiser, _Thresholded, quantile, bound)


def _kept(denoiser: Denoiser, kind: Callable[..., nn.Module], *bounds: float) -> Denoiser:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"what is kept in range is a Denoiser; got {type(denoiser).__name__}: give "
            "Denoiser(network, schedule, prediction)"
        )
    altered = kind(denoiser, *bounds)
    return Denoiser(altered, denoiser.schedule, Data(denoiser.prediction.needs_signal))


class _Clipped(nn.Module):
    def __init__(self, denoiser: Denoiser, low: float, high: float) -> None:
        super().__init__()
        self.denoiser, self.low, self.high = denoiser, low, high
        self.precise_time = denoiser.precise

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        return self.denoiser(t, x, *args).clamp(self.low, self.high)


class _Thresholded(nn.Module):
    def __init__(self, denoiser: Denoiser, quantile: float, bound: float) -> None:
        super().__init__()
        self.denoiser, self.quantile, self.bound = denoiser, quantile, bound
        self.precise_time = denoiser.precise

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        x0 = self.denoiser(t, x, *args)
        size = x0.flatten(1).abs().sort(dim=1).values  # torch.quantile ends at 16 million numbers
        place = self.quantile * (size.shape[1] - 1)
        left, right = size[:, int(place)], size[:, math.ceil(place)]
        cut = expand(left.lerp(right, place % 1.0).clamp(min=self.bound), x0)
        return x0.clamp(-cut, cut) * (self.bound / cut)
