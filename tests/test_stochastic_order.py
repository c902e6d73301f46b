"""Strong and weak orders of the methods for SDEs, against what they declare."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    SRA3,
    SRIW1,
    Increment,
    SlowRK,
    Stochastic,
    StochasticHeun,
)  # fmt: skip

from .systems import catalogue, generator, slope

METHODS: list[Stochastic] = catalogue(integrators, Stochastic)
PATHS, GROUPS, FINE, STEPS = 1000, 10, 512, (8, 16, 32, 64)


# --- problems -------------------------------------------------------------------------------------


def drift(t: Tensor, y: Tensor) -> Tensor:
    """Non-linear, coupled, and a function of time."""
    return 0.6 * (y.flip(-1) - t).sin() - 0.5 * y


def wave(t: Tensor, y: Tensor) -> Tensor:
    """Bent enough for the noise to tell, where that is additive."""
    return (2.0 * y.flip(-1) - 0.5 * t).sin()


def own(t: Tensor, y: Tensor) -> Tensor:
    """g_i(t, y_i)."""
    return (0.4 + 0.3 * (2.0 * t).cos()) * (1.2 + (1.5 * y).sin())


def shared(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[..., 1].sin() + 0.4 * t, 1.2 * y[..., 0].cos()), -1)


def turning(t: Tensor, y: Tensor) -> Tensor:
    """Two columns, multiplications by complex numbers, which commute."""
    turned = torch.stack((-y[..., 1], y[..., 0]), -1)
    return torch.stack((0.5 * y + 0.3 * turned, 0.6 * turned - 0.2 * y), -1)


def turning_square(t: Tensor, y: Tensor) -> Tensor:
    """sum_k Dg_k[g_k] of ``turning``: (0.5 + 0.3i)^2 + (-0.2 + 0.6i)^2 = -0.16 + 0.06i."""
    return -0.16 * y + 0.06 * torch.stack((-y[..., 1], y[..., 0]), -1)


def crossing(t: Tensor, y: Tensor) -> Tensor:
    """Columns that do not commute."""
    zero = torch.zeros_like(y[..., 0])
    first, second = torch.stack((y[..., 1], zero), -1), torch.stack((zero, 0.7 * y[..., 0]), -1)
    return torch.stack((first, second), -1)


def spread(t: Tensor, y: Tensor) -> Tensor:
    return (1.3 + 0.3 * t.cos()).expand_as(y)


def mixing(t: Tensor, y: Tensor) -> Tensor:
    """Three Brownian motions in two dimensions."""
    row = torch.stack((1.2 + 0.0 * t, t.cos(), t - 0.5), -1)
    return torch.stack((row, 1.0 - row), -2).expand(*y.shape, 3)


def growth(t: Tensor, y: Tensor) -> Tensor:
    return 0.3 * y


def proportional(t: Tensor, y: Tensor) -> Tensor:
    return 0.8 * y


@dataclass(frozen=True)
class Problem:
    """An SDE, and the method whose fine path stands for the solution, or a closed form in W(1)."""

    name: str
    f: Callable[..., Tensor]
    g: Callable[..., Tensor]
    kind: Literal["diagonal", "scalar", "general"]
    stratonovich: bool = False
    additive: bool = False
    commutative: bool = False
    reference: Stochastic = SlowRK()
    exact: Callable[[Tensor, Tensor], Tensor] | None = None
    same: fs.SDE | None = None  # in the calculus of the reference

    @property
    def sde(self) -> fs.SDE:
        size = None if self.kind != "general" else 3 if self.additive else 2
        return fs.SDE(
            self.f, self.g, noise=self.kind, stratonovich=self.stratonovich,
            additive=self.additive, commutative=self.commutative, noise_size=size,
            batched_time=True,
        )  # fmt: skip


def ito_turning() -> fs.SDE:
    """The Stratonovich form of dy = drift dt + turning dW in the sense of Ito."""
    return fs.SDE(
        lambda t, y: drift(t, y) - 0.5 * turning_square(t, y), turning, noise="general",
        stratonovich=True, commutative=True, noise_size=2,
    )  # fmt: skip


PROBLEMS = [
    Problem("diagonal, Ito", drift, own, "diagonal", reference=SRIW1()),
    Problem("diagonal, Stratonovich", drift, own, "diagonal", stratonovich=True),
    Problem("scalar, Ito", drift, shared, "scalar", reference=SRIW1()),
    Problem("scalar, Stratonovich", drift, shared, "scalar", stratonovich=True),
    Problem("commutative, Ito", drift, turning, "general", commutative=True, same=ito_turning()),
    Problem("commutative, Stratonovich", drift, turning, "general", True, commutative=True),
    Problem("general, Ito", drift, crossing, "general", reference=integrators.EulerMaruyama()),
    Problem("general, Stratonovich", drift, crossing, "general", True, reference=StochasticHeun()),
    Problem("additive", wave, spread, "diagonal", additive=True, reference=SRA3()),
    Problem("additive, general", wave, mixing, "general", additive=True, reference=SRA3()),
    Problem(
        "geometric, Ito", growth, proportional, "diagonal",
        exact=lambda y0, w: y0 * torch.exp(0.3 - 0.32 + 0.8 * w),
    ),
    Problem(
        "geometric, Stratonovich", growth, proportional, "diagonal", True,
        exact=lambda y0, w: y0 * torch.exp(0.3 + 0.8 * w),
    ),
]  # fmt: skip
CASES = [(m, p) for m in METHODS for p in PROBLEMS if m.fits(p.sde.noise)]  # type: ignore[arg-type]


# --- strong orders --------------------------------------------------------------------------------


@functools.cache
def fine(size: int | None) -> tuple[Tensor, Tensor]:
    """W and H over the steps of the finest grid."""
    shape = (FINE, PATHS) if size is None else (FINE, PATHS, size)
    w, h = (torch.randn(shape, generator=generator(n)) for n in (1, 2))
    return w / math.sqrt(FINE), h / math.sqrt(12 * FINE)


@functools.cache
def coarse(size: int | None, steps: int) -> list[Increment]:
    """The same path's W and H over coarser steps: H = (integral of W)/dt - W/2."""
    w, h = (x.reshape(steps, FINE // steps, *x.shape[1:]) for x in fine(size))
    before = w.cumsum(1) - w
    total = w.sum(1)
    area = (before + 0.5 * w + h).mean(1) - 0.5 * total
    return [Increment(*pair) for pair in zip(total, area, strict=True)]


def start() -> Tensor:
    return torch.ones(PATHS, 2) * torch.tensor([1.0, 0.5])


def walk(method: Stochastic, sde: fs.SDE, y: Any, dws: list[Increment]) -> Any:
    """The state at 1 from that at 0."""
    field, n = Field(sde, (), y), len(dws)
    carry = method.init(field, 0.0, y)
    for i, dw in enumerate(dws):
        step = method.step(field, i / n, (i + 1) / n, y, dw, carry)
        y, carry = step.y1, step.carry
    return y


@functools.cache
def solution(name: str) -> Tensor:
    problem = next(p for p in PROBLEMS if p.name == name)
    size = width(problem)
    if problem.exact is not None:
        return problem.exact(start(), fine(size)[0].sum(0))
    return walk(problem.reference, problem.same or problem.sde, start(), coarse(size, FINE))


def width(problem: Problem) -> int | None:
    assert problem.sde.noise is not None
    return {"diagonal": 2, "scalar": None, "general": problem.sde.noise.size}[problem.kind]


@pytest.mark.parametrize(("method", "problem"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_strong_order(method: Stochastic, problem: Problem) -> None:
    """Within 0.15 of what is declared, the slope's own standard error below 0.05."""
    sde, truth = problem.sde, solution(problem.name)
    gaps = [
        (walk(method, sde, start(), coarse(width(problem), n)) - truth).square().sum(-1)
        for n in STEPS
    ]
    groups = [gap.reshape(GROUPS, -1).mean(-1).sqrt() for gap in gaps]
    slopes = torch.tensor([
        slope([float(g[i]) for g in groups], list(STEPS)) for i in range(GROUPS)
    ])  # fmt: skip
    assert float(slopes.std()) / math.sqrt(GROUPS) < 0.05
    errors = [math.sqrt(float(gap.mean())) for gap in gaps]
    assert sde.noise is not None
    declared = method.strong_order(sde.noise)
    assert declared is not None
    assert abs(slope(errors, list(STEPS)) - declared) < 0.15, errors


def test_every_method_is_measured() -> None:
    assert {type(m) for m, _ in CASES} == {type(m) for m in METHODS}
