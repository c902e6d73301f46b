"""The exponential engine: methods for semi-linear dynamics.

Diffusion's fast samplers are its coefficient choices; no schedule enters here, only a
``SemiLinear``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from .._increment import Draws, Increment
from .._scalar import Scalar, exp, expand, expm1, isfinite, magnitude, sqrt, where
from .._state import State, combine, tree_map
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.discrete import Chain
from ..dynamics.field import Field
from .base import Carry, Integrator, Step

__all__ = ["DDIM", "DPMSolverPP", "Exponential", "ExponentialEuler"]


def check_split(integrator: Integrator, dynamics: Dynamics) -> None:
    """Raises TypeError, with the cure, on dynamics whose linear part is not known."""
    if isinstance(dynamics, Chain) or dynamics.split() is None:
        raise TypeError(
            f"{type(integrator).__name__} needs dynamics with a split; got "
            f"{type(dynamics).__name__}. Use Heun() or Tsit5(), or give ODE(f, linear=...) or "
            "LinearSDE(schedule).probability_flow(denoiser)"
        )
    noise = dynamics.noise
    if noise is not None and not (noise.ito or noise.additive):
        raise TypeError(
            f"{type(integrator).__name__} reads dW as Ito does; got a Stratonovich SDE. Use "
            "StochasticHeun(), or add half of g dg/dy to f and leave out stratonovich=True"
        )


def check_clock(integrator: Integrator, field: Field, t: Scalar) -> None:
    """Raises ValueError, with the cure, on a start where the clock is infinite."""
    assert field.split is not None
    clock = field.split.clock(t)
    if isinstance(clock, float) and clock == math.inf:
        raise ValueError(
            f"{type(integrator).__name__} starts at t = {t}, where there is no noise and the clock "
            "is infinite: start at a small time such as 1e-3"
        )


class Exponential(Integrator):
    """x1 = A x0 + B r + noise: exact for a constant residual r; subclasses say which r.

    The carry is the clock and the residual of the step before.
    """

    def check(self, dynamics: Dynamics) -> None:
        check_split(self, dynamics)

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return None if dynamics.noise is None else Draws(dynamics.noise.shapes(y))

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        check_clock(self, field, t)

    @abstractmethod
    def extrapolate(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, residual: State, carry: Carry
    ) -> State:
        """The constant that stands for the residual over the step."""

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert field.split is not None
        residual, z = field.residual(t0, y), None
        if dw is not None:
            root = sqrt(magnitude(t1 - t0))
            root = where(root > 0, root, 1.0)
            z = tree_map(lambda w: w / expand(root, w), dw.w)
            if field.split.factored:
                z = field.noise_term(t0, y, z)
        return _ExponentialStep(self, field.split, t0, t1, y, residual, z, carry)

    def move(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, y: State, residual: State, z: State | None,
        carry: Carry,
    ) -> State:  # fmt: skip
        """The step's formula, for any end time; z is standard normal, or g times that."""
        constant = self.extrapolate(split, t0, t1, residual, carry)
        y1 = split.advance(t0, t1, y, constant)
        return y1 if z is None else split.stir(t0, t1, y1, z)


class _ExponentialStep(Step):
    __slots__ = ("_before", "_method", "_residual", "_split", "_t0", "_t1", "_y0", "_z")

    def __init__(
        self, method: Exponential, split: SemiLinear, t0: Scalar, t1: Scalar, y0: State,
        residual: State, z: State | None, before: Carry,
    ) -> None:  # fmt: skip
        self._method, self._split, self._before = method, split, before
        self._t0, self._t1, self._y0, self._residual, self._z = t0, t1, y0, residual, z
        self.y1 = self._to(t1)
        self.carry = (split.clock(t0), residual)

    def _to(self, t: Scalar) -> State:
        return self._method.move(
            self._split, self._t0, t, self._y0, self._residual, self._z, self._before
        )

    def dense(self, theta: Scalar) -> State:
        return self._to(self._t0 + theta * (self._t1 - self._t0))


@dataclass(frozen=True)
class ExponentialEuler(Exponential):
    """The residual of the step's start. Order 1; on a probability flow it is DDIM.

    On ``SDE(f, g, linear=rate)`` it is exact in law for a constant f and, with diagonal noise, a
    constant g: an Ornstein-Uhlenbeck process at any step. Else strong order 1/2, 1 for additive
    noise, and weak order 1.

    Source: Hochbruck and Ostermann 2010, "Exponential integrators".
    """

    order = 1
    dense_order = 1

    def extrapolate(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, residual: State, carry: Carry
    ) -> State:
        return residual


@dataclass(frozen=True)
class DDIM(ExponentialEuler):
    """DDIM on a probability flow, with its own noise of variance eta^2 sigma1^2 (1 - e^(-2h)).

        x1 = alpha1 x0_hat + sqrt(sigma1^2 - s^2) eps_hat + s z

    Args:
        eta: 0 is deterministic (the exponential Euler step), 1 is DDPM's posterior sampler.

    Raises:
        ValueError: on eta outside [0, 1].

    Source: Song et al. 2021, arXiv 2010.02502.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM's eta lies in [0, 1]; got {self.eta}")

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if dynamics.noise is not None:
            raise TypeError(
                "DDIM brings its own noise: give it probability_flow(denoiser), or integrate the "
                "reverse SDE with ExponentialEuler() or DPMSolverPP()"
            )
        split = dynamics.split()
        if self.eta and (split is None or not split.noising):
            raise TypeError(
                "DDIM with eta > 0 needs a probability flow, whose split is that of a noised "
                "state: use DDIM(0), or LinearSDE(schedule).probability_flow(denoiser)"
            )

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return Draws(y) if self.eta else None

    def move(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, y: State, residual: State, z: State | None,
        carry: Carry,
    ) -> State:  # fmt: skip
        if z is None:
            return super().move(split, t0, t1, y, residual, None, carry)
        keep, _ = split.weights(t0, t1)  # sigma1 / sigma0
        h = split.clock(t1) - split.clock(t0)
        spread = self.eta * sqrt(-expm1(-2.0 * h))
        rest = keep * sqrt(1.0 - spread * spread)
        alpha0, alpha1 = split.scale(t0), split.scale(t1)
        deviation = alpha1 * exp(-split.clock(t1)) * spread

        def formula(x: State, x0: State, n: State) -> State:
            mean = expand(rest, x) * x + expand(alpha1 - alpha0 * rest, x) * x0
            return mean + expand(deviation, x) * n

        return tree_map(formula, y, residual, z)


@dataclass(frozen=True)
class DPMSolverPP(Exponential):
    """DPM-Solver++(2M): the residual carried half a step on along its last slope. Order 2.

        r = r_n + h / (2 h_before) (r_n - r_before),    h in the split's clock

    On a reverse SDE it is SDE-DPM-Solver++(2M). The first step, and a step onto an infinite clock
    (no noise left, or no signal yet), are of first order. One evaluation a step.

    Source: Lu et al. 2022, arXiv 2211.01095.
    """

    order = 2
    dense_order = 2

    def extrapolate(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, residual: State, carry: Carry
    ) -> State:
        if carry is None:
            return residual
        (before, old), now = carry, split.clock(t0)
        ratio = 0.5 * (split.clock(t1) - now) / (now - before)
        ratio = where(isfinite(ratio), ratio, 0.0)
        change = tree_map(lambda a, b: a - b, residual, old)
        return combine(residual, ratio, ((0, 1.0),), [change])
