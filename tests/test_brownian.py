"""Brownian paths: their joint laws, and that they are the same whatever is asked of them.

Covariances are compared with exact ones, integrals of products of polynomials, to rounding where
they follow from weights, and within five standard errors (one failure in 10^6) where they are
measured; distributions by Kolmogorov and Smirnov at level 10^-6, each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowsde as fs
from flowsde import _random
from flowsde._increment import Draws, Increment, Levy, Source
from flowsde.integrators import (
    SRI2,
    SRIW1,
    EulerMaruyama,
    LogODE,
    Milstein,
    PlatenWeak2,
    Stochastic,
    StochasticHeun,
    TorchSDE,
)
from flowsde.paths import Brownian, BrownianTree, levy, tree
from flowsde.paths.interval import Outside
from flowsde.paths.nodes import Weights

from .systems import DEVICE, generator, increments

LEVIES: tuple[Levy, ...] = ("W", "H", "K")
Span = tuple[float, float]


def parts(step: Increment) -> list[Tensor]:
    """w, H and K, as far as they are there."""
    return [x for x in step[:3] if x is not None]


def gram(a: Span, b: Span, order: int) -> np.ndarray:
    """The covariance of (w, H, K) over one interval with those over another."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    if high <= low:
        return np.zeros((order, order))
    points, masses = np.polynomial.legendre.leggauss(4)
    s = low + 0.5 * (high - low) * (points + 1.0)

    def functionals(span: Span) -> np.ndarray:
        x = (s - span[0]) / (span[1] - span[0])
        return np.stack((1.0 + 0.0 * x, 0.5 - x, 0.5 * x * x - 0.5 * x + 1 / 12))[:order]

    return functionals(a) * (0.5 * (high - low) * masses) @ functionals(b).T


def covariance(spans: list[Span], order: int) -> np.ndarray:
    """Of (w, H, K) over all of the intervals."""
    return np.block([[gram(a, b, order) for b in spans] for a in spans])


def check_law(samples: Tensor, exact: np.ndarray) -> None:
    """Means, covariances and distributions of ``(variables, n)`` joint normals."""
    x, n = samples.cpu(), samples.shape[1]
    expected = torch.as_tensor(exact, device="cpu")
    spread = expected.diagonal().sqrt()
    assert bool((x.mean(1).abs() < 5 * spread / math.sqrt(n)).all())
    error = ((spread[:, None] * spread).square() + expected.square()).sqrt() / math.sqrt(n)
    assert bool(((x @ x.mT / n - expected).abs() < 5 * error).all())
    ordered = torch.special.ndtr(x.sort(1).values / spread[:, None])
    ranks = torch.arange(n, device="cpu") / n
    assert float((ordered - ranks).abs().max()) < 2.7 / math.sqrt(n)


def same(a: Increment, b: Increment) -> bool:
    """Whether all that both hold is the same to the last bit."""
    halves = a.halves is None or (
        b.halves is not None and all(same(x, y) for x, y in zip(a.halves, b.halves, strict=True))
    )
    pairs = zip(a[:4], b[:4], strict=True)
    return halves and all(x is y or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def close(a: Increment, b: Increment, to: float = 1e-12) -> None:
    for x, y in zip(parts(a), parts(b), strict=True):
        assert torch.allclose(x, y, rtol=0.0, atol=to)


def joined(first: Increment, second: Increment, share: float) -> Increment:
    """The increment over two intervals, the first of which is this part of the whole."""
    rows = zip(levy.shares(0.0, share), levy.shares(share, 1.0 - share), strict=True)
    whole = [
        sum(c * x for row, step in zip(pair, (first, second), strict=True)
            for c, x in zip(row, parts(step), strict=False))
        for pair, _ in zip(rows, parts(first), strict=False)
    ]  # fmt: skip
    return Increment(*whole)  # type: ignore[arg-type]


def turned(step: Increment) -> Increment:
    """The same stretch of the path, run back."""
    halves = None if step.halves is None else tuple(turned(half) for half in step.halves[::-1])
    k = None if step.k is None else -step.k
    return Increment(-step.w, step.h, k, step.z, halves)  # type: ignore[arg-type]


# --- normals --------------------------------------------------------------------------------------


def test_normals_are_normal() -> None:
    """Moments within five standard errors, Kolmogorov-Smirnov at level 1e-4, no correlations."""
    n = 200_000
    key = _random.keys(11, 1000, DEVICE, _random.BROWNIAN)
    draws = _random.normal(key, torch.arange(20), 10, torch.float64).flatten().cpu()
    assert abs(float(draws.mean())) < 5 / math.sqrt(n)
    assert abs(float(draws.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(draws.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    ordered = torch.special.ndtr(draws.sort().values)
    ranks = torch.arange(n, device="cpu") / n
    assert float((ordered - ranks).abs().max()) < 2.23 / math.sqrt(n)
    table = draws.reshape(20, 1000, 10)
    for a, b in (
        (table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table[..., 1:], table[..., :-1]),
    ):  # fmt: skip
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_signs_are_fair() -> None:
    key = _random.keys(2, 100, DEVICE, _random.PROBE)
    signs = _random.rademacher(key, torch.arange(10), 100, torch.float64)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())


def test_streams_of_one_seed_are_apart() -> None:
    draws = [
        _random.normal(_random.keys(5, 400, DEVICE, s), torch.arange(5), 10, torch.float64)
        for s in (_random.BROWNIAN, _random.PROBE, _random.BASE)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((draws[a] * draws[b]).mean())) < 5 / math.sqrt(20_000)


# --- the algebra of w, H and K --------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_halves_and_whole_have_the_joint_law(order: int) -> None:
    """To rounding: what ``halve`` makes of independent numbers, and ``compose`` of its halves."""
    deviations = [math.sqrt(gram((0, 1), (0, 1), 3)[i, i]) for i in range(order)]
    unit = torch.eye(2 * order)
    whole = [x * s for x, s in zip(unit[:order], deviations, strict=True)]
    first, second = levy.halve(whole, list(unit[order:]))
    spans = [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)]
    basis = torch.stack((*whole, *first, *second))
    assert np.allclose(basis @ basis.mT, covariance(spans, order), atol=1e-15)
    for a, b in zip(levy.compose(first, second), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-15)


@given(cuts=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=1))
def test_shares_of_pieces_are_their_integrals(cuts: list[float]) -> None:
    """Cov(piece, whole) = Cov(piece, piece) times its shares."""
    for start, end in itertools.pairwise((0.0, *cuts, 1.0)):
        rows = levy.shares(start, end - start)
        table = np.array([[*row, *[0.0] * (3 - len(row))] for row in rows])
        own = gram((start, end), (start, end), 3)
        assert np.allclose(table @ own, gram((0, 1), (start, end), 3), atol=1e-14)


def weights(span: Span, outputs: int, order: int, depth: int) -> np.ndarray:
    """What each of the tree's normals adds to the increment over a part of [0, 1]."""
    values, nodes = Weights(outputs, order, depth)(np.array(span)[:, None])
    table = np.zeros((outputs, order << (depth + 1)))
    np.add.at(table.T, nodes.ravel(), values.reshape(outputs, -1).T)
    return table


PLACES = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=4, unique=True).map(sorted)


