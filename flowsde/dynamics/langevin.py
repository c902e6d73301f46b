"""Langevin dynamics: motions whose stationary law is a Boltzmann distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._scalar import Scalar, sqrt
from .._state import State, tree_map
from .base import Dynamics, Kinetic, Noise, VectorField

__all__ = ["Langevin", "UnderdampedLangevin"]


class _Thermal(Dynamics):
    """A force at a temperature. Noise is additive, one Brownian motion a component."""

    def __init__(self, force: VectorField, batched_time: bool, **numbers: Scalar) -> None:
        super().__init__()
        if not callable(force):
            raise TypeError(f"a force is a callable f(t, x); got {type(force).__name__}")
        self.force, self.batched_time = force, batched_time
        self.noise = Noise("diagonal", additive=True)
        for name, value in numbers.items():
            if isinstance(value, Tensor) and value.ndim:
                raise ValueError(f"{name} is one number for all; got shape {tuple(value.shape)}")
            if not isinstance(value, Tensor) and value < 0.0:
                raise ValueError(f"{name} is not negative; got {value}")
            self.hold(name, value)


class Langevin(_Thermal):
    """dx = force(t, x) dt + sqrt(2 temperature) dW, the overdamped motion.

    With force = -grad U the stationary density is exp(-U / temperature); with a score, the
    gradient of log p, it is p at temperature one.

    Args:
        force: ``f(t, x, *args)``, shaped as x.
        temperature: a number or a 0-d tensor.
        batched_time: whether the force accepts t of shape ``(batch,)``.

    Source: Roberts and Tweedie 1996.
    """

    temperature: Scalar

    def __init__(
        self, force: VectorField, *, temperature: Scalar = 1.0, batched_time: bool = False
    ) -> None:
        super().__init__(force, batched_time, temperature=temperature)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        return self.force(t, y, *args)

    def diffusion(self, t: Tensor, y: State, *args: Any) -> State:
        size = sqrt(2.0 * self.temperature)
        return tree_map(lambda x: size, y)


class UnderdampedLangevin(_Thermal):
    """Motion of y = (x, v) under a force, with friction and the noise that goes with it.

        dx = v dt,    mass dv = (force(t, x) - mass friction v) dt
                                + sqrt(2 friction mass temperature) dW

    With force = -grad U the stationary density is exp(-(U(x) + mass |v|^2 / 2) / temperature);
    with a score at temperature one, x follows its density. Any integrator for additive noise
    takes it; ``BAOAB()``, ``ALIGN()`` and ``QUICSORT()`` know its structure.

    Args:
        force: ``f(t, x, *args)``, shaped as x.
        friction, mass, temperature: numbers or 0-d tensors.
        batched_time: whether the force accepts t of shape ``(batch,)``.

    Source: Pavliotis 2014, "Stochastic processes and applications", chapter 6.
    """

    friction: Scalar
    mass: Scalar
    temperature: Scalar

    def __init__(
        self,
        force: VectorField,
        *,
        friction: Scalar = 1.0,
        mass: Scalar = 1.0,
        temperature: Scalar = 1.0,
        batched_time: bool = False,
    ) -> None:
        super().__init__(force, batched_time, friction=friction, mass=mass, temperature=temperature)

    def kinetic(self) -> Kinetic:
        return Kinetic(self._acceleration, self.friction, self.temperature / self.mass)

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        x, v = y
        a = self._acceleration(t, x, *args)
        return v, tree_map(lambda k, u: k - self.friction * u, a, v)

    def diffusion(self, t: Tensor, y: State, *args: Any) -> State:
        x, v = y
        size = sqrt(2.0 * self.friction * self.temperature / self.mass)
        return tree_map(lambda _: 0.0, x), tree_map(lambda _: size, v)

    def _acceleration(self, t: Tensor, x: State, *args: Any) -> State:
        return tree_map(lambda f: f / self.mass, self.force(t, x, *args))
