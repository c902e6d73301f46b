"""Solvers from outside, as integrators like any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._increment import Draws, Increment
from .._scalar import Scalar, to_float
from .._state import State, describe, leaves, on_device, unflatten
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field
from ..solution import Status
from ..stepping import Adaptive, Fixed, Stepping
from .base import Carry, Engine, Step, check_noise

__all__ = ["SciPy", "TorchDiffEq", "TorchSDE"]

_ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
_FIXED = frozenset(("euler", "midpoint", "heun2", "heun3", "rk4", *_ADAMS))


@dataclass(frozen=True)
class TorchDiffEq(Engine):
    """torchdiffeq's ``odeint``, from one save time to the next.

    Args:
        method: torchdiffeq's name of it, such as ``"dopri8"`` or ``"implicit_adams"``.
        options: torchdiffeq's own options.

    ``Adaptive(rtol, atol)`` gives its tolerances, with dt0, dt_min and dt_max, ``Fixed(dt=...)``
    its step size; ``max_steps`` does not reach it: give ``options={"max_num_steps": n}``. Gradients
    run through its operations (``Direct``). Source: https://github.com/rtqichen/torchdiffeq.

    Raises:
        TypeError: on other steppings, and on what else ``Adaptive`` says, which it would not hear.
    """

    method: str = "dopri5"
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict, repr=False)
    order = 1
    dense_order = 0

    def bind(self, stepping: Stepping) -> Engine:
        if self.method == "scipy_solver":
            raise TypeError("torchdiffeq's scipy_solver drops gradients: use SciPy(method)")
        fixed = self.method in _FIXED
        if isinstance(stepping, Adaptive) and not fixed:
            _check_numbers("torchdiffeq", self.method, stepping, "dt0", "dt_min", "dt_max")
            given = {"first_step": stepping.dt0, "min_step": stepping.dt_min or None}
            given["max_step"] = None if stepping.dt_max == math.inf else stepping.dt_max
            own = {name: value for name, value in given.items() if value is not None}
            keywords: dict[str, Any] = {"rtol": stepping.rtol, "atol": stepping.atol}
            return replace(self, keywords={"options": {**own, **self.options}, **keywords})
        if isinstance(stepping, Fixed) and stepping.dt is not None and fixed:
            return replace(self, keywords={"options": {"step_size": stepping.dt, **self.options}})
        wanted = "Fixed(dt=...)" if fixed else "Adaptive(rtol, atol)"
        raise TypeError(f"torchdiffeq's {self.method} steps by itself: give {wanted}")

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        from torchdiffeq import odeint

        flat = tuple(leaves(y))
        if not any(leaf.numel() for leaf in flat):
            return _Span(y)

        def as_y(state: Sequence[Tensor]) -> State:
            """Its state, whose leaves are all of the widest dtype."""
            return unflatten([x.to(leaf.dtype) for x, leaf in zip(state, flat, strict=True)], y)

        def f(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            try:
                return tuple(leaves(field.drift(t, as_y(state))))
            except AssertionError as error:
                raise _Own(error) from error

        try:
            ends = odeint(f, flat, on_device([t0, t1], y), method=self.method, **self.keywords)
        except _Own as own:
            raise own.error from None
        except AssertionError as error:  # of its controller
            cause = f"torchdiffeq's {self.method} gave up ({error})"
            cure = "loosen rtol and atol, give max_num_steps, or look at the field there"
            return _Failed(y, Status.UNDERFLOW, f"{cause}: {cure}")
        return _Span(as_y([end[-1] for end in ends]))


class _Own(Exception):
    """What a field asserts: no word of the engine's."""

    def __init__(self, error: AssertionError) -> None:
        super().__init__()
        self.error = error


def _check_numbers(name: str, method: str, stepping: Adaptive, *heard: str) -> None:
    """Raises TypeError on what an engine would not hear of, beside tolerances that are numbers."""
    default, known = Adaptive(), {"rtol", "atol", "step_at", "jump_at", *heard}
    for key in (f.name for f in fields(stepping)):
        value = getattr(stepping, key)
        if isinstance(value, Tensor) or (key not in known and value != getattr(default, key)):
            raise TypeError(
                f"{name}'s {method} steps by itself: give Adaptive(rtol, atol), both numbers, and "
                f"leave out {key} = {value}, or use an integrator of the library"
            )


_SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class SciPy(Engine):
    """SciPy's ``solve_ivp``, from one save time to the next, in float64 on the CPU.

    For references and for stiff systems: "Radau", "BDF" and "LSODA" are implicit, with Jacobians
    by finite differences of the whole state. Takes rtol, atol, dt0 and dt_max from
    ``Adaptive(...)``; ``max_steps`` does not reach it. No gradients pass through it;
    ``adjoint=Backsolve(integrator=Tsit5())`` finds them by a method of the library.

    Args:
        method: SciPy's name of it.

    Raises:
        ValueError: on another name.
        TypeError: in a solve of which anything asks for a gradient by another adjoint.

    Source: https://scipy.org; Virtanen et al. 2020.
    """

    exact = True

    method: str = "LSODA"
    stepping: Adaptive | None = field(default=None, repr=False)
    order = 1
    dense_order = 0

    def __post_init__(self) -> None:
        if self.method not in _SCIPY:
            raise ValueError(f"SciPy's methods are {', '.join(_SCIPY)}; got {self.method!r}")

    def bind(self, stepping: Stepping) -> Engine:
        if not isinstance(stepping, Adaptive):
            raise TypeError(
                f"SciPy's {self.method} steps by itself: give Adaptive(rtol, atol), both numbers"
            )
        _check_numbers("SciPy", self.method, stepping, "dt0", "dt_max")
        return replace(self, stepping=stepping)

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        if torch.is_grad_enabled():
            given = [*leaves((t, y, field.args)), *field.dynamics.parameters()]
            _refuse_gradients(given)
            _refuse_gradients(leaves(field.drift(t, y)))  # what the field closes over
        return None

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        from scipy.integrate import solve_ivp

        assert self.stepping is not None
        if torch.is_grad_enabled():
            _refuse_gradients([t1])
        stepping, start, end = self.stepping, to_float(t0), to_float(t1)
        finite = True

        def f(t: float, flat: Any) -> Any:
            nonlocal finite
            slope = _to_numpy(field.drift(float(t), _to_state(flat, y)))
            finite = bool(np.isfinite(slope).all())
            return slope

        first = None if stepping.dt0 is None else min(stepping.dt0, abs(end - start))
        with torch.no_grad():
            try:
                found = solve_ivp(
                    f, (start, end), _to_numpy(y), method=self.method, t_eval=(end,),
                    rtol=stepping.rtol, atol=stepping.atol, first_step=first,
                    max_step=stepping.dt_max,
                )  # fmt: skip
            except ValueError:  # linear algebra on a Jacobian that is not finite
                if finite:
                    raise
                return _Failed(y, Status.NON_FINITE, _NOT_FINITE.format(start, end))
            if not found.success:
                cause = f"SciPy's {self.method} gave up between t = {start:.6g} and {end:.6g}"
                cure = "loosen rtol and atol, try another method, or look at the field there"
                return _Failed(y, Status.UNDERFLOW, f"{cause} ({found.message}): {cure}")
            if not np.isfinite(found.y).all():
                return _Failed(y, Status.NON_FINITE, _NOT_FINITE.format(start, end))
            return _Span(_to_state(found.y[:, -1], y))


_ALL = frozenset(("diagonal", "scalar", "additive", "general"))
_COMMUTING = _ALL - {"general"}
_TORCHSDE: Mapping[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "euler": (("ito",), _ALL),
    "milstein": (("ito", "stratonovich"), _COMMUTING),
    "srk": (("ito",), _COMMUTING),
    "midpoint": (("stratonovich",), _ALL),
    "heun": (("stratonovich",), _ALL),
    "euler_heun": (("stratonovich",), _ALL),
    "reversible_heun": (("stratonovich",), _ALL),
}


