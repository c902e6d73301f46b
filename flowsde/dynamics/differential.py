"""Differential equations given by their fields."""

from __future__ import annotations

from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from .._scalar import Scalar, magnitude, phi1, sqrt
from .._state import State, batch_size, check_like, contract, describe, fits, leaves, tree_map
from ..paths.base import Path
from .base import Dynamics, Noise, SemiLinear, VectorField

__all__ = ["CDE", "ODE", "SDE", "Control"]


class _LinearPart(SemiLinear):
    factored = True

    def __init__(self, field: VectorField, rate: Scalar) -> None:
        self._field, self.rate = field, rate

    def scale(self, t: Scalar) -> Scalar:
        return 1.0

    def clock(self, t: Scalar) -> Scalar:
        if isinstance(self.rate, Tensor) and isinstance(t, Tensor) and t.ndim:
            raise TypeError("a rate per component needs a time that the batch shares")
        return t

    def time(self, s: Scalar) -> Scalar:
        return s

    def residual(self, t: Tensor, x: State, *args: Any, now: Scalar | None = None) -> State:
        return self._field(t, x, *args)

    def fit(self, factor: Scalar, x: Tensor) -> Scalar:
        # a rate per component is shaped as one sample, and broadcasts as it is
        return factor if isinstance(self.rate, Tensor) else super().fit(factor, x)

    def deviation(self, t0: Scalar, t1: Scalar) -> Scalar:
        h = self.clock(t1) - self.clock(t0)
        return sqrt(magnitude(h) * phi1(2.0 * self.rate * h))


@final
class ODE(Dynamics):
    """dy/dt = f(t, y, *args) [ + implicit(t, y, *args) ] [ + linear * y ].

    Args:
        f: the vector field; any callable, a module's parameters are registered.
        linear: the rate of a stiff linear part, a float or a tensor that multiplies the last axes
            of y number by number (a matrix belongs into ``implicit``), which exponential
            integrators then solve exactly, and IMEX ones implicitly.
        implicit: a stiff part, a field like f: IMEX integrators such as ``KenCarp4()`` treat it
            implicitly and f explicitly. Any other integrator sees the sum.
        batched_time: whether the fields accept t of shape ``(batch,)`` (per-sample steps and
            spans).
        rowwise: whether the fields take any rows of the batch by themselves, and give each what it
            would get among the others. Samples that have ended then cost no more evaluations.
        separable: whether y = (q, p) and f(t, (q, p)) = (v(t, p), a(t, q)), as symplectic methods
            need it.
        traced: (f, tr df/dy) as one field, the trace ``(batch,)``, where it is known more cheaply
            than by differentiation: ``log_density`` then takes it.

    Raises:
        ValueError: on a separable field with a further part, which would mix q into dq/dt, and on
            a traced one, whose trace would miss that part.
    """

    linear: Scalar | None

    def __init__(
        self,
        f: VectorField,
        *,
        linear: Scalar | None = None,
        implicit: VectorField | None = None,
        batched_time: bool = False,
        rowwise: bool = False,
        separable: bool = False,
        traced: VectorField | None = None,
    ) -> None:
        super().__init__()
        for given in (f, implicit, traced):
            if given is not None:
                _check_callable(given)
        if (separable or traced is not None) and (linear is not None or implicit is not None):
            raise ValueError(
                "a separable or traced field has one part: put the linear or implicit one into f"
            )
        self.f, self.implicit, self._traced = f, implicit, traced
        self.batched_time, self.rowwise, self.separable = batched_time, rowwise, separable
        self.hold("linear", linear)

    def prepare(self, y0: State, seed: int | None) -> ODE:
        _check_rate(self.linear, y0)
        return self

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        k = self._nonlinear(t, y, *args)
        return k if self.linear is None else tree_map(lambda v, w: self.linear * v + w, y, k)

    def _bare(self) -> VectorField:
        whole = type(self) is ODE and self.linear is None and self.implicit is None
        return self.f if whole else self

    def split(self) -> SemiLinear | None:
        return None if self.linear is None else _LinearPart(self._nonlinear, self.linear)

    def traced(self) -> VectorField | None:
        return self._traced

    def select(self, index: Tensor) -> Dynamics | None:
        return self if self.rowwise else None

    def parts(self) -> tuple[VectorField, VectorField] | None:
        if self.implicit is None and self.linear is None:
            return None
        return self.f, self._stiff

    def _nonlinear(self, t: Tensor, y: State, *args: Any) -> State:
        k = self.f(t, y, *args)
        return k if self.implicit is None else _add(y, k, self.implicit(t, y, *args))

    def _stiff(self, t: Tensor, y: State, *args: Any) -> State:
        if self.linear is None:
            assert self.implicit is not None
            return self.implicit(t, y, *args)
        k = tree_map(lambda v: self.linear * v, y)
        return k if self.implicit is None else _add(y, k, self.implicit(t, y, *args))


