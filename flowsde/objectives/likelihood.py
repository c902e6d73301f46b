"""Maximum likelihood."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._batch import rows
from ..flow import Flow
from ..transforms import regularize

__all__ = ["MaximumLikelihood"]


class MaximumLikelihood(nn.Module):
    """-E log p(x), in nats, plus the penalties of ``regularize`` that have a weight.

        -E log p(x) + kinetic E int |f|^2 dt + jacobian E int |df/dy|_F^2 dt

    One solve gives all of them.

    Args:
        flow: a ``Flow``, or, without penalties, any module with
            ``log_prob(x, *args, generator=...)``.
        kinetic, jacobian: weights >= 0; Finlay et al. 2020 take 0.01 for both, divided by the
            dimension.

    Raises:
        TypeError: on penalties for another module, or for a flow in discrete steps.
        ValueError: on a negative weight.
    """

    def __init__(self, flow: nn.Module, kinetic: float = 0.0, jacobian: float = 0.0) -> None:
        super().__init__()
        if kinetic < 0 or jacobian < 0:
            raise ValueError(f"weights are >= 0; got {kinetic} and {jacobian}")
        self.flow = flow
        self.weights = [w for w in (kinetic, jacobian) if w]
        if not self.weights:
            return
        if not isinstance(flow, Flow):
            raise TypeError(f"penalties are those of a Flow; got {type(flow).__name__}")
        self._regularize = partial(regularize, kinetic=kinetic > 0, jacobian=jacobian > 0)
        # in a tuple: the parameters are the flow's already
        self._costly = flow.density, self._regularize(flow.density)

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        if not self.weights:
            return -self.flow.log_prob(x, *args, generator=generator).mean()  # type: ignore[operator]
        flow = self.flow
        assert isinstance(flow, Flow)
        if self._costly[0] is not flow.density:  # the flow was given other dynamics
            self._costly = flow.density, self._regularize(flow.density)
        _, costly = self._costly
        x, args, _ = rows(x, flow.event_shape, args)
        start = costly.enter(flow.enter(x, generator))
        (z, change), *costs = flow.solver.solve(
            costly, start, flow.t0, flow.dynamics.horizon, args=args, generator=generator
        ).y1
        loss = change - flow.base.log_prob(z)
        for weight, cost in zip(self.weights, costs, strict=True):
            loss = loss + weight * cost
        return loss.mean()
