"""Methods for noise that does not commute: pathwise orders, costs, and their seams.

Their weak orders are measured in test_weak_order.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import (
    Draws,
    EulerMaruyama,
    LogODE,
    NinomiyaNinomiya,
    PlatenWeak2,
    Stochastic,
    StochasticHeun,
)  # fmt: skip

from .systems import slope

METHODS = [LogODE(), NinomiyaNinomiya(), PlatenWeak2()]
ids = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def drift(t: Tensor, y: Tensor) -> Tensor:
    return 0.6 * (y.flip(-1) - t).sin() - 0.5 * y


def crossing(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    columns = (torch.stack((b.sin(), 0.5 + 0.0 * a), -1), torch.stack((0.4 + 0.0 * a, 0.7 * a), -1))
    return torch.stack(columns, -1)


def growing(t: Tensor, y: Tensor) -> Tensor:
    return 0.4 + 0.5 * y.sin()


def sde(method: Stochastic, kind: str) -> fs.SDE:
    """Read as the method reads it."""
    strat = method.calculus == "stratonovich"
    if kind == "general":
        return fs.SDE(drift, crossing, noise="general", noise_size=2, stratonovich=strat)
    if kind == "additive":
        return fs.SDE(drift, lambda t, y: (1.0 + t) * torch.ones_like(y), noise="diagonal",
                      additive=True, stratonovich=strat)  # fmt: skip
    return fs.SDE(drift, growing, noise="diagonal", stratonovich=strat)


# --- strong orders --------------------------------------------------------------------------------

COUNT, GROUPS, STEPS, FINE = 800, 10, [8, 16, 32, 64], 1024


@functools.cache
def path() -> fs.Brownian:
    return fs.Brownian(11, torch.linspace(0.0, 1.0, FINE + 1))


def run(dynamics: fs.SDE, method: Stochastic, steps: int) -> Tensor:
    y0 = torch.ones(COUNT, 2) * torch.tensor([0.4, -0.3])
    with torch.no_grad():
        return fs.solve(
            dynamics, y0, integrator=method, stepping=fs.Fixed(steps=steps), path=path()
        ).y1


@functools.cache
def truth(calculus: str, kind: str) -> Tensor:
    reference = EulerMaruyama() if calculus == "ito" else StochasticHeun()
    if kind != "general":
        reference = PlatenWeak2() if calculus == "ito" else StochasticHeun()
    return run(sde(reference, kind), reference, FINE)


@pytest.mark.parametrize("kind", ["general", "diagonal", "additive"])
@ids
def test_strong_order(method: Stochastic, kind: str) -> None:
    """Within 0.15 of what is declared, the slope's own standard error below 0.05."""
    dynamics = sde(method, kind)
    gap = truth(method.calculus, kind)
    gaps = torch.stack([(run(dynamics, method, n) - gap).square().sum(1) for n in STEPS])
    parts = gaps.reshape(len(STEPS), GROUPS, -1).mean(2)
    slopes = torch.tensor([slope(column.tolist(), STEPS) / 2 for column in parts.T])
    assert float(slopes.std()) / math.sqrt(GROUPS) < 0.05
    errors = gaps.mean(1).sqrt().tolist()
    assert dynamics.noise is not None
    declared = method.strong_order(dynamics.noise)
    assert declared is not None
    assert abs(slope(errors, STEPS) - declared) < 0.15, errors


def test_areas_lower_the_pathwise_error() -> None:
    """Of the variance h^2/4 of an area h^2/10 is left, a half of it the method's own noise."""
    heun, log = ((run(sde(m, "general"), m, 32) - truth("stratonovich", "general"))
                 for m in (StochasticHeun(), LogODE()))  # fmt: skip
    assert float(log.square().mean()) < 0.6 * float(heun.square().mean())


# --- costs and seams ------------------------------------------------------------------------------


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize(
    ("method", "kind", "f", "g"),
    [
        (PlatenWeak2(), "general", 2, 6), (PlatenWeak2(), "diagonal", 2, 3),
        (PlatenWeak2(), "additive", 2, 2), (NinomiyaNinomiya(), "general", 4, 8),
        (NinomiyaNinomiya(), "diagonal", 4, 8), (LogODE(), "general", 4, 9),
        (LogODE(), "diagonal", 4, 4),
    ],
    ids=str,
)  # fmt: skip
def test_evaluations_of_a_step(method: Stochastic, kind: str, f: int, g: int) -> None:
    dynamics = sde(method, kind)
    dynamics.g = Counted(dynamics.g)
    sol = fs.solve(
        dynamics, torch.zeros(3, 2), integrator=method, stepping=fs.Fixed(steps=5),
        path=fs.Brownian(0),
    )  # fmt: skip
    looked = kind == "additive"  # once more, to see that it is
    assert (sol.stats.evaluations, dynamics.g.calls) == (5 * f, 5 * g + looked)