def _check_rate(rate: Scalar | None, y0: State) -> None:
    """Raises TypeError, with the cure, on a rate that would make another state of this one."""
    for leaf in leaves(y0):
        if rate is None or leaf.is_meta:
            continue
        shape = rate.shape if isinstance(rate, Tensor) else torch.Size()
        if not fits(shape, leaf.shape) or torch.result_type(leaf, rate) != leaf.dtype:
            kind = rate.dtype if isinstance(rate, Tensor) else type(rate).__name__
            raise TypeError(
                f"linear, {tuple(shape)} of {kind}, multiplies a state of {describe(y0)}: give it "
                "in the state's dtype, shaped as one sample or as the last axes of one"
            )


def _add(y: State, a: State, b: State) -> State:
    """The sum of two slopes of y, neither broadcast."""
    return tree_map(torch.add, check_like(a, y, "the field"), check_like(b, y, "the implicit part"))


@final
class SDE(Dynamics):
    """dy = (f(t, y, *args) [ + linear * y ]) dt + g(t, y, *args) dW, Ito unless told otherwise.

    Args:
        f: the drift, shaped as y.
        g: the diffusion, shaped as ``noise`` says (see ``Noise``).
        linear: the rate of a stiff linear part, as for ``ODE``, but real: ``ExponentialEuler()``
            then solves it exactly, together with the noise where g is constant.
        noise: ``"diagonal"``, ``"scalar"`` or ``"general"``.
        stratonovich: read dW as a Stratonovich integral.
        additive: g does not depend on y (then Ito and Stratonovich agree).
        commutative: general noise whose columns commute.
        noise_size: number of Brownian motions of general noise.
        batched_time: whether f and g accept t of shape ``(batch,)``.
        rowwise: whether f and g take any rows of the batch by themselves, as in ``ODE``.

    Raises:
        ValueError: on an unknown noise kind, general noise without its size, or a complex rate.
    """

    linear: Scalar | None

    def __init__(
        self,
        f: VectorField,
        g: VectorField,
        *,
        noise: Literal["diagonal", "scalar", "general"],
        linear: Scalar | None = None,
        stratonovich: bool = False,
        additive: bool = False,
        commutative: bool = False,
        noise_size: int | None = None,
        batched_time: bool = False,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        _check_callable(f)
        _check_callable(g)
        self.f, self.g, self.batched_time, self.rowwise = f, g, batched_time, rowwise
        self.noise = Noise(noise, not stratonovich, additive, commutative, noise_size)
        if linear.is_complex() if isinstance(linear, Tensor) else isinstance(linear, complex):
            raise ValueError("the linear rate of an SDE is real: put a complex one into f")
        self.hold("linear", linear)

    def prepare(self, y0: State, seed: int | None) -> SDE:
        _check_rate(self.linear, y0)
        return self

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        k = self.f(t, y, *args)
        return k if self.linear is None else tree_map(lambda v, w: self.linear * v + w, y, k)

    def _bare(self) -> VectorField:
        return self.f if type(self) is SDE and self.linear is None else self

    def split(self) -> SemiLinear | None:
        return None if self.linear is None else _LinearPart(self.f, self.linear)

    def diffusion(self, t: Tensor, y: State, *args: Any) -> Any:
        return self.g(t, y, *args)

    def select(self, index: Tensor) -> Dynamics | None:
        return self if self.rowwise else None


class Control(Protocol):
    """What a CDE asks of its path; ours and torchcde's have it."""

    def derivative(self, t: Tensor) -> Tensor:
        """dX/dt at t, ``(batch, channels)``."""


@final
class CDE(Dynamics):
    """dy = f(t, y, *args) dX(t): a differential equation controlled by a path through data.

    Args:
        f: the matrix field, ``(batch, d)`` to ``(batch, d, channels)``.
        path: the control X, with ``derivative(t)`` of shape ``(batch, channels)``. A ``Path`` ends
            the solve at its last knot unless t1 is given; where its first is not 0, give t0.
        products: f is called f(t, y, dx, *args) and returns what its matrix makes of dx, shaped as
            y: for matrices of low rank, or of other structure, that are never written out.
        batched_time: whether f and the path accept t of shape ``(batch,)``.
        rowwise: whether f takes any rows of the batch by themselves, as in ``ODE``.

    Raises:
        TypeError: on a path without a derivative, and, in a solve, on shapes that do not fit.
        ValueError: from a solve beyond the ends of a ``Path``.

    Source: Kidger et al. 2020, arXiv 2005.08926.
    """

    precise_time = True  # of the path; f is shown t in the state's dtype

    def __init__(
        self,
        f: VectorField,
        path: Control,
        *,
        products: bool = False,
        batched_time: bool = False,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        _check_callable(f)
        if not callable(getattr(path, "derivative", None)):
            raise TypeError("a CDE's path answers derivative(t); give flowsde.paths.Linear(...)")
        self.f, self.path, self.products = f, path, products
        if isinstance(f, nn.Module):  # one for all series
            self._anchor = (f,)
        self.batched_time, self.rowwise = batched_time, rowwise

    @property
    def horizon(self) -> float:  # type: ignore[override]
        """The path's end."""
        return self.path.ends[1] if isinstance(self.path, Path) else 1.0

    def check_span(self, t0: float, t1: float) -> None:
        if not isinstance(self.path, Path):
            return
        first, last = self.path.ends
        slack = 1e-6 * max(last - first, abs(first), abs(last))
        if min(t0, t1) < first - slack or max(t0, t1) > last + slack:
            raise ValueError(
                f"{t0:g} to {t1:g} reaches beyond the path, which runs from {first:g} to "
                f"{last:g}: give t0 and t1 within"
            )

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        first = leaves(y)[0]
        dx = self.path.derivative(t).to(first.dtype)
        t = t.to(first.dtype.to_real())
        if dx.ndim != 2 or len(dx) != batch_size(y):
            raise TypeError(
                f"a CDE's path returns dX/dt as (batch, channels) = ({batch_size(y)}, channels); "
                f"got {tuple(dx.shape)}. With times of each sample's own wrap a path of torchcde: "
                "paths.TorchCDE(path)"
            )
        if self.products:
            return self.f(t, y, dx, *args)
        matrix = self.f(t, y, *args)
        if matrix.shape != (*y.shape, dx.shape[-1]):
            raise TypeError(
                f"a CDE's field returns (batch, d, channels) = {(*y.shape, dx.shape[-1])}; "
                f"got {tuple(matrix.shape)}"
            )
        return contract(matrix, dx)

    def select(self, index: Tensor) -> Dynamics | None:
        rows = self.path.select(index) if self.rowwise and isinstance(self.path, Path) else None
        if rows is None:
            return None
        return CDE(
            self.f, rows, products=self.products, batched_time=self.batched_time, rowwise=True
        )


def _check_callable(f: object) -> None:
    if not callable(f):
        raise TypeError(f"a field is a callable f(t, y); got {type(f).__name__}")
