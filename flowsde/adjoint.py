"""How gradients come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._backsolve import Back, Taken
from ._graft import Inputs, graft
from ._loop import Loop, Recorder
from ._plan import AdaptivePlan
from ._retrace import Trail, Way
from ._save import SaveRows
from ._scalar import Scalar, moving, to_float
from ._state import State
from ._tape import Tape
from .dynamics.base import Dynamics
from .dynamics.discrete import Chain
from .integrators.base import Engine, Integrator, ReversibleIntegrator
from .integrators.stochastic import Stochastic, StochasticHeun
from .solution import Solution
from .stepping import Adaptive, Grid, Norm, Stepping, max_norm, rms_norm
from .transforms.calculus import to_stratonovich
from .transforms.costate import costate

__all__ = ["Adjoint", "Backsolve", "Checkpointed", "Direct", "Reversible"]


class Adjoint(ABC):
    """How gradients come back through a solve."""

    def equation(self, dynamics: Dynamics) -> Dynamics:
        """What it takes back: for most the steps of the dynamics as they are."""
        return dynamics

    @abstractmethod
    def run(self, loop: Loop) -> Solution:
        """Runs the loop so that its outputs differentiate in this way."""


@dataclass(frozen=True)
class Direct(Adjoint):
    """Through every operation of the accepted steps: exact, memory grows with the steps."""

    def run(self, loop: Loop) -> Solution:
        return loop.run(Recorder())


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """The same gradient from recomputed steps, bit by bit, but for the order in which those by y0
    are summed where states are saved.

    Keeps some states on the way and, in the backward pass, takes the steps between them again, with
    the same times and the same noise. What a step saves for its backward is held for a few steps
    at a time, at first for the last ones, which are not taken again; closures, frozen and shared
    parameters are no different from ``Direct``. The field must be deterministic. Beside the saved
    tensors, the times of all steps and the graph's nodes stay.

    Args:
        budget: bytes that saved tensors and kept states may take together, however many steps
            there will be; the least that works is one step and two states. None: a state every 16
            steps and the tensors of 16 steps; all but the last 16 are taken again, once.

    Raises:
        ValueError: on a budget < 1.
        RuntimeError: in the backward pass, if recomputation does not meet the forward pass, or what
            it needs was changed in place.

    Source: Griewank and Walther 2000 (revolve); Wang, Moin and Iaccarino 2009 (steps not known
    beforehand); Chen et al. 2016, arXiv 1604.06174.
    """

    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"Checkpointed(budget) is a number of bytes >= 1; got {self.budget}")

    def run(self, loop: Loop) -> Solution:
        if isinstance(loop.integrator, Engine):
            raise TypeError(
                f"{type(loop.integrator).__name__} takes its own steps, which cannot be taken "
                "again one by one: use adjoint=Direct()"
            )
        if not torch.is_grad_enabled():
            return loop.run(Recorder())
        try:
            return loop.run(Tape(self.budget))
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise TypeError(
                "Checkpointed does not follow torch.func.grad, vjp or jacrev within a field: write "
                "torch.autograd.grad(..., create_graph=True) there, or use adjoint=Direct()"
            ) from error


def _refuse(adjoint: str, loop: Loop) -> None:
    """Outputs through which no gradient would come back."""
    if loop.dense:
        raise TypeError(
            f"{adjoint} gives no gradient through dense output: name the times in save_at, or use "
            "adjoint=Checkpointed()"
        )
    if isinstance(loop.saver, SaveRows):
        raise TypeError(
            f"{adjoint} saves at times that the batch shares: give save_at as (n,) without "
            "per-sample stepping, or use adjoint=Checkpointed()"
        )


def _times(*times: Scalar | None) -> list[Tensor]:
    """Those that a gradient is asked for by, each once."""
    found = {id(t): t for t in times if isinstance(t, Tensor) and t.requires_grad}
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Backsolve(Adjoint):
    """The continuous adjoint: a second solve, from t1 back to t0, of state, costate and integrals.

        da/dt = -(df/dy)^T a,    dL/dtheta = integral over [t0, t1] of (df/dtheta)^T a

    An SDE goes back over its own steps, on its own Brownian path, as the Stratonovich equation of
    ``costate``; an Ito one is converted.

    Memory does not grow with the steps, but the gradient is that of the equation, not of the
    discrete solve: it errs with both tolerances, and on contracting fields the state is not met
    again on the way back (at saved times it is reset to what was saved). ``Checkpointed`` is exact
    and mostly faster.

    Args:
        integrator, stepping: of the way back; None for those of the way there. SDEs go back by an
            integrator that takes g by its products with dW: by ``StochasticHeun()`` where None is
            given and that of the way there does not; their steps are those of the way there.
            An implicit method's systems are there as large as state, cotangent and all parameters:
            give it ``GMRES()`` where those are many, or an explicit one.
        seminorm: leave the integrals over parameters out of the error norm (Kidger et al. 2021).

    Raises:
        TypeError: on chains, dense output, times of each sample's own, grids that are learned, and
            on tensors that the field holds on to from outside of its parameters and args; these are
            looked for at both ends of the span; on fields that do not repeat themselves. With noise
            also on times that ask for a gradient and on save times between the steps.
        SolveError: in the backward pass, if the solve back fails.

    Source: Chen et al. 2018, arXiv 1806.07366; Kidger et al. 2021, arXiv 2009.09457; Li et al.
    2020, arXiv 2001.01328.
    """

    integrator: Integrator | None = None
    stepping: Stepping | None = None
    seminorm: bool = True

    def equation(self, dynamics: Dynamics) -> Dynamics:
        return dynamics if dynamics.noise is None else to_stratonovich(dynamics)

    def run(self, loop: Loop) -> Solution:
        inputs, start = Inputs.of(loop.field, loop.y0), loop.plan.t
        if not torch.is_grad_enabled():
            return loop.run(Recorder())
        dynamics = self.equation(loop.field.dynamics)
        integrator, stepping = self._check(loop, dynamics)
        trail = None if loop.noise is None else Trail()
        with torch.no_grad():
            solution = loop.run(Recorder() if trail is None else trail)
        times = _times(start, solution.t1, loop.saver.times)
        first = inputs.check("Backsolve", start, loop.y0)
        inputs.check("Backsolve", solution.t1, solution.y1)
        if not inputs.any(times):
            return solution
        inputs.repeats("Backsolve", start, loop.y0, first)
        steps = None if trail is None else _steps(trail, times, solution.ts)
        back = Back(
            loop, dynamics, inputs, integrator, stepping, start, solution, steps, bool(times)
        )

        def pullback(end: State, rows: State | None) -> list[Tensor | None]:
            found, by_time = back.run(end, rows)
            return [*found, *(by_time[id(t)].to(t) for t in times)]

        return graft(solution, inputs, times, pullback)

    def _check(self, loop: Loop, dynamics: Dynamics) -> tuple[Integrator, Stepping]:
        _refuse("Backsolve", loop)
        if isinstance(dynamics, Chain):
            raise TypeError("Backsolve needs continuous time: use adjoint=Checkpointed()")
        if isinstance(loop.plan.t, Tensor) and loop.plan.t.ndim:
            raise TypeError(
                "Backsolve has one time for all: use adjoint=Checkpointed() with per-sample times"
            )
        if loop.noise is not None:
            return self._check_noise(loop, dynamics), loop.stepping
        if isinstance(loop.stepping, Grid) and moving(loop.stepping.grid):
            raise TypeError(
                "Backsolve gives the gradient of the equation, which a grid's inner times do not "
                "move: detach() the grid, or learn it through adjoint=Checkpointed()"
            )
        integrator = self.integrator or loop.integrator
        if isinstance(integrator, Engine):
            raise TypeError(
                f"Backsolve does not go back with {type(integrator).__name__}: give "
                "Backsolve(integrator=Tsit5(), stepping=Adaptive())"
            )
        stepping = self.stepping or loop.stepping
        if isinstance(stepping, Adaptive):
            if any(isinstance(x, Tensor) and x.ndim for x in (stepping.rtol, stepping.atol)):
                raise TypeError(
                    "Backsolve takes tolerances that are numbers: give Backsolve(stepping="
                    "Adaptive(rtol, atol))"
                )
            stepping = replace(stepping, norm=_joint(stepping.norm, self.seminorm))
        try:
            integrator.check(costate(dynamics))
        except TypeError as error:
            if self.integrator is not None:
                raise
            raise TypeError(
                f"Backsolve does not go back with {type(integrator).__name__}, as the way back has "
                "not the structure of the way there: give Backsolve(integrator=Tsit5(), stepping="
                "Adaptive()), or Kvaerno5() of a stiff field"
            ) from error
        return integrator.bind(stepping), stepping

    def _check_noise(self, loop: Loop, dynamics: Dynamics) -> Integrator:
        """The integrator of the way back, over the steps of the way there."""
        if isinstance(loop.integrator, Engine):
            raise TypeError(
                f"Backsolve does not see the steps of {type(loop.integrator).__name__}: use "
                "adjoint=Direct()"
            )
        if self.stepping is not None:
            raise TypeError("Backsolve of an SDE takes the same steps back: leave out its stepping")
        noise, own = costate(dynamics).noise, loop.integrator
        assert noise is not None
        if self.integrator is None:
            return own if isinstance(own, Stochastic) and own.fits(noise) else StochasticHeun()
        self.integrator.check(costate(dynamics))
        return self.integrator


def _steps(trail: Trail, times: Sequence[Tensor], saved: Tensor | None) -> list[Taken]:
    """The steps of a stochastic solve, to be taken back; a TypeError where that is not enough."""
    if times or _times(*(t for mark in trail.marks for t in (mark.t0, mark.t1))):
        raise TypeError(
            "a Brownian path has no slope in time: no gradient by times comes back through "
            "Backsolve. Direct() gives that of the discrete solve"
        )
    steps = [(mark.n, to_float(mark.t0), to_float(mark.t1)) for mark in trail.marks]
    if saved is not None and steps:
        ends = torch.tensor([steps[0][1], *(t1 for _, _, t1 in steps)], dtype=torch.float64)
        slack = 1e-6 * float((ends[-1] - ends[0]).abs())  # save times may be of float32
        if any(float((ends - t).abs().min()) > slack for t in saved.tolist()):
            raise TypeError(
                "Backsolve starts again from what an SDE's solve has saved, at the ends of steps: "
                "give Grid(times) that holds save_at, or save_at=Steps()"
            )
    return steps


def _joint(norm: Norm, seminorm: bool) -> Norm:
    """That of (y, a, integrals), from one of y: a user's own does not know of more."""
    if norm in (rms_norm, max_norm):
        return (lambda scaled, per_sample: norm(scaled[:2], per_sample)) if seminorm else norm

    def joint(scaled: State, per_sample: bool) -> Tensor:
        y, a, integrals = scaled
        found = torch.maximum(norm(y, per_sample), norm(a, per_sample))
        if seminorm or not integrals:
            return found
        return torch.maximum(found, rms_norm(integrals, per_sample).to(found))

    return joint


