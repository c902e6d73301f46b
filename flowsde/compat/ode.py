"""torchdiffeq's functions."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._scalar import moving
from .._state import State, leaves, on_device, tree_map
from ..adjoint import Adjoint, Backsolve, Checkpointed, Direct
from ..dynamics.differential import ODE
from ..errors import MaxStepsReached
from ..events import Event
from ..integrators.base import Integrator
from ..integrators.engines import SciPy
from ..integrators.explicit import Bosh3, Dopri5, Dopri8, Euler, Heun, Midpoint
from ..integrators.runge_kutta import ExplicitRK, Tableau
from ..solution import Status
from ..solve import Solver
from ..stepping import Adaptive, Fixed, Grid, Norm, Stepping, rms_norm

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

_PATIENCE = 20_000  # steps in which an event has to come, if nobody says how many


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
_CALLBACKS = [
    f"callback_{when}{way}"
    for when in ("step", "accept_step", "reject_step") for way in ("", "_adjoint")
]  # fmt: skip


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
            options say otherwise; ``"scipy_solver"``. For each of t within a step ``"dopri8"``
            takes one more, to there: states between are of its full order.
        options: ``first_step``, ``min_step``, ``max_step``, ``step_t``, ``jump_t``, ``safety``,
            ``ifactor``, ``dfactor``, ``max_num_steps`` (of the whole solve) and ``norm`` of the
            former methods, ``step_size`` or ``grid_constructor`` of the latter, ``solver`` of
            SciPy's.
        event_fn: ``event_fn(t, y)``, of any shape: the solve starts at t[0] towards t[1] and goes
            on, beyond it too, until one of its numbers, none of which is zero at t[0], crosses
            zero, for ``max_num_steps`` at the most, 20,000 if none are given.

    Returns:
        ``(n, *y0.shape)``, or a tuple of such, the first being y0. With event_fn the time of the
        event, and the states at t[0] and there, differentiable as those of ``Event``.

    Raises:
        ValueError: on other methods, times that are not ``(n,)`` and monotone, an event at t[0].
        TypeError: on other options, tolerances of each part's own, functions with callbacks, and
            where a gradient would have to pass through SciPy.
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
        func, y0, t, rtol, atol, method, options, event_fn: as of ``odeint``. The way back of
            ``"scipy_solver"`` is ``Backsolve(Dopri5())``, with the same tolerances.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params: not used.

    Returns:
        As ``odeint``.

    Raises:
        ValueError, TypeError, SolveError: as ``odeint``.
        RuntimeError: from the backward pass, if func does not repeat itself, as with dropout.
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
    t = t if t.is_floating_point() else t.to(torch.get_default_dtype())
    ode = ODE(func if isinstance(y0, Tensor) else _Parts(func))
    known = {name: value for name, value in (options or {}).items() if value is not None}
    if event_fn is not None:
        known.setdefault("max_num_steps", _PATIENCE)
    solver = _solver(adjoint, ode, y0, t, rtol, atol, method or "dopri5", known)
    if event_fn is not None:
        return _until(event_fn, solver, ode, y0, t)
    if len(t) == 1:
        return tree_map(lambda x: x[None], y0)
    t0, t1 = (t[0], t[-1]) if moving(t) else (float(t[0]), float(t[-1]))
    return solver.solve(ode, y0, t0, t1, save_at=t).ys


class _Parts(nn.Module):
    """A function of a tuple, which may return a list."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.func(t, y))


def _solver(
    adjoint: Adjoint, ode: ODE, y0: State, t: Tensor, rtol: float | Tensor, atol: float | Tensor,
    method: str, options: dict[str, Any],
) -> Solver:  # fmt: skip
    """What these words ask for."""
    most, stepping = int(options.pop("max_num_steps", sys.maxsize)), None
    if method in _GIVEN:
        known, stepping = _GIVEN[method], _given(ode, y0, t, options)
    elif method in _CHOSEN:
        norm = rms_norm if isinstance(y0, Tensor) else _mixed
        known, stepping = _CHOSEN[method], _chosen(rtol, atol, options, norm)
    elif method == "scipy_solver":
        known = SciPy(options.pop("solver", "LSODA"))
        stepping = _chosen(rtol, atol, options, rms_norm)
        adjoint = adjoint if isinstance(adjoint, Direct) else Backsolve(Dopri5(), stepping)
    else:
        raise ValueError(
            f"method is one of {sorted([*_GIVEN, *_CHOSEN])} and 'scipy_solver'; got {method!r}. "
            "Of multistep methods solve has Adams(), of implicit ones Kvaerno5() and others"
        )
    if options:
        raise TypeError(f"{method} has no options {sorted(options)}")
    return Solver(known, stepping, adjoint, max_steps=most)