@pytest.mark.parametrize("order", [1, 2, 3])
@given(places=st.lists(st.integers(0, 64), min_size=2, max_size=5, unique=True).map(sorted))
def test_the_tree_is_exact_on_the_ends_of_its_leaves(order: int, places: list[int]) -> None:
    """All covariances of w, H and K, over neighbouring, nested and overlapping intervals."""
    spans = [(a / 64, b / 64) for a, b in itertools.combinations(places, 2)]
    basis = np.concatenate([weights(span, order, order, 6) for span in spans])
    assert np.allclose(basis @ basis.T, covariance(spans, order), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@given(places=PLACES, depth=st.integers(3, 9))
def test_the_tree_is_exact_for_w_between_leaves(
    order: int, places: list[float], depth: int
) -> None:
    """Times in different leaves; H and K up to the square of leaf over step."""
    places = [p for p, q in zip(places, [*places[1:], 2.0], strict=True) if q - p > 2.0**-depth]
    spans = list(itertools.combinations(places, 2))
    if not spans:
        return
    for outputs in range(1, order + 1):
        basis = np.concatenate([weights(span, outputs, order, depth) for span in spans])
        error = np.abs(basis @ basis.T - covariance(spans, outputs))
        assert error[::outputs, ::outputs].max() < 1e-12
        widths = np.repeat([b - a for a, b in spans], outputs)
        ratio = 2.0**-depth / np.minimum(widths[:, None], widths)
        deviations = np.sqrt(np.diag(covariance(spans, outputs)))
        assert (error <= 12.0 * ratio**2 * deviations[:, None] * deviations + 1e-12).all()


# --- laws -----------------------------------------------------------------------------------------


def on_its_grid(grid: list[float], draws: Draws) -> Source:
    return Brownian(5).bind(grid, draws)


def on_a_finer_grid(grid: list[float], draws: Draws) -> Source:
    ends = itertools.pairwise(sorted(grid))
    inner = [[a, a + 0.125 * (b - a), 0.5 * (a + b)] for a, b in ends]
    return Brownian(5, torch.tensor([*itertools.chain(*inner), max(grid)])).bind(grid, draws)


def on_a_tree(grid: list[float], draws: Draws) -> Source:
    return Brownian(5).tree(grid[0], grid[-1], draws)


def on_a_wider_tree(grid: list[float], draws: Draws) -> Source:
    return BrownianTree(5, min(grid) - 0.7, max(grid) + 0.1, 1e-4).bind(grid, draws)


class OnRows:
    """A tree whose rows have times of their own, which happen to be the same."""

    def __init__(self, grid: list[float], draws: Draws) -> None:
        self._source = Brownian(5).tree(grid[0], grid[-1], draws)
        self._rows = len(draws.shapes)

    def __call__(self, n: int, t0: float, t1: float) -> Increment:
        return self._source(n, torch.full((self._rows,), t0), torch.full((self._rows,), t1))

    def select(self, rows: Tensor) -> Source:
        return self._source.select(rows)


SOURCES: list[Callable[[list[float], Draws], Source]] = [
    on_its_grid, on_a_finer_grid, on_a_tree, on_a_wider_tree, OnRows,
]  # fmt: skip
GRID = [0.2, 0.5, 0.55, 1.0]
every_source = pytest.mark.parametrize("make", SOURCES, ids=lambda m: m.__name__)


@every_source
@pytest.mark.parametrize("kind", LEVIES)
def test_joint_laws(make: Any, kind: Levy) -> None:
    """Of neighbouring steps, their halves and the further normals of every step."""
    like, order = torch.empty(1000, 4), levy.ORDER[kind]
    source = make(GRID, Draws(like, kind, extra=like, halves=True))
    spans: list[Span] = []
    found, normals = [], []
    for n, (a, b) in enumerate(itertools.pairwise(GRID)):
        step = source(n, a, b)
        spans += [(a, b), (a, 0.5 * (a + b)), (0.5 * (a + b), b)]
        for each in (step, *step.halves):
            found += [x.flatten() for x in parts(each)]
            assert len(parts(each)) == order
        normals.append(step.z.flatten())
    size = len(spans) * order
    exact = np.eye(size + len(normals))
    exact[:size, :size] = covariance(spans, order)
    check_law(torch.stack(found + normals), exact)


@every_source
def test_components_and_samples_are_independent(make: Any) -> None:
    like = torch.empty(6000, 3)
    source = make(GRID, Draws(like, "K", extra=like, halves=True))
    step = source(0, GRID[0], GRID[1])
    for x in (*parts(step), step.z, *parts(step.halves[0])):
        assert x is not None
        for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
            scale = float(x.square().mean())
            assert abs(float((a * b).mean())) < 5 * scale / math.sqrt(a.numel())


def test_seeds_and_spans_are_other_paths() -> None:
    like = torch.empty(2000, 2)
    draws = Draws(like, "H")
    drawn = [
        source(0, 0.0, 1.0)
        for source in (
            Brownian(1).bind([0.0, 1.0], draws), Brownian(2).bind([0.0, 1.0], draws),
            Brownian(1).tree(0.0, 1.0, draws), Brownian(2).tree(0.0, 1.0, draws),
        )
    ]  # fmt: skip
    for a, b in itertools.combinations([x for step in drawn for x in parts(step)], 2):
        scale = float(a.std() * b.std())
        assert abs(float((a * b).mean())) < 5 * scale / math.sqrt(4000)


# --- refinement -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=9),
    kind=st.sampled_from(LEVIES),
    down=st.booleans(),
)
def test_a_coarse_step_is_composed_of_fine_ones(
    seed: int, widths: list[float], kind: Levy, down: bool
) -> None:
    times = np.concatenate(([0.0], np.cumsum(widths))).tolist()
    grid = times[::-1] if down else times
    draws = Draws(torch.empty(3, 2), kind)
    path = Brownian(seed, torch.tensor(times))
    fine, coarse = path.bind(grid, draws), path.bind([grid[0], grid[-1]], draws)
    total = fine(0, grid[0], grid[1])
    for n in range(1, len(widths)):
        share = (grid[n] - grid[0]) / (grid[n + 1] - grid[0])
        total = joined(total, fine(n, grid[n], grid[n + 1]), share)
    close(coarse(0, grid[0], grid[-1]), total, 1e-13)


