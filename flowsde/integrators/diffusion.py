"""Diffusion's samplers: choices of the exponential engine's coefficients, and what goes around."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar, exp, expand, expm1, isfinite, sqrt, where, whole
from .._state import State, tree_map
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.field import Field
from .base import Carry, Integrator, Step
from .exponential import (
    NODES,
    ExponentialEuler,
    ExponentialStep,
    Multistep,
    Polynomial,
    Singlestep,
    Weights,
    half,
    lagrange,
)  # fmt: skip

if TYPE_CHECKING:
    from ..stepping import Stepping

__all__ = [
    "DDIM", "DEIS", "SEEDS", "DPMSolver", "DPMSolverPP", "DPMSolverPPSingle", "EDMHeun",
    "PredictorCorrector", "UniPC",
]  # fmt: skip


def check_noised(method: Integrator, dynamics: Dynamics) -> None:
    """Raises TypeError, with the cure, where x is not a noised state."""
    name, split = type(method).__name__, dynamics.split()
    if split is None or not split.noising:
        raise TypeError(
            f"{name} adds noise to a noised state, which {type(dynamics).__name__} has not: use "
            f"LinearSDE(schedule).probability_flow(denoiser), or {name} without noise"
        )


@dataclass(frozen=True)
class DDIM(ExponentialEuler):
    """DDIM on a probability flow, with its own noise of variance eta^2 sigma1^2 (1 - e^(-2h)).

        x1 = alpha1 x0_hat + sqrt(sigma1^2 - s^2) eps_hat + s z

    Run from data to noise it encodes (inversion).

    Args:
        eta: 0 is deterministic (the exponential Euler step), 1 is DDPM's ancestral sampler, and on
            a variance-exploding schedule the ancestral Euler method.

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
        if self.eta:
            check_noised(self, dynamics)

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return Draws(y) if self.eta else None

    def move(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, residual: State,
        z: list[State] | None, carry: Carry,
    ) -> State:  # fmt: skip
        if z is None:
            return super().move(field, t0, t1, y, residual, None, carry)
        split = self.form(field)
        keep, _ = split.weights(t0, t1)  # sigma1 / sigma0
        h = split.clock(t1) - split.clock(t0)
        if isinstance(h, float) and h < 0.0:
            raise ValueError("noise is added on the way to the data alone: encode by DDIM()")
        spread = self.eta * sqrt(-expm1(-2.0 * h))
        # at eta = 1 no root: its slope is infinite onto no noise
        rest = keep * (exp(-h) if self.eta == 1.0 else sqrt(1.0 - spread * spread))
        alpha0, alpha1 = split.scale(t0), split.scale(t1)
        mean = split.add(tree_map(lambda x: split.fit(rest, x) * x, y), alpha1 - alpha0 * rest,
                         residual)  # fmt: skip
        return split.add(mean, split.dual.scale(t1) * spread, z[-1])


@dataclass(frozen=True)
class DPMSolver(Singlestep):
    """DPM-Solver-1, -2, -3: single steps on the noise. As many evaluations a step as its order.

    On a reverse SDE see ``SEEDS``; on any other split it is that of its residual.

    Args:
        order: 1, 2 or 3.

    Source: Lu et al. 2022, arXiv 2206.00927.
    """

    order: int = 2
    dual = True

    def __post_init__(self) -> None:
        if self.order not in NODES:
            raise ValueError(f"{type(self).__name__} has orders 1, 2 and 3; got {self.order}")
        object.__setattr__(self, "dense_order", self.order)
        object.__setattr__(self, "nodes", NODES[self.order])


@dataclass(frozen=True)
class DPMSolverPPSingle(DPMSolver):
    """DPM-Solver++(2S) and (3S): the same on the data.

    Source: Lu et al. 2022, arXiv 2211.01095.
    """

    dual = False


@dataclass(frozen=True)
class SEEDS(DPMSolver):
    """SEEDS-1, -2, -3: DPM-Solver on the reverse SDE, whose noise is exact in law at every stage.

    Without noise it is DPM-Solver.

    Source: Gonzalez et al. 2023, arXiv 2305.14267.
    """


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """DPM-Solver++(2M) and (3M): the residual's polynomial through its last values.

        2M: r = r_n + h / (2 h_before) (r_n - r_before),    h in the split's clock

    On a reverse SDE it is SDE-DPM-Solver++. Two values are weighed by phi1 / 2, as published; three
    exactly. (Published code halves the weight of the second difference of 3M, which is then of
    order 2.)

    Source: Lu et al. 2022, arXiv 2211.01095.
    """

    def tilt(self, z: Scalar) -> Scalar:
        return half(z)