@dataclass(frozen=True)
class TorchSDE(Engine):
    """torchsde's ``sdeint``, from one save time to the next, on a path of ours.

    ``Fixed(dt=...)`` gives its step size; ``Adaptive(rtol, atol)`` has it double its steps, from
    ``dt0`` on. States are ``(batch, d)``, time runs forwards and is the same for all. The seed
    decides, as everywhere: torchsde asks our path for every increment. Gradients by all but times
    run through its operations (``Direct``).

    Args:
        method: torchsde's name of it. ``"log_ode"`` takes Levy areas, which no path here hands out.
        options: torchsde's own options.

    Raises:
        ValueError: on another name.
        TypeError: on noise or a calculus that the method does not take.

    Source: https://github.com/google-research/torchsde; Li et al. 2020, arXiv 2001.01328.
    """

    method: str = "srk"
    options: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict, repr=False)
    order = 1
    dense_order = 0

    def __post_init__(self) -> None:
        if self.method not in _TORCHSDE:
            raise ValueError(f"torchsde's methods are {', '.join(_TORCHSDE)}; got {self.method!r}")

    @property
    def correlated(self) -> bool:
        """Whether it takes no double integrals of W: see ``Stochastic``."""
        return _TORCHSDE[self.method][1] is _ALL

    def fits(self, noise: Noise) -> bool:
        """Whether it integrates dynamics with this noise."""
        readings, kinds = _TORCHSDE[self.method]
        reads = noise.additive or ("ito" if noise.ito else "stratonovich") in readings
        return reads and _noise_type(noise) in kinds

    def check(self, dynamics: Dynamics) -> None:
        noise = check_noise(self, dynamics)
        if not self.fits(noise):
            reading = "Ito" if noise.ito else "Stratonovich"
            others = [f'TorchSDE("{m}")' for m in _TORCHSDE if TorchSDE(m).fits(noise)]
            raise TypeError(
                f"torchsde's {self.method} does not integrate {reading} SDEs with "
                f"{_noise_type(noise)} noise. Use {' or '.join(others)}"
            )

    def bind(self, stepping: Stepping) -> Engine:
        if isinstance(stepping, Adaptive):
            _check_numbers("torchsde", self.method, stepping, "dt0")
            own = {} if stepping.dt0 is None else {"dt": stepping.dt0}
            keywords = {"adaptive": True, "rtol": stepping.rtol, "atol": stepping.atol, **own}
        elif isinstance(stepping, Fixed) and stepping.dt is not None:
            keywords = {"dt": stepping.dt}
        else:
            raise TypeError(
                f"torchsde's {self.method} steps by itself: give Fixed(dt=...) or "
                "Adaptive(rtol, atol)"
            )
        return replace(self, keywords={"options": dict(self.options), **keywords})

    def draws(self, dynamics: Dynamics, y: State) -> Draws:
        if not isinstance(y, Tensor) or y.ndim != 2:
            raise TypeError(
                f"torchsde moves a state of shape (batch, d); got {describe(y)}: reshape it, or "
                "use a stochastic method of the library"
            )
        shapes = check_noise(self, dynamics).shapes(y)
        return Draws(shapes, "H" if self.method == "srk" else "W", within=True)

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        from torchsde import sdeint

        assert dw is not None
        assert dw.within is not None
        if t1 < t0:
            raise TypeError("torchsde runs forwards in time: use EulerMaruyama() or another")
        calculus = "ito" if "ito" in _TORCHSDE[self.method][0] else "stratonovich"
        if field.noise is not None and not field.noise.additive:
            calculus = "ito" if field.noise.ito else "stratonovich"
        ends = sdeint(
            _Sde(field, calculus), y, on_device([t0, t1], y), bm=_Driver(dw.within, dw.w),
            method=self.method, **self.keywords,
        )  # fmt: skip
        return _Span(ends[-1])


def _noise_type(noise: Noise) -> str:
    """torchsde's name of it."""
    return "additive" if noise.kind == "general" and noise.additive else noise.kind


class _Sde:
    """A field as torchsde asks for it."""

    def __init__(self, field: Field, calculus: str) -> None:
        assert field.noise is not None
        self._field, self._scalar = field, field.noise.kind == "scalar"
        self.sde_type, self.noise_type = calculus, _noise_type(field.noise)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._field.drift(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self._field.diffusion(t, y)
        return g[..., None] if self._scalar else g


class _Driver:
    """A path over one step as torchsde asks for it: W and, with it, the integral of W."""

    levy_area_approximation = "space-time"

    def __init__(self, within: Callable[[Scalar, Scalar], Increment], w: Tensor) -> None:
        self._within, self.dtype, self.device = within, w.dtype, w.device
        self.shape = w.shape if w.ndim == 2 else torch.Size((len(w), 1))

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor,
        return_U: bool = False,  # noqa: N803
        return_A: bool = False,  # noqa: N803
    ) -> Any:
        dw = self._within(to_float(ta), to_float(tb))
        w = dw.w.reshape(self.shape)
        if not return_U:
            return w
        assert dw.h is not None
        return w, (tb - ta).to(self.dtype) * (0.5 * w + dw.h.reshape(self.shape))


_NOT_FINITE = (
    "the field is not finite between t = {:.6g} and {:.6g}: look at the field there, bound its "
    "output, or stop before"
)


def _refuse_gradients(values: list[Any]) -> None:
    if any(isinstance(x, Tensor) and x.requires_grad for x in values):
        raise TypeError(
            "no gradient passes through SciPy: solve inside torch.no_grad(), give "
            "adjoint=Backsolve(integrator=Tsit5()), or use an integrator such as Tsit5()"
        )


def _to_numpy(y: State) -> Any:
    """All components in one float64 vector; a complex one is two."""
    flat = [torch.view_as_real(x) if x.is_complex() else x for x in map(torch.detach, leaves(y))]
    return torch.cat([x.reshape(-1).cpu().double() for x in flat]).numpy()


def _to_state(flat: Any, like: State) -> State:
    parts, at, source = [], 0, torch.from_numpy(np.array(flat))
    for leaf in leaves(like):
        width = leaf.numel() * (2 if leaf.is_complex() else 1)
        part, at = source[at : at + width], at + width
        if leaf.is_complex():
            part = torch.view_as_complex(part.reshape(-1, 2))
        parts.append(part.reshape(leaf.shape).to(leaf))
    return unflatten(parts, like)


class _Span(Step):
    __slots__ = ()

    def dense(self, theta: Scalar) -> State:
        if to_float(theta) == 1.0:
            return self.y1
        raise TypeError("an outside engine has no dense output: name the times in save_at")


class _Failed(_Span):
    __slots__ = ("failure",)

    def __init__(self, y0: State, status: Status, message: str) -> None:
        super().__init__(y0)
        self.failure = status, message
