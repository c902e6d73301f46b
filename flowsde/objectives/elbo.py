"""The evidence lower bound of a latent path model."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["ELBO", "Bounded"]


class Bounded(Protocol):
    """What has an ``elbo``, such as ``models.LatentSDE`` and ``LatentODE``."""

    def elbo(self, *args: Any, **keywords: Any) -> Tensor:
        """A lower bound of log p(x), ``(batch,)``, of x and what goes with it, such as times; the
        keywords are ``generator``, and ``weight``, that of the divergences.
        """


class ELBO(nn.Module):
    """-E elbo(x) / number of values seen in x: the loss, in nats a value.

    All of x counts, whatever the model makes of it: of a neural process's points the inputs, too,
    and those that its split leaves out.

    The weight of the divergences rises from 0 to 1 over the first batches, so that the posterior
    finds the data before it is held to the prior. The count is a part of the state.

    Args:
        model: a module with an ``elbo``.
        warmup: number of batches until the weight is one.

    Source: Kingma and Welling 2014, arXiv 1312.6114; Bowman et al. 2016, arXiv 1511.06349.
    """

    batches: Tensor

    def __init__(self, model: Bounded, warmup: int = 0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a module with an elbo; got {type(model).__name__}")
        self.model: Bounded = model
        self.warmup = warmup
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, *args: Tensor, generator: torch.Generator) -> Tensor:
        weight = min(1.0, int(self.batches) / self.warmup) if self.warmup else 1.0
        if self.training:
            self.batches += 1
        bound = self.model.elbo(x, *args, generator=generator, weight=weight)
        return -bound.sum() / (~torch.isnan(x)).sum().clamp(min=1)
