"""Couplings: which noise goes with which data, in a batch of both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._random import widest
from .._state import leaves

__all__ = ["Coupling", "Independent", "OptimalTransport", "Sinkhorn"]


class Coupling(ABC):
    """A joint law of data x0 and noise x1 with the marginals that they have.

    The data stays where it is, and whatever belongs to it with it; the noise is brought to it.
    """

    def __call__(self, x0: Tensor, x1: Tensor, *args: Any, generator: torch.Generator) -> Tensor:
        """``(batch,)`` rows: x1[rows[i]] goes with x0[i].

        Args:
            x0, x1: as many of each, drawn independently, ``(batch, ...)``.
            args: the conditions of x0's rows; row i of them is lent to row i of x1, too.
            generator: of every draw.

        Raises:
            ValueError: where they are not as many, differ in shape, or are not finite.
        """
        if x0.shape != x1.shape:
            raise ValueError(
                f"data and noise are as many and alike; got {tuple(x0.shape)} and {tuple(x1.shape)}"
            )
        if not len(x0):
            return torch.arange(0, device=x0.device)
        with torch.no_grad():
            return self.match(x0, x1, args, generator)

    @abstractmethod
    def match(
        self, x0: Tensor, x1: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Tensor:
        """The rows, of a batch that was looked at."""


@dataclass(frozen=True)
class Independent(Coupling):
    """As they were drawn."""

    def match(
        self, x0: Tensor, x1: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Tensor:
        return torch.arange(len(x0), device=x0.device)


@dataclass(frozen=True)
class _Transport(Coupling):
    """By a plan that costs |x0 - x1|^2 + condition_weight |c0 - c1|^2.

    A plan that does not see the conditions gives the data of each condition noise of a law of its
    own, and the model learns to start from there; sampling does not. So a conditional model has
    to say what a difference of conditions costs.
    """

    condition_weight: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weight = self.condition_weight
        if weight is not None and not 0.0 <= weight < math.inf:
            raise ValueError(f"condition_weight is finite and >= 0; got {weight}")

    def _cost(self, x0: Tensor, x1: Tensor, args: tuple[Any, ...]) -> Tensor:
        conditions = [
            c for c in leaves(args) if isinstance(c, Tensor) and c.shape[:1] == x0.shape[:1]
        ]
        weight = self.condition_weight
        if conditions and weight is None:
            raise TypeError(
                f"a coupling of conditional data: {type(self).__name__}(condition_weight=w) adds "
                "w |c0 - c1|^2 to the cost (1 for labels that differ); a great w pairs within a "
                "condition, 0 across all"
            )
        cost = _squares(x0, x1)
        if weight:
            cost = cost + sum(weight * _squares(c, c) for c in conditions)
        if not bool(cost.isfinite().all()):
            raise ValueError(
                "data, noise or conditions are not finite, or too far apart for their squares: "
                "clean them with torch.nan_to_num, or Standardize the data"
            )
        return cost


@dataclass(frozen=True)
class OptimalTransport(_Transport):
    """The permutation of least cost: exact optimal transport between the two batches.

    Every row of either is used once. The cost is sum |x0 - x1|^2 over the pairs.

    Args:
        condition_weight: what a difference of conditions costs: the squared distance of floating
            point ones, 1 for labels that differ. A conditional model has to give it: great, so
            that noise stays independent of the condition, as it is in sampling.

    Raises:
        TypeError: on conditions without a weight.
        ImportError: without POT.

    Source: Tong et al. 2023, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772; with
    conditions, Cheng and Schwing 2025, arXiv 2503.10636.
    """

    def match(
        self, x0: Tensor, x1: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Tensor:
        cost = self._cost(x0, x1, args)
        return _pot().emd([], [], cost).argmax(1)  # a vertex of the plans: a permutation


@dataclass(frozen=True)
class Sinkhorn(_Transport):
    """A partner a row, drawn by the entropic plan between the two batches.

        argmin <plan, cost> - regularization entropy(plan)

    With the ends of an ``Interpolant(bridge=s)`` on a horizon of 1 and the regularization 2 s^2
    this is the Schroedinger bridge. Row i's partner has row i of the plan for its law. The draws
    are stratified over the batch: every row of the data is used once, every row of the noise once
    on average, and just once where the plan is a permutation or flat. In between up to a third of a
    batch's noise stays behind for another's second use.

    Args:
        regularization: of the entropy; the cost is |x0 - x1|^2.
        condition_weight: see ``OptimalTransport``.

    Raises:
        ValueError: on a regularization that is not positive.
        TypeError: on conditions without a weight.
        ImportError: without POT.

    Source: Cuturi 2013, arXiv 1306.0895; Tong et al. 2023, arXiv 2307.03672.
    """

    regularization: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.regularization < math.inf:
            raise ValueError(f"regularization is finite and > 0; got {self.regularization}")

    def plan(self, x0: Tensor, x1: Tensor, *args: Any) -> Tensor:
        """``(batch, batch)``: how x0's rows are shared among x1's.

        Rows sum to 1 / batch, columns to within a hundredth of it, in the root mean square, which
        is little beside the spread of one draw. POT warns where a thousand iterations do not get
        there; then the regularization is too small.
        """
        how = {"method": "sinkhorn_log", "stopThr": 1e-2 / math.sqrt(len(x0))}
        return _pot().sinkhorn([], [], self._cost(x0, x1, args), self.regularization, **how)

    def match(
        self, x0: Tensor, x1: Tensor, args: tuple[Any, ...], generator: torch.Generator
    ) -> Tensor:
        count, mass = len(x0), self.plan(x0, x1, *args).cumsum(1)
        strata = torch.randperm(count, generator=generator, device=x0.device)
        u = torch.rand(count, generator=generator, dtype=mass.dtype, device=x0.device)
        wanted = mass[:, -1] * (strata + u) / count
        return torch.searchsorted(mass, wanted[:, None], right=True)[:, 0].clamp(max=count - 1)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2; of labels, whether they differ."""
    wide = widest(a.device)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return (_flat(a)[:, None] != _flat(b)).any(-1).to(wide)
    a, b = _flat(a).to(wide), _flat(b).to(wide)
    centre = a.mean(0)  # far from 0 the differences would lose their digits
    return torch.cdist(a - centre, b - centre).square()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "this coupling is worked out by POT: pip install flowsde[couplings]"
        ) from error
    return ot
