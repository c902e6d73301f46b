"""Solvers fitted to a model. A solve is differentiable by its times and its coefficients: both are
learned here, from fine trajectories of the same model.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ._files import load_checkpoint, save_checkpoint
from ._increment import Increment
from ._scalar import Scalar, to_float
from ._state import State, leaves
from .dynamics.base import Dynamics, SemiLinear
from .dynamics.field import Field
from .dynamics.noising import Reverse
from .integrators.base import Carry, Integrator, Step
from .integrators.explicit import Dopri5
from .integrators.exponential import Exponential
from .paths import NaturalCubic
from .paths.grids import aligned, karras, quadratic, uniform, uniform_lambda
from .solution import Solution
from .solve import Solver, solve
from .stepping import Adaptive, Grid, Stepping

__all__ = [
    "Frontier", "Nonstationary", "Trial", "distill_solver", "frontier", "optimize_grid",
]  # fmt: skip

FINE = Solver(integrator=Dopri5(), stepping=Adaptive(1e-8, 1e-8))


@dataclass(frozen=True, eq=False)
class Nonstationary(Integrator):
    """A solver of N evaluations of a probability flow, each step with weights of its own.

        r_k = residual(t_k, x_k),    x_(k+1) = w_k0 x_0 + sum_(j <= k) w_k(j+1) r_j

    Every explicit exponential method on given steps is one: see ``distill_solver``, which makes
    them. It steps on its own times alone: ``fitted.solver.solve(flow, x, t0, t1)``. Its states
    inside are what the model is shown best, and no more: there is nothing to save between.

    Args:
        times: ``(N + 1,)``, from the start to the end; the model is asked at all but the last.
        table: ``(N, N + 1)``, the weights w; those of residuals to come are not read.
        dual: whether the residual is that of the split's ``dual``: the noise, not the data.
        lambdas: ``(N + 1,)``, log(alpha / sigma) at the times, by the schedule it was fitted to;
            None where any will do.

    Raises:
        ValueError: on shapes that do not go together, times that turn back, other steps, or a flow
            of another schedule.
        TypeError: on dynamics other than a probability flow.

    Source: Shaul et al. 2024, "Bespoke non-stationary solvers", arXiv 2403.01329.
    """

    times: Tensor
    table: Tensor
    dual: bool = False
    lambdas: Tensor | None = None
    order = 1
    dense_order = 0
    static = False

    def __post_init__(self) -> None:
        steps = len(self.grid.grid) - 1
        if self.table.shape != (steps, steps + 1):
            raise ValueError(
                f"{steps} steps take a table of shape {(steps, steps + 1)}; got "
                f"{tuple(self.table.shape)}"
            )

    @property
    def grid(self) -> Grid:
        """Its steps."""
        return Grid(self.times)

    @property
    def solver(self) -> Solver:
        """It, and its steps."""
        return Solver(integrator=self, stepping=self.grid)

    def save(self, path: str | Path) -> None:
        """Writes it to a file, whole or not at all."""
        save_checkpoint(path, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote."""
        return cls(**load_checkpoint(path))

    def check(self, dynamics: Dynamics) -> None:
        flow = check_flow(self, dynamics)
        if self.lambdas is None:
            return
        if not torch.allclose(_lambdas(flow, self.times), self.lambdas, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"the solver was fitted to a flow of another schedule than {flow.denoiser.schedule}"
                ": fit one to this flow, as the weights know of the schedule"
            )

    def bind(self, stepping: Stepping) -> Integrator:
        grid = stepping.grid.to(self.times) if isinstance(stepping, Grid) else self.times[:0]
        if not torch.equal(grid, self.times):
            raise ValueError("a fitted solver steps on its own times: give stepping=fitted.grid")
        return self

    def init(self, field: Field, t: Scalar, y: State) -> Carry:
        return y, ()

    def step(
        self, field: Field, t0: Scalar, t1: Scalar, y: State, dw: Increment | None, carry: Carry
    ) -> Step:
        assert field.split is not None
        split = self.split(field.split)
        start, before = carry
        residuals = (*before, field.residual(t0, y, split))
        return _End(self.state(split, start, residuals), (start, residuals))

    def split(self, split: SemiLinear) -> SemiLinear:
        """The one that it steps by: a flow's own, or its dual."""
        return split.dual if self.dual else split

    def state(self, split: SemiLinear, start: Tensor, residuals: Sequence[Tensor]) -> Tensor:
        """After as many steps as there are residuals."""
        row = self.table[len(residuals) - 1, : len(residuals) + 1]
        own, *weights = row.unbind() if row.requires_grad else row.tolist()
        y = own * start
        for weight, residual in zip(weights, residuals, strict=True):
            y = split.add(y, weight, residual)
        return y


