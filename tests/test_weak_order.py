"""Weak orders without Monte Carlo: expectations over a step's normals are quadratures.

A step's state is a smooth function of a few normals, so that Gauss's rule gives its expectation to
rounding. By Milstein's theorem a local weak error of order p + 1 makes a method of weak order p;
on linear systems the moments after many steps follow exactly from those of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics.field import Field
from flowsde.integrators import (
    Draws,
    EulerMaruyama,
    Increment,
    LogODE,
    NinomiyaNinomiya,
    PlatenWeak2,
    Stochastic,
    StochasticHeun,
)

from .systems import catalogue, slope

METHODS = catalogue(integrators, Stochastic)
TIGHT = (EulerMaruyama, LogODE, NinomiyaNinomiya, PlatenWeak2)  # of no higher order than declared
# --- expectations over the normals of one step ----------------------------------------------------


def outcomes(draws: Draws, h: float, points: int) -> tuple[Increment, Tensor]:
    """The nodes of a product rule for all that a step draws, a sample each, and their weights.

    Rules of two points fewer serve beyond W: what they multiply is smaller.
    """
    sizes = {"w": draws.shapes[0].numel()}
    if draws.levy != "W":
        sizes["h"] = sizes["w"]
    if draws.levy == "K":
        sizes["k"] = sizes["w"]
    if draws.extra is not None:
        sizes["z"] = draws.extra[0].numel()
    rules = [
        np.polynomial.hermite_e.hermegauss(points if name == "w" else points - 2)
        for name, size in sizes.items() for _ in range(size)
    ]  # fmt: skip
    nodes = torch.cartesian_prod(*(torch.tensor(x) for x, _ in rules), torch.zeros(1))
    weights = torch.cartesian_prod(*(torch.tensor(p) for _, p in rules), torch.ones(1)).prod(1)
    scales = {"w": h, "h": h / 12, "k": h / 720, "z": 1.0}
    parts: dict[str, Tensor] = {}
    for name, part in zip(sizes, nodes[:, :-1].split(list(sizes.values()), 1), strict=True):
        like = draws.extra if name == "z" else draws.shapes
        assert like is not None
        parts[name] = scales[name] ** 0.5 * part.reshape(len(nodes), *like.shape[1:])
    return Increment(**parts), weights / weights.sum()


def one_step(
    method: Stochastic, sde: fs.SDE, y: Tensor, t: float, h: float, points: int = 5
) -> tuple[Tensor, Tensor]:
    """The states that a step from y may lead to, ``(outcomes, d)``, and their probabilities."""
    draws = method.draws(sde, y[None])
    assert draws is not None
    dw, weights = outcomes(draws, h, points)
    start = y.repeat(len(weights), 1)
    field = Field(sde, (), start)
    return method.step(field, t, t + h, start, dw, method.init(field, t, start)).y1, weights


# --- the local error against the generator's expansion --------------------------------------------


def drift(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack((0.5 * b.sin() - a + 0.4 * t, 0.7 * a.cos() - 0.3 * a * b), -1)


def general(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    columns = (
        torch.stack((0.6 + 0.3 * b.sin(), 0.4 * a * (1.0 + t)), -1),
        torch.stack((0.5 * b, 0.5 - 0.4 * a.cos()), -1),
    )
    return torch.stack(columns, -1)


def scalar(t: Tensor, y: Tensor) -> Tensor:
    return general(t, y)[..., 0]


def diagonal(t: Tensor, y: Tensor) -> Tensor:
    return 0.6 * (y + 0.5 * t).sin() + 0.4


def parallel(t: Tensor, y: Tensor) -> Tensor:
    return scalar(t, y)[..., None] * torch.tensor([0.8, -0.6])


def additive(t: Tensor, y: Tensor) -> Tensor:
    return (0.7 + 0.5 * (2.0 * t).sin()) * torch.ones_like(y)


KINDS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "general": (general, {"noise": "general", "noise_size": 2}),
    "commutative": (parallel, {"noise": "general", "noise_size": 2, "commutative": True}),
    "scalar": (scalar, {"noise": "scalar"}),
    "diagonal": (diagonal, {"noise": "diagonal"}),
    "additive": (additive, {"noise": "diagonal", "additive": True}),
}


def columns(g: Callable[..., Tensor], kind: str, t: Tensor, y: Tensor) -> Tensor:
    """The matrix that multiplies dW, ``(d, m)``."""
    value = g(t, y)
    if kind in ("diagonal", "additive"):
        return torch.diag_embed(value)
    return value[..., None] if kind == "scalar" else value


def backward(
    u: Callable[..., Tensor], g: Callable[..., Tensor], kind: str, ito: bool
) -> Callable[..., Tensor]:
    """(d/dt + L) u, L the generator of dy = drift dt + g dW."""

    def along(v: Callable[..., Tensor], t: Tensor, y: Tensor, k: int) -> Tensor:
        """The derivative of v along column k, which varies with y where v's derivative does."""
        return jvp(lambda x: v(t, x), (y,), (columns(g, kind, t, y)[:, k],))[1]

    def result(t: Tensor, y: Tensor) -> Tensor:
        total = jvp(u, (t, y), (torch.ones(()), drift(t, y)))[1]
        for k in range(columns(g, kind, t, y).shape[1]):
            twice = along(lambda s, x, k=k: along(u, s, x, k), t, y, k)
            total = total + 0.5 * twice  # in the sense of Stratonovich
            if ito:
                turn = along(lambda s, x, k=k: columns(g, kind, s, x)[:, k], t, y, k)
                total = total - 0.5 * jvp(lambda x: u(t, x), (y,), (turn,))[1]
        return total

    return result


