"""The verb: ``solve(dynamics, y0, t0, t1)``."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import _random
from ._increment import Draws, Source, Whole
from ._loop import Loop, Report
from ._plan import AdaptivePlan, GivenPlan, Plan
from ._save import SaveEnd, Saver, SaveRows, SaveSteps, SaveTimes
from ._scalar import Scalar, moving, on_host, resolution, still, to_float, whole
from ._state import NO_STATE, State, batch_size, describe, finite, fits, leaves, mapped, transformed
from .adjoint import Adjoint, Checkpointed, Direct
from .dynamics.base import Dynamics
from .dynamics.discrete import Chain
from .dynamics.field import Field, check_apart
from .errors import MaxStepsReached, NonFiniteState, SolveError, StepUnderflow
from .events import Event, Watch
from .executor import Eager, Executor
from .integrators.base import Engine, Integrator
from .integrators.discrete import Iterate
from .integrators.explicit import Tsit5
from .paths.base import Path, RandomPath
from .paths.brownian import Brownian
from .paths.interval import Outside
from .solution import Solution, Status, Steps
from .stepping import Adaptive, Fixed, Given, Grid, Stepping
from .transforms.calculus import Converted, check_additive, check_diagonal

__all__ = ["Solver", "solve"]

_Verb = TypeVar("_Verb", bound=Callable[..., Any])
SaveAt = Tensor | Sequence[float] | Steps | None
_KINDS = {
    "args": "a tuple of further inputs, args=(u,)",
    "adjoint": "Direct(), Checkpointed(), Reversible() or Backsolve()",
    "executor": "Eager(), Compiled() or Picard()",
    "path": "a Brownian(seed), a BrownianTree(seed, t0, t1), or torchsde's BrownianInterval",
}
_APART = (
    "a solve goes by numbers that the host reads: leave out fullgraph, and have its steps compiled "
    "by executor=Compiled()"
)
_FINE = 1e-12  # of a span: rounding of times that are computed
_ERRORS = {
    Status.MAX_STEPS: MaxStepsReached,
    Status.NON_FINITE: NonFiniteState,
    Status.UNDERFLOW: StepUnderflow,
}


def _by_host(verb: _Verb) -> _Verb:
    """What ``torch.compile`` leaves as it is: a solve goes by numbers that the host reads, and by
    others that no graph should be bound to. The compiler is not imported for it.
    """
    apart: list[Callable[..., Any]] = []

    @functools.wraps(verb)
    def run(*args: Any, **keywords: Any) -> Any:
        if not apart and "torch._dynamo" in sys.modules:
            apart.append(torch.compiler.disable(verb, reason=_APART))  # type: ignore[no-untyped-call]
        return (apart[0] if apart else verb)(*args, **keywords)

    return cast(_Verb, run)


@dataclass(frozen=True, eq=False)
class Solver:
    """The keywords of ``solve``, in a bundle: ``solver.solve(dynamics, y0, t0, t1, **more)``."""

    integrator: Integrator | None = None
    stepping: Stepping | None = None
    adjoint: Adjoint = Direct()
    executor: Executor = Eager()
    max_steps: int = 10_000
    throw: bool = True
    progress: bool | Report = False

    def solve(
        self, dynamics: Dynamics, y0: State, t0: Scalar = 0.0, t1: Scalar | None = None,
        **more: Any,
    ) -> Solution:  # fmt: skip
        """``solve`` with this solver's keywords; ``more`` goes before them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return solve(dynamics, y0, t0, t1, **{**own, **more})