@dataclass(frozen=True)
class Reversible(Adjoint):
    """The exact gradient of the discrete solve from steps taken back, one by one.

    Nothing of the states is kept: each is found again from the one after it, algebraically, by a
    ``ReversibleIntegrator``. What stays is the times of the steps.

    Raises:
        TypeError: on an integrator whose steps do not reverse, dense output, ``jump_at``, save
            times of each sample's own, chosen steps between differentiable ends of each sample's
            own, and on tensors that the field holds on to from outside of
            its parameters and args; these are looked for at both ends of the span.

    Source: Zhuang et al. 2021, arXiv 2102.04668; Kidger et al. 2021, arXiv 2105.13493 (SDEs);
    McCallum and Foster 2024, arXiv 2410.11648.
    """

    def run(self, loop: Loop) -> Solution:
        if not isinstance(loop.integrator, ReversibleIntegrator):
            raise TypeError(
                f"{type(loop.integrator).__name__} has no way back: use integrator="
                "ReversibleRK(...) around an explicit Runge-Kutta method, ReversibleHeun() for an "
                "SDE, or Checkpointed()"
            )
        inputs, trail = Inputs.of(loop.field, loop.y0), Trail()
        start = loop.plan.t
        if not torch.is_grad_enabled():
            return loop.run(Recorder())
        _refuse("Reversible", loop)
        if isinstance(loop.plan, AdaptivePlan) and loop.plan.own_ends:
            raise TypeError(
                "Reversible gives no gradients by ends of each sample's own to chosen steps: "
                "detach t0 and t1, take Fixed(steps), or use adjoint=Checkpointed()"
            )
        if isinstance(loop.stepping, Adaptive) and loop.stepping.jump_at:
            raise TypeError(
                "Reversible does not take back a fresh start: use adjoint=Checkpointed() with "
                "jump_at"
            )
        with torch.no_grad():
            solution = loop.run(trail)
        ends = (t for mark in trail.marks for t in (mark.t0, mark.t1))
        times = _times(start, solution.t1, loop.saver.times, *ends)
        for t, y in ((start, loop.y0), (solution.t1, solution.y1)):
            inputs.check("Reversible", t, y)
        if not inputs.any(times):
            return solution
        way = Way(replace(loop, field=inputs.field), inputs, trail, solution, start, times)
        return graft(solution, inputs, times, way.pullback)