class _End(Step):
    __slots__ = ()

    def dense(self, theta: Scalar) -> State:
        raise TypeError("a fitted solver has no states between its steps: leave out save_at")


def _lambdas(flow: Reverse, times: Tensor) -> Tensor:
    """log(alpha / sigma) at these times, in double precision."""
    found = [to_float(flow.denoiser.schedule.half_log_snr(t)) for t in times.tolist()]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def check_flow(method: Integrator, dynamics: Dynamics) -> Reverse:
    """The flow; a TypeError, with the cure, on all but one."""
    if not isinstance(dynamics, Reverse) or dynamics.noise is not None:
        raise TypeError(
            f"{type(method).__name__} is fitted to a probability flow; got "
            f"{type(dynamics).__name__}: use LinearSDE(schedule).probability_flow(denoiser)"
        )
    return dynamics


@dataclass(frozen=True, eq=False)
class Trial:
    """An integrator on a grid, what it cost, and how far from fine trajectories it ended.

    Attributes:
        integrator, grid: what was tried.
        evaluations: of the field, for the whole batch at once.
        error: root of the mean square over samples and components.
    """

    integrator: Integrator
    grid: Grid
    evaluations: int
    error: float

    @property
    def solver(self) -> Solver:
        """The two, ready to solve."""
        return Solver(integrator=self.integrator, stepping=self.grid)


@dataclass(frozen=True)
class Frontier:
    """The trials that no other one beats: each costs more than the one before, and errs less."""

    trials: tuple[Trial, ...]

    def cheapest(self, error: float) -> Trial:
        """The one of least cost that errs by so much or less.

        Raises:
            ValueError: where none does.
        """
        for trial in self.trials:
            if trial.error <= error:
                return trial
        best = self.trials[-1]
        raise ValueError(
            f"none of the trials errs by {error:.3g} or less; {best.integrator} comes to "
            f"{best.error:.3g} with {best.evaluations} evaluations: allow more steps"
        )


def frontier(
    dynamics: Dynamics,
    integrators: Sequence[Integrator],
    steps: Sequence[int],
    y0: State,
    t0: float,
    t1: float,
    *,
    grids: Sequence[Callable[[int], Tensor]] | None = None,
    fine: Solver = FINE,
) -> Frontier:
    """What each number of evaluations can buy: every integrator on every grid, so many steps each.

        frontier(flow, [DPMSolverPP(), UniPC(3)], range(5, 30), x, 1.0, 1e-3).cheapest(error=0.01)

    Errors are those of the end, beside fine trajectories from the same starts. Starts are many
    enough where others give the same errors.

    Args:
        dynamics, y0, t0, t1, fine: see ``optimize_grid``.
        integrators: any that take a ``Grid`` and no noise.
        steps: the numbers of steps to try.
        grids: each makes times, ``(n + 1,)`` from t0 to t1, of a number n of steps; by default the
            usual ones: uniform, and on the flow of a diffusion also quadratic, aligned, uniform in
            lambda and Karras's.

    Raises:
        TypeError: on stochastic dynamics, or a sampler that adds noise.
        ValueError: where no trial is finite.
    """
    aim, trials = _Aim.of(dynamics, integrators, y0, t0, t1, fine), list[Trial]()
    for n, integrator in itertools.product(steps, integrators):
        tried = _usual(dynamics, t0, t1, n) if grids is None else [Grid(g(n)) for g in grids]
        trials += [aim.attempt(integrator, grid) for grid in tried]
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.evaluations, trial.error)):
        if trial.error < (best[-1].error if best else math.inf):
            best.append(trial)
    if not best:
        raise ValueError("no trial is finite at its end: take more steps, or other integrators")
    return Frontier(tuple(best))