def _given(ode: ODE, y0: State, t: Tensor, options: dict[str, Any]) -> Stepping:
    size, make = options.pop("step_size", None), options.pop("grid_constructor", None)
    interp, perturb = options.pop("interp", "cubic"), options.pop("perturb", False)
    if interp not in ("linear", "cubic"):
        raise TypeError("interp is 'linear' or 'cubic'; states between steps are dense output")
    if perturb:
        raise TypeError(
            "perturb=True, a look at either side of each time, is for fields that jump there: "
            "give their times to a method that chooses its steps, options={'jump_t': times}"
        )
    if size is not None and make is not None:
        raise ValueError("give step_size or grid_constructor, one of the two")
    if size is not None:
        return Fixed(dt=size if moving(size) else float(size))
    return Grid(t if make is None else make(ode.f, y0, t))


def _chosen(
    rtol: float | Tensor, atol: float | Tensor, options: dict[str, Any], norm: Norm
) -> Adaptive:
    if isinstance(rtol, tuple | list) or isinstance(atol, tuple | list):
        raise TypeError("rtol and atol are for all parts of a state: scale the parts, or give norm")
    if options.pop("dtype", torch.float64) != torch.float64:
        raise TypeError("times are float64 on the host: leave out dtype")
    more: dict[str, Any] = {
        mine: float(options.pop(name)) for name, mine in _NAMES.items() if name in options
    }
    more |= {mine: options.pop(name) for name, mine in _TIMES.items() if name in options}
    own = options.pop("norm", None)
    if own is not None:
        norm = lambda scaled, per_sample: own(scaled)  # noqa: E731
    return Adaptive(rtol, atol, norm=norm, **more)


def _mixed(scaled: State, per_sample: bool) -> Tensor:
    """The largest of the parts' root mean squares: torchdiffeq's norm of a tuple."""
    return torch.stack([rms_norm(part, per_sample) for part in leaves(scaled)]).amax(0)


def _until(
    event_fn: Callable[..., Tensor], solver: Solver, ode: ODE, y0: State, t: Tensor
) -> tuple[Tensor, State]:
    """On, over twice as long a stretch each time, until a number of event_fn crosses zero."""
    if len(t) != 2:
        raise ValueError(f"with event_fn t is a start and a time in the direction; got {len(t)}")
    if isinstance(solver.stepping, Grid):
        raise ValueError("nobody knows where the steps end: give options={'step_size': dt}")
    with torch.no_grad():
        signs = event_fn(t[0].detach(), y0).sign()
    if not bool(signs.all()):
        raise ValueError("event_fn is zero at t[0] already: start a little beyond")
    event = Event(lambda t, y: (event_fn(t, y) * signs).amin(), direction=-1)  # the first of them
    start, width = t[0] if moving(t) else float(t[0]), float((t[1] - t[0]).detach())
    if isinstance(solver.stepping, Fixed) and solver.stepping.dt is not None:
        steps = max(1.0, round(abs(width) / solver.stepping.dt))
        width = math.copysign(steps * solver.stepping.dt, width)
    y, part = y0, solver
    while True:
        try:
            found = part.solve(ode, y, start, start + width, events=event)
        except MaxStepsReached as error:
            raise MaxStepsReached(
                f"event_fn did not cross zero in {solver.max_steps} steps, up to t = "
                f"{float(error.solution.t1):g}: raise options={{'max_num_steps': ...}}, or look at "
                "its sign there",
                error.solution,
            ) from None
        if found.status == Status.EVENT:
            states = tree_map(lambda a, b: torch.stack((a, b)), y0, found.y1)
            return on_device(found.t1, y0).to(t), states
        y, start, width = found.y1, found.t1, 2.0 * width
        part = replace(part, max_steps=part.max_steps - found.stats.attempts)
