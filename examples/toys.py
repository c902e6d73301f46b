"""The toys of the plane: densities in two dimensions that a model should learn in minutes.

Each is ``(count, generator) -> (count, 2)``, on the generator's device and in the default dtype, at
the scale that FFJORD gave it (Grathwohl et al. 2019, arXiv 1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["TOYS", "checkerboard", "eight_gaussians", "moons", "pinwheel", "swiss_roll"]


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    u = torch.rand(shape, generator=generator, device=generator.device)
    return low + (high - low) * u


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _choice(count: int, kinds: int, generator: Generator) -> Tensor:
    return torch.randint(kinds, (count,), generator=generator, device=generator.device)


def _circle(angle: Tensor, radius: Tensor | float = 1.0) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def eight_gaussians(count: int, generator: Generator) -> Tensor:
    """Eight normals of deviation .5 on a circle of radius 4, all over sqrt 2."""
    centre = 4.0 * _circle(_choice(count, 8, generator) * (math.pi / 4.0))
    return (centre + 0.5 * _normal((count, 2), generator)) / math.sqrt(2.0)


def checkerboard(count: int, generator: Generator) -> Tensor:
    """Uniform on every second of the sixteen squares of [-4, 4]^2."""
    x = _uniform((count,), -2.0, 2.0, generator)
    row = _uniform((count,), 0.0, 1.0, generator) - 2.0 * _choice(count, 2, generator)
    return 2.0 * torch.stack((x, row + x.floor() % 2.0), -1)


def swiss_roll(count: int, generator: Generator) -> Tensor:
    """The spiral t (cos t, sin t), t in [1.5 pi, 4.5 pi], with noise of deviation 1, over 5."""
    t = _uniform((count,), 1.5 * math.pi, 4.5 * math.pi, generator)
    return (_circle(t, t) + _normal((count, 2), generator)) / 5.0


def pinwheel(count: int, generator: Generator) -> Tensor:
    """Five arms of radial deviation .3 and tangential .1, turned by .25 e^radius, times 2."""
    arm = _choice(count, 5, generator) * (2.0 * math.pi / 5.0)
    spread = torch.tensor([0.3, 0.1], device=generator.device)
    point = _normal((count, 2), generator) * spread + torch.tensor([1.0, 0.0]).to(spread)
    angle = arm + 0.25 * point[:, 0].exp()
    x, y = point.unbind(-1)
    return 2.0 * torch.stack(
        (x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), -1
    )


def moons(count: int, generator: Generator) -> Tensor:
    """Two half circles, each about an end of the other, with noise of deviation .1, times 2."""
    lower = _choice(count, 2, generator)
    angle = _uniform((count,), 0.0, math.pi, generator)
    sign = (1 - 2 * lower).to(angle.dtype)
    shift = torch.tensor([1.0, 0.5], device=generator.device) * lower[:, None]
    curve = _circle(angle) * sign[:, None] + shift + 0.1 * _normal((count, 2), generator)
    return 2.0 * curve - torch.tensor([1.0, 0.2]).to(curve)


TOYS: dict[str, Callable[[int, Generator], Tensor]] = {
    toy.__name__: toy for toy in (eight_gaussians, checkerboard, swiss_roll, pinwheel, moons)
}
