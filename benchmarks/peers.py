"""flowsde and the libraries beside it, each behind the same small interface.

A ``Library`` makes a ``Solver`` of a problem, a method and a tolerance. A solver counts once, with
a field that counts its calls and their rows, and is timed as often as wanted with the bare field.
Gradients are off. Peers that are not installed are reported so and left out; diffrax runs in a
process of its own, jitted, on one thread.
"""

from __future__ import annotations

import inspect
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.integrators.base import Engine

from .problems import Problem
from .timing import clock

__all__ = [
    "PEERS",
    "SDE_PEERS",
    "Answer",
    "Apart",
    "Exhausted",
    "Failed",
    "Flowsde",
    "Library",
    "Place",
    "Solver",
    "installed",
    "peers",
]

Field = Callable[[Any, Any], Any]


class Failed(Exception):
    """A solve did not reach its end."""


class Exhausted(Failed):
    """It would have taken more evaluations than it may."""


@dataclass(frozen=True)
class Place:
    """Where a solve runs, how precisely, and how many calls of the field it may make."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    calls: int = 50_000


@dataclass(frozen=True)
class Answer:
    """What one counted solve gave.

    Attributes:
        y1: the last state, ``(batch, dim)``.
        calls: of the field, a batched call counting once.
        rows: of the batch in those calls, summed.
        needed: rows that were not finished yet, where the library says so.
    """

    y1: np.ndarray
    calls: int
    rows: int
    needed: int | None = None


class Solver(ABC):
    """One problem, method and tolerance, ready to be solved again and again."""

    @abstractmethod
    def count(self) -> Answer:
        """Solves once, counting. Raises Failed."""

    @abstractmethod
    def time(self) -> float:
        """Seconds of one solve."""


class Library(ABC):
    """A library of solvers."""

    name: ClassVar[str]

    @abstractmethod
    def methods(self, stiff: bool) -> Sequence[str]:
        """Its adaptive methods; for stiff problems, those meant for them."""

    @abstractmethod
    def solver(self, problem: Problem, method: str, rtol: float, place: Place) -> Solver:
        """The solver of y(end)."""


class Counted:
    """A field that counts, and gives up after so many calls."""

    def __init__(self, f: Field, limit: int) -> None:
        self._f, self._limit, self.calls, self.rows = f, limit, 0, 0

    def __call__(self, t: Any, y: Any) -> Any:
        self.calls += 1
        self.rows += y.shape[0]
        if self.calls > self._limit:
            raise Exhausted(f"more than {self._limit} evaluations")
        return self._f(t, y)


class TorchLibrary(Library):
    """A library that solves for a field of tensors."""

    failures: ClassVar[tuple[type[Exception], ...]] = ()

    def solver(self, problem: Problem, method: str, rtol: float, place: Place) -> Solver:
        return _TorchSolver(self, problem, method, rtol, place)

    @abstractmethod
    def run(
        self, f: Field, y0: Tensor, end: float, method: str, rtol: float, atol: float
    ) -> Tensor:
        """y(end)."""

    def needed(self) -> int | None:
        """Rows that the last run could not have done without."""
        return None


class _TorchSolver(Solver):
    def __init__(
        self, library: TorchLibrary, problem: Problem, method: str, rtol: float, place: Place
    ) -> None:
        self._library, self._place = library, place
        self._f, self._y0 = problem.torch(place.device, place.dtype)
        self._rest = problem.end, method, rtol, rtol * problem.floor

    def count(self) -> Answer:
        counted, library = Counted(self._f, self._place.calls), self._library
        try:
            with torch.no_grad():
                y1 = library.run(counted, self._y0, *self._rest)
        except library.failures as error:
            raise Failed(str(error)) from error
        if not bool(torch.isfinite(y1).all()):
            raise Failed("the last state is not finite")
        return Answer(
            y1.double().cpu().numpy(), counted.calls, counted.rows, library.needed()
        )  # fmt: skip

    @torch.no_grad()
    def time(self) -> float:
        run = self._library.run
        return clock(lambda: run(self._f, self._y0, *self._rest), self._place.device)


class Flowsde(TorchLibrary):
    """This library, over its catalogue: every integrator with an error estimate.

    Evaluations are counted eagerly, whatever the executor.
    """

    name = "flowsde"
    failures = (fs.SolveError,)

    def __init__(
        self, per_sample: bool = False, executor: fs.Executor = fs.Eager(),
        only: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._per_sample, self._executor, self._only = per_sample, executor, only
        if executor != fs.Eager():
            self.name = f"flowsde {type(executor).__name__}"
        self._dynamics: dict[Field, fs.ODE] = {}  # what is compiled lives as long as its dynamics
        self._last: tuple[fs.Stats, int] | None = None
        self.skipped: dict[str, str] = {}

    @cached_property
    def catalogue(self) -> dict[str, fs.Integrator]:
        """By name; ``skipped`` says why others with an error estimate are not in it."""
        dynamics, found = fs.ODE(lambda t, y: -y), {}
        for name in integrators.__all__:
            entry = getattr(integrators, name)
            if not inspect.isclass(entry) or not issubclass(entry, fs.Integrator):
                continue
            if inspect.isabstract(entry) or issubclass(entry, Engine):
                continue
            try:
                made = entry()
                if made.error_order is not None:
                    made.check(dynamics)
                    found[name] = made
            except TypeError as error:
                self.skipped[name] = str(error)
        return dict(sorted(found.items(), key=lambda item: item[1].order))

    def methods(self, stiff: bool) -> Sequence[str]:
        return self._only or tuple(self.catalogue)  # which of them can, is for the problem to say

    def run(
        self, f: Field, y0: Tensor, end: float, method: str, rtol: float, atol: float
    ) -> Tensor:
        stepping = fs.Adaptive(rtol, atol, per_sample=self._per_sample)
        if f not in self._dynamics:
            self._dynamics[f] = fs.ODE(f, batched_time=self._per_sample, rowwise=self._per_sample)
        solution = fs.solve(
            self._dynamics[f], y0, 0.0, end, max_steps=1_000_000,
            integrator=self.catalogue[method], stepping=stepping,
            executor=fs.Eager() if isinstance(f, Counted) else self._executor,
        )  # fmt: skip
        self._last = solution.stats, len(y0)
        return solution.y1

    def needed(self) -> int | None:
        """Calls per attempt times the attempts that each row made while it was not finished."""
        if self._last is None or not isinstance(self._last[0].accepted, Tensor):
            return None
        stats, rows = self._last
        attempts = int((stats.accepted + stats.rejected).sum())
        start = 2  # the first slope and the first step's size
        each = (stats.evaluations - start) / max(1, stats.attempts)
        return round(start * rows + each * attempts)


class TorchDiffEq(TorchLibrary):
    name = "torchdiffeq"
    failures = (AssertionError,)

    def methods(self, stiff: bool) -> Sequence[str]:
        return () if stiff else ("bosh3", "dopri5", "dopri8")

    def run(
        self, f: Field, y0: Tensor, end: float, method: str, rtol: float, atol: float
    ) -> Tensor:
        from torchdiffeq import odeint

        times = torch.tensor([0.0, end], device=y0.device, dtype=torch.float64)
        return odeint(f, y0, times, rtol=rtol, atol=atol, method=method)[-1]


class TorchODE(TorchLibrary):
    """torchode steps per sample, always; rows that have finished are still evaluated."""

    name = "torchode"
    failures = (Failed,)

    def methods(self, stiff: bool) -> Sequence[str]:
        return () if stiff else ("Dopri5", "Tsit5")

    def run(
        self, f: Field, y0: Tensor, end: float, method: str, rtol: float, atol: float
    ) -> Tensor:
        import torchode

        term = torchode.ODETerm(f)
        adjoint = torchode.AutoDiffAdjoint(
            getattr(torchode, method)(term=term),
            torchode.IntegralController(atol=atol, rtol=rtol, term=term),
        )
        ends = torch.tensor([0.0, end], device=y0.device, dtype=y0.dtype).expand(len(y0), 2)
        problem = torchode.InitialValueProblem(y0, ends[:, 0], ends[:, 1], t_eval=ends[:, 1:])
        solution = adjoint.solve(problem)
        if bool((solution.status != 0).any()):
            raise Failed(f"status {solution.status.unique().tolist()}")
        return solution.ys[:, -1]


class TorchDyn(TorchLibrary):
    name = "torchdyn"

    def methods(self, stiff: bool) -> Sequence[str]:
        return () if stiff else ("dopri5", "tsit5")

    def run(
        self, f: Field, y0: Tensor, end: float, method: str, rtol: float, atol: float
    ) -> Tensor:
        from torchdyn.numerics import odeint

        times = torch.tensor([0.0, end], device=y0.device, dtype=y0.dtype)
        return odeint(f, y0, times, solver=method, atol=atol, rtol=rtol)[1][-1]


class SciPy(Library):
    """On the CPU in float64, whatever the place; the batch is one long vector."""

    name = "scipy"

    def methods(self, stiff: bool) -> Sequence[str]:
        return ("Radau", "BDF", "LSODA") if stiff else ("RK45", "DOP853")

    def solver(self, problem: Problem, method: str, rtol: float, place: Place) -> Solver:
        return _SciPySolver(problem, method, rtol, place)


@dataclass
class _SciPySolver(Solver):
    problem: Problem
    method: str
    rtol: float
    place: Place

    def _run(self, f: Field) -> Any:
        from scipy.integrate import solve_ivp

        problem = self.problem
        return solve_ivp(
            f, (0.0, problem.end), problem.y0.ravel(), method=self.method, rtol=self.rtol,
            atol=self.rtol * problem.floor,
        )  # fmt: skip

    def count(self) -> Answer:
        counted, shape = Counted(self.problem.flat(), self.place.calls), self.problem.y0.shape
        solution = self._run(counted)
        if not solution.success:
            raise Failed(solution.message)
        return Answer(
            solution.y[:, -1].reshape(shape), counted.calls, counted.calls * shape[0]
        )  # fmt: skip

    def time(self) -> float:
        return clock(lambda: self._run(self.problem.flat()))


class Apart:
    """An object in a process of its own, where jax runs on one thread; made when first asked.

    Args:
        kind: its class, whose methods are the questions.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._pipe: Any = None

    def ask(self, what: str, *question: Any) -> Any:
        """The answer of its method ``what``; raises what that raised."""
        if self._pipe is None:
            context = get_context("spawn")
            self._pipe, end = context.Pipe()
            context.Process(target=_serve, args=(end, self._kind), daemon=True).start()
        self._pipe.send((what, question))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Diffrax(Library):
    """Jitted, on the CPU with one thread, the batch as one state; compilation is not timed."""

    name = "diffrax"

    def __init__(self) -> None:
        self._apart = Apart(_Jitted)

    def methods(self, stiff: bool) -> Sequence[str]:
        return ("Kvaerno3", "Kvaerno5") if stiff else ("Bosh3", "Dopri5", "Tsit5", "Dopri8")

    def solver(self, problem: Problem, method: str, rtol: float, place: Place) -> Solver:
        return _DiffraxSolver(self._apart, (problem, method, rtol, place))


