"""Initial value problems with exact right sides, and references to measure errors by.

A right side is written once, ``field(xp, t, y, *constants)`` with y of shape ``(batch, dim)`` or
``(dim,)``, against the few functions that ``torch``, ``numpy`` and ``jax.numpy`` share: ``stack``,
``concatenate``, ``exp``, ``sin``, ``cos``, ``sqrt``, ``tanh``.

Sources: Hull, Enright, Fellen and Sedgwick 1972, "Comparing numerical methods for ordinary
differential equations" (A1 to E5, without the five bodies of C5); Hairer and Wanner 1996, IV.10
(Robertson, van der Pol, HIRES, Oregonator); Lorenz 1963.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp

__all__ = ["NONSTIFF", "STIFF", "Problem", "oscillators"]

Array = Any


@dataclass(frozen=True, eq=False)
class Problem:
    """dy/dt = field(xp, t, y, *constants) from y(0) = y0, ``(batch, dim)``, to t = end.

    Args:
        floor: the size of a component above which its error is relative. Solvers are given
            ``atol = floor rtol``.
        stiff: whether the reference takes an implicit method.
    """

    name: str
    field: Callable[..., Array]
    y0: np.ndarray
    end: float
    floor: float = 1.0
    stiff: bool = False
    constants: tuple[np.ndarray, ...] = ()

    def bind(self, xp: ModuleType, convert: Callable[[np.ndarray], Array]) -> Callable[..., Array]:
        """f(t, y) on the arrays of one library; ``convert`` makes them of the constants."""
        field, constants = self.field, tuple(convert(c) for c in self.constants)
        return lambda t, y: field(xp, t, y, *constants)

    def torch(self, device: str, dtype: torch.dtype) -> tuple[Callable[..., Any], torch.Tensor]:
        """f(t, y) and y0 as tensors."""

        def convert(x: np.ndarray) -> torch.Tensor:
            return torch.tensor(x, device=device, dtype=dtype)

        return self.bind(torch, convert), convert(self.y0)

    def flat(self) -> Callable[[float, np.ndarray], np.ndarray]:
        """f(t, y) with the batch in one vector, for SciPy."""
        f, shape = self.bind(np, np.asarray), self.y0.shape
        return lambda t, y: f(t, y.reshape(shape)).ravel()

    @property
    def reference(self) -> np.ndarray:
        """y(end) at tight tolerances in float64, ``(batch, dim)``; worked out once."""
        return _reference(self)

    def error(self, y1: np.ndarray) -> float:
        """Root mean square over components of |y - reference| / (floor + |reference|)."""
        return float(np.sqrt(np.mean(self.errors(y1) ** 2)))

    def errors(self, y1: np.ndarray) -> np.ndarray:
        return np.abs(y1 - self.reference) / (self.floor + np.abs(self.reference))


@cache
def _reference(problem: Problem) -> np.ndarray:
    method, rtol = ("Radau", 1e-9) if problem.stiff else ("DOP853", 1e-13)
    solution = solve_ivp(
        problem.flat(), (0.0, problem.end), problem.y0.ravel(), method=method, rtol=rtol,
        atol=1e-2 * rtol * problem.floor, t_eval=[problem.end],
    )  # fmt: skip
    if not solution.success:
        raise RuntimeError(f"no reference for {problem.name}: {solution.message}")
    return solution.y[:, -1].reshape(problem.y0.shape)


def _join(xp: ModuleType, *components: Array) -> Array:
    return xp.stack(components, -1)


# A: single equations


def _a1(xp: ModuleType, t: Array, y: Array) -> Array:
    return -y


def _a2(xp: ModuleType, t: Array, y: Array) -> Array:
    return -0.5 * y**3


def _a3(xp: ModuleType, t: Array, y: Array) -> Array:
    return _join(xp, y[..., 0] * xp.cos(t))


def _a4(xp: ModuleType, t: Array, y: Array) -> Array:
    return 0.25 * y * (1.0 - y / 20.0)


def _a5(xp: ModuleType, t: Array, y: Array) -> Array:
    return _join(xp, (y[..., 0] - t) / (y[..., 0] + t))


# B: small systems


def _b1(xp: ModuleType, t: Array, y: Array) -> Array:
    """Two species, hunter and hunted."""
    a, b = y[..., 0], y[..., 1]
    return _join(xp, 2.0 * (a - a * b), -(b - a * b))


def _b2(xp: ModuleType, t: Array, y: Array) -> Array:
    """A linear chemical reaction."""
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return _join(xp, b - a, a - 2.0 * b + c, b - c)


def _b3(xp: ModuleType, t: Array, y: Array) -> Array:
    """A nonlinear chemical reaction."""
    a, b = y[..., 0], y[..., 1]
    return _join(xp, -a, a - b**2, b**2)


def _b4(xp: ModuleType, t: Array, y: Array) -> Array:
    """A curve on a torus."""
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    r = xp.sqrt(a**2 + b**2)
    return _join(xp, -b - a * c / r, a - b * c / r, a / r)


def _b5(xp: ModuleType, t: Array, y: Array) -> Array:
    """Euler's equations of a rigid body without external forces."""
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return _join(xp, b * c, -a * c, -0.51 * a * b)


