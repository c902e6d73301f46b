"""How long the first step is, where nobody said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._scalar import Scalar, expand, isfinite, minimum, power, sqrt
from ._scalar import where as choose
from ._state import State, combine, tree_map
from .dynamics.field import Field
from .stepping import Adaptive

__all__ = ["Outset"]


@dataclass
class Outset:
    """The start of a solve: times are detached, floats, 0-d or ``(batch,)``; steps unsigned.

    Attributes:
        exponent: q, of the error of a step.
        sign: of the direction of time.
        span: the way to the end, which no step exceeds.
    """

    field: Field
    stepping: Adaptive
    exponent: float
    t: Any
    y: State
    sign: Any
    span: Any

    def __post_init__(self) -> None:
        self._scale = self.stepping.scale(self.y)

    def _norm(self, x: State) -> Any:
        """In units of the tolerance."""
        on_device = isinstance(self.span, Tensor)
        per_sample = on_device and self.span.ndim > 0
        size = self.stepping.length(tree_map(torch.div, x, self._scale), per_sample)
        return size.to(self.span.dtype) if on_device else float(size)

    def smooth(self, slope: State) -> Scalar:
        """Hairer's rule: a step at which an explicit method's error is about the tolerance."""
        norm = self._norm
        d0, d1 = norm(self.y), norm(slope)
        small = (d0 < 1e-5) | (d1 < 1e-5)
        guess = choose(small, 1e-6 + 0.0 * d0, 0.01 * d0 / choose(small, 1.0 + 0.0 * d1, d1))
        guess = minimum(guess, self.span)
        guess = choose(isfinite(guess) & (guess > 0), guess, 1e-6 * self.span)
        step = guess * self.sign
        ahead = self.field.drift(self.t + step, combine(self.y, step, ((0, 1.0),), [slope]))
        curve = norm(tree_map(torch.sub, ahead, slope)) / choose(guess > 0, guess, 1.0 + 0 * guess)
        steep = choose(d1 > curve, d1, curve)
        flat = steep <= 1e-15
        bent = (0.01 / choose(flat, 1.0 + 0.0 * steep, steep)) ** (1.0 / self.exponent)
        careful = choose(1e-3 * guess > 1e-6, 1e-3 * guess, 1e-6 + 0.0 * guess)
        first = minimum(100.0 * guess, choose(flat, careful, bent))
        return choose(isfinite(first) & (first > 0), first, guess)

    def rough(self, z: State) -> Scalar:
        """The same for an SDE, with signs z in the place of dW / sqrt(dt).

        A step that moves y by a hundredth of itself or by the tolerance, f dt and g sqrt(dt) z
        each; then the one at which Euler's error, by what f and g have changed there, is about half
        the tolerance. Two evaluations.
        """
        field, norm, y = self.field, self._norm, self.y
        f0, reach = field.drift(self.t, y), 1.0 + 0.01 * norm(y)
        speed, spread = norm(f0), norm(field.noise_term(self.t, y, z))
        guess = minimum(_over(reach, speed), _over(reach, spread) ** 2)
        guess = minimum(choose(isfinite(guess), guess, 1e-6 * self.span), self.span)
        step, root = guess * self.sign, sqrt(guess)
        dw = tree_map(lambda x: x * expand(root, x), z)
        g0 = field.noise_term(self.t, y, dw)
        ahead = tree_map(torch.add, combine(y, step, ((0, 1.0),), [f0]), g0)
        df = tree_map(torch.sub, field.drift(self.t + step, ahead), f0)
        dg = tree_map(torch.sub, field.noise_term(self.t + step, ahead, dw), g0)
        error = guess * norm(df) + norm(dg)
        first = guess * minimum(power(_over(0.5 + 0.0 * error, error), 1.0 / self.exponent), 100.0)
        return choose(isfinite(first), first, guess)


def _over(a: Any, b: Any) -> Any:
    """a / b, huge where b is nothing."""
    tiny = b <= 1e-100
    return choose(tiny, 1e100 + 0.0 * b, a / choose(tiny, 1.0 + 0.0 * b, b))