class _DiffraxSolver(Solver):
    def __init__(self, apart: Apart, question: tuple[Any, ...]) -> None:
        self._apart, self._question = apart, question

    def count(self) -> Answer:
        return self._apart.ask("count", *self._question)

    def time(self) -> float:
        return self._apart.ask("time", *self._question)


def _serve(pipe: Any, kind: type) -> None:
    """Answers questions until nobody asks."""
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )  # fmt: skip
    os.environ["JAX_PLATFORMS"] = "cpu"
    served = kind()
    while True:
        try:
            what, question = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(served, what)(*question))
        except Exception as error:  # whatever it is, it is the other process that asked
            pipe.send(error if isinstance(error, Failed) else Failed(repr(error)))


class _Jitted:
    """diffrax's solves, compiled once for each problem, method and precision."""

    def __init__(self) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self._calls, self._compiled = 0, {}

    def _tick(self) -> None:
        self._calls += 1

    def _solve(self, problem: Problem, method: str, place: Place, counts: bool) -> Any:
        """(rtol) -> (y1, whether it got there)."""
        import diffrax
        import jax
        from jax import numpy as jnp

        key = problem.name, problem.y0.shape, method, place, counts
        if key not in self._compiled:
            dtype = jnp.float64 if place.dtype is torch.float64 else jnp.float32
            y0 = jnp.asarray(problem.y0, dtype)
            bound = problem.bind(jnp, lambda x: jnp.asarray(x, dtype))

            def f(t: Any, y: Any, args: Any) -> Any:
                if counts:
                    jax.debug.callback(self._tick)
                return bound(t, y)

            @jax.jit
            def run(y0: Any, rtol: Any) -> Any:
                solution = diffrax.diffeqsolve(
                    diffrax.ODETerm(f), getattr(diffrax, method)(), 0.0, problem.end, None, y0,
                    stepsize_controller=diffrax.PIDController(
                        rtol=rtol, atol=rtol * problem.floor
                    ),
                    max_steps=place.calls // 3, throw=False,
                )  # fmt: skip
                return solution.ys[-1], solution.result == diffrax.RESULTS.successful

            self._compiled[key] = lambda rtol: jax.block_until_ready(run(y0, rtol))
        return self._compiled[key]

    def count(self, problem: Problem, method: str, rtol: float, place: Place) -> Answer:
        import jax

        y1, reached = self._solve(problem, method, place, False)(rtol)
        if not bool(reached):
            raise Failed("the solve did not reach its end")
        self._calls = 0
        self._solve(problem, method, place, True)(rtol)
        jax.effects_barrier()
        if self._calls > place.calls:
            raise Exhausted(f"more than {place.calls} evaluations")
        y1 = np.asarray(y1, np.float64)
        return Answer(y1, self._calls, self._calls * len(y1))

    def time(self, problem: Problem, method: str, rtol: float, place: Place) -> float:
        solve = self._solve(problem, method, place, False)
        start = time.perf_counter()
        solve(rtol)
        return time.perf_counter() - start


PEERS: dict[str, type[Library]] = {
    peer.name: peer for peer in (TorchDiffEq, TorchODE, TorchDyn, Diffrax, SciPy)
}


SDE_PEERS = ("torchsde", "diffrax")


def installed(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that are installed, and the version of each, or ``"not installed"``."""
    found, report = [], {}
    for name in names:
        known = find_spec(name) is not None
        report[name] = version(name) if known else "not installed"
        if known:
            found.append(name)
        else:
            print(f"{name}: not installed, left out")
    return found, report


def peers(names: Sequence[str] | None) -> tuple[list[Library], dict[str, str]]:
    """Of the libraries that solve ODEs, those that are installed, and the version of each."""
    asked = PEERS if names is None else names
    found, report = installed([name for name in asked if name in PEERS])
    return [PEERS[name]() for name in found], report