# C: moderate systems


def _c1(xp: ModuleType, t: Array, y: Array) -> Array:
    """A radioactive decay chain."""
    return xp.concatenate((-y[..., :1], y[..., :-2] - y[..., 1:-1], y[..., -2:-1]), -1)


def _c2(xp: ModuleType, t: Array, y: Array, rates: Array) -> Array:
    """The same with rates 1 to 9."""
    flow = rates * y[..., :-1]
    return xp.concatenate((-flow[..., :1], flow[..., :-1] - flow[..., 1:], flow[..., -1:]), -1)


def _c3(xp: ModuleType, t: Array, y: Array) -> Array:
    """The heat equation on a line, ends at zero; C4 is the same in 51 components."""
    inner = y[..., :-2] - 2.0 * y[..., 1:-1] + y[..., 2:]
    first, last = y[..., 1:2] - 2.0 * y[..., :1], y[..., -2:-1] - 2.0 * y[..., -1:]
    return xp.concatenate((first, inner, last), -1)


# D: orbits


def _d(xp: ModuleType, t: Array, y: Array) -> Array:
    """Kepler's two bodies."""
    a, b, u, v = (y[..., i] for i in range(4))
    cube = (a**2 + b**2) ** 1.5
    return _join(xp, u, v, -a / cube, -b / cube)


# E: equations of higher order


def _e1(xp: ModuleType, t: Array, y: Array) -> Array:
    """Bessel's equation of order one half, at t + 1."""
    a, b = y[..., 0], y[..., 1]
    return _join(xp, b, -(b / (t + 1.0) + (1.0 - 0.25 / (t + 1.0) ** 2) * a))


def _e2(xp: ModuleType, t: Array, y: Array) -> Array:
    """Van der Pol's equation."""
    a, b = y[..., 0], y[..., 1]
    return _join(xp, b, (1.0 - a**2) * b - a)


def _e3(xp: ModuleType, t: Array, y: Array) -> Array:
    """Duffing's equation."""
    a, b = y[..., 0], y[..., 1]
    return _join(xp, b, a**3 / 6.0 - a + 2.0 * xp.sin(2.78535 * t))


def _e4(xp: ModuleType, t: Array, y: Array) -> Array:
    """A falling body."""
    b = y[..., 1]
    return _join(xp, b, 0.032 - 0.4 * b**2)


def _e5(xp: ModuleType, t: Array, y: Array) -> Array:
    """A linear pursuit."""
    b = y[..., 1]
    return _join(xp, b, xp.sqrt(1.0 + b**2) / (25.0 - t))


# Beyond


def _lorenz(xp: ModuleType, t: Array, y: Array) -> Array:
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return _join(xp, 10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c)


def _network(xp: ModuleType, t: Array, y: Array, w0: Array, b0: Array, w1: Array) -> Array:
    """A tanh network with one hidden layer."""
    return xp.tanh(y @ w0 + b0) @ w1


def _robertson(xp: ModuleType, t: Array, y: Array) -> Array:
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    slow, fast, pair = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return _join(xp, fast - slow, slow - fast - pair, pair)


def _van_der_pol(xp: ModuleType, t: Array, y: Array) -> Array:
    """The constant mu is the third component, so that each row carries its own."""
    a, b, mu = y[..., 0], y[..., 1], y[..., 2]
    return _join(xp, b, mu * (1.0 - a**2) * b - a, 0.0 * mu)


def _stiff_van_der_pol(xp: ModuleType, t: Array, y: Array) -> Array:
    a, b = y[..., 0], y[..., 1]
    return _join(xp, b, 1000.0 * (1.0 - a**2) * b - a)


def _hires(xp: ModuleType, t: Array, y: Array, rates: Array, inflow: Array, pair: Array) -> Array:
    """The high irradiance response of photomorphogenesis: eight reactants, one pair of them."""
    return y @ rates + inflow + (280.0 * y[..., 5:6] * y[..., 7:8]) * pair


