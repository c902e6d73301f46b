"""What every model is: dynamics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from .. import _scalar
from .._scalar import Scalar, expand
from .._state import State, tree_map

__all__ = ["Dynamics", "Kinetic", "Noise", "SemiLinear", "VectorField"]

VectorField = Callable[..., Any]


@dataclass(frozen=True)
class Noise:
    """What is declared of an SDE's noise.

    Args:
        kind: ``"diagonal"``: g has the state's shape (or broadcasts to it), one Brownian motion a
            component. Orders above 1/2, chosen steps and conversions take g_i for a function of t
            and y_i alone; else give ``"general"`` and ``torch.diag_embed(g)``. ``"scalar"``: g has
            the state's shape, one Brownian motion a sample. ``"general"``: g has shape
            ``(batch, d, m)``, m Brownian motions a sample.
        ito: Ito integral, else Stratonovich.
        additive: g does not depend on y.
        commutative: the columns of general g commute; see ``commutes`` for any noise.
        size: m, for general noise.

    Attributes:
        by_products: whether g is known by its products with dW alone (``Dynamics.product``).
    """

    by_products: ClassVar[bool] = False

    kind: Literal["diagonal", "scalar", "general"]
    ito: bool = True
    additive: bool = False
    commutative: bool = False
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("diagonal", "scalar", "general"):
            raise ValueError(f"noise is 'diagonal', 'scalar' or 'general'; got {self.kind!r}")
        if (self.kind == "general") != (self.size is not None):
            raise ValueError("noise_size is the number of Brownian motions of general noise")

    @property
    def commutes(self) -> bool:
        """Whether its columns commute, by declaration, by its kind, or as there is but one."""
        return self.commutative or self.additive or self.size in (None, 1)

    def shapes(self, y: State) -> State:
        """A state shaped as one Brownian increment."""
        if self.kind == "diagonal":
            return y
        if not isinstance(y, Tensor) or y.ndim < 1:
            raise TypeError(f"{self.kind} noise moves a tensor state of shape (batch, ...)")
        width = () if self.size is None else (self.size,)
        return y.new_empty((y.shape[0], *width))


class SemiLinear(ABC):
    """The structure dy/ds = rate y + residual(t, x), with x = scale(t) y and s = clock(t).

    All that exponential integrators need to know. They work in x: ``weights`` are exact for a
    constant residual, and subclasses give limits where the clock is infinite.
    """

    rate: Scalar
    noising: bool = False  # whether x is a noised state and nothing else
    factored: bool = False  # whether its noise is g dW with the dynamics' g, deviations for g = 1

    @property
    def dual(self) -> SemiLinear:
        """Where x is a noised state, the same equation with the noise in the place of the data
        for its residual, which is -rate sigma score, with sigma its scale; else itself.
        """
        return self

    @abstractmethod
    def scale(self, t: Scalar) -> Scalar:
        """x over y."""

    @abstractmethod
    def clock(self, t: Scalar) -> Scalar:
        """The time s in which the linear rate is constant."""

    @abstractmethod
    def time(self, s: Scalar) -> Scalar:
        """The t at which the clock is s."""

    @abstractmethod
    def residual(self, t: Tensor, x: State, *args: Any, now: Scalar | None = None) -> State:
        """What is not linear, shaped as x; ``now`` is t as the solve has it, often on the host."""

    def weights(self, t0: Scalar, t1: Scalar) -> tuple[Scalar, Scalar]:
        """(A, B) of x1 = A x0 + B residual."""
        h = self.clock(t1) - self.clock(t0)
        decay = _scalar.expm1(self.rate * h)
        if isinstance(self.rate, Tensor):
            integral = h * _scalar.phi1(self.rate * h)  # differentiable by a rate of 0 too
        else:
            integral = decay / self.rate if self.rate else h
        return self.scale(t1) / self.scale(t0) * (decay + 1.0), self.scale(t1) * integral

    def fit(self, factor: Scalar, x: Tensor) -> Scalar:
        """A weight, ready to multiply x."""
        return expand(factor, x)

    def add(self, x: State, factor: Scalar, change: State) -> State:
        """x + factor change: one fused operation a leaf where the factor is a host float."""

        def leaf(v: Tensor, n: Tensor) -> Tensor:
            by = self.fit(factor, v)
            return v + by * n if isinstance(by, Tensor) else v.add(n, alpha=by)

        return tree_map(leaf, x, change)

    def decay(self, t0: Scalar, t1: Scalar, x: State) -> State:
        """x at t1 if there were no residual."""
        a, _ = self.weights(t0, t1)
        return tree_map(lambda v: self.fit(a, v) * v, x)

    def advance(self, t0: Scalar, t1: Scalar, x: State, residual: State) -> State:
        """x at t1 if the residual stood still."""
        a, b = self.weights(t0, t1)
        return self.add(tree_map(lambda v: self.fit(a, v) * v, x), b, residual)

    def bend(
        self, t0: Scalar, t1: Scalar, x: State, weights: Callable[[Scalar], Sequence[Scalar]],
        changes: Sequence[State],
    ) -> State:  # fmt: skip
        """x at t1 with changes of the residual on the way: x + scale(t1) h sum_i w_i changes_i.

        The weights w are functions of rate h. As it was where h is infinite.
        """
        h = self.clock(t1) - self.clock(t0)
        h = _scalar.where(_scalar.isfinite(h), h, 0.0)
        factor = self.scale(t1) * h
        for weight, change in zip(weights(self.rate * h), changes, strict=True):
            x = self.add(x, factor * weight, change)
        return x

    def deviation(self, t0: Scalar, t1: Scalar) -> Scalar | None:
        """Exact standard deviation, in x, of the noise gathered over the step; None if none."""
        return None

    def stir(self, t0: Scalar, t1: Scalar, x: State, z: State) -> State:
        """x with the noise gathered over the step; z is standard normal, or g times that."""
        deviation = self.deviation(t0, t1)
        return x if deviation is None else self.add(x, deviation, z)


@dataclass(frozen=True)
class Kinetic:
    """The structure of y = (x, v) that Langevin integrators see: exact but for the acceleration.

        dx = v dt,    dv = (acceleration(t, x) - friction v) dt + sqrt(2 friction variance) dW

    Args:
        acceleration: a field of t and x alone, shaped as x.
        friction, variance: numbers or 0-d tensors; the variance is that of v at rest.
    """

    acceleration: VectorField
    friction: Scalar
    variance: Scalar


class Dynamics(nn.Module, ABC):
    """How a state moves.

    Attributes:
        noise: what is declared of its noise; None for a deterministic system.
        batched_time: whether it accepts t of shape ``(batch,)`` beside 0-d.
        precise_time: whether t comes in the device's most precise floats, not in the state's dtype.
        separable: whether y = (q, p) with dq/dt = v(t, p) and dp/dt = a(t, q).
        random: whether ``prepare`` draws (a solve then needs a generator).
        pulls: whether its drift takes derivatives, which ``torch.compile`` does not trace.
        whitens: whether it takes the W of its noise for independent components of variance 1.
        horizon: the end of its natural time, from 0; where generative models hold noise.
    """

    noise: Noise | None = None
    batched_time: bool = True
    precise_time: bool = False
    separable: bool = False
    random: bool = False
    pulls: bool = False
    whitens: bool = False
    horizon: float = 1.0
    _anchor: tuple[nn.Module, ...] = ()

    def follow(self, inner: Dynamics) -> None:
        """Is asked as the dynamics of which it is made: at which times, with which draws."""
        for name in ("batched_time", "precise_time", "random", "pulls", "horizon"):
            setattr(self, name, getattr(inner, name))
        self._anchor = (inner.anchor,)  # in a tuple, as it is no part of this one

    @property
    def anchor(self) -> nn.Module:
        """What graphs that are compiled for it live as long as: itself, or what it is made of anew
        for each solve.
        """
        anchor: nn.Module = self._anchor[0] if self._anchor else self
        return anchor

    def hold(self, name: str, value: Scalar | None) -> None:
        """Makes a number an attribute: a buffer where it is a tensor but no parameter."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    @abstractmethod
    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        """The whole drift dy/dt, shaped as y, at a 0-d or ``(batch,)`` time."""

    def _bare(self) -> VectorField:
        """What a call comes to where nothing hooks into it: the user's own f, if that is all."""
        return self

    def diffusion(self, t: Tensor, y: State, *args: Any) -> Any:
        """The factor of dW, as ``noise`` declares it; None for a deterministic system."""
        return None

    def product(self, t: Tensor, y: State, dw: State, args: tuple[Any, ...]) -> State:
        """g(t, y, *args) dW, shaped as y, where ``noise.by_products`` holds."""
        raise TypeError(f"{type(self).__name__} has a diffusion: multiply by that")

    def split(self) -> SemiLinear | None:
        """The semi-linear structure; None where it is unknown."""
        return None

    def parts(self) -> tuple[VectorField, VectorField] | None:
        """(explicit, implicit): two fields whose sum is the drift, the second one stiff; None
        where none was declared. What IMEX integrators need to know.
        """
        return None

    def traced(self) -> VectorField | None:
        """(drift, its divergence ``(batch,)``) as one field of (t, y, *args), where the dynamics
        knows it more cheaply than by differentiation. What ``log_density`` needs to know.
        """
        return None

    def kinetic(self) -> Kinetic | None:
        """The structure of underdamped Langevin dynamics; None where it has none."""
        return None

    def select(self, index: Tensor) -> Dynamics | None:
        """The dynamics of these rows of the batch alone; None where that cannot be told."""
        return None

    def prepare(self, y0: State, seed: int | None) -> Self:
        """Called once a solve: draws probes, learns shapes. Returns the dynamics to integrate."""
        return self

    def check_span(self, t0: float, t1: float) -> None:
        """Raises ValueError, with the cure, on times at which the dynamics is not defined."""

    def hint(self, t: float) -> str:
        """What a failed solve with an end at t should be told beside; mostly nothing."""
        return ""