@given(places=PLACES, kind=st.sampled_from(LEVIES))
@example(places=[0.25, 0.65625, 0.6875], kind="W")  # two in one leaf, and then new nodes
def test_increments_of_a_tree_add_up(places: list[float], kind: Levy) -> None:
    """Also within a leaf: to rounding, in terms of the increment of the whole."""
    a, b, c = places[0], places[1], places[-1]
    if b - a < 1e-4 or c - b < 1e-4:
        return
    source = BrownianTree(3, 0.0, 1.0, 0.2).bind([0.0, 1.0], Draws(torch.empty(3, 2), kind))
    pieces = joined(source(0, a, b), source(0, b, c), (b - a) / (c - a))
    close(source(0, a, c), pieces, 1e-9)


@every_source
@pytest.mark.parametrize("kind", LEVIES)
@pytest.mark.parametrize("grid", [GRID, GRID[::-1]], ids=["up", "down"])
def test_halves_make_up_the_whole(make: Any, kind: Levy, grid: list[float]) -> None:
    source = make(grid, Draws(torch.empty(4, 2), kind, halves=True))
    for n, (a, b) in enumerate(itertools.pairwise(grid)):
        step = source(n, a, b)
        close(step, joined(*step.halves, 0.5))


@pytest.mark.parametrize("make", SOURCES[2:], ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", LEVIES)
def test_halves_are_what_shorter_steps_find(make: Any, kind: Levy) -> None:
    """So that a rejected step is taken again on the same path."""
    like = torch.empty(4, 2)
    step = make(GRID, Draws(like, kind, halves=True))(0, 0.2, 0.5)
    plain = make(GRID, Draws(like, kind))
    assert same(plain(0, 0.2, 0.35), step.halves[0])
    assert same(plain(0, 0.35, 0.5), step.halves[1])
    close(plain(0, 0.2, 0.5), step)


@every_source
@pytest.mark.parametrize("kind", LEVIES)
def test_a_path_run_back(make: Any, kind: Levy) -> None:
    like = torch.empty(4, 2)
    draws = Draws(like, kind, extra=like, halves=True)
    up, down = make(GRID, draws), make(GRID[::-1], draws)
    for n, (a, b) in enumerate(itertools.pairwise(GRID)):
        back, there = down(len(GRID) - 2 - n, b, a), turned(up(n, a, b))
        close(back, there)
        for one, other in zip(back.halves, there.halves, strict=True):  # type: ignore[arg-type]
            close(one, other)
        assert torch.equal(back.z, there.z)


# --- the same numbers, whatever is asked ----------------------------------------------------------


QUERIES = st.lists(
    st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.booleans()), min_size=2, max_size=5
)


