"""Dense networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ._conditions import joined
from .embedding import FourierTime

__all__ = ["MLP", "ConcatSquash", "TimeGates", "TimeMLP"]


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        sizes: of input, hidden layers and output.
        activation: made anew for each layer.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        super().__init__(*layers[:-1])


class _Block(nn.Module):
    """x + W2 dropout(act(W1 norm(x) scaled and shifted by time))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.film = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.film(time).chunk(2, dim=-1)
        h = self.norm(x) * (1.0 + scale) + shift
        return x + self.second(self.dropout(nn.functional.silu(self.first(h))))


class TimeMLP(nn.Module):
    """A residual network of (t, x), x of shape ``(batch, *shape)``; zero at the start.

    Args:
        shape: of one sample.
        width: of the hidden layers.
        depth: number of residual blocks.
        condition: size of a further input ``(batch, condition)``, 0 for none.
        dropout: in each block.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        depth: int = 3,
        condition: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size = torch.Size((shape,) if isinstance(shape, int) else shape).numel()
        self.time = nn.Sequential(FourierTime(32), nn.Linear(33, width), nn.SiLU())
        self.condition, self.enter = condition, nn.Linear(size + condition, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        nn.init.zeros_(self.leave[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.leave[1].bias)  # type: ignore[arg-type]

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        time = self.time(t)
        h = self.enter(joined(x.flatten(1), args, self.condition))
        for block in self.blocks:
            h = block(h, time)
        return self.leave(h).reshape(x.shape)


class TimeGates(nn.Module):
    """sigmoid(W_t t + b_t) and V_t t + c for each of several layers, from one linear map of time.

    Args:
        widths: of the layers' outputs.

    ``(...)`` times give pairs ``(..., width)``.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.linear = nn.Linear(1, 2 * sum(widths))

    def forward(self, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        scale, shift = self.linear(t[..., None]).chunk(2, dim=-1)
        scales = scale.sigmoid().split(self.widths, dim=-1)
        return list(zip(scales, shift.split(self.widths, dim=-1), strict=True))


class ConcatSquash(nn.Module):
    """Layers W x * sigmoid(W_t t + b_t) + V_t t, tanh between them: FFJORD's network.

    Args:
        sizes: of input, hidden layers (one at least) and output.
        condition: size of a further input ``(batch, condition)``, 0 for none.

    Source: Grathwohl et al. 2019, arXiv 1810.01367.
    """

    def __init__(self, sizes: Sequence[int], condition: int = 0) -> None:
        super().__init__()
        if len(sizes) < 3:
            raise ValueError(f"sizes are of input, hidden layers and output; got {list(sizes)}")
        self.condition, inner = condition, [sizes[0] + condition, *sizes[1:]]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(inner))
        self.gates = TimeGates(sizes[1:])

    def forward(self, t: Tensor, x: Tensor, *args: Any) -> Tensor:
        *gates, (scale, shift) = self.gates(t)
        *hidden, last = self.layers
        x = joined(x, args, self.condition)
        for layer, (gain, push) in zip(hidden, gates, strict=True):
            x = (layer(x) * gain + push).tanh()
        return last(x) * scale + shift

    def traced(self, t: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """(f, tr df/dx) of x ``(batch, dim)``: the columns of the Jacobian carried along, all at
        once. The first layer's are its weight, and of the last one only the trace is taken.
        """
        *gates, (scale, shift) = self.gates(t)
        *hidden, last = self.layers
        columns = hidden[0].weight.t()[: x.shape[-1]]  # type: ignore[operator]
        x = joined(x, args, self.condition)
        for i, (layer, (gain, push)) in enumerate(zip(hidden, gates, strict=True)):
            if i:
                columns = linear(columns, layer.weight)  # type: ignore[arg-type]
            x = (layer(x) * gain + push).tanh()
            columns = columns * ((1.0 - x * x) * gain).unsqueeze(-2)
        weight = (last.weight * scale.unsqueeze(-1)).flatten(-2)
        trace = (columns.flatten(-2).unsqueeze(-2) @ weight.unsqueeze(-1)).flatten()
        return last(x) * scale + shift, trace