def optimize_grid(
    dynamics: Dynamics,
    integrator: Integrator,
    steps: int,
    y0: State,
    t0: float,
    t1: float,
    *,
    fine: Solver = FINE,
    iterations: int = 60,
) -> Grid:
    """The times at which this integrator ends nearest to fine trajectories of the same dynamics.

        min over times of mean |y1(times) - y1(fine)|^2

    by L-BFGS on the logarithm, over the shares of the steps in the split's clock (in t where there
    is none, or where it is infinite at an end). It starts from the best of the usual grids.

    Args:
        dynamics: deterministic.
        integrator: any that takes a ``Grid``.
        steps: how many.
        y0: what the trajectories start from, such as ``base.sample(256, seed)``.
        t0, t1: the ends.
        fine: what the trajectories are made with.
        iterations: of L-BFGS.

    Raises:
        TypeError: on stochastic dynamics, or a sampler that adds noise.

    Source: in the spirit of Tong et al. 2024, "LD3", arXiv 2405.15506, for any dynamics.
    """
    aim = _Aim.of(dynamics, [integrator], y0, t0, t1, fine)

    def error(grid: Grid) -> Tensor:
        return aim.miss(Solver(integrator=integrator, stepping=grid))

    with torch.no_grad():
        start = min(_usual(dynamics, t0, t1, steps), key=lambda grid: float(error(grid)))
    times, shares = _movable(dynamics, start.grid)
    _descend([shares], lambda: error(Grid(times())), iterations)
    return Grid(times().detach())


