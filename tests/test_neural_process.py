"""Neural processes: sets of points in any order, a bound, and an ODE in the place of a constant."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowsde as fs
from flowsde import models, objectives
from flowsde.integrators import RK4

from .systems import generator

TIGHT = fs.Solver(stepping=fs.Adaptive(1e-9, 1e-9))
SMALL: dict[str, Any] = {
    "conditional": partial(models.conditional_process, width=10),
    "neural": partial(models.neural_process, latent=4, width=10),
    "attentive": partial(models.attentive_process, latent=4, width=10),
    "ODE": partial(models.neural_ode_process, -2.0, state=3, control=2, width=10, solver=TIGHT),
    "second-order ODE": partial(
        models.neural_ode_process, -2.0, state=4, control=2, width=10, second_order=True,
        solver=TIGHT,
    ),
}  # fmt: skip
every = pytest.mark.parametrize("kind", SMALL)


def process(kind: str, **more: Any) -> models.NeuralProcess:
    torch.manual_seed(1)
    return SMALL[kind](**more)


def points(n: int, rows: int = 3, channels: int = 1, seed: int = 0) -> Tensor:
    """Rows (x, y), x in [-1, 1]."""
    draws = generator(seed)
    x = 2.0 * torch.rand(rows, n, 1, generator=draws) - 1.0
    return torch.cat((x, torch.randn(rows, n, channels, generator=draws)), -1)


def laws(net: models.NeuralProcess, context: Tensor, x: Tensor) -> Tensor:
    """Means and deviations of two functions, ``(2, samples, batch, m, channels)``."""
    law = net.functions(context, x, samples=2, generator=generator(3))
    return torch.stack((law.mean, law.stddev))


@every
@torch.no_grad()
def test_the_order_of_the_points_is_nothing(kind: str) -> None:
    net, context, targets = process(kind), points(7), points(6, seed=1)
    x = targets[..., :1]
    out = laws(net, context, x)
    order, other = torch.randperm(7), torch.randperm(6)
    assert torch.allclose(laws(net, context[:, order], x), out, rtol=0.0, atol=1e-12)
    assert torch.allclose(laws(net, context, x[:, other]), out[:, :, :, other], atol=1e-12)
    a, b = (
        net.bound(c, torch.cat((c, t), 1), generator=generator(2))
        for c, t in ((context, targets), (context[:, order], targets[:, other]))
    )
    assert torch.allclose(a, b, atol=1e-12)
    assert not torch.allclose(laws(net, context + 0.5, x), out, atol=1e-6)  # but they count


@every
@torch.no_grad()
def test_what_is_no_point_changes_nothing(kind: str) -> None:
    """Rows of sets of different sizes, as if each were alone; garbage beside a NaN is not read."""
    net, context, targets = process(kind), points(5), points(4, seed=1)
    hole = torch.full((3, 2, 2), torch.nan)
    hole[..., 0] = 1e3
    padded = torch.cat((hole, context, hole), 1)
    x = targets[..., :1]
    assert torch.allclose(laws(net, padded, x), laws(net, context, x), rtol=0.0, atol=1e-12)
    a = net.bound(context, targets, generator=generator(2))
    b = net.bound(padded, torch.cat((targets, hole), 1), generator=generator(2))
    assert torch.allclose(a, b, atol=1e-12)
    gone = torch.cat((torch.full((3, 1, 1), torch.nan), x), 1)
    out = laws(net, context, gone)
    assert bool(out[..., 0, :].isnan().all())
    assert torch.allclose(out[..., 1:, :], laws(net, context, x), atol=1e-12)


@every
@pytest.mark.parametrize("n", [0, 1])
def test_a_context_may_be_small(kind: str, n: int) -> None:
    """None at all is the same as none that counts; and all of it can be trained on."""
    net, targets = process(kind), points(4)
    loss = net.bound(targets[:, :n], targets, generator=generator()).sum()
    slopes = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in slopes)
    blank = targets[:, : n + 1].clone()
    blank[:, n:] = torch.nan
    with torch.no_grad():
        a, b = (laws(net, c, targets[..., :1]) for c in (targets[:, :n], blank))
        assert laws(net, targets, targets[:, :0, :1]).shape == (2, 2, 3, 0, 1)
    assert torch.allclose(a, b, atol=1e-12)


@every
@torch.no_grad()
def test_rows_of_a_batch_are_strangers(kind: str) -> None:
    """Each with times of its own, in one solve; several inputs of y."""
    net, context, x = process(kind, channels=2), points(5, channels=2), points(4, seed=1)[..., :1]
    law = net.infer(context)
    z = None if law is None else law.mean
    whole = net.decode(context, x, z).mean
    for i in range(3):
        one = net.decode(context[i : i + 1], x[i : i + 1], None if z is None else z[i : i + 1])
        assert torch.allclose(one.mean[0], whole[i], atol=1e-6)


@every
@torch.no_grad()
def test_single_precision_is_kept(kind: str) -> None:
    net, context, x = process(kind), points(5), points(4, seed=1)[..., :1]
    law = net.infer(context)
    z = None if law is None else law.mean
    wide = net.decode(context, x, z).mean
    narrow = net.float().decode(context.float(), x.float(), None if z is None else z.float()).mean
    assert narrow.dtype is torch.float32
    assert torch.allclose(narrow.double(), wide, atol=1e-4)


@torch.no_grad()
def test_a_path_that_stands_still_is_a_neural_process() -> None:
    """dl/dx = 0: the frame is one, bit for bit."""
    still = process("neural")
    moving = models.NeuralProcess(
        1, still.encoder, still.decoder, law=still.law,
        path=models.SolvedPath(fs.ODE(lambda t, y, d: 0.0 * y), 4, -2.0, fs.Solver()),
    )  # fmt: skip
    context, targets = points(3), points(6, seed=1)
    nets = (still, moving)
    assert torch.equal(*(laws(net, context, targets[..., :1]) for net in nets))
    assert torch.equal(*(net.bound(context, targets, generator=generator(2)) for net in nets))


@torch.no_grad()
def test_paths_are_solutions() -> None:
    """dl/dx = d l with d beside it, each row at its own times, the start and equal times among
    them; and of second order p'' = -d p, in closed form.
    """
    x = points(5)[..., :1]
    x[0, :2], x[1, 3] = -2.0, x[2, 1]
    z = 0.5 + torch.rand(3, 4)
    path = models.SolvedPath(fs.ODE(lambda t, y, d: d * y), 2, -2.0, TIGHT)
    exact = z[:, None, :2] * (z[:, None, 2:] * (x + 2.0)).exp()
    moved, control = path(x, z).chunk(2, -1)
    assert torch.allclose(moved, exact, rtol=1e-7)
    assert torch.equal(control, z[:, None, 2:].expand_as(control))
    assert torch.equal(path(x[:1, :2], z[:1]), z[:1, None].expand(-1, 2, -1))
    net = process("second-order ODE", control=1, state=2).path
    assert isinstance(net, models.SolvedPath)
    net.dynamics.f.net = Spring()
    p, v, d = z[:, None, :1], z[:, None, 1:2], z[:, None, 2:3].sqrt()
    exact = p * (d * (x + 2.0)).cos() + v / d * (d * (x + 2.0)).sin()
    assert torch.allclose(net(x, z[:, :3])[..., :1], exact, atol=1e-7)


class Spring(torch.nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        p, _, d, _ = inputs.split(1, -1)
        return -d * p


@torch.no_grad()
def test_the_bound_lies_below_the_evidence() -> None:
    """By the divergence of the posterior that was drawn from; its KL by Monte Carlo."""
    net, count = process("neural"), 4000
    context, targets = points(2, rows=1), points(3, rows=1, seed=1)
    targets = torch.cat((context, targets), 1)
    many, all_of = context.expand(count, -1, -1), targets.expand(count, -1, -1)

    def mean(v: Tensor) -> tuple[float, float]:
        return float(v.mean()), 4.0 * float(v.std()) / math.sqrt(count)

    q, p = net.infer(all_of), net.infer(many)
    z = q.mean + q.stddev * torch.randn(q.mean.shape, generator=generator(5))
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    whole, none = (net.bound(many, all_of, generator=generator(5), weight=w) for w in (1.0, 0.0))
    (kl, bound), divergence = mean(ratio), (none - whole)[0]
    assert abs(kl - float(divergence)) < bound
    assert float(divergence) > 0.0
    y = net.decode(many, all_of[..., :1], z).log_prob(all_of[..., 1:]).sum((1, 2))
    assert torch.allclose(y, none, atol=1e-12)
    evidence, slack = mean((y - ratio).exp())
    assert slack < 0.1 * evidence
    assert float(whole.mean()) < math.log(evidence + slack)


@every
def test_slopes_are_those_of_finite_differences(kind: str) -> None:
    solver = {"solver": fs.Solver(RK4(), fs.Fixed(steps=3))} if "ODE" in kind else {}
    net, context = process(kind, **solver), points(3, rows=2)
    targets = torch.cat((context, points(2, rows=2, seed=1)), 1)
    values = list(net.parameters())
    way = [torch.randn(v.shape, generator=generator(7)) for v in values]

    def loss(h: float) -> Tensor:
        moved = {name: v + h * w for (name, v), w in zip(net.named_parameters(), way, strict=True)}
        draws = {"generator": generator(2)}
        return torch.func.functional_call(
            Bound(net), {f"net.{k}": v for k, v in moved.items()}, (context, targets), draws
        )

    slopes = torch.autograd.grad(loss(0.0), values, allow_unused=True)
    mine = sum(float((g * w).sum()) for g, w in zip(slopes, way, strict=True) if g is not None)
    with torch.no_grad():
        other = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert mine == pytest.approx(other, rel=1e-6)
    assert all(g is not None and bool((g != 0).any()) for g in slopes)


class Bound(torch.nn.Module):
    def __init__(self, net: models.NeuralProcess) -> None:
        super().__init__()
        self.net = net

    def forward(self, *sets: Tensor, generator: torch.Generator) -> Tensor:
        return self.net.bound(*sets, generator=generator).sum()


@torch.no_grad()
def test_predictions_are_moments_of_the_mixture() -> None:
    net, context, x = process("ODE"), points(3, rows=2), points(4, rows=2, seed=1)[..., :1]
    mean, std = net.predict(context, x, samples=500, generator=generator(3))
    law = net.functions(context, x, samples=500, generator=generator(3))
    drawn = law.mean + law.stddev * torch.randn((40, *law.mean.shape), generator=generator(4))
    drawn = drawn.flatten(0, 1)
    assert torch.allclose(drawn.mean(0), mean, atol=6.0 * float(std.max()) / math.sqrt(len(drawn)))
    assert torch.allclose(drawn.std(0), std, rtol=0.05)
    single = process("conditional").predict(context, x)
    several = process("conditional").predict(context, x, samples=3)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(single, several, strict=True))


@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))
def test_a_split_draws_points_and_nothing_else(low: int, more: int, extra: int, n: int) -> None:
    split = models.ContextSplit((low, low + more), (0, extra))
    full = points(9, rows=20)
    full[:, n:] = torch.nan
    context, targets = split.draw(full, generator(1))
    counts = [(~part.isnan().any(-1)).sum(1) for part in (context, targets)]
    assert bool((counts[0] >= min(low, n)).all())
    assert bool((counts[0] <= min(low + more, n)).all())
    assert bool((counts[1] >= counts[0]).all())
    assert bool((counts[1] <= counts[0] + extra).all())
    for row, given_, drawn in zip(full[:, :n], context, targets, strict=True):
        first, second = (part[~part.isnan().any(-1)] for part in (given_, drawn))
        assert torch.equal(second[: len(first)], first)  # the context is among the targets
        same = (second[:, None] == row).all(-1)
        assert bool((same.sum(1) == 1).all())
        assert bool((same.sum(0) <= 1).all())


def test_the_objective_is_a_function_of_its_draws() -> None:
    net = process("neural", split=models.ContextSplit((1, 3), (1, 2)))
    objective, x = objectives.ELBO(net), points(6, rows=20)
    a, b = (objective(x, generator=generator(s)) for s in (4, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, objective(x, generator=generator(5)))


def test_refusals_carry_the_cure() -> None:
    net, context = process("ODE"), points(3)
    x = context[..., :1]
    with pytest.raises(TypeError, match="give generator="):
        net.predict(context, x)
    with pytest.raises(TypeError, match="detach"):
        net.predict(context, x.clone().requires_grad_(), generator=generator())
    with pytest.raises(ValueError, match="before the path's start"):
        net.predict(context, x - 5.0, generator=generator())
    with pytest.raises(ValueError, match="as many rows"):
        net.predict(context, x[:1], generator=generator())
    with pytest.raises(ValueError, match="2 channels, the decoder 1"):
        process("conditional").bound(context, points(3, channels=2), generator=generator())
    with pytest.raises(ValueError, match="one time"):
        models.SolvedPath(fs.ODE(lambda t, y, d: y), 1, 0.0, TIGHT)(context, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="a law, an aggregator"):
        models.NeuralProcess(1, net.encoder, net.decoder)
    with pytest.raises(ValueError, match="even size"):
        models.neural_ode_process(0.0, state=3, second_order=True)
    with pytest.raises(ValueError, match="a range"):
        models.ContextSplit((3, 1))


def test_the_benchmark_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is not trained again, and gives the same figures."""
    pytest.importorskip("matplotlib")
    from benchmarks import processes

    torch.set_default_dtype(torch.float32)
    arguments = ["--small", "--processes", "NP", "--out", str(tmp_path), "--work", str(tmp_path)]
    with torch.device("cpu"):
        processes.main(arguments)
        first = json.loads((tmp_path / "processes-cpu.json").read_text())
        monkeypatch.setattr(processes.Family, "draw", None)
        monkeypatch.setattr(processes, "picture", lambda options: None)
        processes.main(arguments)
    assert json.loads((tmp_path / "processes-cpu.json").read_text()) == first
    assert math.isfinite(first["found"]["sine"]["NP"]["mean"])
    assert (tmp_path / "processes.png").stat().st_size > 0


def test_heads_share_a_width() -> None:
    with pytest.raises(ValueError, match="multiple"):
        models.AttentionAggregator(1, 12)


def test_processes_train_in_mixed_precision() -> None:
    points = torch.randn(8, 12, 2, generator=generator(0), dtype=torch.float32)
    points[..., 0] = points[..., 0].sigmoid()
    model = models.neural_ode_process(0.0).float()
    with torch.autocast(points.device.type, dtype=torch.bfloat16):
        law = model.infer(points)
        bound = model.elbo(points, generator=generator(1))
    assert law is not None
    assert law.mean.dtype is torch.float32
    assert bool(bound.isfinite().all())
