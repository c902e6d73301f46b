"""Control paths: against SciPy's, with missing values and own times; log-signatures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate
from torch import Tensor

import flowsde as fs
from benchmarks.counting import Counter
from flowsde import paths
from flowsde.paths import (
    HermiteCubic,
    Linear,
    LogSignature,
    Monotone,
    NaturalCubic,
    Piecewise,
    Rectilinear,
    log_signature,
    signature,
)
from flowsde.paths.logsignature import _logarithm
from flowsde.paths.splines import tridiagonal
from flowsde.series import Series, collate

Rule = Callable[[Tensor, Tensor], Piecewise]


def backward(t: Any, x: Any) -> Any:
    slopes = np.diff(x) / np.diff(t)
    return interpolate.CubicHermiteSpline(t, x, np.concatenate((slopes[:1], slopes)))


SCIPY = {
    Linear: lambda t, x: interpolate.make_interp_spline(t, x, k=1),
    HermiteCubic: backward,
    Monotone: interpolate.PchipInterpolator,
    NaturalCubic: lambda t, x: interpolate.CubicSpline(t, x, bc_type="natural"),
}
OTHERS: dict[str, Rule] = {
    "Rectilinear": Rectilinear,
    "LogSignature": lambda t, x: LogSignature(t, x, depth=2, window=3),
}
EVERY: dict[str, Rule] = {**{rule.__name__: rule for rule in SCIPY}, **OTHERS}


def data(batch: int = 3, n: int = 9, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Irregular times of each sample's own, and values."""
    torch.manual_seed(seed)
    return torch.rand(batch, n).add(0.05).cumsum(1), torch.randn(batch, n, channels)


def holes(x: Tensor, share: float = 0.4) -> Tensor:
    """The values with some missing: at both ends, inside, and a channel without any."""
    x = x.masked_fill(torch.rand(x.shape) < share, torch.nan)
    x[0, :, 0], x[1, :2, 1], x[1, -3:, 1] = torch.nan, torch.nan, torch.nan
    return x


def known(t: Any, x: Any, end: int) -> tuple[Any, Any]:
    """The observed values of one channel, filled up at the ends of a sample of so many rows."""
    t, x = t[:end], x[:end].copy()
    seen = np.flatnonzero(~np.isnan(x))
    if not len(seen):
        return t, np.zeros_like(x)
    x[: seen[0]], x[seen[-1] :] = x[seen[0]], x[seen[-1]]
    return t[~np.isnan(x)], x[~np.isnan(x)]


def test_every_path_is_tested() -> None:
    made = (getattr(paths, name) for name in paths.__all__)
    rules = {c.__name__ for c in made if isinstance(c, type) and issubclass(c, Piecewise)}
    assert rules == {*EVERY, "Piecewise"}