def distill_solver(
    dynamics: Reverse,
    starts: Sequence[Solver],
    y0: Tensor,
    *,
    fine: Solver = FINE,
    iterations: int = 200,
) -> Nonstationary:
    """The times and weights that stay nearest to fine trajectories of the same model.

        min over (times, weights) of  mean of r(|x_N - x(t_N)|^2)
                                      + mean over k of r(|x0_hat(t_k, x_k) - x0_hat(t_k, x(t_k))|^2)

        r(s) = c log(1 + s / c),    c a tenth of the variance of the x(t_N), at first a thirtieth

    x_k are what the model is asked at, x(t) the fine trajectory from the same noise, x0_hat the
    model's data, squares are means over components. The end alone tells little where trajectories
    contract to few points and part before: by what the model says on the way every noise counts.
    What ends at another point cannot be moved back by a small change, and a few of these would
    hide what can be: r, Cauchy's, lets them count for little more than what is near. An integrator
    is run on symbols for residuals, so that its weights are known at any times; learned are the
    times and what is added to each weight.

    There are many minima, and the start tells which of them is found: give many. The best eight
    learn times alone by a sixteenth of the noises, then all by a quarter of them, and the best of
    these goes on with the whole. Judge the result on other noises: few are learned by heart, and in
    many dimensions thousands are not too many.

        grids = [fs.Grid(make(1.0, 1e-3, 8)) for make in (uniform, quadratic)]
        starts = [fs.Solver(m, grid) for m in (UniPC(1), UniPC(2), DEIS()) for grid in grids]
        fitted = distill_solver(flow, starts, noises)

    Args:
        dynamics: a probability flow.
        starts: integrators whose weights it starts from, ``DPMSolverPP()``, ``UniPC()``,
            ``DEIS(3)``, ..., on the grids whose times it starts from, of as many evaluations.
        y0, fine: see ``optimize_grid``.
        iterations: of L-BFGS for the one that comes to the end, most of them on the whole of y0.

    Raises:
        TypeError: on other dynamics, or an integrator that is not exponential or adds noise.
        ValueError: on an integrator that asks the model twice at one time, as ``EDMHeun``; on
            starts that differ in their ends or in the number of their evaluations, or on none.

    Source: Shaul et al. 2024, arXiv 2403.01329; Frankel et al. 2025, "S4S", arXiv 2502.17423; for
        the rounds, Jamieson & Talwalkar 2016, "Successive halving", arXiv 1502.07943.
    """
    pupils = [_Pupil(dynamics, start, y0) for start in starts]
    spans = {(len(p.plain.table), *p.plain.times[[0, -1]].tolist()) for p in pupils}
    if len(spans) != 1:
        raise ValueError(
            f"starts have one number of evaluations and one span between them; got {len(starts)} "
            f"with (evaluations, t0, t1) of {sorted(spans)}: fit a solver for each"
        )
    best = pupils[0]
    if iterations:
        whole, early = _Course.of(dynamics, pupils, y0, fine), iterations // 8
        few, some = (whole.first(max(1, len(y0) // part), near=0.03) for part in (16, 4))
        pupils = sorted(pupils, key=few.missed_by)[:8]
        for pupil in pupils:
            few.teach(pupil, [pupil.shares], early)
            some.teach(pupil, [pupil.shares, pupil.change], early)
        best = min(pupils, key=whole.missed_by)
        whole.teach(best, [best.shares, best.change], iterations - 2 * early)
    found = best.fitted()
    times = found.times.detach()
    return Nonstationary(times, found.table.detach(), found.dual, _lambdas(dynamics, times))


class _Pupil:
    """What is learned from one start.

    Attributes:
        plain: the start.
        shares: learned: the logits of its steps' shares of the clock.
        change: learned: what is added to its weights, over their scale.
    """

    def __init__(self, dynamics: Reverse, start: Solver, y0: Tensor) -> None:
        integrator, grid = start.integrator, start.stepping
        if not isinstance(integrator, Exponential):
            raise TypeError(
                f"the weights of {type(integrator).__name__} are not those of residuals: use "
                "UniPC(), DPMSolverPP() or another exponential integrator"
            )
        if not isinstance(grid, Grid):
            raise TypeError(f"a solver is fitted from times: start from a Grid; got {grid}")
        check_flow(integrator, dynamics)
        _check_noiseless(dynamics, integrator, y0)
        with torch.no_grad():
            ends = float(grid.grid[0]), float(grid.grid[-1])
            count = start.solve(dynamics, y0[:1], *ends).stats.evaluations
            self._table = partial(_transcribe, dynamics, integrator, count=count)
            self.plain = self._table(grid)
        self._times, self.shares = _movable(dynamics, grid.grid)
        table = self.plain.table
        self._scale = table.abs().amax(1, keepdim=True) * torch.ones_like(table).tril(1)
        self.change = torch.zeros_like(table, requires_grad=True)

    def fitted(self) -> Nonstationary:
        """As learned so far."""
        moved = self._table(Grid(self._times()))
        return replace(moved, table=moved.table + self._scale * self.change)


@dataclass(frozen=True, eq=False)
class _Course:
    """Fine trajectories: where they end, and the model's residuals on the way.

    Attributes:
        start, end: ``(batch, *shape)``.
        residuals: of a split and of its dual, where they are asked for, by the flow's clock, or by
            t where that has no ends.
        clock: to the argument of ``residuals``.
        data: the split whose residual is the data.
        near: the part of the variance of the ends from which on squares count for less.
    """

    start: Tensor
    end: Tensor
    residuals: dict[bool, NaturalCubic]
    clock: Clock
    data: SemiLinear
    near: float = 0.1

    @classmethod
    @torch.no_grad()
    def of(cls, dynamics: Reverse, pupils: Sequence[_Pupil], y0: Tensor, fine: Solver) -> Self:
        """At sixteen places for each time at which these ask the model."""
        data, ends = dynamics.split(), pupils[0].plain.times[[0, -1]]
        clock, time = _clock(dynamics, ends)
        low, high = clock(ends).tolist()
        s = torch.linspace(low, high, 16 * len(pupils[0].plain.table) + 1, dtype=torch.float64)
        times = torch.cat((ends[:1], time(s[1:-1]), ends[1:]))
        saved = fine.solve(dynamics, y0, *ends.tolist(), save_at=times).ys
        assert isinstance(saved, Tensor)
        order = s.argsort()
        knots, residuals = s[order].to(y0.device), dict[bool, NaturalCubic]()
        for plain in (pupil.plain for pupil in pupils):
            if plain.dual not in residuals:
                split = plain.split(data)
                found = [split.residual(times[i].to(y0), saved[i]).flatten(1) for i in order]
                residuals[plain.dual] = NaturalCubic(knots, torch.stack(found, 1))
        return cls(y0, saved[-1], residuals, clock, data)

    def first(self, count: int, near: float) -> Self:
        """So many of them."""
        rows = torch.arange(count, device=self.start.device)
        residuals = {dual: course.select(rows) for dual, course in self.residuals.items()}
        start, end = self.start[rows], self.end[rows]
        return replace(self, start=start, end=end, residuals=residuals, near=near)

    def teach(self, pupil: _Pupil, learned: Sequence[Tensor], iterations: int) -> None:
        """To miss less."""
        _descend(learned, lambda: self.miss(pupil.fitted()), iterations)

    @torch.no_grad()
    def missed_by(self, pupil: _Pupil) -> float:
        """``miss`` of what it has learned so far."""
        return float(self.miss(pupil.fitted()))

    def miss(self, solver: Nonstationary) -> Tensor:
        """The logarithm of what ``distill_solver`` makes small; infinite where it is not finite."""
        own, variance = solver.split(self.data), self.end.var(correction=0)
        bound = self.near * torch.where(variance > 0.0, variance, 1.0)

        def mean(gap: Tensor) -> Tensor:
            squares = gap.flatten(1).square().mean(1)
            return (bound * torch.log1p(squares / bound)).mean()

        x, residuals, missed = self.start, list[Tensor](), list[Tensor]()
        for t in solver.times[:-1]:
            residuals.append(own.residual(t.to(x), x))
            if len(residuals) > 1:  # at the start there is nothing to miss
                known = self.residuals[solver.dual].evaluate(self.clock(t).to(x.device))
                gain = own.scale(t) / self.data.scale(t)
                missed.append(mean(gain * (residuals[-1] - known.reshape(x.shape))))
            x = solver.state(own, self.start, residuals)
        total = mean(x - self.end)
        if missed:
            total = total + torch.stack(missed).mean()
        return _log(total)


@dataclass(frozen=True, eq=False)
class _Aim:
    """Where fine trajectories end, and coarse ones should."""

    dynamics: Dynamics
    y0: State
    t0: float
    t1: float
    end: State

    @classmethod
    def of(
        cls, dynamics: Dynamics, integrators: Sequence[Integrator], y0: State, t0: float, t1: float,
        fine: Solver,
    ) -> Self:  # fmt: skip
        """Of the fine solver, for these integrators to be judged by."""
        for integrator in integrators:
            _check_noiseless(dynamics, integrator, y0)
        with torch.no_grad():
            return cls(dynamics, y0, t0, t1, fine.solve(dynamics, y0, t0, t1).y1)

    def run(self, solver: Solver) -> Solution:
        """A coarse solve; its end is perhaps not finite, which a search then turns from."""
        return solver.solve(self.dynamics, self.y0, self.t0, self.t1, throw=False)

    def distance(self, y: State) -> Tensor:
        """The logarithm of the mean square; infinite where y is not finite."""
        pairs = zip(leaves(y), leaves(self.end), strict=True)
        gaps = [(a - b).abs().square() for a, b in pairs]
        total = torch.stack([gap.sum() for gap in gaps]).sum()
        return _log(total / sum(gap.numel() for gap in gaps))

    def miss(self, solver: Solver) -> Tensor:
        """The distance at the end of a coarse solve."""
        return self.distance(self.run(solver).y1)

    @torch.no_grad()
    def attempt(self, integrator: Integrator, grid: Grid) -> Trial:
        """A coarse solve, judged."""
        sol = self.run(Solver(integrator=integrator, stepping=grid))
        error = math.exp(0.5 * float(self.distance(sol.y1)))
        return Trial(integrator, grid, sol.stats.evaluations, error)


def _check_noiseless(dynamics: Dynamics, integrator: Integrator, y0: State) -> None:
    integrator.check(dynamics)
    if dynamics.noise is not None or integrator.draws(dynamics, y0) is not None:
        raise TypeError(
            "a solver is fitted to trajectories, which noise has none of: use "
            "probability_flow(denoiser), and an integrator without noise"
        )


def _log(mean: Tensor) -> Tensor:
    """Of a number from 0 on; infinite where it is none."""
    found = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return found.nan_to_num(nan=math.inf, posinf=math.inf)


def _usual(dynamics: Dynamics, t0: float, t1: float, steps: int) -> list[Grid]:
    """The grids of the literature that have these ends."""
    grids = [uniform(t0, t1, steps)]
    if isinstance(dynamics, Reverse):
        schedule = dynamics.denoiser.schedule
        grids += [quadratic(t0, t1, steps), aligned(schedule, t0, t1, steps)]
        if all(math.isfinite(to_float(schedule.half_log_snr(t))) for t in (t0, t1)):
            grids += [uniform_lambda(schedule, t0, t1, steps), karras(schedule, t0, t1, steps)]
    return [Grid(times) for times in grids]


def _movable(dynamics: Dynamics, start: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Times as a function of the logits of the steps' shares of the clock, and these logits.

    A share stays above a tenth of the smallest one at the start, so that times never meet.
    """
    start = start.detach().double().cpu()
    clock, time = _clock(dynamics, start)
    s = clock(start)
    first, length = s[0], s[-1] - s[0]
    shares = s.diff() / length
    least = 0.1 * float(shares.min())
    logits = (shares - least).log().requires_grad_()

    def times() -> Tensor:
        parts = least + (1.0 - len(shares) * least) * logits.softmax(0)
        return torch.cat([start[:1], time(first + length * parts.cumsum(0)[:-1]), start[-1:]])

    return times, logits


Clock = Callable[[Tensor], Tensor]


@torch.no_grad()
def _clock(dynamics: Dynamics, times: Tensor) -> tuple[Clock, Clock]:
    """From times to the split's clock, and back; nothing where there is none, or where it is
    infinite at one of these.
    """
    split = dynamics.split()
    if split is None or not bool(torch.as_tensor(split.clock(times)).isfinite().all()):
        return (lambda t: t), (lambda t: t)
    return (lambda t: torch.as_tensor(split.clock(t))), (lambda s: torch.as_tensor(split.time(s)))


def _descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], iterations: int) -> None:
    """L-BFGS; leaves the best values met in the parameters, and no gradient anywhere else."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fitting takes gradients: call it outside of inference_mode")
    search = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    best, values = math.inf, [p.detach().clone() for p in parameters]

    @torch.enable_grad()
    def closure() -> float:
        nonlocal best, values
        found = loss()
        gradients = torch.autograd.grad(found, parameters)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.nan_to_num()
        if float(found.detach()) < best:
            best, values = float(found.detach()), [p.detach().clone() for p in parameters]
        return float(found.detach())

    search.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


# --- an integrator's weights, by running it on symbols --------------------------------------------


class _Ledger(SemiLinear):
    """A split whose states are combinations of the start and of residuals, ``(1, 1 + count)``.

    The residual of the k-th evaluation is the k-th unit vector; states and times are written down.
    """

    noising = True

    def __init__(self, split: SemiLinear, count: int) -> None:
        self._split, self.rate = split, split.rate
        self.units = torch.eye(1 + count, dtype=torch.float64)
        self.states: list[Tensor] = []
        self.times: list[Scalar] = []

    @property
    def dual(self) -> SemiLinear:
        """Written down in the same place."""
        if self._split.dual is self._split:
            return self
        other = copy.copy(self)
        other._split, other.rate = self._split.dual, self._split.dual.rate
        return other

    def scale(self, t: Scalar) -> Scalar:
        return self._split.scale(t)

    def clock(self, t: Scalar) -> Scalar:
        return self._split.clock(t)

    def time(self, s: Scalar) -> Scalar:
        return self._split.time(s)

    def weights(self, t0: Scalar, t1: Scalar) -> tuple[Scalar, Scalar]:
        return self._split.weights(t0, t1)

    def residual(self, t: Tensor, x: Tensor, *args: Any, now: Scalar | None = None) -> Tensor:
        self.states.append(x)
        self.times.append(t if now is None else now)
        return self.units[None, len(self.states)]


class _Symbols(Dynamics):
    """Dynamics that is known by its split alone."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        raise TypeError("an exponential integrator asks for residuals alone")

    def split(self) -> SemiLinear:
        return self.ledger


def _transcribe(
    dynamics: Reverse, integrator: Exponential, grid: Grid, count: int
) -> Nonstationary:
    """The integrator on this grid, of so many evaluations, as a table; differentiable by times."""
    ledger = _Ledger(dynamics.split(), count)
    ends = float(grid.grid[0].detach()), float(grid.grid[-1].detach())
    last = solve(_Symbols(ledger), ledger.units[:1], *ends, integrator=integrator, stepping=grid).y1
    asked = [torch.as_tensor(t).to(ledger.units) for t in ledger.times]
    if not len({float(t.detach()) for t in asked}) == count:
        raise ValueError(
            f"{integrator} asks the model twice at one time: start from DPMSolverPPSingle() or a "
            "multistep method"
        )
    times = torch.stack([*asked, grid.grid[-1].to(ledger.units)])
    return Nonstationary(times, torch.cat([*ledger.states[1:], last]), integrator.dual)
