"""Steady states are roots of the field, and differentiate as roots do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import flowsde as fs
from flowsde.integrators import RK4


def net(t: Tensor, y: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """A deep equilibrium layer: contracting, so that it has one steady state."""
    return torch.tanh(y @ w + x) - y


@pytest.mark.parametrize("per_sample", [False, True])
def test_equilibrium_layer(per_sample: bool) -> None:
    w, x = (0.4 * torch.randn(3, 3)).requires_grad_(), torch.randn(2, 3, requires_grad=True)
    layer = fs.ODE(net, batched_time=per_sample)
    run = lambda w, x: fs.steady_state(
        layer, torch.zeros(2, 3), args=(w, x), solver=fs.Solver(
            stepping=fs.Adaptive(1e-3, 1e-4, per_sample=per_sample))).y1  # fmt: skip
    y = run(w, x)
    assert float(net(None, y, w, x).detach().abs().max()) < 1e-9
    assert gradcheck(run, [w, x], atol=1e-5, fast_mode=True)
    # whatever the way there
    other = fs.steady_state(
        layer, torch.randn(2, 3), args=(w, x), t0=3.0, t1=60.0,
        solver=fs.Solver(RK4(), fs.Fixed(dt=0.5)),
    )  # fmt: skip
    assert torch.allclose(other.y1, y, atol=1e-9)
    ours, theirs = (torch.autograd.grad(s.square().sum(), [w, x]) for s in (other.y1, y))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_pytrees_samples_and_times_of_each_ones_own() -> None:
    """a' = r (b - a), b' = c - b: at rest where a = b = c; the start may be at rest."""
    c, rate = torch.tensor([1.0, 2.0, 0.5], requires_grad=True), torch.tensor([1.0, 0.2, 3.0])
    f = lambda t, y, c: {"a": rate[:, None] * (y["b"][:, :1] - y["a"]), "b": c[:, None] - y["b"]}
    y0 = {"a": torch.tensor([[0.0], [0.0], [0.5]]), "b": torch.full((3, 2), 0.5)}
    sol = fs.steady_state(fs.ODE(f, batched_time=True), y0, args=(c,), t1=200.0)
    for leaf in (sol.y1["a"], sol.y1["b"]):
        assert torch.allclose(leaf, c[:, None].expand_as(leaf), atol=1e-12)
    assert sol.t1[2] == 0.0 < sol.t1[0] < sol.t1[1]
    (g,) = torch.autograd.grad(sol.y1["a"].sum(), [c])
    assert torch.allclose(g, torch.ones(3), atol=1e-12)


def test_what_does_not_settle_says_so() -> None:
    """A circle has no rest away from its centre."""
    f = lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1)
    y0 = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    for batched in (False, True):
        ode = fs.ODE(f, batched_time=batched)
        with pytest.raises(fs.NotSettled, match="later t1"):
            fs.steady_state(ode, y0, t1=5.0)
        sol = fs.steady_state(ode, y0, t1=5.0, solver=fs.Solver(throw=False))
        assert not sol.success
        if batched:
            assert sol.status.tolist() == [fs.Status.SUCCESS, fs.Status.UNSETTLED]
            assert sol.y1[1].tolist() == pytest.approx([math.cos(5.0), -math.sin(5.0)], abs=1e-4)
        else:
            assert sol.status is fs.Status.UNSETTLED
    with pytest.raises(fs.MaxStepsReached):
        fs.steady_state(fs.ODE(f), y0, solver=fs.Solver(max_steps=3))


def test_second_derivatives_are_refused() -> None:
    """They would know nothing of how the Jacobian moves: as part of a penalty they raise too."""
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    y1 = fs.steady_state(fs.ODE(lambda t, y, w: w * w - y * y), torch.ones(1, 2), args=(w,)).y1
    (g,) = torch.autograd.grad(y1.sum(), w, create_graph=True)
    assert torch.allclose(g, torch.ones(2))
    with pytest.raises(RuntimeError, match="differentiated again"):
        (g.square().sum() + w.sum()).backward()


def test_noise_and_discrete_steps_have_no_rest() -> None:
    y0 = torch.rand(2, 2)
    sde = fs.SDE(lambda t, y: -y, lambda t, y: y, noise="diagonal")
    with pytest.raises(TypeError, match=r"has noise: give ODE\(sde.f\)"):
        fs.steady_state(sde, y0)
    with pytest.raises(TypeError, match="moves in discrete steps"):
        fs.steady_state(fs.models.ActNorm(2), y0)


def test_bad_input() -> None:
    ode = fs.ODE(lambda t, y: -y)
    bad: list[tuple[Any, dict[str, Any]]] = [
        (torch.ones(2, 2), {"tol": 0.0}), (torch.ones(()), {}),
        ((torch.ones(2), torch.ones(2, dtype=torch.float32)), {}),
        (torch.ones(2, 2, dtype=torch.complex128), {}),
    ]  # fmt: skip
    for y0, more in bad:
        with pytest.raises(ValueError, match=r"tol|batch first"):
            fs.steady_state(ode, y0, **more)


def conserving(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    """A chain of reactions a <-> b <-> c."""
    first, second = k[0] * y[:, 0] - k[1] * y[:, 1], k[2] * y[:, 1] - k[3] * y[:, 2]
    return torch.stack((-first, first - second, second), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_rests_that_are_not_isolated_are_told(dtype: torch.dtype, per_sample: bool) -> None:
    """Where something is conserved y* hangs on y0: the state is as it was integrated."""
    k = torch.tensor([0.1, 0.7, 0.3, 0.9], dtype=dtype, requires_grad=True)
    y0 = torch.ones(2, 3, dtype=dtype)
    ode = fs.ODE(conserving, batched_time=per_sample)
    with pytest.raises(fs.NotSettled, match="eliminate what the system conserves"):
        fs.steady_state(ode, y0, args=(k,))
    sol = fs.steady_state(ode, y0, args=(k,), solver=fs.Solver(throw=False))
    assert torch.all(torch.as_tensor(sol.status) == fs.Status.UNSETTLED)
    rest = torch.tensor([2.52, 0.36, 0.12], dtype=dtype)
    assert torch.allclose(sol.y1, rest.expand(2, 3), atol=1e-2)
    assert torch.allclose(sol.y1.sum(1), y0.sum(1), atol=1e-4)


def test_one_sample_without_a_rest_leaves_the_others() -> None:
    rate = torch.tensor([[1.0], [0.0]], requires_grad=True)
    ode = fs.ODE(lambda t, y, k: 1.0 - k * y - (k == 0) * 1.0, batched_time=True)
    sol = fs.steady_state(ode, torch.ones(2, 1), args=(rate,), solver=fs.Solver(throw=False))
    assert sol.status.tolist() == [fs.Status.SUCCESS, fs.Status.UNSETTLED]
    (slope,) = torch.autograd.grad(sol.y1[0].sum(), rate)
    assert torch.allclose(slope, torch.tensor([[-1.0], [0.0]]))


def test_a_place_where_a_system_only_slows_down_is_no_rest() -> None:
    ode = fs.ODE(lambda t, y: -((y - 1.0) ** 2) - 1e-5, batched_time=True)
    with pytest.raises(fs.NotSettled, match="only slows down"):
        fs.steady_state(ode, torch.full((1, 1), 2.0), tol=10.0)


def test_scales_of_rows_and_columns_do_not_matter() -> None:
    """Rates six decades apart, each of them exact."""
    rates = torch.tensor([[1e-3, 1e3]])
    ode = fs.ODE(lambda t, y: rates * (1.0 - y), batched_time=True)
    sol = fs.steady_state(ode, torch.ones(1, 2) * 1.001, t1=1e5)
    assert torch.allclose(sol.y1, torch.ones(1, 2), atol=1e-12)
