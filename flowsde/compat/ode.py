"""torchdiffeq's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._scalar import moving
from .._state import State, leaves, tree_map
from ..adjoint import Adjoint, Checkpointed, Direct
from ..dynamics.differential import ODE
from ..events import Event
from ..integrators.base import Integrator
from ..integrators.engines import SciPy
from ..integrators.explicit import Bosh3, Dopri5, Dopri8, Euler, Heun, Midpoint
from ..integrators.runge_kutta import ExplicitRK, Tableau
from ..solution import Status
from ..solve import Solver
from ..stepping import Adaptive, Fixed, Grid, Stepping, rms_norm

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

_PATIENCE = 100_000  # steps in which an event has to come, if nobody says how many


@dataclass(frozen=True)
class _Fehlberg2(ExplicitRK):
    """Order 2(1). Source: Fehlberg 1969, NASA TR R-315."""

    tableau = Tableau(
        c=(0, 1 / 2, 1), a=((1 / 2,), (1 / 256, 255 / 256)), b=(1 / 512, 255 / 256, 1 / 512),
        order=2, b_low=(1 / 256, 255 / 256, 0), order_low=1,
    )  # fmt: skip


@dataclass(frozen=True)
class _Heun3(ExplicitRK):
    """Order 3. Source: Heun 1900."""

    tableau = Tableau(c=(0, 1 / 3, 2 / 3), a=((1 / 3,), (0, 2 / 3)), b=(1 / 4, 0, 3 / 4), order=3)


@dataclass(frozen=True)
class _ThreeEighths(ExplicitRK):
    """Order 4. Source: Kutta 1901."""

    tableau = Tableau(
        c=(0, 1 / 3, 2 / 3, 1), a=((1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8), order=4,
    )  # fmt: skip


_GIVEN: Mapping[str, Integrator] = {
    "euler": Euler(), "midpoint": Midpoint(), "heun2": Heun(), "heun3": _Heun3(),
    "rk4": _ThreeEighths(),
}  # fmt: skip
_CHOSEN: Mapping[str, Integrator] = {
    "dopri5": Dopri5(), "dopri8": Dopri8(), "bosh3": Bosh3(), "adaptive_heun": Heun(),
    "fehlberg2": _Fehlberg2(),
}  # fmt: skip
_NAMES = {  # of options, there and here
    "first_step": "dt0", "min_step": "dt_min", "max_step": "dt_max", "safety": "safety",
    "ifactor": "factor_max", "dfactor": "factor_min",
}  # fmt: skip
_TIMES = {"step_t": "step_at", "jump_t": "jump_at"}
_CALLBACKS = "callback_step", "callback_accept_step", "callback_reject_step"


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> Any:
    """torchdiffeq's ``odeint``: dy/dt = func(t, y), y(t[0]) = y0.

    Gradients by y0, t and whatever func depends on pass through the steps. States between steps of
    one size are the method's own dense output, where torchdiffeq draws chords unless told
    ``interp="cubic"``.

    Args:
        func: ``func(t, y)``, shaped as y, t 0-d.
        y0: a tensor, or a tuple of tensors.
        t: ``(n,)``, rising or falling.
        rtol, atol: tolerances, for the methods that choose their steps.
        method: ``"dopri5"`` (the default), ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``,
            ``"adaptive_heun"``, which choose their steps; ``"euler"``, ``"midpoint"``, ``"heun2"``,
            ``"heun3"``, ``"rk4"`` (the 3/8 rule), which step from one of t to the next unless
            options say otherwise; ``"scipy_solver"``.
        options: ``first_step``, ``min_step``, ``max_step``, ``step_t``, ``jump_t``, ``safety``,
            ``ifactor``, ``dfactor``, ``max_num_steps`` (of the whole solve) and ``norm`` of the
            former methods, ``step_size`` or ``grid_constructor`` of the latter, ``solver`` of
            SciPy's.
        event_fn: ``event_fn(t, y)``, of any shape: the solve starts at t[0] towards t[1] and goes
            on, beyond it too, until one of its numbers is zero, for ``max_num_steps`` at the most,
            100,000 if none are given.

    Returns:
        ``(n, *y0.shape)``, or a tuple of such, the first being y0. With event_fn the time of the
        event, and the states at t[0] and there, differentiable as those of ``Event``.

    Raises:
        ValueError: on other methods, or times that are not ``(n,)`` and monotone.
        TypeError: on other options, and on functions with callbacks.
        SolveError: with ``solution``, what was computed, if the solve fails.

    Source: https://github.com/rtqichen/torchdiffeq; Chen et al. 2018, arXiv 1806.07366.
    """
    return _run(Direct(), func, y0, t, rtol, atol, method, options, event_fn)


def odeint_adjoint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """torchdiffeq's ``odeint_adjoint``: ``odeint`` in little memory, by ``Checkpointed()``.

    Steps are taken again on the way back, so that the gradient is that of the solve to rounding,
    and reaches all that func depends on. What torchdiffeq's adjoint_* arguments say is how exact,
    by which method, and of which parameters a second solve backwards finds another one: here there
    is none, and nothing for them to say. ``solve(..., adjoint=Backsolve())`` is that solve.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as of ``odeint``.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params: not used.

    Returns:
        As ``odeint``.

    Raises:
        TypeError: as ``odeint``; and on functions that do not repeat themselves, as with dropout.
    """
    return _run(Checkpointed(), func, y0, t, rtol, atol, method, options, event_fn)


def odeint_event(
    func: Callable[..., State],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **keywords: Any,
) -> tuple[Tensor, Any]:
    """torchdiffeq's ``odeint_event``: from t0 on, or back, until ``event_fn(t, y)`` is zero.

    Args:
        func, y0, event_fn: as of ``odeint``.
        t0: 0-d.
        reverse_time: run down in time.
        odeint_interface: ``odeint`` or ``odeint_adjoint``.
        keywords: of that.

    Returns:
        The time of the event, and the states at t0 and there.

    Raises:
        MaxStepsReached: where there was none within the steps.
    """
    start = t0.reshape(())
    t = torch.stack((start, start.detach() + (-1.0 if reverse_time else 1.0)))
    return odeint_interface(func, y0, t, event_fn=event_fn, **keywords)


def _run(
    adjoint: Adjoint, func: Callable[..., State], y0: State, t: Tensor, rtol: float | Tensor,
    atol: float | Tensor, method: str | None, options: Mapping[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> Any:  # fmt: skip
    gaps = t.detach().diff() if isinstance(t, Tensor) and t.ndim == 1 and len(t) else None
    if gaps is None or not bool((gaps > 0).all() | (gaps < 0).all()):
        raise ValueError("t is a tensor of times, (n,), strictly rising or falling")
    for name in _CALLBACKS:
        if hasattr(func, name):
            raise TypeError(
                f"func has a {name}, which is not called here: solve(..., progress=call) calls "
                "call(done, t, y) after each step"
            )
    ode = ODE(func)
    if event_fn is not None:
        return _until(event_fn, adjoint, ode, y0, t, rtol, atol, method, options)
    if len(t) == 1:
        return tree_map(lambda x: x[None], y0)
    solver = _solver(adjoint, ode, y0, t, rtol, atol, method or "dopri5", dict(options or {}))
    t0, t1 = (t[0], t[-1]) if moving(t) else (float(t[0]), float(t[-1]))
    return solver.solve(ode, y0, t0, t1, save_at=t).ys


def _solver(
    adjoint: Adjoint, ode: ODE, y0: State, t: Tensor, rtol: float | Tensor, atol: float | Tensor,
    method: str, options: dict[str, Any],
) -> Solver:  # fmt: skip
    """What these words ask for."""
    known, stepping, most = _methods(method, options), None, options.pop("max_num_steps", None)
    if method in _GIVEN:
        stepping = _given(ode, y0, t, options)
    else:
        stepping = _chosen(rtol, atol, options, isinstance(y0, Tensor), method in _CHOSEN)
    if options:
        raise TypeError(f"{method} has no options {sorted(options)}")
    return Solver(known, stepping, adjoint, max_steps=sys.maxsize if most is None else int(most))


def _methods(method: str, options: dict[str, Any]) -> Integrator:
    known = {**_GIVEN, **_CHOSEN}
    if method == "scipy_solver":
        return SciPy(options.pop("solver", "LSODA"))
    if method not in known:
        raise ValueError(
            f"method is one of {sorted(known)} and 'scipy_solver'; got {method!r}. Of multistep "
            "methods solve has Adams(), of implicit ones Kvaerno5() and others"
        )
    return known[method]


def _given(ode: ODE, y0: State, t: Tensor, options: dict[str, Any]) -> Stepping:
    size, make = options.pop("step_size", None), options.pop("grid_constructor", None)
    if options.pop("interp", "cubic") not in ("linear", "cubic"):
        raise TypeError("interp is 'linear' or 'cubic'; states between steps are dense output")
    if options.pop("perturb", False):
        raise TypeError(
            "perturb=True, a look at either side of each time, is for fields that jump there: "
            "give their times to a method that chooses its steps, options={'jump_t': times}"
        )
    if size is not None and make is not None:
        raise ValueError("give step_size or grid_constructor, one of the two")
    if size is not None:
        return Fixed(dt=float(size))
    return Grid(t if make is None else make(ode.f, y0, t))


def _chosen(
    rtol: float | Tensor, atol: float | Tensor, options: dict[str, Any], one: bool, own: bool
) -> Adaptive:
    if options.pop("dtype", torch.float64) not in (torch.float64, None):
        raise TypeError("times are float64 on the host: leave out dtype")
    more: dict[str, Any] = {
        mine: float(options.pop(name)) for name, mine in _NAMES.items() if name in options
    }
    more |= {mine: options.pop(name) for name, mine in _TIMES.items() if name in options}
    norm = options.pop("norm", None)
    if norm is not None:
        more["norm"] = lambda scaled, per_sample: norm(scaled)
    elif own and not one:
        more["norm"] = _mixed
    return Adaptive(rtol, atol, **more)


def _mixed(scaled: State, per_sample: bool) -> Tensor:
    """The largest of the parts' root mean squares: torchdiffeq's norm of a tuple."""
    return torch.stack([rms_norm(part, per_sample) for part in leaves(scaled)]).amax(0)


def _until(
    event_fn: Callable[..., Tensor], adjoint: Adjoint, ode: ODE, y0: State, t: Tensor,
    rtol: float | Tensor, atol: float | Tensor, method: str | None,
    options: Mapping[str, Any] | None,
) -> tuple[Tensor, State]:  # fmt: skip
    """On, over twice as long a stretch each time, until a number of event_fn is zero."""
    if len(t) != 2:
        raise ValueError(f"with event_fn t is a start and a time in the direction; got {len(t)}")
    if method in _GIVEN and "step_size" not in (options or {}):
        raise ValueError(f"nobody knows where {method} ends: give options={{'step_size': dt}}")
    told = {"max_num_steps": _PATIENCE, **(options or {})}
    solver = _solver(adjoint, ode, y0, t, rtol, atol, method or "dopri5", told)
    start: Any = t[0] if moving(t) else float(t[0])
    width = float((t[1] - t[0]).detach())
    if isinstance(solver.stepping, Fixed) and solver.stepping.dt is not None:
        steps = max(1.0, round(abs(width) / solver.stepping.dt))
        width = steps * solver.stepping.dt * (1.0 if width > 0 else -1.0)
    with torch.no_grad():
        count = event_fn(t[0].detach(), y0).numel()
    events = [Event(_number(event_fn, i)) for i in range(count)]
    y = y0
    while True:
        found = solver.solve(ode, y, start, start + width, events=events)
        if found.status == Status.EVENT:
            states = tree_map(lambda a, b: torch.stack((a, b)), y0, found.y1)
            return torch.as_tensor(found.t1).to(t), states
        left = solver.max_steps - found.stats.attempts
        y, start, width = found.y1, found.t1, 2.0 * width
        solver = replace(solver, max_steps=left)


def _number(event_fn: Callable[..., Tensor], i: int) -> Callable[..., Tensor]:
    return lambda t, y: event_fn(t, y).reshape(-1)[i]
