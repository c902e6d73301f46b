"""Discrete normalizing flows, as they were published: short stacks of maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..dynamics.discrete import Composed, Map
from ..nn import MLP, ConvNet
from ..nn.zeroed import zeroed
from .autoregressive import Autoregressive
from .coupling import Coupling, half
from .elementwise import Additive, Affine, Elementwise, RationalQuadraticSpline
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import multiscale

__all__ = ["glow", "maf", "nice", "nsf", "realnvp"]

Network = Callable[[int, int], nn.Module]


def nice(
    dim: int, depth: int = 4, width: int = 64, *, generator: torch.Generator, condition: int = 0
) -> Composed:
    """Additive couplings over random halves, then one scale a component; the identity at first.

    Args:
        dim: components of a sample, at least 2.
        depth: number of couplings.
        width: of their networks.
        generator: for the halves.
        condition: size of a further input ``(batch, condition)``, given as ``args``; 0 for none.

    Source: Dinh et al. 2015, "NICE", arXiv 1410.8516.
    """
    stack = _halves(dim, depth, Additive(), _dense(width, nn.SiLU), generator, condition)
    return Composed([*stack, ActNorm(dim)])


def realnvp(
    dim: int,
    depth: int = 8,
    width: int = 64,
    *,
    generator: torch.Generator,
    condition: int = 0,
    dropout: float = 0.0,
) -> Composed:
    """Affine couplings over random halves, each followed by one over the other half.

    The identity at first.

    Args:
        dim, depth, width, generator, condition: as of ``nice``.
        dropout: in the networks.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803.
    """
    network = _dense(width, nn.SiLU, dropout)
    return Composed(_halves(dim, depth, Affine(), network, generator, condition))


def nsf(
    dim: int,
    depth: int = 8,
    width: int = 64,
    *,
    generator: torch.Generator,
    condition: int = 0,
    bins: int = 8,
    tail: float = 3.0,
) -> Composed:
    """Spline couplings, a linear map before every second one; a random permutation at first.

    Args:
        dim, depth, width, generator, condition: as of ``nice``.
        bins, tail: of the ``RationalQuadraticSpline``.

    Source: Durkan et al. 2019, "Neural spline flows", arXiv 1906.04032.
    """
    law, network, mask = RationalQuadraticSpline(bins, tail), _dense(width, nn.ReLU), half(dim)
    layers: list[Map] = []
    for i in range(depth):
        if i % 2 == 0:
            layers.append(Mixing(dim, generator=generator))
        layers.append(Coupling(mask if i % 2 == 0 else ~mask, law, network, condition))
    return Composed(layers)


def maf(
    dim: int,
    depth: int = 5,
    width: int = 64,
    *,
    law: Elementwise = Affine(),
    condition: int = 0,
) -> Composed:
    """Autoregressive maps, the order of the components reversed after each.

    Densities in one pass of each network, samples in ``dim`` passes.

    Args:
        dim, width, condition: as of ``nice``.
        depth: number of maps.
        law: of a component given those before; ``RationalQuadraticSpline()`` makes of it the
            autoregressive neural spline flow of Durkan et al. 2019, arXiv 1906.04032.

    Source: Papamakarios et al. 2017, arXiv 1705.07057.
    """
    return Composed(
        layer
        for _ in range(depth)
        for layer in (
            Autoregressive(dim, law, width, condition=condition),
            Permutation(torch.arange(dim, device="cpu").flip(0)),
        )
    )


def glow(
    shape: Sequence[int],
    depth: int = 8,
    levels: int = 2,
    width: int = 64,
    *,
    generator: torch.Generator,
    condition: int = 0,
) -> Composed:
    """Steps of ActNorm, 1x1 convolution and affine coupling, at several scales.

    ``start`` sets its ActNorms from a batch of data, once, before training.

    Args:
        shape: of an image, ``(channels, height, width)``; sides are multiples of 2^levels.
        depth: number of steps a level.
        levels: each works on half of the sides of the one before.
        width: of the convolutional networks.
        generator: for the permutations.
        condition: size of a further input ``(batch, condition)``, given as ``args``; 0 for none.

    Raises:
        ValueError: on sides that cannot be halved that often.

    Source: Kingma and Dhariwal 2018, "Glow", arXiv 1807.03039.
    """
    channels, *sides = shape
    if len(sides) != 2 or levels < 1 or any(side % 2**levels for side in sides):
        raise ValueError(
            f"shape is (channels, height, width), sides multiples of {2**levels}; got {shape}, "
            f"{levels} levels"
        )

    def network(inputs: int, outputs: int) -> nn.Module:
        return ConvNet(inputs, width, outputs)

    def level(rows: int) -> Composed:
        steps = [
            (ActNorm(rows), Mixing(rows, generator=generator),
             Coupling(half((rows, 1, 1)), Affine(), network, condition))
            for _ in range(depth)
        ]  # fmt: skip
        return Composed(layer for step in steps for layer in step)

    return multiscale([level(channels * 2 ** (2 + i)) for i in range(levels)])


def _dense(width: int, unit: Callable[[], nn.Module], dropout: float = 0.0) -> Network:
    """Two hidden layers of such units; zero at first."""

    def network(inputs: int, outputs: int) -> nn.Module:
        net = MLP(
            [inputs, width, width, outputs], lambda: nn.Sequential(unit(), nn.Dropout(dropout))
        )
        zeroed(net[-1])
        return net

    return network


def _halves(
    dim: int,
    depth: int,
    law: Elementwise,
    network: Network,
    generator: torch.Generator,
    condition: int,
) -> list[Map]:
    """Couplings over random halves of the components, each followed by one over the other half.

    The halves are brought together by permutations between the pairs and put back by the last.
    """
    layers: list[Map] = []
    mask = half(dim)
    places = torch.arange(dim, device=generator.device)  # of the components, so far
    for i in range(depth):
        if i % 2 == 0:
            chosen = torch.randperm(dim, generator=generator, device=generator.device)
            cut = dim // 2
            order = torch.cat((chosen[:cut].sort().values, chosen[cut:].sort().values))
            layers.append(Permutation(places[order]))
            places = order.argsort()
        layers.append(Coupling(mask if i % 2 == 0 else ~mask, law, network, condition))
    return [*layers, Permutation(places)]
