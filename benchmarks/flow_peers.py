"""Normalizing flows of flowsde and of the libraries beside it, as modules x -> log p(x).

A library makes two kinds: the stacks of couplings of which training steps are timed, with networks
of the same shape in all, and the flows that it recommends, of a given number of parameters. Peers
are imported when they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives

__all__ = ["FLOW_PEERS", "LIBRARIES", "Density", "Library", "networks_alone", "parameters", "sized"]

LAYERS, WIDTH, BINS, TAIL = 8, 128, 8, 3.0


class Density(nn.Module):
    """log p(x) by a method of a module, and what is trained where that is not its mean.

    Args:
        module: what holds the parameters.
        log_prob: x to log-densities.
        objective: ``objective(x, generator=)``, a loss; minus the mean of log p by default.
    """

    def __init__(
        self, module: nn.Module, log_prob: Callable[[Tensor], Tensor],
        objective: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module, self.objective = module, objective
        self.log_prob = log_prob

    def forward(self, x: Tensor) -> Tensor:
        return self.log_prob(x)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.objective is None:
            return -self(x).mean()
        return self.objective(x, generator=generator)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def sized(make: Callable[[int], Density], count: int) -> Density:
    """That of the width by which the number of parameters comes nearest to ``count``."""
    low, high = 4, 8
    while parameters(make(high)) <= count:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(make(middle)) <= count else (low, middle)
    return make(min((low, high), key=lambda width: abs(parameters(make(width)) - count)))


class Net(nn.Sequential):
    """Two hidden layers; what else is given is left out."""

    def __init__(self, inputs: int, outputs: int, width: int = WIDTH) -> None:
        super().__init__(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return super().forward(x)


def networks_alone(dim: int, spline: bool) -> Density:
    """What no stack of such couplings can do without: its networks, one after the other, so that
    all but the first have gradients for what they see.
    """
    half = dim // 2
    outputs = (3 * BINS - 1 if spline else 2) * half
    nets = nn.ModuleList(Net(half, outputs) for _ in range(LAYERS))

    def through(x: Tensor) -> Tensor:
        for net in nets:
            x = net(x[:, :half])
        return x.sum(1)

    return Density(nets, through)


class Library(ABC):
    """A library of normalizing flows."""

    name: ClassVar[str]

    @abstractmethod
    def couplings(self, dim: int, spline: bool) -> Density:
        """Affine or spline couplings, ``LAYERS`` of them, networks of two times ``WIDTH``."""

    @abstractmethod
    def flows(self, dim: int) -> dict[str, Callable[[int], Density]]:
        """The flows it recommends for vectors, each made of a width."""


class Flowsde(Library):
    name = "flowsde"

    def couplings(self, dim: int, spline: bool) -> Density:
        law = models.RationalQuadraticSpline(BINS, TAIL) if spline else models.Affine()
        mask = models.half(dim)
        layers = [models.Coupling(mask if i % 2 else ~mask, law, Net) for i in range(LAYERS)]
        return self._density(fs.Composed(layers), dim)

    @staticmethod
    def _density(dynamics: fs.Dynamics, dim: int, **more: Any) -> Density:
        flow = fs.Flow(fs.Normal(dim), dynamics)
        return Density(flow, flow.log_prob, **more)

    def flows(self, dim: int) -> dict[str, Callable[[int], Density]]:
        def spline(width: int) -> Density:
            draws = torch.Generator().manual_seed(0)
            return self._density(models.nsf(dim, LAYERS, width, generator=draws), dim)

        def affine(width: int) -> Density:
            draws = torch.Generator().manual_seed(0)
            return self._density(models.realnvp(dim, LAYERS, width, generator=draws), dim)

        def autoregressive(width: int) -> Density:
            law = models.RationalQuadraticSpline(2 * BINS, tail=5.0)
            return self._density(models.maf(dim, 3, width, law=law), dim)

        def matched(width: int) -> Density:
            ode = models.cnf(dim, width, 3)
            return self._density(ode, dim, objective=objectives.FlowMatching(ode))

        # splines of every component have too many numbers for the networks of many components
        few = {"maf, splines": autoregressive} if dim < 8 else {"realnvp": affine}
        return {"nsf": spline, **few, "cnf, flow matching": matched}


class Zuko(Library):
    name = "zuko"

    def couplings(self, dim: int, spline: bool) -> Density:
        from zuko.flows import NICE
        from zuko.transforms import MonotonicRQSTransform

        law = {
            "univariate": MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)],
        }  # fmt: skip
        more = law if spline else {}
        return self._density(NICE(dim, transforms=LAYERS, hidden_features=(WIDTH, WIDTH), **more))

    @staticmethod
    def _density(flow: Any) -> Density:
        return Density(flow, lambda x: flow().log_prob(x))

    def flows(self, dim: int) -> dict[str, Callable[[int], Density]]:
        from zuko.flows import CNF, NSF

        return {
            "NSF": lambda width: self._density(
                NSF(dim, bins=BINS, transforms=3, hidden_features=(width, width))
            ),
            "CNF": lambda width: self._density(CNF(dim, hidden_features=(width, width, width))),
        }


class NFlows(Library):
    name = "nflows"

    def couplings(self, dim: int, spline: bool) -> Density:
        from nflows import transforms

        mask = torch.arange(dim) < dim // 2
        kind = transforms.AffineCouplingTransform
        if spline:
            kind = self._spline
        return self._density([kind(mask if i % 2 else ~mask, Net) for i in range(LAYERS)], dim)

    @staticmethod
    def _spline(mask: Tensor, net: Any) -> Any:
        from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

        return PiecewiseRationalQuadraticCouplingTransform(
            mask, net, num_bins=BINS, tails="linear", tail_bound=TAIL
        )

    @staticmethod
    def _density(layers: list[Any], dim: int) -> Density:
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.transforms import CompositeTransform

        flow = Flow(CompositeTransform(layers), StandardNormal([dim]))
        return Density(flow, flow.log_prob)

    def flows(self, dim: int) -> dict[str, Callable[[int], Density]]:
        from nflows.nn.nets import ResidualNet
        from nflows.transforms import LULinear, RandomPermutation

        def spline(width: int) -> Density:
            layers, net = [], partial(ResidualNet, hidden_features=width, num_blocks=2)
            for i in range(LAYERS):
                mask = torch.arange(dim) % 2 == i % 2
                layers += [
                    RandomPermutation(dim), LULinear(dim, identity_init=True),
                    self._spline(mask, net),
                ]  # fmt: skip
            return self._density(layers, dim)

        return {"NSF": spline}


class NormFlows(Library):
    name = "normflows"

    def couplings(self, dim: int, spline: bool) -> Density:
        import normflows as nf
        from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

        layers: list[Any] = []
        for i in range(LAYERS):
            if spline:
                mask = torch.arange(dim) < dim // 2
                inner = PiecewiseRationalQuadraticCoupling(
                    mask if i % 2 else ~mask, Net, num_bins=BINS, tails="linear", tail_bound=TAIL
                )
                layers.append(inner)
            else:
                net = nf.nets.MLP([dim // 2, WIDTH, WIDTH, dim], init_zeros=True)
                layers += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="swap")]
        return self._density(layers, dim)

    @staticmethod
    def _density(layers: list[Any], dim: int) -> Density:
        import normflows as nf

        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
        return Density(flow, flow.log_prob)

    def flows(self, dim: int) -> dict[str, Callable[[int], Density]]:
        import normflows as nf

        def spline(width: int) -> Density:
            layers: list[Any] = []
            for i in range(LAYERS):
                layers += [
                    nf.flows.CoupledRationalQuadraticSpline(
                        dim, 2, width, num_bins=BINS, reverse_mask=bool(i % 2)
                    ),
                    nf.flows.LULinearPermute(dim),
                ]
            return self._density(layers, dim)

        return {"NSF": spline}


LIBRARIES: dict[str, type[Library]] = {
    library.name: library for library in (Flowsde, Zuko, NFlows, NormFlows)
}
FLOW_PEERS = tuple(name for name in LIBRARIES if name != "flowsde")
