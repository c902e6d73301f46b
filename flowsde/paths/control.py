"""Control paths through observed data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Path

__all__ = ["Linear"]


class Linear(Path, nn.Module):
    """Piecewise-linear interpolation of data, X(t_i) = x_i.

    Args:
        times: ``(n,)``, increasing, at least two.
        values: ``(batch, n, channels)``. Put time among the channels for a neural CDE.

    Raises:
        ValueError: on times that do not increase, or shapes that do not fit.

    Source: Kidger et al. 2020, "Neural controlled differential equations", arXiv 2005.08926.
    """

    times: Tensor
    values: Tensor

    def __init__(self, times: Tensor, values: Tensor) -> None:
        super().__init__()
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
            raise ValueError("times must be a 1-d tensor of at least two increasing values")
        if values.ndim != 3 or values.shape[1] != len(times):
            raise ValueError(
                f"values must have shape (batch, {len(times)}, channels); got {tuple(values.shape)}"
            )
        self.register_buffer("times", times.to(torch.promote_types(times.dtype, torch.float32)))
        self.register_buffer("values", values)

    @property
    def knots(self) -> Tensor:
        return self.times

    def _slope(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The piece that holds t: start value, slope, time since its start."""
        rows = torch.arange(len(self.values), device=self.values.device)
        t = t.to(self.times.dtype).expand(len(rows))
        i = (torch.searchsorted(self.times, t.contiguous(), right=True) - 1).clamp(
            0, len(self.times) - 2
        )
        start, end = self.values[rows, i], self.values[rows, i + 1]
        width = (self.times[i + 1] - self.times[i])[:, None]
        return start, (end - start) / width, (t - self.times[i])[:, None]

    def evaluate(self, t: Tensor) -> Tensor:
        start, slope, elapsed = self._slope(t)
        return start + elapsed * slope

    def derivative(self, t: Tensor) -> Tensor:
        return self._slope(t)[1]