@settings(max_examples=6, phases=(Phase.generate,))
@given(queries=QUERIES, order=st.randoms(use_true_random=False), kind=st.sampled_from(LEVIES))
def test_queries_of_a_tree_have_no_order(queries: Any, order: Any, kind: Levy) -> None:
    """To the last bit; times shared or one a row; one source, one a query, or another order."""
    like = torch.empty(3, 2)
    draws = Draws(like, kind, extra=like, halves=kind == "H")

    def ask(source: Source, a: float, b: float, rows: bool) -> Increment:
        if rows:
            ends = torch.tensor([[a, 0.3, b], [b, 0.3, 0.9]])
            return source(0, ends[0], ends[1])
        return source(0, a, b)

    path = BrownianTree(1, 0.0, 1.0, 1e-3)
    source = path.tree(0.0, 1.0, draws)
    first = [ask(source, *query) for query in queries]
    again = list(enumerate(queries))
    order.shuffle(again)
    for i, query in again:
        assert same(ask(source, *query), first[i])
        assert same(ask(path.tree(0.0, 1.0, draws), *query), first[i])


def held(source: Any) -> int:
    """Bytes of the numbers that a source holds, and a hundred for every node it remembers."""
    return source._held.untyped_storage().nbytes() + 100 * len(source._places)


def test_a_tree_holds_no_more_after_many_queries() -> None:
    draws = Draws(torch.empty(1, 1), "H")
    source, sizes = Brownian(0).tree(0.0, 1.0, draws), []
    for n in range(200):
        t = (0.618 * n) % 0.9
        source(n, t, t + 0.05)
        sizes.append(held(source))
    most = 2 * (2 * tree.DEPTH + 2) * (8 + 100)
    assert max(sizes) <= most, "two normals for every node of two ways down"
    assert max(sizes[:10]) > 0.8 * most


def test_the_next_step_draws_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes that hold its end and held neither end of the step before, one number each."""
    drawn, normal = [], _random.normal

    def counted(key: Tensor, steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        drawn.append(steps.numel())
        return normal(key, steps, size, dtype)

    def nodes(*times: float) -> set[tuple[int, int]]:
        return {(level, int(t * 2**level)) for level in range(tree.DEPTH + 1) for t in times}

    monkeypatch.setattr(_random, "normal", counted)
    source = BrownianTree(0, 0.0, 1.0).tree(0.0, 1.0, Draws(torch.empty(1, 2)))
    last: set[tuple[int, int]] = set()
    for a, b in ((0.3001, 0.3101), (0.3101, 0.3201), (0.3101, 0.3151), (0.3151, 0.3101)):
        drawn.clear()
        source(0, a, b)
        new = len(nodes(a, b) - last)
        assert sum(drawn) == (new if last else new + 1)  # and the root's
        last = nodes(a, b)


SEEDS = torch.tensor([3, 14, 15, 92, 65, 35, 89], device="cpu")


def on_own_grid(seed: Tensor, draws: Draws) -> Source:
    return Brownian(seed).bind(GRID, draws)


def on_own_finer_grid(seed: Tensor, draws: Draws) -> Source:
    return Brownian(seed, torch.linspace(0.2, 1.0, 33)).bind(GRID, draws)


def on_own_tree(seed: Tensor, draws: Draws) -> Source:
    return Brownian(seed).tree(0.0, 1.0, draws)


@pytest.mark.parametrize("make", [on_own_grid, on_own_finer_grid, on_own_tree])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_is_the_same_in_any_batch(make: Any, dtype: torch.dtype) -> None:
    seeds = SEEDS.to(DEVICE)
    halves = make is not on_own_finer_grid

    def draws(count: int) -> Draws:
        like = torch.empty(count, 67, dtype=dtype)
        return Draws(like, "K", extra=like[:, :5], halves=halves)

    whole = make(seeds, draws(7))(0, 0.2, 0.5)
    for rows in ([4], [1, 5, 0], [6, 6]):
        index = torch.tensor(rows)
        alone = make(seeds[index], draws(len(rows)))(0, 0.2, 0.5)
        assert same(alone, whole.map(lambda x: x[index]))
        assert same(make(seeds, draws(7)).select(index)(0, 0.2, 0.5), alone)
        if make is on_own_tree:
            t = torch.full((len(rows),), 0.2)
            close(make(seeds[index], draws(len(rows)))(0, t, t + 0.3), alone, 1e-6)


@settings(max_examples=4)
@given(t=st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6))
def test_rows_with_times_of_their_own_are_alone(t: list[float]) -> None:
    """Spans and steps of each sample's own, bitwise those of a batch of one."""
    seeds, like = torch.arange(3), torch.empty(3, 5)
    low, high = torch.tensor(t).reshape(2, 3).sort(0).values
    high = high + 0.01
    whole = Brownian(seeds).tree(low, high, Draws(like, "K", halves=True))
    ends = low + 0.3 * (high - low), low + 0.9 * (high - low)
    step = whole(0, *ends)
    for i in range(3):
        row = slice(i, i + 1)
        own = Brownian(seeds[row]).tree(low[row], high[row], Draws(like[row], "K", halves=True))
        assert same(own(0, ends[0][row], ends[1][row]), step.map(lambda x: x[row]))
        chosen = whole.select(torch.tensor([i]))
        assert same(chosen(0, ends[0][row], ends[1][row]), step.map(lambda x: x[row]))
        shared = Brownian(seeds[row]).tree(float(low[i]), float(high[i]), Draws(like[row], "K"))
        close(shared(0, float(ends[0][i]), float(ends[1][i])), step.map(lambda x: x[row]), 1e-7)