def _oregonator(xp: ModuleType, t: Array, y: Array) -> Array:
    """The Belousov-Zhabotinskii reaction."""
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return _join(
        xp,
        77.27 * (b + a * (1.0 - 8.375e-6 * a - b)),
        (c - (1.0 + a) * b) / 77.27,
        0.161 * (a - c),
    )


def _row(*components: float) -> np.ndarray:
    return np.array([components])


def _first(dim: int) -> np.ndarray:
    return np.eye(1, dim)


def _kepler(number: int) -> Problem:
    e = 0.2 * number - 0.1
    return Problem(f"D{number}", _d, _row(1.0 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))), 20.0)


def _neural(batch: int = 64, dim: int = 8, width: int = 64) -> Problem:
    draw = np.random.default_rng(0)
    weights = (
        draw.normal(size=(dim, width)) / math.sqrt(dim),
        draw.normal(size=width),
        2.0 * draw.normal(size=(width, dim)) / math.sqrt(width),
    )
    return Problem("neural", _network, draw.normal(size=(batch, dim)), 4.0, constants=weights)


def _light() -> Problem:
    rates = (
        (-1.71, 0.43, 8.32, 0.0, 0.0, 0.0, 0.0, 0.0),
        (1.71, -8.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, -10.03, 0.43, 0.035, 0.0, 0.0, 0.0),
        (0.0, 8.32, 1.71, -1.12, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, -1.745, 0.43, 0.43, 0.0),
        (0.0, 0.0, 0.0, 0.69, 1.71, -0.43, 0.69, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.81, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.81, 0.0),
    )
    pair = np.array((0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0, -1.0))
    y0 = _row(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057)
    constants = np.array(rates).T.copy(), 0.0007 * np.eye(8)[0], pair
    return Problem("HIRES", _hires, y0, 321.8122, 1e-4, True, constants)


def oscillators(count: int = 256, end: float = 20.0) -> Problem:
    """Van der Pol's oscillator from (2, 0), mu log-uniform in [0.1, 30], smallest first."""
    exponents = np.random.default_rng(0).uniform(size=count)
    mu = 0.1 * 300.0 ** np.sort(exponents)
    rows = np.stack((np.full(count, 2.0), np.zeros(count), mu), -1)
    return Problem(f"{count} oscillators", _van_der_pol, rows, end)


_BESSEL = (0.6713967071418030, 0.09540051444747446)

NONSTIFF = (
    Problem("A1", _a1, _row(1.0), 20.0),
    Problem("A2", _a2, _row(1.0), 20.0),
    Problem("A3", _a3, _row(1.0), 20.0),
    Problem("A4", _a4, _row(1.0), 20.0),
    Problem("A5", _a5, _row(4.0), 20.0),
    Problem("B1", _b1, _row(1.0, 3.0), 20.0),
    Problem("B2", _b2, _row(2.0, 0.0, 1.0), 20.0),
    Problem("B3", _b3, _row(1.0, 0.0, 0.0), 20.0),
    Problem("B4", _b4, _row(3.0, 0.0, 0.0), 20.0),
    Problem("B5", _b5, _row(0.0, 1.0, 1.0), 20.0),
    Problem("C1", _c1, _first(10), 20.0),
    Problem("C2", _c2, _first(10), 20.0, constants=(np.arange(1.0, 10.0),)),
    Problem("C3", _c3, _first(10), 20.0),
    Problem("C4", _c3, _first(51), 20.0),
    *(_kepler(n) for n in range(1, 6)),
    Problem("E1", _e1, _row(*_BESSEL), 20.0),
    Problem("E2", _e2, _row(2.0, 0.0), 20.0),
    Problem("E3", _e3, _row(0.0, 0.0), 20.0),
    Problem("E4", _e4, _row(30.0, 0.0), 20.0),
    Problem("E5", _e5, _row(0.0, 0.0), 20.0),
    Problem("Lorenz", _lorenz, _row(1.0, 1.0, 1.0), 10.0),
    _neural(),
)

STIFF = (
    Problem("Robertson", _robertson, _row(1.0, 0.0, 0.0), 1e11, 1e-8, True),
    Problem("van der Pol", _stiff_van_der_pol, _row(2.0, 0.0), 2000.0, 1e-3, True),
    _light(),
    Problem("Oregonator", _oregonator, _row(1.0, 2.0, 3.0), 360.0, 1.0, True),
)