@pytest.mark.parametrize("rule", SCIPY, ids=lambda rule: rule.__name__)
@settings(max_examples=8)
@given(
    n=st.integers(2, 12), share=st.sampled_from([0.0, 0.4, 0.9]), each=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_splines_are_scipys(rule: Any, n: int, share: float, each: bool, seed: int) -> None:
    """Values and slopes, within the times and beyond."""
    times, x = data(n=n, seed=seed)
    times = times if each else times[0].expand(3, -1)
    x = holes(x, share) if share else x
    path = rule(times if each else times[0], x)
    span = float(times[0, 0]) - 0.1, float(times[0, -1]) + 0.1
    for q in torch.linspace(*span, 9):
        value, slope = path.evaluate(q).cpu().numpy(), path.derivative(q).cpu().numpy()
        rows = path.evaluate(q.expand(3)), path.derivative(q.expand(3))
        for b, c in itertools.product(range(3), range(2)):
            end = 1 + max([0, *torch.nonzero(~x[b].isnan())[:, 0].tolist()])
            own = known(times[b].cpu().numpy(), x[b, :, c].cpu().numpy(), end)
            at, wanted = float(q), (own[1][-1], 0.0)
            if end == n or (end > 1 and at < own[0][-1]):
                theirs = SCIPY[rule](*own)
                wanted = theirs(at), theirs(at, 1)
            np.testing.assert_allclose(value[b, c], wanted[0], rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(slope[b, c], wanted[1], rtol=1e-9, atol=1e-9)
        assert torch.allclose(rows[0].cpu(), torch.as_tensor(value), atol=1e-12)
        assert torch.allclose(rows[1].cpu(), torch.as_tensor(slope), atol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
def test_the_natural_spline_is_torchcdes(missing: bool) -> None:
    import torchcde

    times, x = data(n=20)
    x = holes(x) if missing else x
    x[:, -1, 0] = 1.0  # rows without any value at the end are no knots of ours
    mine = NaturalCubic(times[0], x).pieces.permute(2, 0, 1, 3).flatten(-2)
    assert torch.allclose(mine, torchcde.natural_cubic_coeffs(x, times[0]), atol=1e-9)


@given(n=st.integers(1, 40), seed=st.integers(0, 99))
def test_cyclic_reduction_solves(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    beside, rhs = torch.rand(n - 1, 1) - 0.5, torch.randn(n, 3)
    diagonal = 1.1 + torch.rand(n, 1)
    matrix = torch.diag(diagonal[:, 0])
    for side in (1, -1):
        matrix = matrix + torch.diag(beside[:, 0], side)
    assert torch.allclose(matrix @ tridiagonal(diagonal, beside, rhs), rhs, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_slopes_are_derivatives(name: str) -> None:
    times, x = data()
    path = EVERY[name](times[0], x)
    q = path.knots[:-1] + path.knots.diff() * torch.rand(len(path.knots) - 1)
    for t in q:
        t = t.requires_grad_()
        value = path.evaluate(t)
        rows = [torch.autograd.grad(v, t, retain_graph=True)[0] for v in value.flatten()]
        assert torch.allclose(torch.stack(rows).view_as(value), path.derivative(t), atol=1e-9)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_values_and_times(name: str, missing: bool) -> None:
    times, x = data(batch=2, n=6)
    x[0, 2, 1] = torch.nan if missing else x[0, 2, 1]
    t = 0.4 * times[:, 0] + 0.6 * times[:, -1] if name != "Rectilinear" else torch.tensor(4.3)
    gap = x.isnan()

    def found(times: Tensor, x: Tensor) -> Tensor:
        path = EVERY[name](times, x.masked_fill(gap, torch.nan))
        return torch.cat((path.evaluate(t), path.derivative(t)))

    assert torch.autograd.gradcheck(
        found, (times.requires_grad_(), x.nan_to_num().requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_what_is_called_causal_is(name: str, missing: bool) -> None:
    """X up to arrival i is unchanged when later data are; and what is not called so is not."""
    times, x = data()
    x[0, 3, 0] = torch.nan if missing else x[0, 3, 0]
    late = x.clone()
    late[:, 4:] += 1.0
    mine, other = EVERY[name](times, x), EVERY[name](times, late)
    window = 3 if name == "LogSignature" else 1
    end = mine.arrivals[..., 3 // window]
    same = True
    for part in torch.linspace(0.0, 1.0, 20):
        t = mine.arrivals[..., 0] * (1 - part) + end * part
        same &= bool(torch.allclose(mine.evaluate(t), other.evaluate(t), atol=1e-12))
    assert mine.causal == (name not in ("Monotone", "NaturalCubic") and not _fills(name, missing))
    assert same == mine.causal


def _fills(name: str, missing: bool) -> bool:
    return missing and name != "Rectilinear"


def test_a_rectilinear_path_moves_one_at_a_time() -> None:
    times, x = data()
    x[1, 2, 0] = torch.nan
    path = Rectilinear(times, x)
    held = x.clone()
    held[1, 2, 0] = x[1, 1, 0]
    for i in range(9):
        assert torch.allclose(path.evaluate(path.arrivals[i])[:, 1:], held[:, i])
        assert torch.allclose(path.evaluate(path.arrivals[i])[:, 0], times[:, i])
    between = torch.stack([path.derivative(k + 0.5) for k in path.knots[:-1]])
    assert not bool((between[::2, :, 1:] != 0).any())
    assert not bool((between[1::2, :, 0] != 0).any())
    with pytest.raises(ValueError, match="first"):
        Rectilinear(times, x.masked_fill(torch.arange(9)[:, None] == 0, torch.nan))


def test_monotone_data_stay_monotone() -> None:
    times, x = data()
    path = Monotone(times[0], x.abs().cumsum(1))
    line = torch.stack([path.evaluate(t) for t in torch.linspace(*times[0, [0, -1]].tolist(), 200)])
    assert bool((line.diff(dim=0) > -1e-14).all())


def test_the_shared_time_costs_one_search_and_one_selection() -> None:
    """Nothing in a derivative is over the batch but the piece's own arithmetic."""
    times, x = data()
    counts = {}
    for rule in (Linear, NaturalCubic):
        path = rule(times[0], x)
        with Counter() as counter:
            path.derivative(torch.tensor(0.3))
        counts[rule] = counter.operations
        assert counter.reads == 0
    assert counts[Linear] <= 9
    assert counts[NaturalCubic] <= 11


@pytest.mark.parametrize("missing", [False, True])
def test_operations_grow_with_the_logarithm_of_the_length(missing: bool) -> None:
    counts = []
    for n in (64, 128, 256):
        times, x = data(batch=2, n=n)
        with Counter() as counter:
            NaturalCubic(times[0], holes(x) if missing else x)
        counts.append(counter.operations)
    assert counts[2] - counts[1] == counts[1] - counts[0] < 40


@pytest.mark.parametrize("rule", [Linear, NaturalCubic], ids=lambda rule: rule.__name__)
def test_rows_can_be_selected(rule: Any) -> None:
    times, x = data()
    rows = torch.tensor([2, 0])
    for t in (times, times[0]):
        path, q = rule(t, x), torch.tensor(1.0)
        assert torch.equal(path.select(rows).evaluate(q), path.evaluate(q)[rows])
        assert torch.equal(path.evaluate(q), rule(t, x).evaluate(q))


def test_paths_of_torchcde_have_knots_and_own_times() -> None:
    import torchcde

    times, x = data()
    theirs = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(x, times[0]), times[0])
    path, mine = paths.TorchCDE(theirs), NaturalCubic(times[0], x)
    t = torch.tensor([0.5, 1.0, 1.5])
    for q in (t, t[0]):
        assert torch.allclose(path.evaluate(q), mine.evaluate(q))
        assert torch.allclose(path.derivative(q), mine.derivative(q))
    assert torch.equal(path.knots, mine.knots)
    field = fs.CDE(lambda t, y: y.new_ones(3, 1, 2), theirs, batched_time=True)
    with pytest.raises(TypeError, match="TorchCDE"):
        fs.solve(field, torch.zeros(3, 1), torch.zeros(3), torch.ones(3))
    with pytest.raises(TypeError, match="torchcde"):
        paths.TorchCDE(mine)


@pytest.mark.parametrize("name", EVERY)
def test_wrong_data_are_refused(name: str) -> None:
    times, x = data()
    for t, v, word in (
        (times[:, [1, 0]], x[:, :2], "increasing"), (times[0, :1], x[:, :1], "increasing"),
        (times[:2], x, "shape"), (times[0], x[0], "shape"), (times, x.long(), "floating"),
        (times, x.masked_fill(x > 0, torch.inf), "finite"),
        (times.masked_fill(times > 1, torch.nan), x, "increasing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            EVERY[name](t, v)


@pytest.mark.parametrize("rule", [Linear, NaturalCubic], ids=lambda rule: rule.__name__)
def test_a_path_by_row_goes_the_same_way(rule: Any) -> None:
    times, x = data()
    for t in (times, times[0]):
        path = rule(t, x)
        rows, own = path.by_row(), t.expand(3, -1)
        assert torch.equal(rows.arrivals, torch.arange(9.0))
        for i in (0, 3, 7):
            gap = own[:, i + 1] - own[:, i]
            s, q = torch.tensor(i + 0.3), own[:, i] + 0.3 * gap
            assert torch.allclose(rows.evaluate(s), path.evaluate(q))
            assert torch.allclose(rows.derivative(s), path.derivative(q) * gap[:, None])


@pytest.mark.parametrize("name", EVERY)
def test_whole_numbers_are_counted_exactly(name: str) -> None:
    _, x = data(n=4)
    whole = 1_600_000_000 + 60 * torch.arange(4)
    counted, wide = EVERY[name](whole, x), EVERY[name](whole.double(), x)
    assert torch.equal(counted.pieces, wide.pieces)


def test_a_path_holds_its_own_data() -> None:
    """What the caller does to his afterwards, or loads into another, leaves it as it is."""
    times, x = data()
    path = Linear(times, x)
    before = path.evaluate(torch.tensor(1.0))
    times += 10.0
    assert torch.equal(path.evaluate(torch.tensor(1.0)), before)
    assert not path.state_dict()


def test_times_whose_gaps_are_rounded_away_are_refused() -> None:
    times = 1.6e9 + 60.0 * torch.arange(5.0)
    with pytest.raises(ValueError, match="count them from the first"):
        Rectilinear(times, torch.zeros(1, 5, 1, dtype=torch.float32))
    with pytest.raises(ValueError, match="count them from the first"):
        collate([Series(times, torch.zeros(5, 1, dtype=torch.float32))]).channels()


def test_a_rectilinear_path_ends_with_its_last_value() -> None:
    """Whatever the times that a batch goes on with."""
    one = Series(torch.arange(3.0), torch.randn(3, 1))
    batch = collate([one, Series(torch.arange(7.0), torch.randn(7, 1))])
    alone = Rectilinear(one.times, one.values[None])
    together = Rectilinear(batch.times, batch.values)
    assert torch.equal(together.evaluate(torch.tensor(12.0))[0], alone.evaluate(alone.times[-1])[0])


def test_float32_values_at_float64_times() -> None:
    times, x = data()
    path = NaturalCubic(times, x.float())
    assert path.derivative(torch.tensor(0.7, dtype=torch.float32)).dtype is torch.float32
    q, wide = times[:, 4] + 0.01, NaturalCubic(times, x)
    assert torch.allclose(path.evaluate(q).double(), wide.evaluate(q), atol=1e-5)


# --- log-signatures -------------------------------------------------------------------------------


def nilpotent(channels: int) -> Tensor:
    """Matrices of which any four multiply to nothing."""
    return torch.randn(channels, 4, 4).triu(1)


def develop(levels: list[Tensor], matrices: Tensor) -> Tensor:
    """sum over the words w of S_w M_w."""
    total, power = torch.zeros(4, 4), torch.eye(4)[None]
    for level in levels:
        power = torch.einsum("pij,cjk->pcik", power, matrices).flatten(0, 1)
        total = total + torch.einsum("p,pij->ij", level.flatten(), power)
    return total


@given(n=st.integers(2, 7), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_signatures_develop_paths(n: int, channels: int, seed: int) -> None:
    """Chen's identity: a segment is an exponential, one after another is a product; and the
    logarithm is one."""
    torch.manual_seed(seed)
    x, matrices = torch.randn(n, channels), nilpotent(channels)
    product = torch.eye(4)
    for step in x.diff(dim=0):
        product = product @ torch.linalg.matrix_exp(torch.einsum("c,cij->ij", step, matrices))
    levels = signature(x, 3)
    assert torch.allclose(develop(levels, matrices), product - torch.eye(4), atol=1e-10)
    log = torch.linalg.matrix_exp(develop(_logarithm(levels), matrices))
    assert torch.allclose(log, product, atol=1e-10)
    for depth in (1, 2):
        low = log_signature(x, depth)
        assert torch.allclose(log_signature(x, 3)[: len(low)], low)


def test_log_signatures_have_closed_forms() -> None:
    """The Levy area; and of two segments the Baker-Campbell-Hausdorff series."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(log_signature(x, 2), torch.tensor([0.0, 0.0, 1.0]))
    a, b = torch.randn(2), torch.randn(2)
    area = a[0] * b[1] - a[1] * b[0]
    found = log_signature(torch.stack((torch.zeros(2), a, a + b)), 3)
    third = area / 12 * (a - b)  # [a, [a, b]] + [b, [b, a]], words 112 and 122
    expected = torch.cat((a + b, area[None] / 2, third * torch.tensor([1.0, -1.0])))
    assert torch.allclose(found, expected)
    walk = torch.randn(5, 8, 3)
    assert torch.allclose(log_signature(walk.flip(1), 3), -log_signature(walk, 3))
    assert log_signature(walk, 3).shape == (5, 3 + 3 + 8)
    finer = torch.stack((walk[:, :-1], 0.3 * walk[:, :-1] + 0.7 * walk[:, 1:]), 2).flatten(1, 2)
    finer = torch.cat((finer, walk[:, -1:]), 1)
    assert torch.allclose(log_signature(finer, 3), log_signature(walk, 3))
    with pytest.raises(ValueError, match="depth"):
        log_signature(walk, 4)


def test_a_log_signature_path_gathers_windows() -> None:
    times, x = data(n=9)
    path = LogSignature(times, x, depth=3, window=3)
    assert torch.equal(path.times, times[:, [0, 3, 6, 8]])
    start = path.evaluate(times[:, 0])
    assert torch.equal(start[:, :2], x[:, 0])
    assert not bool(start[:, 2:].any())
    for i, (first, last) in enumerate(((0, 3), (3, 6), (6, 8))):
        inside = 0.5 * (times[:, first] + times[:, last])
        gap = (path.times[:, i + 1] - path.times[:, i])[:, None]
        expected = log_signature(x[:, first : last + 1], 3)
        assert torch.allclose(path.derivative(inside) * gap, expected)
    with pytest.raises(ValueError, match="window"):
        LogSignature(times, x, depth=2, window=0)


@pytest.mark.parametrize("kind", ["backsolve", "costate", "density", "regularize", "horizon"])
def test_what_is_made_of_a_cde_asks_its_path_at_the_same_times(kind: str) -> None:
    """In float32 too, where seconds since 1970 are a minute apart."""
    torch.set_default_dtype(torch.float32)
    times = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)
    values, found = torch.randn(2, 40, 2).cumsum(1) * 0.1, []
    for offset in (0.0, 1.7e9):
        cde = fs.CDE(
            lambda t, y: y.tanh()[..., None].expand(-1, -1, 2),
            NaturalCubic(times + offset, values), batched_time=True,
        )  # fmt: skip
        y0 = torch.full((2, 2), 0.5, requires_grad=True)
        zero, costs = torch.zeros(2), fs.regularize(cde, jacobian=False)
        dynamics, start, adjoint = {
            "backsolve": (cde, y0, fs.Backsolve()),
            "costate": (fs.costate(cde), (y0, torch.ones(2, 2), ()), fs.Direct()),
            "density": (fs.log_density(cde), (y0, zero), fs.Direct()),
            "regularize": (costs, costs.enter(y0), fs.Direct()),
            "horizon": (fs.learn_horizon(cde, 1.0), y0, fs.Direct()),
        }[kind]
        sol = fs.solve(
            dynamics, start, offset, offset + 1.0, adjoint=adjoint, integrator=fs.integrators.RK4(),
            stepping=fs.Fixed(steps=40),
        )  # fmt: skip
        parts = [x for x in torch.utils._pytree.tree_leaves(sol.y1) if x.numel()]
        if kind == "backsolve":
            parts += torch.autograd.grad(sol.y1.square().sum(), y0)
        found.append(parts)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
