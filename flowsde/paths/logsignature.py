"""Log-signatures: what a stretch of path is to a differential equation, to third order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._scalar import whole
from .control import Linear, Straight

__all__ = ["LogSignature", "log_signature", "signature"]


def signature(values: Tensor, depth: int) -> list[Tensor]:
    """The iterated integrals of the path that is straight from point to point.

        S_1 = int dX,    S_2 = int int_{u<v} dX_u (x) dX_v,    S_3 = int int int ...

    Args:
        values: the points, ``(..., n, channels)``.
        depth: 1, 2 or 3.

    Returns:
        Its levels, ``(..., channels)``, ``(..., channels, channels)`` and so on.

    Raises:
        ValueError: on another depth.

    Source: Lyons 1998; Chen 1958.
    """
    if depth not in (1, 2, 3):
        raise ValueError(f"depth is 1, 2 or 3; got {depth}")
    step = values.diff(dim=-2)
    levels = [step.sum(-2)]
    if depth == 1:
        return levels
    before = step.cumsum(-2) - step
    levels.append((before + 0.5 * step).mT @ step)
    if depth == 2:
        return levels
    pairs = (before + 0.5 * step).unsqueeze(-1) * step.unsqueeze(-2)  # of each step
    earlier = pairs.cumsum(-3) - pairs
    inner = (0.5 * before + step / 6.0).unsqueeze(-1) * step.unsqueeze(-2)
    levels.append(torch.einsum("...nab,...nc->...abc", earlier + inner, step))
    return levels


def log_signature(values: Tensor, depth: int) -> Tensor:
    """The logarithm of the signature, in as many numbers as it has freedoms.

        log S = S_1 + (S_2 - S_1 (x) S_1 / 2)
                + (S_3 - (S_1 (x) S_2 + S_2 (x) S_1) / 2 + S_1 (x) S_1 (x) S_1 / 3)

    of which the coefficients of the Lyndon words are kept, sorted by length, then by letters: those
    less than all their rotations. They determine the others. For words ab, a < b, that is the Levy
    area; for c channels there are c, c (c - 1) / 2 and (c^3 - c) / 3 words.

    Args:
        values: the points, ``(..., n, channels)``.
        depth: 1, 2 or 3.

    Returns:
        ``(..., words)``.

    Raises:
        ValueError: on another depth.

    Source: Reizenstein and Graham 2020, arXiv 1802.08252 (coordinates).
    """
    return _lyndon(_logarithm(signature(values, depth)))


def _logarithm(levels: Sequence[Tensor]) -> list[Tensor]:
    """Of a group-like element, level by level."""
    s1, *higher = levels
    found = [s1]
    if higher:
        square = torch.einsum("...a,...b->...ab", s1, s1)
        found.append(higher[0] - 0.5 * square)
    if len(higher) > 1:
        left = torch.einsum("...a,...bc->...abc", s1, square / 3.0 - 0.5 * higher[0])
        right = torch.einsum("...ab,...c->...abc", higher[0], s1)
        found.append(higher[1] + left - 0.5 * right)
    return found


def _lyndon(levels: Sequence[Tensor]) -> Tensor:
    """The coefficients of the Lyndon words."""
    channels, kept = levels[0].shape[-1], []
    for length, level in enumerate(levels, 1):
        words = list(itertools.product(range(channels), repeat=length))
        index = [i for i, w in enumerate(words) if all(w < w[j:] + w[:j] for j in range(1, length))]
        at = torch.tensor(index, dtype=torch.int64, device=level.device)
        kept.append(level.flatten(-length).index_select(-1, at))
    return torch.cat(kept, -1)


@final
class LogSignature(Straight):
    """A path for the log-ODE method: over each window of a long series its log-signature, evenly.

        X(T_j) = (x_0, 0) + sum of the log-signatures of the windows before T_j

    straight between the ends T_j of windows, so that a CDE takes steps as long as windows, and sees
    of each what a solution feels to that depth. The first channels are the series' own.

    Args:
        times: ``(n,)`` or ``(batch, n)``.
        values: ``(batch, n, channels)``; missing ones are filled in linearly.
        depth: 1, 2 or 3.
        window: observations' gaps in one; the last window may hold fewer.

    Raises:
        ValueError: also on a depth or a window out of range.

    Source: Morrill et al. 2021, "Neural rough differential equations for long time series", arXiv
    2009.08295.
    """

    def __init__(self, times: Tensor, values: Tensor, depth: int, window: int) -> None:
        if not whole(window, 1):
            raise ValueError(f"a window holds a whole number of gaps, one or more; got {window}")
        through = Linear(times, values)
        times, n = through.times, through.times.shape[-1]
        last = through.evaluate(times[..., -1])
        x = torch.cat((through.pieces[:, 0], last[None])).transpose(0, 1)
        short = -(n - 1) % window  # gaps that the last window lacks: the path stands still there
        x = torch.cat((x, x[:, -1:].expand(-1, short, -1)), 1)
        logs = log_signature(x.unfold(1, window + 1, window).mT, depth)
        start = pad(x[:, :1], (0, logs.shape[-1] - x.shape[-1]))
        ends = [*range(0, n - 1, window), n - 1]
        super().__init__(times[..., ends], torch.cat((start, logs), 1).cumsum(1))
        self.causal = through.causal
