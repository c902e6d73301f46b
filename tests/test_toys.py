"""The toys that examples and benchmarks share, and the measure of samples of them."""

from __future__ import annotations

import math

import pytest
import torch

from examples.measures import sliced_wasserstein
from examples.toys import TOYS, checkerboard, eight_gaussians, moons

from .systems import generator


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_drawn_from_their_generator(name: str) -> None:
    before = torch.random.get_rng_state()
    x = TOYS[name](500, generator(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(x, TOYS[name](500, generator(1)))
    assert not torch.equal(x, TOYS[name](500, generator(2)))
    assert x.shape == (500, 2)
    assert x.dtype == torch.get_default_dtype()
    assert 0.5 < float(x.std(0).min()) <= float(x.std(0).max()) < 3.0


def test_toys_are_where_they_should_be() -> None:
    x = checkerboard(4000, generator())
    assert float(x.abs().max()) <= 4.0
    squares = (x / 2.0).floor()
    assert bool((squares.sum(1) % 2 == squares[0].sum() % 2).all())
    assert len(torch.unique(squares, dim=0)) == 8
    radius = torch.linalg.vector_norm(eight_gaussians(4000, generator()), dim=1) * math.sqrt(2.0)
    assert float(radius.mean()) == pytest.approx(4.0 + 0.5**2 / 8.0, abs=4.5 * 0.5 / 63.0)
    arcs = moons(2000, generator()) / 2.0 + torch.tensor([0.5, 0.1])
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    assert float((torch.cdist(arcs, centres) - 1.0).abs().amin(1).max()) < 0.5


def test_the_sliced_distance_of_a_shift_is_its_mean_length() -> None:
    """|E[(u . s)^2]|^1/2 = |s| / sqrt(d), and 0 of the same points in another order."""
    x, draws = torch.randn(100, 3), generator()
    shift = torch.tensor([1.0, 2.0, 2.0])
    found = sliced_wasserstein(x, (x + shift).flip(0), draws, directions=20_000)
    assert found == pytest.approx(3.0 / math.sqrt(3.0), rel=0.03)
    assert sliced_wasserstein(x, x.flip(0), draws) < 1e-12
    with pytest.raises(ValueError, match="as many"):
        sliced_wasserstein(x, x[1:], draws)
