"""Both readings of dW, and the way from one to the other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde._state import pushforward
from flowsde.integrators import EulerMaruyama, StochasticHeun

A, B = 0.3, 0.6  # geometric Brownian motion: dy = A y dt + B y dW


def drift(t: Tensor, y: Tensor) -> Tensor:
    return A * y


def gbm(kind: str) -> fs.SDE:
    """The same motion, as each kind of noise writes it."""
    if kind == "general":
        return fs.SDE(
            drift, lambda t, y: B * y[..., None] * torch.eye(2), noise="general", noise_size=2,
            commutative=True,
        )  # fmt: skip
    return fs.SDE(drift, lambda t, y: B * y, noise=kind)  # type: ignore[arg-type]


def mixing(kind: str, ito: bool = True) -> fs.SDE:
    """A nonlinear system of two components; for general noise its three columns do not commute."""
    net = nn.Linear(2, 2)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(net(y)) - t * y

    def g(t: Tensor, y: Tensor) -> Tensor:
        own = 0.3 + 0.2 * torch.sin(y + t)
        if kind == "diagonal":
            return own
        mixed = own * torch.cos(y.flip(-1))
        return mixed if kind == "scalar" else torch.stack((own, mixed, 0.1 * y.flip(-1)), -1)

    size = 3 if kind == "general" else None
    return fs.SDE(f, g, noise=kind, noise_size=size, stratonovich=not ito)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_geometric_brownian_motion_loses_half_its_variance_rate(kind: str) -> None:
    """Its Stratonovich drift is (a - b^2/2) y."""
    y = torch.randn(5, 2)
    found = fs.to_stratonovich(gbm(kind))
    assert found.noise is not None
    assert not found.noise.ito
    assert torch.allclose(found(torch.tensor(0.0), y), (A - B * B / 2) * y, atol=1e-14)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize("ito", [True, False])
@given(seed=st.integers(0, 999))
def test_there_and_back_is_the_same_drift(kind: str, ito: bool, seed: int) -> None:
    torch.manual_seed(seed)
    sde, t, y = mixing(kind, ito), torch.rand(()), torch.randn(4, 2)
    there, back = fs.to_stratonovich, fs.to_ito
    if not ito:
        there, back = back, there
    moved = there(sde)
    again = back(moved)
    assert not torch.allclose(moved(t, y), sde(t, y), atol=1e-4)
    assert torch.allclose(again(t, y), sde(t, y), rtol=1e-13, atol=1e-14)
    assert again.noise == sde.noise


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_the_correction_is_the_jacobians(kind: str) -> None:
    """Against sum_jk g_kj dg_ij/dy_k, from the whole Jacobian."""
    sde, t, y = mixing(kind), torch.tensor(0.4), torch.randn(3, 2)

    def matrix(x: Tensor) -> Tensor:
        g = sde.diffusion(t, x[None])[0]
        return {"diagonal": torch.diag_embed(g), "scalar": g[..., None], "general": g}[kind]

    expected = [
        torch.einsum("kj,ijk->i", matrix(x), torch.autograd.functional.jacobian(matrix, x))
        for x in y
    ]
    found = 2.0 * (sde(t, y) - fs.to_stratonovich(sde)(t, y))
    assert torch.allclose(found, torch.stack(expected), atol=1e-13)
    with torch.inference_mode():
        still = fs.to_stratonovich(sde)(t, y) - sde(t, y)  # by forward mode, as in a graph
    assert torch.allclose(-2.0 * still, torch.stack(expected), atol=1e-13)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_derivatives_along_a_direction_are_those_of_forward_mode(kind: str) -> None:
    """Values, and gradients by the state, the direction and the parameters; none if g is still."""
    sde, t = mixing(kind), torch.tensor(0.4)
    y, v = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    g = lambda x: sde.diffusion(t, x)
    by = [y, v, *(p for p in sde.parameters() if p.requires_grad)]
    found = []
    for slope in (pushforward(g, y)[1](v), torch.func.jvp(g, (y,), (v,))[1]):
        slopes = torch.autograd.grad(slope.square().sum(), by, allow_unused=True)
        found.append([slope, *(torch.zeros(()) if s is None else s for s in slopes)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        value, push = pushforward(g, y)
        assert torch.equal(value, g(y))
        assert torch.allclose(push(v), found[1][0], atol=1e-12)
    assert torch.equal(pushforward(torch.ones_like, y)[1](v), torch.zeros(3, 2))


@pytest.mark.parametrize("kind", ["diagonal", "scalar"])
def test_both_readings_have_the_same_paths(kind: str) -> None:
    """Ito's form by Euler and Stratonovich's by Heun, on one path, draw near to each other."""
    sde, y0, fine = mixing(kind), torch.ones(200, 2), torch.linspace(0.0, 1.0, 129)
    gaps, wrong = [], []
    for steps in (16, 128):
        path, stepping = fs.Brownian(3, fine), fs.Fixed(steps=steps)
        more = {"stepping": stepping, "path": path}
        with torch.no_grad():
            a = fs.solve(sde, y0, integrator=EulerMaruyama(), **more).y1
            b = fs.solve(fs.to_stratonovich(sde), y0, integrator=StochasticHeun(), **more).y1
            misread = fs.SDE(sde.f, sde.g, noise=kind, stratonovich=True)  # type: ignore[arg-type]
            c = fs.solve(misread, y0, integrator=StochasticHeun(), **more).y1
        gaps.append(float((a - b).square().mean().sqrt()))
        wrong.append(float((a - c).square().mean().sqrt()))
    assert math.log2(gaps[0] / gaps[1]) / 3 > 0.35  # Euler's strong order is one half
    assert wrong[1] > 2 * gaps[1]  # misread, they stay apart


def test_pairs_and_gradients_go_through() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    sde = fs.SDE(
        lambda t, y, c: (y[1], -c * y[0]), lambda t, y, c: (scale * y[0], y[1].sin()),
        noise="diagonal",
    )  # fmt: skip
    y, c = (torch.randn(3), torch.randn(3)), torch.tensor(2.0, requires_grad=True)
    found = fs.to_stratonovich(sde)(torch.tensor(0.0), y, c)
    assert torch.allclose(found[0], y[1] - 0.5 * scale**2 * y[0])
    assert torch.allclose(found[1], -c * y[0] - 0.5 * y[1].sin() * y[1].cos())
    total = found[0].sum() + found[1].sum()
    grads = torch.autograd.grad(total, (scale, c))
    assert torch.allclose(grads[0], -scale * y[0].sum())
    assert torch.allclose(grads[1], -y[0].sum())


def test_what_needs_no_conversion_is_returned() -> None:
    additive = fs.SDE(drift, lambda t, y: 0.1 + 0.0 * y, noise="diagonal", additive=True)
    assert fs.to_stratonovich(additive) is additive
    assert fs.to_ito(additive) is additive
    assert fs.to_ito(gbm("scalar")) is not fs.to_stratonovich(gbm("scalar"))
    sde = gbm("diagonal")
    assert fs.to_ito(sde) is sde
    for convert in (fs.to_ito, fs.to_stratonovich):
        with pytest.raises(TypeError, match="no noise"):
            convert(fs.ODE(drift))