def test_a_step_of_no_length_moves_nothing() -> None:
    like = torch.empty(2, 3)
    source = Brownian(0).tree(0.0, 1.0, Draws(like, "K", halves=True))
    step = source(0, torch.tensor([0.4, 0.2]), torch.tensor([0.4, 0.7]))
    for each in (step, *step.halves):  # type: ignore[misc]
        for x in parts(each):
            assert bool(torch.isfinite(x).all())
            assert float(x[0].abs().max()) == 0.0
    assert all(float(x.abs().max()) == 0.0 for x in parts(source(0, 0.3, 0.3)))


@given(seed=st.integers(0, 2**63 - 1), count=st.integers(2, 6), steps=st.integers(1, 7))
def test_replay_and_batch_invariance(seed: int, count: int, steps: int) -> None:
    """The same seed gives the same path; a sample's own seed, whatever the batch around it."""
    sde, y0 = fs.LinearSDE(fs.paths.VP()), torch.randn(count, 3)

    def run(y: Tensor, path: fs.Brownian) -> Tensor:
        return fs.solve(
            sde, y, 0.1, 0.9, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=steps), path=path
        ).y1

    assert torch.equal(run(y0, fs.Brownian(seed)), run(y0, fs.Brownian(seed)))
    assert not torch.equal(run(y0, fs.Brownian(seed)), run(y0, fs.Brownian(seed ^ 1)))
    seeds = torch.arange(count) + seed % 1000
    whole = run(y0, fs.Brownian(seeds))
    for i in range(count):
        assert torch.equal(run(y0[i : i + 1], fs.Brownian(seeds[i : i + 1])), whole[i : i + 1])
    order = torch.randperm(count)
    assert torch.equal(run(y0[order], fs.Brownian(seeds[order])), whole[order])


@given(seed=st.integers(0, 1000), pieces=st.integers(1, 8))
def test_coarse_increments_are_sums_of_fine_ones(seed: int, pieces: int) -> None:
    y, times = torch.zeros(3, 2), torch.linspace(0.0, 2.0, 4 * pieces + 1)
    fine = increments(fs.Brownian(seed, times), times.tolist(), y)
    coarse = increments(fs.Brownian(seed, times), times[::4].tolist(), y)
    for n in range(pieces):
        total = sum(fine(4 * n + i) for i in range(4))
        assert torch.allclose(coarse(n), total, atol=1e-14)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 9))
def test_a_path_run_back_takes_back_its_increments(seed: int, steps: int) -> None:
    y = torch.zeros(3, 2)
    for grid in ([n / steps for n in range(steps + 1)], [n**2 / steps for n in range(steps + 1)]):
        up = increments(fs.Brownian(seed), grid, y)
        down = increments(fs.Brownian(seed), grid[::-1], y)
        for n in range(steps):
            assert torch.equal(down(steps - 1 - n), -up(n))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, y = torch.linspace(0.0, 1.0, 12).tolist(), torch.zeros(5, 3)
    whole = increments(fs.Brownian(1), grid, y)
    monkeypatch.setattr("flowsde.paths.brownian._CHUNK", 30)
    parts = increments(fs.Brownian(1), grid, y)
    for n in (0, 10, 3, 4, 5, 10, 0):
        assert torch.equal(whole(n), parts(n))


def test_a_generator_is_consumed_once_and_decides() -> None:
    sde, y = fs.LinearSDE(fs.paths.VP()), torch.zeros(4, 2)

    def run(g: torch.Generator) -> Tensor:
        return fs.solve(
            sde, y, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=5), generator=g
        ).y1

    assert torch.equal(run(generator(1)), run(generator(1)))
    g = generator(1)
    assert not torch.equal(run(g), run(g))


# --- antithetic and correlated paths --------------------------------------------------------------


COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 2.0, -0.5], [0.0, -0.5, 0.7]], device="cpu")
PATHS = [
    lambda **how: Brownian(5, **how).bind,
    lambda **how: Brownian(5, torch.linspace(0.0, 1.0, 11), **how).bind,
    lambda **how: BrownianTree(5, 0.0, 1.0, **how).bind,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_antithetic_pairs(path: Any) -> None:
    """The first half is the path without them; the second is its negative."""
    like = torch.empty(8, 3)
    step, plain = (
        path(**how)([0.0, 0.5, 1.0], Draws(x, "K", extra=x))(0, 0.0, 0.5)
        for how, x in (({"antithetic": True}, like), ({}, like[:4]))
    )
    for x, first in zip(step[:4], plain[:4], strict=True):
        assert torch.equal(x[:4], first)
        assert torch.equal(x[4:], -first)
    with pytest.raises(ValueError, match="even"):
        path(antithetic=True)([0.0, 1.0], Draws(like[:3]))


@pytest.mark.parametrize("path", PATHS)
def test_correlated_components(path: Any) -> None:
    """Each of w, H and K has the covariance; further normals have none."""
    like = torch.empty(4000, 3)
    source = path(correlation=COVARIANCE)([0.0, 0.5, 1.0], Draws(like, "K", extra=like))
    step = source(0, 0.0, 0.5)
    for x, deviation in zip(parts(step), levy.DEVIATIONS, strict=True):
        check_law(x.mT, COVARIANCE.numpy() * deviation**2 * 0.5)
    assert step.z is not None
    check_law(step.z.mT, np.eye(3))
    with pytest.raises(ValueError, match="last axis"):
        path(correlation=COVARIANCE)([0.0, 1.0], Draws(like[:, :2]))


@pytest.mark.parametrize(
    "matrix", [torch.ones(2, 2), torch.eye(2) - 2.0, torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
               torch.ones(2), torch.eye(2, dtype=torch.int64)],
)  # fmt: skip
def test_correlations_are_covariances(matrix: Tensor) -> None:
    for make in (
        lambda c: Brownian(0, correlation=c),
        lambda c: BrownianTree(0, 0, 1, correlation=c),
    ):
        with pytest.raises(ValueError, match="correlation"):
            make(matrix)


# --- paths from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize("down", [False, True])
def test_brownian_intervals_of_torchsde(down: bool) -> None:
    torchsde = pytest.importorskip("torchsde")
    bm = torchsde.BrownianInterval(
        0.0, 1.0, size=(5, 2), dtype=torch.float64, device=DEVICE, entropy=3,
        levy_area_approximation="space-time",
    )  # fmt: skip
    like, (a, b) = torch.empty(5, 2), (0.25, 0.75)
    source = Outside(bm).bind([0.0, 1.0], Draws(like, "H", halves=True))
    step = source(0, b, a) if down else source(0, a, b)
    sign, (w, u) = -1.0 if down else 1.0, bm(a, b, return_U=True)
    assert torch.allclose(step.w, sign * w, atol=1e-12)
    assert torch.allclose(step.h, u / (b - a) - 0.5 * w, atol=1e-12)
    close(step, joined(*step.halves, 0.5))  # type: ignore[misc]
    rows = torch.tensor([3, 1])
    assert same(source.select(rows)(0, a, b), source(0, a, b).map(lambda x: x[rows]))
    sde = fs.SDE(lambda t, y: 0.0 * y, lambda t, y: 1.0, noise="diagonal", additive=True)
    ends = (1.0, 0.0) if down else (0.0, 1.0)
    y1 = fs.solve(
        sde, torch.zeros(5, 2), *ends, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=4),
        path=bm,
    ).y1  # fmt: skip
    assert torch.allclose(y1, sign * bm(0.0, 1.0), atol=1e-12)


def test_paths_from_outside_give_no_more_than_they_have() -> None:
    like = torch.empty(5, 2)
    outside = Outside(lambda a, b: torch.ones(5, 2) * (b - a))
    assert float(outside.tree(0.0, 1.0, Draws(like))(0, 0.5, 0.2).w[0, 0]) == pytest.approx(-0.3)
    for draws in (Draws(like, "H"), Draws(like, "K"), Draws(like, extra=like)):
        with pytest.raises(TypeError, match="Brownian"):
            outside.bind([0.0, 1.0], draws)
    for t in (torch.rand(5), torch.tensor(0.5, requires_grad=True)):
        with pytest.raises(TypeError, match="one time"):
            outside.bind([0.0, 1.0], Draws(like))(0, 0.0, t)
    with pytest.raises(TypeError, match="Brownian path"):
        outside.bind([0.0, 1.0], Draws(torch.empty(5, 3)))(0, 0.0, 1.0)


# --- cost, forms and refusals ---------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", LEVIES)
def test_a_step_on_a_grid_has_its_numbers_at_hand(kind: Levy) -> None:
    """None but the first of a stretch asks for operations."""
    times = torch.linspace(0.0, 1.0, 51).tolist()
    for grid in (times, times[::-1]):
        source = Brownian(0).bind(grid, Draws(torch.empty(4, 3), kind))
        source(0, grid[0], grid[1])
        with Operations() as operations:
            for n in range(1, 50):
                source(n, grid[n], grid[n + 1])
        assert operations.count == 0