def moments(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack((a, b, a * a, a * b, b * b, a * a * b), -1)


@functools.cache
def expansion(kind: str, ito: bool) -> tuple[Tensor, float, list[Tensor]]:
    """A start, and there u, L u and L^2 u of the moments u."""
    start, t0, g = torch.tensor([0.4, -0.3]), 0.2, KINDS[kind][0]
    first = backward(moments, g, kind, ito)
    functions = (moments, first, backward(first, g, kind, ito))
    return start, t0, [u(torch.tensor(t0), start) for u in functions]


def cases() -> Iterator[Any]:
    for method in METHODS:
        for kind, (g, keywords) in KINDS.items():
            for ito in (True, False) if kind != "additive" else (True,):
                sde = fs.SDE(drift, g, stratonovich=not ito, **keywords)
                if method.fits(sde.noise):
                    name = f"{type(method).__name__}-{kind}-{'ito' if ito else 'stratonovich'}"
                    yield pytest.param(method, kind, ito, id=name)


@pytest.mark.parametrize(("method", "kind", "ito"), list(cases()))
def test_weak_order_by_the_error_of_one_step(method: Stochastic, kind: str, ito: bool) -> None:
    """E u(y1) = u + h L u + h^2/2 L^2 u + O(h^3), for moments u up to the third."""
    g, keywords = KINDS[kind]
    sde = fs.SDE(drift, g, stratonovich=not ito, **keywords)
    start, t0, derivatives = expansion(kind, ito)
    errors, steps = [], [512, 1024, 2048]
    for n in steps:
        y1, weights = one_step(method, sde, start, t0, 1 / n)
        mean = weights @ moments(torch.tensor(t0), y1)
        wanted = derivatives[0] + derivatives[1] / n + 0.5 * derivatives[2] / n**2
        errors.append(float((mean - wanted).norm()))
    gain = slope(errors, steps) - 1.0 - method.weak_order(sde.noise)
    assert gain > -0.15, errors
    if isinstance(method, TIGHT):
        assert gain < 0.15, errors


# --- moments of a linear system after many steps --------------------------------------------------


def linear(ito: bool) -> tuple[fs.SDE, Tensor, Tensor]:
    """dy = A y dt + sum_k B_k y dW_k, and its first two moment maps over unit time."""
    rate = torch.tensor([[-0.5, 0.3], [-0.2, -0.4]])
    factors = torch.tensor([[[0.5, 0.3], [-0.2, 0.1]], [[0.1, -0.4], [0.5, 0.2]]])
    sde = fs.SDE(
        lambda t, y: y @ rate.T, lambda t, y: torch.einsum("kij,bj->bik", factors, y),
        noise="general", noise_size=2, stratonovich=not ito,
    )  # fmt: skip
    whole, one = rate if ito else rate + 0.5 * (factors @ factors).sum(0), torch.eye(2)
    second = torch.kron(whole, one) + torch.kron(one, whole)
    second = second + sum(torch.kron(b, b) for b in factors)
    return sde, torch.matrix_exp(whole), torch.matrix_exp(second)


@pytest.mark.parametrize(
    "method",
    [EulerMaruyama(), StochasticHeun(), LogODE(), NinomiyaNinomiya(), PlatenWeak2()],
    ids=lambda m: type(m).__name__,
)
def test_weak_order_of_moments_after_many_steps(method: Stochastic) -> None:
    """E y and E y y' of a system whose columns do not commute, against their closed forms."""
    sde, mean, square = linear(method.calculus == "ito")
    errors: list[tuple[float, float]] = []
    steps = [8, 16, 32, 64]
    for n in steps:
        runs = [one_step(method, sde, e, 0.0, 1 / n) for e in torch.eye(2)]
        maps, weights = torch.stack([y1 for y1, _ in runs], -1), runs[0][1]
        first = torch.einsum("n,nij->ij", weights, maps)
        second = torch.einsum("n,nij,nkl->ikjl", weights, maps, maps).reshape(4, 4)
        gaps = (
            torch.linalg.matrix_power(first, n) - mean,
            torch.linalg.matrix_power(second, n) - square,
        )
        errors.append((float(gaps[0].norm()), float(gaps[1].norm())))
    for moment in zip(*errors, strict=True):
        assert abs(slope(list(moment), steps) - method.weak_order(sde.noise)) < 0.15, moment


# --- Levy areas -----------------------------------------------------------------------------------


def heisenberg(t: Tensor, y: Tensor) -> Tensor:
    """x1' = dW1, x2' = dW2, x3' = (x1 dW2 - x2 dW1) / 2: x3 is the Levy area."""
    a, b, _ = y.unbind(-1)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    rows = ((one, zero), (zero, one), (-0.5 * b, 0.5 * a))
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_the_log_ode_has_the_areas_moments() -> None:
    """Var A = h^2/4 exactly, its mean nil whatever W; E A^4 = 5 h^4/16 within a tenth."""
    sde = fs.SDE(
        lambda t, y: torch.zeros_like(y), heisenberg, noise="general", noise_size=2,
        stratonovich=True,
    )  # fmt: skip
    h = 0.7
    y1, weights = one_step(LogODE(), sde, torch.zeros(3), 0.0, h)
    a, b, area = y1.unbind(-1)
    assert float(weights @ area.square()) == pytest.approx(h**2 / 4, rel=1e-12)
    for other in (a, b, a * b, a.square(), b.square()):
        assert abs(float(weights @ (area * other))) < 1e-14
    around = weights @ (area.square() * (a.square() + b.square()))
    assert float(around) == pytest.approx(h**2 / 4 * 2 * h + h**3 / 3, rel=1e-12)
    assert float(weights @ area.pow(4)) == pytest.approx(5 * h**4 / 16, rel=0.1)
    naive, weights = one_step(StochasticHeun(), sde, torch.zeros(3), 0.0, h)
    assert float(weights @ naive[:, 2].square()) == pytest.approx(0.0, abs=1e-15)
