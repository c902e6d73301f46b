"""Neural CDEs: laws of controlled equations, and of the model on series as users have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde.integrators import RK4, Dopri8, Midpoint, ReversibleRK
from flowsde.models import NeuralCDE
from flowsde.paths import HermiteCubic, Linear, LogSignature, NaturalCubic, Piecewise, Rectilinear
from flowsde.series import Batch, Series, collate

from .test_control import EVERY, data

TIGHT = fs.Solver(Dopri8(), fs.Adaptive(1e-9, 1e-10))


def timed(t: Tensor, x: Tensor) -> Tensor:
    """Values with the time as a channel."""
    return torch.cat((t.expand(x.shape[:2])[..., None], x), -1)


def on_knots(path: Piecewise, substeps: int = 4) -> fs.Grid:
    """Steps that end on the knots."""
    t = path.times.transpose(0, -1)  # time first, where each sample has its own
    parts = [t[:-1] + t.diff(dim=0) * i / substeps for i in range(substeps)]
    return fs.Grid(torch.cat((torch.stack(parts, 1).flatten(0, 1), t[-1:])))


def model(channels: int, **more: Any) -> NeuralCDE:
    torch.manual_seed(1)
    return NeuralCDE(channels, 2, hidden=4, width=8, depth=1, **more)


# --- the equation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_commuting_linear_fields_see_the_increment_alone(name: str) -> None:
    """dy = sum_c A_c y dX_c with A_c = p_c(A): y = exp(sum_c A_c (X(t) - X(t_0))) y_0."""
    times, x = data(n=5)
    path = EVERY[name](times[0], x)
    a, y0 = 0.3 * torch.randn(2, 2), torch.randn(3, 2)
    channels = path.pieces.shape[-1]
    powers = torch.stack([a + 0.1 * c * torch.eye(2) for c in range(channels)], -1)
    cde = fs.CDE(lambda t, y: torch.einsum("ijc,bj->bic", powers, y), path)
    t0, t1 = path.knots[[0, -1]].unbind()
    stepping = fs.Adaptive(1e-8, 1e-9, step_at=path.knots, jump_at=path.jumps)
    found = fs.solve(cde, y0, t0, t1, integrator=Dopri8(), stepping=stepping).y1
    move = torch.einsum("ijc,bc->bij", powers, path.evaluate(t1) - path.evaluate(t0))
    expected = torch.einsum("bij,bj->bi", torch.linalg.matrix_exp(move), y0)
    assert torch.allclose(found, expected, atol=1e-7)


def test_the_log_ode_method_is_exact_on_nilpotent_fields() -> None:
    """Linear fields of which any three multiply to nothing: one step a window at depth 2."""
    times, x = data(n=8)
    m, y0 = torch.randn(2, 3, 3).triu(1), torch.randn(3, 3)
    each = fs.CDE(lambda t, y: torch.einsum("cij,bj->bic", m, y), Linear(times[0], x))
    bracket = m[1] @ m[0] - m[0] @ m[1]  # the later factor stands to the left
    words = torch.cat((m, bracket[None]))
    windows = LogSignature(times[0], x, depth=2, window=3)
    gathered = fs.CDE(lambda t, y: torch.einsum("cij,bj->bic", words, y), windows)
    t0, t1 = times[0, [0, -1]].unbind()
    ends = [
        fs.solve(cde, y0, t0, t1, stepping=fs.Adaptive(1e3, 1e3, jump_at=path.knots)).y1
        for cde, path in ((each, each.path), (gathered, windows))
    ]
    assert torch.allclose(ends[0], ends[1], atol=1e-12)


def test_products_and_matrices_agree() -> None:
    times, x = data()
    path, y0 = NaturalCubic(times, x), torch.randn(3, 2)
    a = torch.randn(2, 2, 2)
    matrix = fs.CDE(lambda t, y: torch.einsum("ijc,bj->bic", a, y.tanh()), path, batched_time=True)
    product = fs.CDE(
        lambda t, y, dx: torch.einsum("ijc,bj,bc->bi", a, y.tanh(), dx), path, products=True,
        batched_time=True,
    )  # fmt: skip
    solver, span = fs.Solver(RK4(), fs.Fixed(steps=10)), (times[:, 0], times[:, -1])
    ends = [solver.solve(cde, y0, *span).y1 for cde in (matrix, product)]
    assert torch.allclose(ends[0], ends[1])


def test_ended_rows_are_left_out() -> None:
    """Of spans that differ much, each sample is solved as it would be alone."""
    times, x = data(batch=16)
    rows, y0 = [], torch.randn(16, 2)

    def f(t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(y))
        return torch.stack((y.tanh(), y.cos()), -1)

    ends = times[:, 0] + (times[:, -1] - times[:, 0]) * torch.linspace(0.01, 1.0, 16)
    stepping, found = fs.Adaptive(1e-6, 1e-7, per_sample=True), []
    for rowwise in (True, False):
        cde = fs.CDE(f, NaturalCubic(times, x), batched_time=True, rowwise=rowwise)
        found.append(fs.solve(cde, y0, times[:, 0], ends, stepping=stepping).y1)
        assert (min(rows) < 16) == rowwise
        rows.clear()
    assert torch.allclose(found[0], found[1], atol=1e-12)


def test_a_path_of_another_batch_is_refused() -> None:
    times, x = data()
    cde = fs.CDE(lambda t, y: y.new_ones(2, 1, 2), Linear(times[0], x[:1]))
    with pytest.raises(TypeError, match=r"\(2, channels\)"):
        fs.solve(cde, torch.zeros(2, 1), 1.5, 2.0)


def test_torchcde_solves_the_same_equation() -> None:
    import torchcde

    times, x = data()
    t, net = times[0], torch.nn.Linear(3, 6)
    y0 = torch.randn(3, 3)
    theirs = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(x, t), t)
    expected = torchcde.cdeint(
        theirs, lambda t, y: net(y).tanh().unflatten(-1, (3, 2)), y0, t[[0, -1]], adjoint=False,
        rtol=1e-9, atol=1e-10, method="dopri5",
    )[:, -1]  # fmt: skip
    for path in (theirs, NaturalCubic(t, x)):
        cde = fs.CDE(lambda t, y: net(y).tanh().unflatten(-1, (3, 2)), path)
        assert torch.allclose(TIGHT.solve(cde, y0, t[0], t[-1]).y1, expected, atol=1e-7)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"rank": 1}, {"layers": 2}], ids=str)
def test_the_clock_is_not_felt(more: dict[str, Any]) -> None:
    """Own times, shared times and the numbers of the rows name the same path."""
    times, x = data(n=5)
    found = []
    for named in (times, times[0], torch.arange(5.0)):
        path = Linear(named, timed(times, x))
        net = model(3, solver=fs.Solver(Midpoint(), on_knots(path)), **more)
        found.append(net(path))
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])


def test_a_matrix_of_low_rank_is_one() -> None:
    net, h = model(3, rank=2), torch.randn(5, 4)
    (matrix,) = net.field
    columns = [matrix(h, torch.eye(3)[c].expand(5, 3)) for c in range(3)]
    assert torch.linalg.matrix_rank(torch.stack(columns, -1), rtol=1e-9).tolist() == [2] * 5
    dx = torch.randn(5, 3)
    assert torch.allclose(matrix(h, dx), torch.einsum("bic,bc->bi", torch.stack(columns, -1), dx))


def test_a_layer_drives_the_next() -> None:
    """dh_1 = f_1(h_1) dX as if it were alone; dh_2 = f_2(h_2) dh_1."""
    net, h, dx = model(3, layers=2), torch.randn(5, 8), torch.randn(5, 3)
    first, second = net.field
    move = net.field(torch.tensor(0.0), h, dx)
    assert torch.equal(move[:, :4], first(h[:, :4], dx))
    assert torch.equal(move[:, 4:], second(h[:, 4:], move[:, :4]))
    times, x = data()
    assert net.online(HermiteCubic(times[0], timed(times[0], x))).shape == (3, 9, 2)


@pytest.mark.parametrize("name", ["HermiteCubic", "Linear", "Rectilinear", "LogSignature"])
def test_online_outputs_know_nothing_of_what_comes(name: str) -> None:
    times, x = data()
    if name != "Rectilinear":  # which has the time as a channel of its own
        x = timed(times[0], x)
    late = x.clone()
    late[:, 5:, 1:] += 1.0
    path, other = (EVERY[name](times[0], v) for v in (x, late))
    net = model(path.pieces.shape[-1], solver=fs.Solver(Midpoint(), on_knots(path)))
    outputs, changed = net.online(path), net.online(other)
    known = 2 if name == "LogSignature" else 5
    assert outputs.shape[:2] == (3, path.arrivals.shape[-1])
    assert torch.equal(outputs[:, :known], changed[:, :known])
    assert not torch.allclose(outputs[:, known], changed[:, known])
    assert torch.allclose(outputs[:, -1], net(path))


def test_online_outputs_refuse_a_path_that_looks_ahead() -> None:
    times, x = data()
    gap = x.clone()
    gap[0, 2, 0] = torch.nan
    for path in (NaturalCubic(times[0], x), Linear(times[0], gap)):
        with pytest.raises(TypeError, match="Rectilinear"):
            model(2).online(path)


def ragged() -> tuple[list[Series], Batch]:
    torch.manual_seed(0)
    series = [Series(torch.rand(n).add(0.1).cumsum(0), torch.randn(n, 2)) for n in (3, 6, 4)]
    return series, collate(series)


@pytest.mark.parametrize(
    "rule", [Linear, HermiteCubic, NaturalCubic, Rectilinear], ids=lambda r: r.__name__
)
def test_a_series_among_longer_ones_is_as_it_is_alone(rule: Any) -> None:
    series, batch = ragged()

    def outputs(values: Tensor) -> Tensor:
        times = values[..., 0] if rule is Rectilinear else torch.arange(float(values.shape[1]))
        path = rule(times, values[..., 1:] if rule is Rectilinear else values)
        return model(3, solver=fs.Solver(Midpoint(), on_knots(path)))(path)

    together = outputs(batch.channels())
    for i, s in enumerate(series):
        assert torch.allclose(outputs(timed(s.times[None], s.values[None]))[0], together[i])


def test_a_series_at_its_own_times_is_as_it_is_alone() -> None:
    series, batch = ragged()
    net = model(3)
    together = net(HermiteCubic(batch.times, batch.channels()))
    for i, s in enumerate(series):
        alone = HermiteCubic(s.times[None], timed(s.times[None], s.values[None]))
        assert torch.allclose(net(alone)[0], together[i], atol=1e-3)


@pytest.mark.parametrize("rule", [Linear, HermiteCubic, NaturalCubic], ids=lambda r: r.__name__)
def test_no_excursion_of_a_series_at_its_own_times_is_missed(rule: Any) -> None:
    """A loop of eight rows in a long series that else stands still."""
    t, x = torch.arange(200.0), torch.zeros(2, 200, 2)
    turn = torch.linspace(0.0, 2.0 * torch.pi, 9)
    x[0, 140:149] = 3.0 * torch.stack((1.0 - turn.cos(), turn.sin()), -1)
    values, own = timed(t / 200.0, x), torch.stack((t, 3.0 * t**1.1))
    net = model(3)
    wanted = net(rule(t, values))
    assert torch.allclose(net(rule(own[:1], values[:1])), wanted[:1], atol=5e-3)
    assert torch.allclose(net(Linear(own, values)), net(Linear(t, values)), atol=5e-3)
    assert not torch.allclose(wanted[0], wanted[1], atol=2e-2)
    with pytest.raises(TypeError, match="Linear"):
        net(values)


def test_a_series_at_its_own_times_does_not_look_ahead() -> None:
    times, x = data(n=20)
    net, later = model(3), x.clone()
    later[:, 10:] += 1.0
    for rule in (Linear, HermiteCubic):
        now, then = (net.online(rule(times, timed(times, v))) for v in (x, later))
        assert torch.allclose(now[:, :10], then[:, :10], atol=1e-12)
        assert not torch.allclose(now[:, 11:], then[:, 11:], atol=1e-3)


ADJOINTS = {
    "Checkpointed": (fs.Checkpointed(), 0.0),
    "Backsolve": (fs.Backsolve(), 1e-2),
    "Reversible": (fs.Reversible(), 1e-10),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_every_adjoint_trains_it(name: str) -> None:
    times, x = data(n=5)
    adjoint, slack = ADJOINTS[name]
    integrator = ReversibleRK(Midpoint()) if name == "Reversible" else Midpoint()
    gradients = []
    for each in (fs.Direct(), adjoint):
        values = x.clone().requires_grad_(name == "Checkpointed")
        path = HermiteCubic(times[0], timed(times[0], values))
        stepping = on_knots(path, 1 if name == "Reversible" else 40)
        net = model(3, solver=fs.Solver(integrator, stepping, each))
        inputs = [*net.parameters(), *[values] * values.requires_grad]
        gradients.append(torch.autograd.grad(net(path).square().sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= slack * float(b.norm())


@settings(max_examples=4)
@given(seed=st.integers(0, 99), layers=st.integers(1, 2), rank=st.sampled_from([None, 1]))
def test_gradients_are_slopes(seed: int, layers: int, rank: int | None) -> None:
    times, x = data(batch=1, n=3, seed=seed)
    net = model(3, layers=layers, rank=rank, solver=fs.Solver(RK4(), fs.Fixed(steps=2)))
    bias = net.field[0].net[0].bias.detach().clone().requires_grad_()

    def outputs(x: Tensor, bias: Tensor) -> Tensor:
        path = LogSignature(times[0], x, depth=2, window=2)
        return torch.func.functional_call(net, {"field.0.net.0.bias": bias}, (path,))

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), bias))


@torch.no_grad()
def test_knots_spare_evaluations() -> None:
    """Steps that are told where the path is rough need fewer of them, and err less."""
    times, x = data(n=10)
    for rule in (Linear, HermiteCubic):
        path, net, counts, errors = rule(times[0], 0.2 * x), model(2), [], []
        ends, y0 = path.knots[[0, -1]].unbind(), torch.zeros(3, 4)
        cde = fs.CDE(net.field, path, products=True)
        told = {"step_at": path.knots, "jump_at": path.jumps}
        fine = fs.solve(
            cde, y0, *ends, integrator=Dopri8(), stepping=fs.Adaptive(1e-7, 1e-8, **told)
        ).y1
        for keywords in ({}, told):
            sol = fs.solve(cde, y0, *ends, stepping=fs.Adaptive(1e-4, 1e-6, **keywords))
            counts.append(sol.stats.evaluations)
            errors.append(float((sol.y1 - fine).abs().max()))
        assert counts[1] < counts[0]
        assert errors[1] < errors[0]


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_defaults_take_both_kinds_of_times(own: bool) -> None:
    times, x = data(n=5)
    for rule in (Linear, NaturalCubic):
        path = rule(times if own else times[0], 0.2 * x)
        stops = {} if own else {"step_at": path.knots, "jump_at": path.jumps}
        tight = fs.Solver(stepping=fs.Adaptive(1e-7, 1e-8, own, **stops))
        assert torch.allclose(model(2)(path), model(2, solver=tight)(path), atol=1e-3)


@pytest.mark.parametrize("path", [Linear, NaturalCubic])
def test_great_times_are_not_rounded_to_the_state(path: Any) -> None:
    """Unix seconds in float64 over values in float32: f = 1 gives the path's own increment."""
    x = torch.tensor([[[0.0], [1.0], [0.0], [5.0]]], dtype=torch.float32)
    times = 1.7e9 + torch.arange(4, dtype=torch.float64)
    cde = fs.CDE(lambda t, y: torch.ones_like(y)[..., None], path(times, x), batched_time=True)
    y1 = fs.solve(
        cde, torch.zeros_like(x[:, 0]), 1.7e9, 1.7e9 + 3, integrator=Midpoint(),
        stepping=fs.Fixed(steps=300),
    ).y1  # fmt: skip
    assert y1.item() == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize("rule", [Linear, HermiteCubic])
def test_shared_times_have_the_gradient_of_own_times(rule: Any) -> None:
    times = torch.tensor([0.0, 1.0, 2.0, 4.0], requires_grad=True)
    values = torch.tensor([[[0.0], [1.0], [-1.0], [2.0]]])
    torch.manual_seed(0)
    net = NeuralCDE(1, 1, hidden=4, width=8, depth=1)
    shared, own = (
        torch.autograd.grad(net(rule(t, values)), times)[0] for t in (times, times[None])
    )
    torch.testing.assert_close(shared, own)
    if rule is Linear:  # which time is when does not matter to it
        torch.testing.assert_close(shared, torch.zeros(4))