def test_a_query_of_a_tree_costs_the_same_for_any_depth() -> None:
    """But for one halving more of its sum for twice the nodes: two parts and their sum, a rest."""
    counts = []
    for depth in (6, 13, 27):
        source = BrownianTree(0, 0.0, 1.0, 2.0**-depth).tree(0.0, 1.0, Draws(torch.empty(4, 3)))
        source(0, 0.123, 0.234)
        with Operations() as operations:
            source(0, 0.234, 0.345)
        counts.append(operations.count)
    assert counts == [counts[0], counts[0] + 4, counts[0] + 8]
    assert counts[-1] <= 95


@pytest.mark.parametrize("path", PATHS)
def test_forms_of_states(path: Any) -> None:
    """Every leaf is filled in its own dtype, trees and grids alike; a batch is not needed."""
    like = {
        "a": torch.empty(4, 2, 3, dtype=torch.float32), "b": torch.empty(4, dtype=torch.complex64),
        "c": torch.empty(4, 0, dtype=torch.bfloat16),
    }  # fmt: skip
    step = path()([0.0, 0.4, 1.0], Draws(like, "H", extra=like["a"]))(0, 0.0, 0.4)
    for part in step[:2]:
        assert part is not None
        for name, leaf in like.items():
            assert part[name].shape == leaf.shape
            assert part[name].dtype == leaf.dtype
    assert step.z is not None
    assert step.z.dtype == torch.float32
    alone = torch.empty(())
    assert path()([0.0, 0.4, 1.0], Draws(alone))(0, 0.0, 0.4).w.shape == ()
    with pytest.raises(ValueError, match="batch"):
        path(antithetic=True)([0.0, 1.0], Draws(alone))


def test_one_tree_serves_any_steps() -> None:
    """W itself, whatever the steps, and the same solution from finer ones in the limit."""
    path, y0 = BrownianTree(2, -0.5, 2.0), torch.ones(500, 2)
    still = fs.SDE(lambda t, y: 0.0 * y, lambda t, y: 1.0, noise="diagonal", additive=True)
    curved = fs.SDE(lambda t, y: -y, lambda t, y: 0.5 * y.cos(), noise="diagonal")

    def solve(sde: fs.SDE, steps: int, *ends: float) -> Tensor:
        return fs.solve(
            sde, y0, *ends, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=steps), path=path
        ).y1

    whole = solve(still, 1, 0.0, 1.0)
    assert torch.allclose(solve(still, 7, 0.0, 1.0), whole, atol=1e-12)
    assert torch.allclose(solve(still, 3, 1.0, 0.0) - 1.0, 1.0 - whole, atol=1e-12)
    exact = solve(curved, 128, 0.0, 1.0)
    errors = [float((solve(curved, n, 0.0, 1.0) - exact).square().mean().sqrt()) for n in (4, 16)]
    assert errors[1] < 0.62 * errors[0] < 0.1


def test_trees_refuse_what_they_cannot_give() -> None:
    like = torch.empty(3, 2)
    for span in ((1.0, 0.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="spans"):
            BrownianTree(0, *span)
    for tol in (0.0, -1.0, 2.0, 1e-12):
        with pytest.raises(ValueError, match="tol"):
            BrownianTree(0, 0.0, 1.0, tol)
    with pytest.raises(ValueError, match="levy"):
        BrownianTree(0, 0.0, 1.0, levy="A")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="levy='K'"):
        BrownianTree(0, 0.0, 1.0, levy="H").bind([0.0, 1.0], Draws(like, "K"))
    with pytest.raises(ValueError, match="outside"):
        BrownianTree(0, 0.0, 1.0).bind([0.0, 1.5], Draws(like))
    with pytest.raises(ValueError, match="outside"):
        BrownianTree(0, 0.0, 1.0).tree(torch.tensor([0.0, -0.1, 0.0]), 1.0, Draws(like))
    with pytest.raises(TypeError, match="derivative"):
        BrownianTree(0, 0.0, 1.0).tree(0.0, 1.0, Draws(like))(
            0, 0.0, torch.tensor(1.0, requires_grad=True)
        )
    with pytest.raises(TypeError, match="between"):
        Brownian(0, torch.linspace(0.0, 1.0, 5)).tree(0.0, 1.0, Draws(like))
    with pytest.raises(ValueError, match="halves"):
        Brownian(0, torch.tensor([0.0, 0.3, 1.0])).bind([0.0, 1.0], Draws(like, halves=True))(
            0, 0.0, 1.0
        )
    wide, narrow = (
        BrownianTree(0, 0.0, 1.0, levy=kind).bind([0.0, 1.0], Draws(like))(0, 0.2, 0.9)
        for kind in ("K", None)
    )
    assert not torch.equal(wide.w, narrow.w)


@pytest.mark.parametrize("method", [Milstein(), SRIW1(), SRI2(), PlatenWeak2(), LogODE()], ids=str)
def test_double_integrals_refuse_correlated_components(method: Stochastic) -> None:
    """They would converge to another equation."""
    sde = fs.SDE(
        lambda t, y: 0.0 * y, lambda t, y: 0.5 * y, noise="diagonal",
        stratonovich=method.calculus == "stratonovich",
    )  # fmt: skip
    path = BrownianTree(1, 0.0, 1.0, levy="K", correlation=torch.eye(2) + 0.5)
    with pytest.raises(TypeError, match="correlation"):
        fs.solve(sde, torch.ones(4, 2), integrator=method, stepping=fs.Fixed(steps=2), path=path)