@dataclass(frozen=True)
class DEIS(Multistep):
    """tAB-DEIS: the noise as a polynomial in t, integrated by Gauss's rule of 16 nodes.

    For polynomials in log(sigma / alpha), ``ExponentialAdams(order, dual=True)``.

    Source: Zhang and Chen 2023, arXiv 2204.13902.
    """

    dual = True

    def weights(
        self, split: SemiLinear, t0: Scalar, t1: Scalar, times: Sequence[Scalar]
    ) -> Weights:
        s0 = split.clock(t0)
        h = split.clock(t1) - s0
        h = where(isfinite(h), h, 0.0)
        at = [split.time(s0 + c * h) - t0 for c, _ in GAUSS]

        polynomials = lagrange([0.0 * t0, *(t - t0 for t in times)])[1:]
        values = [[_value(p, u) for u in at] for p in polynomials]

        def weights(z: Scalar) -> list[Scalar]:
            decays = [g * exp(z * (1.0 - c)) for c, g in GAUSS]
            return [
                sum((d * u for d, u in zip(decays, us, strict=True)), start=0.0 * z)
                for us in values
            ]

        return weights


def _gauss(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return tuple(
        (0.5 + 0.5 * float(c), 0.5 * float(g)) for c, g in zip(nodes, weights, strict=True)
    )


def _value(polynomial: Sequence[Scalar], u: Scalar) -> Scalar:
    total: Scalar = 0.0
    for c in reversed(polynomial):
        total = total * u + c
    return total


GAUSS = _gauss(16)


@dataclass(frozen=True)
class UniPC(Polynomial):
    """UniPC-p: a predictor through the last p residuals, corrected once the next one is known.

    An evaluation at x1 predicted gives the residual r1; x1 is then stepped to anew, with the
    polynomial through r1 and the last p, and the next step starts from there with the same r1. One
    evaluation a step, of order p + 1; the last step's end is as predicted.

    Args:
        p: 1 to 3.
        start: the order of the first steps. With 1, as published, they take the residuals that
            there are, are corrected, and order 4 is 3 in all; with 2 or 3 they are single steps.
        bh: the weight of two residuals, h B(h) / 2 with B(h) = h (1) or e^h - 1 (2). With more of
            them B cancels.
        final: how many residuals the last step is predicted through at most; each step before it,
            and its corrector, one more. With 1 it is as published.

    Source: Zhao et al. 2023, arXiv 2302.04867.
    """

    p: int = 2
    start: int = 1
    bh: Literal[1, 2] = 2
    final: int = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        self._settle(self.p)
        object.__setattr__(self, "order", self.p + 1)
        if self.bh not in (1, 2):
            raise ValueError(f"UniPC's B(h) is number 1 or 2; got {self.bh}")

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if dynamics.noise is not None:
            raise TypeError(
                "UniPC corrects a step once its end is known, which noise forbids: use "
                "probability_flow(denoiser), or DPMSolverPP() on the reverse SDE"
            )

    def tilt(self, z: Scalar) -> Scalar:
        return half(z) if self.bh == 2 else 0.5 + 0.0 * z

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        split = self.form(field)
        residual = field.residual(t0, y, split)
        most = self.limit(carry[2][0]) if carry else 0
        if len(carry) > 1 + min(self.start, self.p, most):  # else no step, or a single one
            predicted, before, (t, last), *older = carry
            found = self.through(split, t, t0, before, last, ((t0, residual), *older[: most - 1]))
            y = tree_map(_corrected, found, y, predicted)
        step = ExponentialStep(self, field, (t0, t1), y, residual, None, carry[2 : self.p + 1])
        step.carry = step.y1, *step.carry
        return step

    def remember(self, t: Scalar, y: State, residual: State, carry: Carry) -> Carry:
        """The corrected state at t, and the last p residuals; before it stands what is predicted
        from there.
        """
        return y, (t, residual), *carry


def _corrected(found: Tensor, y: Tensor, predicted: Tensor) -> Tensor:
    """The state found, with what was done to the predicted one since."""
    return found if y is predicted else found + (y - predicted)


@dataclass(frozen=True)
class EDMHeun(Singlestep):
    """EDM's sampler: noise put back, then Heun's step in sigma / alpha.

        t' = time of (1 + gamma) sigma/alpha,    x' = x at t' by the noising process,
        x1 = x' + the step from t' for the mean of eps_hat at t' and at Euler's end

    The step onto sigma = 0 is Euler's. Two evaluations a step. Without churn it is ``Heun()`` on
    ``change_clock(flow)``, in the coordinates of x.

    Args:
        gamma: how much noise is put back, relative: EDM's min(S_churn / steps, sqrt(2) - 1).
        low, high: the sigma / alpha between which it is.
        swell: EDM's S_noise, by which the noise is a little too large.

    Raises:
        ValueError: on a negative gamma.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2.
    """

    gamma: float = 0.0
    low: float = 0.0
    high: float = math.inf
    swell: float = 1.0
    order = 2
    dense_order = 2
    nodes = (1.0,)
    dual = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0.0:
            raise ValueError(f"gamma >= 0 says how much noise is put back; got {self.gamma}")

    def check(self, dynamics: Dynamics) -> None:
        super().check(dynamics)
        if dynamics.noise is not None:
            raise TypeError(
                "EDMHeun brings its own noise: give it probability_flow(denoiser), or integrate "
                "the reverse SDE with SEEDS() or DPMSolverPP()"
            )
        if self.gamma:
            check_noised(self, dynamics)

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        return Draws(y) if self.gamma else None

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        if dw is not None:
            split, (z,) = self.form(field), self._normals(field, t0, t1, y, dw)
            clock = split.clock(t0)
            sigma = exp(-clock)
            churned = (self.low <= sigma) & (sigma <= self.high)
            more = where(churned, math.log1p(self.gamma), 0.0 * clock)
            start = where(churned, split.time(clock - more), t0)
            added = self.swell * split.scale(start) * sqrt(-expm1(-2.0 * more))
            y, t0 = split.add(split.decay(t0, start, y), added, z), start
        return super().step(field, t0, t1, y, None, carry)


@dataclass(frozen=True)
class PredictorCorrector(Integrator):
    """Langevin steps at the start of each step, at its noise level; then a predictor's step.

        x <- x + e score(t0, x) + sqrt(2 e) z,    e = 2 a snr^2 d / (|score| max(|score|, d / |x|)),

    with |.| the norm of each sample (a mean over the batch would have samples depend on each other)
    and a = (alpha(t0) / alpha(t1))^2, which is DDPM's 1 - beta. The paper has (snr |z| / |score|)^2
    with means over the batch; d is E|z|^2, as a step must not hang on the noise that it moves by.
    Near a mode the score of a sample vanishes; since E[x . score] = -d of any density, d / |x| is
    what it is on the whole, and a tenth of that the least it is taken for. Steps that hang on the
    state draw the law towards p(x) / e(x): where many are taken, a normal one is 6 % wider in 8
    dimensions and 2 % in 64; in one or two they are of no use. The predictor may be any one-step
    integrator of the dynamics, ``EulerMaruyama()`` or ``DDIM(1.0)`` for two; it starts from the
    corrected state, and ends the step, so that nothing is added at the end. One more evaluation for
    each Langevin step, and for a predictor that would bring its first slope from the step before.

    Args:
        predictor: whose steps are taken.
        corrections: Langevin steps before each of them.
        snr: the signal-to-noise ratio r.

    Raises:
        ValueError: on a number out of range.
        TypeError: on dynamics that are neither a reverse SDE nor a probability flow, and on a
            predictor that builds on steps before its own.

    Source: Song et al. 2021, arXiv 2011.13456, algorithms 4 and 5.
    """

    predictor: Integrator
    corrections: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if not whole(self.corrections, 1) or not self.snr > 0.0:
            raise ValueError(
                "PredictorCorrector takes a whole number of corrections >= 1 and snr > 0; got "
                f"{self.corrections} and {self.snr}"
            )
        if self.predictor.remembers:
            raise TypeError(
                f"{type(self.predictor).__name__} builds on the steps before, which a correction "
                "moves: predict by one-step methods, such as DDIM(1.0), EDMHeun() or "
                "EulerMaruyama()"
            )
        for name in ("order", "dense_order", "static"):
            object.__setattr__(self, name, getattr(self.predictor, name))

    def check(self, dynamics: Dynamics) -> None:
        self.predictor.check(dynamics)
        check_noised(self, dynamics)

    def bind(self, stepping: Stepping) -> Integrator:
        return replace(self, predictor=self.predictor.bind(stepping))

    def along(self, times: Sequence[Scalar]) -> Integrator:
        return replace(self, predictor=self.predictor.along(times))

    def draws(self, dynamics: Dynamics, y: State) -> Draws | None:
        own = self.predictor.draws(dynamics, y) or Draws(y)
        rest = () if own.extra is None else (own.extra,)
        return replace(own, extra=(*(y,) * self.corrections, *rest))

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert dw is not None
        assert dw.z is not None
        assert field.split is not None
        a = (field.split.scale(t0) / field.split.scale(t1)) ** 2
        for z in dw.z[: self.corrections]:
            y = self._langevin(field, t0, a, y, z)
        rest = dw.z[self.corrections :]
        draws = self.predictor.draws(field.dynamics, y) is not None
        dw = dw._replace(z=rest[0] if rest else None) if draws else None
        carry = self.predictor.init(field, t0, y)
        return self.predictor.step(field, t0, t1, y, dw, carry)

    def _langevin(self, field: Field, t: Scalar, a: Scalar, x: Tensor, z: Tensor) -> Tensor:
        split = field.split
        assert split is not None
        strength = -split.rate * split.dual.scale(t)  # the dual's residual over the score
        score = field.residual(t, x, split.dual) / expand(strength, x)
        size, d = _norm(score), z.shape[1:].numel()
        usual = d / _norm(x)
        square = torch.maximum(size, usual) * torch.maximum(size, 0.1 * usual)
        e = 2.0 * a * self.snr**2 * d / square
        return x + expand(e, x) * score + expand(sqrt(2.0 * e), x) * z


def _norm(x: Tensor) -> Tensor:
    """Of each sample, ``(batch,)``."""
    return x.flatten(1).norm(dim=1)