@pytest.mark.parametrize("method", [LogODE(), PlatenWeak2()], ids=str)
def test_nothing_more_is_drawn_where_columns_commute(method: Stochastic) -> None:
    y = torch.zeros(3, 2)
    strat = method.calculus == "stratonovich"
    plain = [sde(method, "diagonal"), sde(method, "additive")]
    for size, commutative in ((2, True), (1, False)):
        plain.append(fs.SDE(
            drift, crossing, noise="general", noise_size=size, commutative=commutative,
            stratonovich=strat,
        ))  # fmt: skip
    for dynamics in plain:
        draws = method.draws(dynamics, y)
        assert draws is not None
        assert (draws.levy, draws.extra) == ("W", None)
    draws = method.draws(sde(method, "general"), y)
    assert isinstance(draws, Draws)
    assert draws.extra is not None
    assert draws.extra.shape == (3, 1)


@pytest.mark.parametrize("kind", ["general", "diagonal"])
@ids
def test_gradients(method: Stochastic, kind: str) -> None:
    """By the start, an argument and the end, against finite differences."""

    def end(y0: Tensor, k: Tensor, t1: Tensor) -> Tensor:
        base = sde(method, kind)
        dynamics = fs.SDE(
            lambda t, y, k: k * drift(t, y), lambda t, y, k: k * base.g(t, y),
            noise=base.noise.kind, noise_size=base.noise.size, stratonovich=not base.noise.ito,
        )  # fmt: skip
        return fs.solve(
            dynamics, y0, 0.0, t1, args=(k,), integrator=method, stepping=fs.Fixed(steps=2),
            path=fs.Brownian(4),
        ).y1  # fmt: skip

    inputs = (torch.randn(2, 2), torch.tensor(0.9), torch.tensor(0.8))
    assert torch.autograd.gradcheck(end, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize("kind", ["general", "diagonal"])
@ids
def test_spans_of_each_sample(method: Stochastic, kind: str) -> None:
    """Each sample as if alone; one that is not to move stays where it is."""
    wide, strat = kind == "general", method.calculus == "stratonovich"

    def g(t: Tensor, y: Tensor) -> Tensor:
        value = crossing(t, y) if wide else growing(t, y)
        return value * (1.0 + (t.reshape((-1,) + (1,) * (value.ndim - 1)) if t.ndim else t))

    dynamics = fs.SDE(
        lambda t, y: -y, g, noise="general" if wide else "diagonal", noise_size=2 if wide else None,
        stratonovich=strat, batched_time=True,
    )  # fmt: skip
    y0, ends, seeds = torch.randn(3, 2), torch.tensor([0.5, 0.0, 1.0]), torch.arange(3)

    def run(y: Tensor, t1: Any, seed: Tensor) -> Tensor:
        stepping, noise = fs.Fixed(steps=4), fs.Brownian(seed)
        return fs.solve(dynamics, y, 0.0, t1, integrator=method, stepping=stepping, path=noise).y1

    whole = run(y0, ends, seeds)
    assert torch.equal(whole[1], y0[1])
    for i in (0, 2):
        alone = run(y0[i : i + 1], float(ends[i]), seeds[i : i + 1])
        assert torch.allclose(alone[0], whole[i], atol=1e-12)


@ids
def test_pytrees_and_single_precision(method: Stochastic) -> None:
    """Diagonal noise of a tree of leaves is that of the leaves side by side."""
    strat = method.calculus == "stratonovich"
    y0 = torch.randn(4, 3, dtype=torch.float32)

    def split(y: Tensor) -> dict[str, Tensor]:
        return {"a": y[:, :2], "b": y[:, 2:]}

    whole = fs.SDE(lambda t, y: -y, growing, noise="diagonal", stratonovich=strat)
    parts = fs.SDE(
        lambda t, y: {k: -v for k, v in y.items()},
        lambda t, y: {k: growing(t, v) for k, v in y.items()},
        noise="diagonal", stratonovich=strat,
    )  # fmt: skip
    ends = [
        fs.solve(d, y, integrator=method, stepping=fs.Fixed(steps=3), path=fs.Brownian(1)).y1
        for d, y in ((whole, y0), (parts, split(y0)))
    ]
    for key, part in split(ends[0]).items():
        assert part.dtype == torch.float32
        assert torch.allclose(ends[1][key], part)


@ids
def test_a_path_back_is_solved_back(method: Stochastic) -> None:
    """Towards t1 < t0 it is the mirrored equation in law: means and variances agree."""
    dynamics = sde(method, "diagonal")
    y0 = torch.full((20_000, 2), 0.3)
    with torch.no_grad():
        back = fs.solve(
            dynamics, y0, 1.0, 0.0, integrator=method, stepping=fs.Fixed(steps=8),
            path=fs.Brownian(3),
        ).y1  # fmt: skip
        mirrored = fs.SDE(
            lambda t, y: -drift(1.0 - t, y), lambda t, y: growing(1.0 - t, y), noise="diagonal",
            stratonovich=not dynamics.noise.ito,
        )  # fmt: skip
        forth = fs.solve(
            mirrored, y0, 0.0, 1.0, integrator=method, stepping=fs.Fixed(steps=8),
            path=fs.Brownian(4),
        ).y1  # fmt: skip
    error = 5 * float(back.std()) / math.sqrt(len(y0))
    assert torch.allclose(back.mean(0), forth.mean(0), atol=1.5 * error)
    assert torch.allclose(back.var(0), forth.var(0), rtol=5 * 2 / math.sqrt(len(y0)))