@pytest.mark.parametrize("ito", [True, False], ids=["ito", "stratonovich"])
def test_what_takes_independent_components_refuses_others(ito: bool) -> None:
    sde = fs.SDE(lambda t, y: 0.0 * y, lambda t, y: 0.5 * y, noise="diagonal", stratonovich=not ito)
    additive = fs.SDE(
        lambda t, y: 0.0 * y, lambda t, y: torch.ones_like(y), noise="diagonal", additive=True
    )
    y0, heun = torch.ones(4, 2, requires_grad=True), StochasticHeun()
    end = torch.zeros(2)
    cases: list[tuple[fs.Dynamics, Any, fs.Adjoint]] = [
        (fs.to_stratonovich(sde), heun, fs.Direct()) if ito
        else (fs.to_ito(sde), EulerMaruyama(), fs.Direct()),
        (fs.bridge(additive, end, 1.5), EulerMaruyama(), fs.Direct()),
        (sde, TorchSDE("milstein"), fs.Direct()),
    ]  # fmt: skip
    if ito:
        cases += [(sde, EulerMaruyama(), fs.Backsolve()), (sde, TorchSDE("srk"), fs.Direct())]
    for dynamics, method, adjoint in cases:
        start = dynamics.enter(y0) if hasattr(dynamics, "enter") else y0
        path = Brownian(1, correlation=torch.eye(start.shape[1]) + 0.5)
        with pytest.raises(TypeError, match="correlation"):
            fs.solve(
                dynamics, start, integrator=method, stepping=fs.Fixed(dt=0.5), path=path,
                adjoint=adjoint,
            )  # fmt: skip
    fine = (additive, heun, fs.Backsolve())
    fs.solve(
        fine[0], y0, integrator=fine[1], stepping=fs.Fixed(dt=0.5), adjoint=fine[2],
        path=Brownian(1, correlation=torch.eye(2) + 0.5),
    )  # fmt: skip


def test_what_takes_correlated_components_keeps_a_martingale() -> None:
    """The mean of dy = y dW / 2 is 1 in the sense of Ito."""
    covariance, y0 = torch.tensor([[2.0, 0.5], [0.5, 2.0]]), torch.ones(20_000, 2)
    sde = fs.SDE(lambda t, y: 0.0 * y, lambda t, y: 0.5 * y, noise="diagonal")
    steps: dict[str, Any] = {
        "integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=64),
        "path": Brownian(1, correlation=covariance),
    }  # fmt: skip
    y1 = fs.solve(sde, y0, **steps).y1
    assert isinstance(y1, Tensor)
    assert float((y1.mean() - 1.0).abs()) < 5.0 * float(y1.std()) / len(y0) ** 0.5
    both = fs.girsanov(sde, sde)
    with pytest.raises(TypeError, match="independent"):
        fs.solve(both, both.enter(y0), **steps)


def test_what_draws_do_not_hang_on_is_refused() -> None:
    factor = torch.eye(2).requires_grad_()
    with pytest.raises(ValueError, match="detach"):
        Brownian(0, correlation=factor @ factor.mT)
    for seed in ([1, 2], None, 3.5):
        with pytest.raises(TypeError, match="whole number"):
            Brownian(seed)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor"):
        Brownian(0, [0.0, 1.0])  # type: ignore[arg-type]
    like = torch.zeros(2, 3)
    ours, theirs = (Brownian(s).bind([0.0, 1.0], Draws(like)) for s in (3, np.int64(3)))  # type: ignore[arg-type]
    assert torch.equal(ours(0, 0.0, 1.0).w, theirs(0, 0.0, 1.0).w)


@pytest.mark.parametrize("down", [False, True])
def test_several_steps_at_once_are_those_one_by_one(
    monkeypatch: pytest.MonkeyPatch, down: bool
) -> None:
    """Over the ends of stretches too, in either direction, with all that a step may ask for."""
    monkeypatch.setattr("flowsde.paths.brownian._CHUNK", 24)
    y = torch.zeros(2, 3)
    draws = Draws(y, "K", extra=y, halves=True)
    grid = torch.linspace(0.0, 2.0, 12).square().tolist()
    grid = grid[::-1] if down else grid
    spans = list(itertools.pairwise(grid))
    for path in (fs.Brownian(3), fs.Brownian(3, torch.tensor(sorted({*grid, *middles(grid)})))):
        for first, count in ((0, 11), (2, 7), (10, 1), (5, 4)):
            source = path.bind(grid, draws)
            found = source.several(first, spans[first : first + count])
            for i, one in enumerate(found.unbind(count)):
                known = path.bind(grid, draws)(first + i, *spans[first + i])
                for a, b in zip(tree_leaves(one), tree_leaves(known), strict=True):
                    assert (a is None and b is None) or torch.equal(a, b)


def middles(grid: list[float]) -> list[float]:
    return [0.5 * (a + b) for a, b in itertools.pairwise(grid)]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    draws = Draws(torch.empty(2, 2))
    with pytest.raises(ValueError, match="64 bits"):
        Brownian(seed).bind([0.0, 1.0], draws)
    Brownian(2**64 - 1).bind([0.0, 1.0], draws)
    Brownian(-(2**63)).bind([0.0, 1.0], draws)
