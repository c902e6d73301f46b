"""Maximum likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaximumLikelihood"]


class MaximumLikelihood(nn.Module):
    """-E log p(x), in nats.

    Args:
        flow: a ``Flow``, or any module with ``log_prob(x, *args, generator=...)``.
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        return -self.flow.log_prob(x, *args, generator=generator).mean()  # type: ignore[operator]