@_by_host
def solve(
    dynamics: Dynamics,
    y0: State,
    t0: Scalar = 0.0,
    t1: Scalar | None = None,
    *,
    args: tuple[Any, ...] = (),
    integrator: Integrator | None = None,
    stepping: Stepping | None = None,
    adjoint: Adjoint = Direct(),
    save_at: SaveAt = None,
    dense: bool = False,
    events: Event | Sequence[Event] | None = None,
    path: RandomPath | Callable[..., Any] | None = None,
    generator: torch.Generator | None = None,
    max_steps: int = 10_000,
    executor: Executor = Eager(),
    throw: bool = True,
    progress: bool | Report = False,
) -> Solution:
    """Moves y0 from t0 to t1, in either direction.

    Args:
        dynamics: an ``ODE``, ``SDE``, ``CDE``, ``Chain`` or ``Map``, or what a transformation of
            one returned.
        y0: a tensor, or any pytree of tensors, real or complex; batch first where there is one.
        t0, t1: floats; 0-d tensors, to differentiate by them; or ``(batch,)``, for spans of each
            sample's own. t1 defaults to the dynamics' horizon.
        args: more inputs of the field, ``f(t, y, *args)``.
        integrator: ``Tsit5()`` for ODEs and CDEs, ``Iterate()`` for chains and maps by default.
        stepping: ``Fixed``, ``Grid`` or ``Adaptive``; by default ``Adaptive()`` for ODEs.
        adjoint: ``Direct()``, ``Checkpointed()``, ``Reversible()`` or ``Backsolve()``.
        save_at: times to keep, ordered from t0 towards t1, ``(n,)`` or per sample ``(batch, n)``;
            or ``Steps(every)``. Between the given steps of an SDE lies a chord, which has not the
            law of its path: let a step end there, or choose the steps (``Adaptive`` lands on them).
        dense: keep what ``sol(t)`` needs.
        events: an ``Event`` or several: crossings to find, to end at or to go on from changed.
        path: for stochastic dynamics a ``Brownian``, a ``BrownianTree``, or a function
            ``path(ta, tb)`` such as torchsde's ``BrownianInterval``; or give
        generator: from which one seed is drawn, for noise and for probes.
        max_steps: attempts allowed.
        executor: how steps are run.
        throw: raise one ``SolveError`` at the end of a failed solve; else look at ``status``. Where
            a field is not finite for some samples, gradients by what all samples share, such as
            parameters, are not either: leave those samples out and solve again.
        progress: True shows a bar; a function ``(done, t, y)`` is called after each step with the
            part of the way that is done, 0 to 1, the time reached and the state, for previews such
            as ``flow.denoiser(t, y)``. It sees each step, and so one at a time is taken.

    Returns:
        A ``Solution``: ``y1``, ``ts``, ``ys``, ``stats``, ``status``.

    Raises:
        TypeError: on an integrator, stepping or adjoint that the dynamics does not admit, a
            stochastic solve without randomness, per-sample times that the field does not take.
        ValueError: on times, steps or states out of range.
        MaxStepsReached, NonFiniteState, StepUnderflow: with ``solution``, what was computed.
    """
    _check_dynamics(dynamics)
    _check_state(y0)
    driver = _driver(path)
    for name, value, kind in (
        ("args", args, tuple), ("adjoint", adjoint, Adjoint), ("executor", executor, Executor),
        ("path", driver, (RandomPath, type(None))),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {_KINDS[name]}; got {type(value).__name__}")
    if not whole(max_steps, 0):
        raise ValueError(f"max_steps is a whole number >= 0; got {max_steps}")
    t1 = _horizon(dynamics, t0) if t1 is None else t1
    integrator, stepping = _choose(dynamics, integrator, stepping)
    _check_transformed(adjoint, dynamics, stepping, (y0, args, t0, t1), events)
    _check_errors(integrator, stepping, y0)
    span = _Span.of(dynamics, y0, t0, t1, stepping, save_at)
    seed = _seed(dynamics, generator)
    known, dynamics = dynamics, dynamics.prepare(y0, seed)
    field = Field(dynamics, args, y0)
    grid = None if isinstance(stepping, Adaptive) else _grid(dynamics, integrator, stepping, span)
    integrator = integrator.bind(stepping)
    integrator = integrator if grid is None else integrator.along(grid)
    if isinstance(integrator, Engine):
        if isinstance(stepping, Adaptive) and (stepping.step_at or stepping.jump_at):
            raise TypeError("an outside engine steps by itself: leave out step_at and jump_at")
        grid = _save_grid(span, save_at)
    draws = integrator.draws(dynamics, y0)
    draws = None if draws is None else replace(draws, normal=executor.normal)
    landings = None
    if draws is not None and isinstance(stepping, Adaptive):
        _check_rough(stepping, span, draws, dense)
        landings = span.saves
    plan = _plan(dynamics, integrator, stepping, span, grid, y0, landings)
    if span.batch is not None:
        integrator.check_own_times()
        check_apart(known, field, span.t0, y0)
    noise = None
    if draws is not None:
        _check_noise(
            driver, known, field, integrator, stepping, adjoint, draws, span.t0, y0
        )  # fmt: skip
        noise = _noise(driver, seed, grid, draws, span)
    elif path is not None:
        raise TypeError("this solve takes no noise: leave out path")
    watch = None
    if events is not None:
        watch = _watch(events, field, integrator, adjoint, span.batch)

    with _bar(progress) as report:
        loop = Loop(
            field, integrator, stepping, plan, span.saver(save_at), noise, y0, max_steps, dense,
            report, watch,
        )  # fmt: skip
        executor.prepare(loop, known)
        solution = adjoint.run(loop)
    if not solution.success and span.batch is None:
        solution.message += known.hint(to_float(span.t0)) or known.hint(to_float(span.t1))
    if throw and not solution.success:
        raise _error(solution)
    return solution


def _check_dynamics(dynamics: Dynamics) -> None:
    if not isinstance(dynamics, Dynamics):
        raise TypeError(
            f"solve takes dynamics; got {type(dynamics).__name__}. Wrap a field: ODE(f), SDE(f, g, "
            "noise='diagonal')"
        )


def _check_state(y0: State) -> None:
    flat = leaves(y0)
    if not flat or not all(isinstance(leaf, Tensor) for leaf in flat):
        raise TypeError(NO_STATE)
    if not all(leaf.is_floating_point() or leaf.is_complex() for leaf in flat):
        raise TypeError(f"y0 is real or complex; got {describe(y0)}. Use y0.float()")
    if len({leaf.device for leaf in flat}) > 1:
        raise TypeError(f"y0 lies on several devices: {describe(y0)}. Move it to one")
    if any(leaf.is_meta for leaf in flat) or mapped(y0):
        return
    if not finite(y0):
        raise ValueError("y0 holds values that are not finite: clean it with torch.nan_to_num")


def _check_transformed(
    adjoint: Adjoint, dynamics: Dynamics, stepping: Stepping, given: tuple[Any, ...], events: Any
) -> None:
    """Refuses what torch.func's transformations cannot do to a solve."""
    if not isinstance(adjoint, Direct) and torch.is_grad_enabled() and transformed():
        raise TypeError(
            f"torch.func does not see into {type(adjoint).__name__}: use adjoint=Direct(), or "
            "torch.autograd.grad"
        )
    if not transformed() or not mapped((given, *dynamics.parameters(), *dynamics.buffers())):
        return
    if isinstance(stepping, Adaptive):
        raise TypeError(
            "vmap cannot choose steps: give Fixed(...) or Grid(...), or leave vmap out and solve "
            "the batch with Adaptive(per_sample=True)"
        )
    if events is not None or mapped(given[2:]):
        raise TypeError(
            "vmap maps over neither events nor ends: leave it out, and give each sample its own, "
            "with t1 of shape (batch,)"
        )


def _choose(
    dynamics: Dynamics, integrator: Integrator | None, stepping: Stepping | None
) -> tuple[Integrator, Stepping]:
    """Defaults by kind, and whether the two go together."""
    chain, stochastic = isinstance(dynamics, Chain), dynamics.noise is not None
    if integrator is None:
        if stochastic:
            raise TypeError(
                "name the integrator of an SDE: integrator=EulerMaruyama(), or StochasticHeun() "
                "for additive or Stratonovich noise"
            )
        integrator = Iterate() if chain else Tsit5()
    if not isinstance(integrator, Integrator):
        raise TypeError(f"integrator is an object such as Dopri5(); got {integrator!r}")
    integrator.check(dynamics)
    if chain:
        if stepping is not None:
            raise TypeError("a chain steps from one whole number to the next: leave out stepping")
        return integrator, Fixed(dt=1.0)
    adaptive = integrator.error_order is not None and not stochastic
    if stepping is None:
        if not adaptive and not isinstance(integrator, Engine):
            raise TypeError(
                f"{type(integrator).__name__} needs its steps named: stepping=Fixed(steps=100), "
                "Fixed(dt=.01) or Grid(times)"
            )
        stepping = Adaptive()
    if not isinstance(stepping, Stepping):
        raise TypeError(f"stepping is an object such as Fixed(steps=50); got {stepping!r}")
    if isinstance(stepping, Adaptive) and not isinstance(integrator, Engine):
        integrator.exponent(dynamics)
    return integrator, stepping


def _horizon(dynamics: Dynamics, t0: Scalar) -> float:
    """Where a solve ends of which only the start was said."""
    if isinstance(t0, Tensor) and t0.ndim == 1:
        raise TypeError(
            "t0 has a start for each sample: give t1, too. Of the times of an odeint call give "
            "the ends, and all of them to be saved: solve(dynamics, y0, ts[0], ts[-1], save_at=ts)"
        )
    return dynamics.horizon


def _check_errors(integrator: Integrator, stepping: Stepping, y0: State) -> None:
    """Refuses to choose steps by errors that half precision rounds away, or by tolerances that
    are not of the state.
    """
    if not isinstance(stepping, Adaptive) or (isinstance(integrator, Engine) and integrator.exact):
        return
    for name, value in (("rtol", stepping.rtol), ("atol", stepping.atol)):
        for leaf in leaves(y0):
            if isinstance(value, Tensor) and not fits(value.shape, leaf.shape):
                raise ValueError(
                    f"{name} of shape {tuple(value.shape)} does not broadcast to a state of "
                    f"{describe(y0)}: give a number, (d,) for components or (batch, 1) for samples"
                )
    if any(torch.finfo(leaf.dtype).bits < 32 for leaf in leaves(y0)):
        raise TypeError(
            f"half precision rounds away the errors that steps are chosen by; got {describe(y0)}. "
            "Give y0.float() (a network may still autocast), or a few tens of steps by Fixed(...) "
            "or Grid(...): the increments of many are rounded away, too"
        )


def _check_rough(stepping: Adaptive, span: _Span, draws: Draws, dense: bool) -> None:
    """Refuses what steps chosen along a Brownian path cannot give."""
    if draws.extra is not None:
        raise TypeError(
            "this method draws numbers beside its path, anew for each try, so that keeping or "
            "rejecting a step would choose among them: use Fixed(...) or Grid(...)"
        )
    if dense:
        raise TypeError(
            "between the chosen steps of an SDE no state is known, and a chord is not its path: "
            "name the times in save_at, on which steps then end"
        )
    if stepping.jump_at:
        raise TypeError(
            "an SDE's steps start afresh anyway: give the times where f or g jumps as step_at"
        )
    times = (span.t0, span.t1, span.saves)
    if torch.is_grad_enabled() and any(moving(t) for t in times):
        raise TypeError(
            "a solution along a given Brownian path has no derivative by time: detach() t0, t1 and "
            "save_at"
        )


@dataclass
class _Span:
    """The times of one solve: floats or 0-d tensors, or columns of the batch."""

    t0: Any
    t1: Any
    batch: int | None
    sign: Any
    saves: Tensor | None

    @classmethod
    def of(
        cls, dynamics: Dynamics, y0: State, t0: Scalar, t1: Scalar, stepping: Stepping,
        save_at: SaveAt,
    ) -> _Span:  # fmt: skip
        """Checks them, and whether the batch shares its time."""
        ends: list[Any] = [_time(t, name) for t, name in ((t0, "t0"), (t1, "t1"))]
        saves, slack = None, max(resolution(t) for t in (t0, t1, save_at))
        if save_at is not None and not isinstance(save_at, Steps):
            saves = _wide(save_at)
            if saves.ndim not in (1, 2):
                raise ValueError(f"save_at is (n,) or (batch, n); got shape {tuple(saves.shape)}")
        own = isinstance(stepping, Adaptive) and stepping.per_sample
        own |= isinstance(stepping, Grid) and stepping.grid.ndim == 2
        own |= any(isinstance(t, Tensor) and t.ndim == 1 for t in ends)
        own |= saves is not None and saves.ndim == 2
        if not own:
            a, b = (to_float(t) for t in ends)
            dynamics.check_span(a, b)
            moved = [t for t in ends if isinstance(t, Tensor)]
            saves = saves if saves is None or not moved else saves.to(moved[0].device)
            span = cls(ends[0], ends[1], None, 1.0 if b >= a else -1.0, saves)
            span._check_saves(slack)
            return span
        _check_rows(ends, batch_size(y0))
        if not dynamics.batched_time:
            raise TypeError(
                f"this {type(dynamics).__name__} was not declared to take t of shape (batch,): "
                "give ODE(f, batched_time=True) if f does (t[:, None] broadcasts against y), or "
                "let the batch share its time"
            )
        batch, device = batch_size(y0), leaves(y0)[0].device
        if batch is None:
            raise TypeError(f"per-sample times need a batch-first state; got {describe(y0)}")
        wide = _random.widest(device)
        columns = []
        for t, name in zip(ends, ("t0", "t1"), strict=True):
            column = _wide(t)
            if column.ndim and column.shape != (batch,):
                raise ValueError(
                    f"{name} has shape {tuple(column.shape)}: give a number, or one time a sample, "
                    f"({batch},)"
                )
            columns.append(column.to(dtype=wide, device=device).expand(batch))
        gap = (columns[1] - columns[0]).detach()
        if batch:
            low, high = (float(end) for end in torch.stack(columns).detach().aminmax())
            dynamics.check_span(*((high, low) if bool((gap < 0).any()) else (low, high)))
        sign = torch.where(gap >= 0, 1.0, -1.0).to(gap)
        span = cls(columns[0], columns[1], batch, sign, saves)
        if saves is not None:
            if saves.ndim == 1:
                saves = saves.expand(batch, -1)
            if saves.shape[0] != batch:
                raise ValueError(f"save_at is (n,) or ({batch}, n); got {tuple(saves.shape)}")
            span.saves = saves.to(dtype=wide, device=device).T
        span._check_saves(slack)
        return span

    def _check_saves(self, rounding: float) -> None:
        if self.saves is None:
            return
        ends, shared = (self.t0, self.t1), self.batch is None
        at: Any = on_host(self.saves) if shared else self.saves.detach()
        t0, t1 = places = _places(ends, shared)
        slack = rounding * (abs(t0) + abs(t1)) + _FINE * abs(t1 - t0)
        inside = ((at - t0) * self.sign >= -slack) & ((at - t1) * self.sign <= slack)
        if len(at) and not bool(inside.all()):
            raise ValueError("save_at reaches outside [t0, t1]: save between the ends of the solve")
        if moving(self.saves) and len(at) and bool(torch.as_tensor(t1 - t0 == 0).any()):
            raise ValueError(
                "states saved on a span of no length have no derivative by their times here: "
                "detach() save_at, or take that of y1 by t1"
            )
        if not bool(((at[1:] - at[:-1]) * self.sign >= 0).all()):
            raise ValueError("save_at runs from t0 towards t1: sort it in that direction")
        self.saves = _snap(self.saves, places if self.empty else ends, self.sign, rounding, shared)

    @property
    def empty(self) -> bool:
        return self.batch is None and to_float(self.t0) == to_float(self.t1)

    def rest(self, dynamics: Dynamics) -> list[Scalar]:
        """The times of a solve that goes nowhere: one; both ends where a slope is asked for."""
        asked = any(isinstance(t, Tensor) for t in (self.t0, self.t1))
        return [self.t0, self.t1] if asked and dynamics.noise is None else [self.t0]

    def saver(self, save_at: SaveAt) -> Saver:
        if self.saves is not None:
            if self.batch is None:
                return SaveTimes(self.saves, self.sign)
            return SaveRows(self.saves, self.sign)
        return SaveSteps(save_at) if isinstance(save_at, Steps) else SaveEnd()


def _places(ends: tuple[Any, Any], shared: bool) -> tuple[Any, Any]:
    """Where they are, whatever moves by them."""
    t0, t1 = (to_float(t) if shared else still(t) for t in ends)
    return t0, t1


def _snap(
    saves: Tensor, ends: tuple[Any, Any], sign: Any, rounding: float, shared: bool
) -> Tensor:  # fmt: skip
    """Times within rounding of an end, or beyond it, are that end; they move with it, or in their
    own way.
    """
    own, places = moving(saves), _places(ends, shared)
    fine = _FINE * abs(places[1] - places[0])
    for end, place, way in zip(ends, places, (-sign, sign), strict=True):
        at: Any = on_host(saves) if shared else saves.detach()
        near = abs(at - place) <= fine + 0.5 * rounding * abs(place)
        near = near | ((at - place) * way > 0)
        if isinstance(end, float) and not (near & (at != place)).any():  # they are there already
            continue
        near = torch.as_tensor(near, device=saves.device)
        target = place if own or not bool(near.any()) else end
        saves = saves + torch.where(near, target - saves.detach(), 0.0)
    return saves


def _check_rows(ends: list[Any], batch: int | None) -> None:
    """Refuses a time of one number that is no batch's."""
    for name, t in zip(("t0", "t1"), ends, strict=True):
        if isinstance(t, Tensor) and t.shape == (1,) and batch != 1:
            raise ValueError(
                f"{name} has shape (1,): give a 0-d tensor, {name}[0], for a time that the batch "
                "shares"
            )


def _wide(t: Any) -> Tensor:
    """Times in float64: none is rounded to float32 on the way."""
    if isinstance(t, Tensor):
        return t if t.device.type == "mps" else t.double()
    tensors = [x for x in t if isinstance(x, Tensor)] if isinstance(t, Sequence) else []
    if tensors:  # stacked, they keep their gradients
        rows = [_wide(x).to(tensors[0].device) for x in t]
        if all(x.numel() == 1 for x in rows):
            rows = [x.reshape(()) for x in rows]
        if len({x.shape for x in rows}) > 1:
            shapes = [tuple(x.shape) for x in rows]
            raise ValueError(f"save_at is (n,) or (batch, n); got a list of shapes {shapes}")
        return torch.stack(rows)
    return torch.tensor(t, dtype=torch.float64)


def _time(t: Scalar, name: str) -> Scalar:
    if isinstance(t, Tensor):
        if t.ndim > 1 or t.is_complex():
            raise ValueError(f"{name} is a number, a 0-d tensor or (batch,); got {tuple(t.shape)}")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{name} is not finite: {t}. With an event, a late time will do")
        if t.ndim == 0:
            return _wide(t) if moving(t) else float(t)
        return t
    if isinstance(t, bool) or not isinstance(t, numbers.Real):
        raise TypeError(f"{name} is a number or a tensor; got {type(t).__name__}")
    if not math.isfinite(t):
        raise ValueError(f"{name} is not finite: {t}. With an event, a late time will do")
    return float(t)


def _grid(
    dynamics: Dynamics, integrator: Integrator, stepping: Stepping, span: _Span
) -> list[Scalar]:
    """The steps of a given stepping; a single time where there is nothing to do."""
    assert isinstance(stepping, Given)
    if isinstance(dynamics, Chain):
        for t in (span.t0, span.t1):
            if isinstance(t, Tensor) or t != int(t) or not 0 <= t <= len(dynamics):
                raise ValueError(
                    f"a chain of {len(dynamics)} steps runs between whole numbers 0 .. "
                    f"{len(dynamics)}; got t = {t}"
                )
    if span.batch is not None and isinstance(stepping, Grid) and stepping.grid.ndim == 2:
        rows, device = stepping.grid.shape[1], span.t0.device
        if rows != span.batch:
            raise ValueError(f"the grid has {rows} columns for a batch of {span.batch}: one each")
        stepping = Grid(stepping.grid.to(dtype=span.t0.dtype, device=device))
    elif span.batch is not None and isinstance(stepping, Grid):
        stepping = Grid(stepping.grid.to(span.t0)[:, None].expand(-1, span.batch))
    return span.rest(dynamics) if span.empty else stepping.times(span.t0, span.t1)


def _save_grid(span: _Span, save_at: SaveAt) -> list[Scalar]:
    """An outside engine's steps: from one save time to the next."""
    if span.batch is not None or isinstance(save_at, Steps):
        raise TypeError("an outside engine has one time for all, and save_at as times")
    saves = span.saves
    if saves is not None and moving(_wide(save_at)):
        raise TypeError(
            "an outside engine gives no gradient by save_at, only by t0 and t1: detach() the times"
        )
    inner = [] if saves is None else saves.tolist()
    ends = {to_float(span.t0), to_float(span.t1)}
    inner = [t for t in dict.fromkeys(inner) if t not in ends]
    if span.empty and moving(span.t1 - span.t0):
        raise TypeError(
            "an outside engine has no slope by the ends of a solve that goes nowhere: detach() them"
        )
    return [span.t0] if span.empty else [span.t0, *inner, span.t1]


def _plan(
    dynamics: Dynamics, integrator: Integrator, stepping: Stepping, span: _Span,
    grid: list[Scalar] | None, y0: State, landings: Tensor | None,
) -> Plan:  # fmt: skip
    if grid is not None:
        return GivenPlan(grid, span.batch, integrator.cure)
    assert isinstance(stepping, Adaptive)
    if span.empty:
        return GivenPlan(span.rest(dynamics), None)
    dtype = leaves(y0)[0].dtype.to_real()
    return AdaptivePlan(stepping, integrator, span.t0, span.t1, span.batch, dtype, landings)


def _seed(dynamics: Dynamics, generator: torch.Generator | None) -> int | None:
    """One seed a solve, from the caller's generator."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is a torch.Generator; got {type(generator).__name__}")
        return _random.draw_seed(generator)
    if dynamics.random:
        raise TypeError(
            "this solve draws probes: give generator=torch.Generator().manual_seed(...)"
        )
    return None


def _driver(path: Any) -> Any:
    """A function of two times is a Brownian motion from outside; a control path is none."""
    return Outside(path) if callable(path) and not isinstance(path, Path) else path


def _check_noise(
    path: Any, known: Dynamics, field: Field, integrator: Integrator, stepping: Stepping,
    adjoint: Adjoint, draws: Draws, t: Scalar, y: State,
) -> None:  # fmt: skip
    """Refuses noise that is not what the formulas of this solve take it for."""
    equation = adjoint.equation(field.dynamics)
    _check_correlation(path, equation, integrator, draws)
    check_additive(known, field, t, y)
    goes_back = equation is not field.dynamics and torch.is_grad_enabled()
    chosen = isinstance(stepping, Adaptive) and not isinstance(integrator, Engine)
    if chosen or goes_back or isinstance(field.dynamics, Converted):
        check_diagonal(known, field, t, y)


def _check_correlation(path: Any, dynamics: Dynamics, integrator: Integrator, draws: Draws) -> None:
    """Refuses correlated increments where formulas take them for independent ones."""
    if getattr(path, "correlation", None) is None or dynamics.noise is None:
        return
    if draws.extra is not None:
        raise TypeError(
            f"{type(integrator).__name__} draws numbers beside W, which have no correlation: use "
            "EulerMaruyama(), ExponentialEuler() or DPMSolverPP(), or give the factor L of the "
            "correlation to the diffusion, noise='general'"
        )
    own = getattr(integrator, "method", None)  # of what wraps another
    method = own if isinstance(own, Integrator) else integrator
    if dynamics.whitens:
        raise TypeError(
            "a divergence or a weight of paths, a bridge, and a conversion between Ito and "
            "Stratonovich, as Backsolve makes, take W for independent components of variance 1: "
            "leave out correlation, and give its factor L to the diffusion, noise='general'"
        )
    if not (getattr(method, "correlated", True) or dynamics.noise.additive):
        raise TypeError(
            f"{type(method).__name__} takes W for independent components of variance 1: use "
            "EulerMaruyama() or StochasticHeun(), or leave out correlation and give its factor L "
            "to the diffusion, noise='general'"
        )


def _noise(
    path: RandomPath | None, seed: int | None, grid: list[Scalar] | None, draws: Draws, span: _Span
) -> Source:
    if path is None:
        if seed is None:
            raise TypeError(
                "a stochastic solve needs its randomness: path=Brownian(seed) or generator=..."
            )
        path = Brownian(seed)
    if grid is None:
        return path.tree(span.t0, span.t1, draws)
    return Whole(path.tree(grid[0], grid[-1], draws)) if draws.within else path.bind(grid, draws)


def _watch(
    events: Event | Sequence[Event], field: Field, integrator: Integrator, adjoint: Adjoint,
    batch: int | None,
) -> Watch:  # fmt: skip
    """The events of one solve, or a TypeError where none can be found."""
    several = tuple(events) if isinstance(events, Sequence) else (events,)
    if not several or not all(isinstance(event, Event) for event in several):
        raise TypeError("events is an Event(fn), or a list of them")
    if field.noise is not None or isinstance(field.dynamics, Chain):
        raise TypeError(
            f"events are zeros of a smooth solution; {type(field.dynamics).__name__} has none: "
            "look at save_at=Steps()"
        )
    if isinstance(integrator, Engine):
        raise TypeError(
            f"{type(integrator).__name__} shows no states between its ends: use Tsit5() or another "
            "integrator of the library"
        )
    if not isinstance(adjoint, (Direct, Checkpointed)):
        raise TypeError("events differentiate through Direct() or Checkpointed()")
    return Watch(several, field, batch)


class _bar:  # noqa: N801
    """Who is told of the way from t0 to t1: nobody, a progress bar, or a function of the user's."""

    def __init__(self, show: bool | Report) -> None:
        self._show = show
        self._bar: Any = None

    def __enter__(self) -> Report | None:
        if not self._show:
            return None
        if callable(self._show):
            return self._show
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                "progress=True shows a bar of tqdm: pip install tqdm, or give progress a function"
            ) from error
        self._bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", desc="solve")
        return lambda done, t, y: self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _error(solution: Solution) -> SolveError:
    status = solution.status
    if isinstance(status, Tensor):
        status = Status(int(status.max()))  # failures are positive
    return _ERRORS[status](solution.message, solution)
