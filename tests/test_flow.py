"""A flow as its users know one: densities, draws, gradients, bases, transforms, torch's classes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributions as td

import flowsde as fs
from flowsde import _random, bases, interop, models, objectives
from flowsde.dynamics import Composed, Inverse
from flowsde.integrators import Dopri8
from flowsde.models import Dequantize, Logit, Standardize, Whiten
from flowsde.nn import ConcatSquash, LipschitzMLP, TimeMLP

from .systems import DEVICE, generator

STEPS = fs.Solver(Dopri8(), fs.Fixed(steps=3))
CPU = torch.Generator("cpu").manual_seed(0)


def shaken(dynamics: fs.Dynamics, std: float, seed: int = 0) -> Any:
    """The same dynamics away from where it starts."""
    draws = generator(seed)
    for p in dynamics.parameters():
        nn.init.normal_(p, std=std, generator=draws)
    return dynamics


def stack(dim: int = 2, condition: int = 0, depth: int = 3) -> fs.Composed:
    made = models.realnvp(
        dim, depth, 8, generator=torch.Generator("cpu").manual_seed(1), condition=condition
    )
    return shaken(made, 0.3)


class Shifted(nn.Module):
    """A field that sees a condition: dx/dt = A(c) x + c."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 4)

    def forward(self, t: Tensor, x: Tensor, *args: Tensor) -> Tensor:
        c = args[0] if args else torch.zeros_like(x)
        return (self.inner(c).reshape(-1, 2, 2) @ x[..., None])[..., 0].tanh() + c


def flow(kind: str, **more: Any) -> fs.Flow:
    """A map or an ODE in two dimensions; both take a condition of two numbers."""
    base = more.pop("base", fs.Normal(2))
    if kind == "map":
        return fs.Flow(base, stack(condition=2), **more)
    return fs.Flow(base, shaken(fs.ODE(Shifted(), batched_time=True), 0.4), STEPS, **more)


KINDS = ("map", "ode")


# --- shapes and conditions ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)], ids=str)
def test_samples_know_their_density(kind: str, shape: tuple[int, ...]) -> None:
    """Whatever the shapes, conditions included: ``(*sample_shape, batch, *event_shape)``."""
    made, c = flow(kind), torch.randn(4, 2, generator=generator(2))
    for draw in (made.sample_and_log_prob, made.rsample_and_log_prob):
        x, density = draw(shape, c, generator=generator())
        assert x.shape == (*shape, 4, 2)
        assert torch.allclose(x, made.sample(shape, c, generator=generator()), atol=1e-12)
        assert density.shape == (*shape, 4)
        assert torch.allclose(made.log_prob(x, c), density, atol=1e-6)
        assert density.requires_grad == (draw == made.rsample_and_log_prob)


@settings(max_examples=5)
@given(rows=st.integers(1, 4), samples=st.integers(1, 3), kind=st.sampled_from(KINDS))
def test_each_sample_has_its_own_condition(rows: int, samples: int, kind: str) -> None:
    """A row alone gives what it gives among others; one condition serves any x."""
    made, draws = flow(kind), generator(rows)
    c, x = torch.randn(rows, 2, generator=draws), torch.randn(samples, rows, 2, generator=draws)
    whole = made.log_prob(x, c)
    assert whole.shape == (samples, rows)
    for i in range(rows):
        alone = made.log_prob(x[:, i], c[i : i + 1])
        assert torch.allclose(alone, whole[:, i], atol=1e-6)
    assert torch.allclose(made.log_prob(x[0, :1], c), made.log_prob(x[0, :1].expand(rows, 2), c))
    seeds = torch.arange(samples * rows)
    drawn = made.sample((samples,), c, seed=seeds)
    first = made.sample((), c[:1], seed=seeds[:1])
    assert torch.allclose(drawn[0, :1], first, atol=1e-6)


def test_conditions_that_do_not_fit_are_refused() -> None:
    made, c = flow("map"), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"broadcast with 3.*\(1, n\)"):
        made.log_prob(torch.zeros(4, 2), c)
    with pytest.raises(TypeError, match="as_tensor"):
        made.log_prob([[0.0, 0.0]], c)
    with pytest.raises(ValueError, match="a row each"):
        made.sample((2,), c, torch.zeros(5, 2), seed=0)
    with pytest.raises(ValueError, match="event"):
        made.log_prob(torch.zeros(3, 3), c)
    with pytest.raises(TypeError, match="generator"):
        made.sample((2,), c)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_sample_in_any_batch(kind: str) -> None:
    made, c = flow(kind), torch.zeros(1, 2)
    few, many = made.sample((3,), c, seed=5), made.sample((20,), c, seed=5)
    assert torch.allclose(many[:3], few, atol=1e-7)
    assert not torch.allclose(made.sample((3,), c, seed=6), few)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["log_prob", "rsample", "rsample_and_log_prob"])
def test_gradients_are_those_of_finite_differences(kind: str, which: str) -> None:
    """By a parameter, by the condition, and by the base's own parameter, both ways."""
    loc = nn.Parameter(torch.tensor([0.3, -0.2]))
    made = flow(kind, base=fs.Componentwise(td.Normal, loc=loc, scale=torch.ones(2)))
    x, c = torch.randn(3, 2, generator=generator(1)), torch.randn(3, 2, generator=generator(2))
    bias = [p for p in made.dynamics.parameters() if p.ndim == 1][-1]

    def loss(condition: Tensor) -> Tensor:
        if which == "log_prob":
            return made.log_prob(x, condition).sum()
        found = getattr(made, which)((2,), condition, seed=3)
        return sum((part.square().sum() for part in found), torch.zeros(()))

    inputs = [c.requires_grad_(), bias, loc]
    found = torch.autograd.grad(loss(c), inputs)
    for value, slope in zip(inputs, found, strict=True):
        way = torch.randn(value.shape, generator=generator(4))
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                value.add_(way, alpha=step)
                ends.append(float(loss(c)))
                value.sub_(way, alpha=step)
        wanted = (ends[0] - ends[1]) / 2e-5
        assert abs(wanted) > 1e-3
        assert float((slope * way).sum()) == pytest.approx(wanted, rel=1e-5)


# --- as a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_the_same_law(kind: str) -> None:
    made, c = flow(kind, transform=Standardize.of(torch.randn(9, 2) * 3.0)), torch.ones(1, 2)
    x = torch.randn(3, 2)
    wanted = made.log_prob(x, c)
    other = flow(kind, transform=Standardize(2))
    other.load_state_dict(made.state_dict())
    for same in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), other):
        assert torch.equal(same.log_prob(x, c), wanted)
        shaken(same.dynamics, 0.1)  # its density follows its own parameters, and ours stays
        assert not torch.allclose(same.log_prob(x, c), wanted)
    assert torch.equal(made.log_prob(x, c), wanted)
    state = made.state_dict()
    assert len(state) == len({value.data_ptr() for value in state.values()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_changes_its_dtype(kind: str) -> None:
    base = fs.Mixture(torch.ones(2), [
        fs.Normal(2), fs.Componentwise(td.Laplace, loc=torch.zeros(2), scale=torch.ones(2)),
    ])  # fmt: skip
    made, c, x = flow(kind, base=base, transform=Logit()), torch.ones(1, 2), torch.rand(5, 2)
    wanted, drawn = made.log_prob(x, c), made.sample((5,), c, seed=0)
    made, c = made.float(), c.float()
    narrow = made.log_prob(x.float(), c), made.sample((5,), c, seed=0)
    assert {value.dtype for value in narrow} == {torch.float32}
    assert torch.allclose(narrow[0].double(), wanted, atol=1e-3)
    assert torch.allclose(narrow[1].double(), drawn, atol=1e-3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="graphs are compared on the CPU")
def test_maps_compile_as_one_graph() -> None:
    made, x = fs.Flow(fs.Normal(2), stack(depth=1), transform=Logit()), torch.rand(6, 2)
    objective = objectives.MaximumLikelihood(made)
    whole = torch.compile(objective, backend="eager", fullgraph=True)
    assert torch.equal(whole(x, generator=CPU), objective(x, generator=CPU))


# --- bases ----------------------------------------------------------------------------------------

LAWS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "normal": (td.Normal, {"loc": torch.tensor([1.0, -1.0]), "scale": torch.tensor([0.5, 2.0])}),
    "laplace": (td.Laplace, {"loc": torch.tensor([0.0, 1.0]), "scale": torch.tensor([1.0, 0.5])}),
    "uniform": (td.Uniform, {"low": torch.tensor([-1.0, 0.0]), "high": torch.tensor([1.0, 3.0])}),
    "exponential": (td.Exponential, {"rate": torch.tensor([1.0, 3.0])}),
    "gumbel": (td.Gumbel, {"loc": torch.tensor([0.0, 1.0]), "scale": torch.tensor([1.0, 0.5])}),
}


def componentwise(name: str) -> fs.Componentwise:
    law, parameters = LAWS[name]
    return fs.Componentwise(law, **{k: v.to(DEVICE, torch.float64) for k, v in parameters.items()})


def every_base() -> list[fs.Base]:
    parts = [componentwise(name) for name in LAWS]
    mixture = fs.Mixture(torch.tensor([1.0, 3.0]), [parts[0], fs.Normal(2, 0.5)])
    return [fs.Normal(2, 1.5), *parts, mixture]


def test_every_base_is_tested() -> None:
    known = {type(base).__name__ for base in every_base()}
    assert known == set(bases.__all__) - {"Base"}


@pytest.mark.parametrize("index", range(len(every_base())))
def test_bases_are_laws(index: int) -> None:
    """The density has mass one, and the moments of the draws; seeds fix them, one by one."""
    base, count = every_base()[index], 20_000
    x = base.sample(count, 3)
    middles = 0.1 * (torch.arange(-140, 140) + 0.5)
    grid = torch.cartesian_prod(middles, middles)
    mass = base.log_prob(grid).exp() * 0.01
    assert float(mass.sum()) == pytest.approx(1.0, abs=0.01)
    for power in (1, 2):
        moment, of_grid = x.clamp(-9, 9) ** power, grid.clamp(-9, 9) ** power
        gap = moment.mean(0) - (of_grid * mass[:, None]).sum(0)
        assert bool((gap.abs() < 4.5 * moment.std(0) / math.sqrt(count) + 0.01).all())
    seeds = torch.tensor([5, 6, 7, 8])
    assert torch.equal(base.sample(4, seeds)[2:], base.sample(2, seeds[2:]))
    assert bool(base.log_prob(torch.full((3, 2), torch.nan)).isnan().all())


@pytest.mark.parametrize("name", LAWS)
def test_componentwise_is_torchs_law(name: str) -> None:
    base, x = componentwise(name), torch.rand(7, 2)
    law, _ = LAWS[name]
    made = law(**dict(base.named_buffers()), validate_args=False)
    wanted = made.log_prob(x).sum(-1)
    inside = made.support.check(x).all(-1)
    assert torch.allclose(base.log_prob(x)[inside], wanted[inside])
    far = torch.full((1, 2), -5.0, requires_grad=True)
    bounded = name in ("uniform", "exponential")
    assert math.isinf(base.log_prob(far).item()) == bounded
    assert bool(torch.isfinite(torch.autograd.grad(base.log_prob(far).sum(), far)[0]).all())


def test_bases_refuse_what_they_cannot_draw() -> None:
    one = torch.ones(2)
    with pytest.raises(TypeError, match="icdf"):
        fs.Componentwise(td.Gamma, concentration=one, rate=one)
    with pytest.raises(TypeError, match="law of vectors"):
        fs.Componentwise(td.MultivariateNormal, loc=one, covariance_matrix=torch.eye(2))
    for weights, parts in (
        (one, [fs.Normal(2), fs.Normal(3)]), (one, [fs.Normal(2)]),
        (-one, [fs.Normal(2), fs.Normal(2)]),
        (one[:1], [fs.Mixture(one[:1], [fs.Normal(2)])]),
        (one.clone().requires_grad_(), [fs.Normal(2), fs.Normal(2)]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"weights|bases"):
            fs.Mixture(weights, parts)


# --- transforms of data ---------------------------------------------------------------------------


TRANSFORMS = ("standardize", "whiten", "logit", "both")


def transform(name: str) -> fs.Map:
    data = torch.rand(50, 2, generator=generator(5))
    return {
        "standardize": lambda: Standardize.of(3.0 * data + 1.0),
        "whiten": lambda: Whiten.of(3.0 * data @ torch.tensor([[1.0, 0.5], [0.0, 0.7]])),
        "logit": lambda: Logit(0.05),
        "both": lambda: fs.Composed([Logit(0.01), Standardize.of(Logit(0.01).step(0, data)[0])]),
    }[name]()


@given(
    name=st.sampled_from(TRANSFORMS), batch=st.integers(1, 4),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_transforms_change_variables(name: str, batch: int, seed: int) -> None:
    made, x = transform(name), torch.rand(batch, 2, generator=generator(seed))
    y, change = fs.solve(fs.log_density(made), (x, torch.zeros(batch))).y1
    back, rest = fs.solve(fs.log_density(made), (y, change), made.horizon, 0.0).y1
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(rest, torch.zeros(batch), atol=1e-12)
    for i in range(batch):
        jacobian = torch.autograd.functional.jacobian(lambda v: fs.solve(made, v[None]).y1[0], x[i])
        assert float(-change[i]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["whiten", "logit", "both"])
def test_densities_of_data_integrate_to_one(kind: str, name: str) -> None:
    made = flow(kind, transform=transform(name))
    c = torch.tensor([[0.2, -0.4]])
    edges = torch.linspace(-16.0, 16.0, 161 if kind == "map" else 81)
    middles = 0.5 * (edges[1:] + edges[:-1])
    if name != "whiten":  # cells that get small where the support ends, beyond the margin
        beyond = 0.05 / 0.9 if name == "logit" else 0.01 / 0.98
        edges, middles = ((1 + 2 * beyond) * x.sigmoid() - beyond for x in (edges, middles))
    with torch.no_grad():
        density = made.log_prob(torch.cartesian_prod(middles, middles), c).exp()
        mass = (density * torch.cartesian_prod(edges.diff(), edges.diff()).prod(-1)).sum()
        x, density = made.sample_and_log_prob((20,), c, seed=0)
        assert torch.allclose(made.log_prob(x, c), density, atol=1e-7)
    assert float(mass) == pytest.approx(1.0, abs=5e-3)


def test_every_transform_is_tested() -> None:
    known = {name.lower() for name in models.data.__all__}
    assert known == {*TRANSFORMS, "dequantize"} - {"both"}


def test_standardize_is_that_of_the_data() -> None:
    data = 4.0 * torch.rand(200, 3, 2, generator=generator()) - 1.0
    y, _ = Standardize.of(data).step(0, data)
    assert torch.allclose(y.mean(0), torch.zeros(3, 2), atol=1e-12)
    assert torch.allclose(y.var(0), torch.ones(3, 2))
    with pytest.raises(ValueError, match="constant"):
        Standardize.of(torch.ones(5, 2))


@pytest.mark.parametrize("dim", [1, 3])
def test_a_flow_starts_from_data(dim: int) -> None:
    """Layer after layer, each sees what the ones before it make of the data, draws included."""
    values = torch.randint(16, (500, dim), generator=generator()).double()
    made = fs.Flow(
        fs.Normal(dim), fs.Composed([models.ActNorm(dim)]),
        transform=fs.Composed([Dequantize(16), Logit(0.01), Standardize(dim)]),
    )  # fmt: skip
    made.start(values, generator=generator(1))
    assert made.transform is not None
    y = made.transform.prepare(values, _random.draw_seed(generator(1)))
    for layer in (*((y, k) for k in range(3)), (made.dynamics, 0)):
        values, _ = layer[0].step(layer[1], values)
    assert torch.allclose(values.mean(0), torch.zeros(dim), atol=1e-12)
    assert torch.allclose(values.var(0), torch.ones(dim))
    assert not torch.equal(made.transform.layers[2].std, torch.ones(dim))


def test_whiten_leaves_no_covariance() -> None:
    """So that a flow over it starts at the normal law of the data's covariance."""
    data = torch.rand(200, 3, generator=generator()) @ torch.randn(3, 3, generator=generator(1))
    made = fs.Flow(fs.Normal(3), Standardize(3), transform=Whiten.of(data))
    law = td.MultivariateNormal(data.mean(0), torch.cov(data.T))
    assert torch.allclose(made.log_prob(data), law.log_prob(data))
    y, _ = Whiten.of(data).step(0, data)
    assert torch.allclose(torch.cov(y.T), torch.eye(3), atol=1e-12)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantisation_keeps_the_values(levels: int, dtype: torch.dtype) -> None:
    values = torch.randint(levels, (2000, 8), generator=generator()).to(dtype)
    made = Dequantize(levels).prepare(values, 3)
    y, ladj = made.step(0, values)
    assert 0.0 < float(y.min()) <= float(y.max()) < 1.0
    back, rest = made.unstep(0, y)
    assert torch.equal(back, values)
    assert torch.equal(ladj, -rest)
    assert float(ladj[0]) == pytest.approx(-8 * math.log(levels), rel=1e-6)
    u = (y * levels - values).double()
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / u.numel()))
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.03)


def test_bits_of_dequantised_data() -> None:
    """Of uniform values under a uniform law, log2 of their number, without a scale to think of."""
    cube = fs.Componentwise(td.Uniform, low=torch.zeros(3), high=torch.ones(3))
    made = fs.Flow(cube, Standardize(3), transform=Dequantize(16))
    values = torch.randint(16, (5, 3), generator=generator()).double()
    bits = fs.bits_per_dim(made.log_prob(values, generator=generator()), 3)
    assert torch.allclose(bits, torch.full((5,), 4.0))
    with pytest.raises(TypeError, match="generator"):
        made.log_prob(values)


def test_the_discrete_likelihood_is_bounded() -> None:
    """E_u log p(v + u) <= log P(v), P(v) being how often v is drawn; probabilities sum to one."""
    made = fs.Flow(fs.Normal(1, 1.3), Logit(0.05), transform=Dequantize(4))
    drawn = made.sample((40_000,), seed=1)[:, 0]
    assert set(drawn.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    total = 0.0
    for v in range(4):
        log_prob = made.log_prob(torch.full((4000, 1), float(v)), generator=generator(v))
        frequency = float((drawn == v).double().mean())
        assert float(log_prob.mean()) < math.log(frequency) + 0.03
        total += float(log_prob.exp().mean())
    assert 0.9 < total <= 1.01  # the margins hold the rest


def test_whole_numbers_have_no_derivative() -> None:
    made = fs.Flow(fs.Normal(2), stack(), transform=Dequantize(4))
    assert bool((made.sample((9,), seed=0) % 1.0 == 0.0).all())
    with pytest.raises(TypeError, match="no derivative"):
        made.rsample((9,), seed=0)


# --- torch.distributions --------------------------------------------------------------------------


class Affine(fs.Map):
    """y = (x - loc) / scale: the flow of a normal law."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(loc), scale

    def __len__(self) -> int:
        return 1

    def step(self, k: int, y: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        y = y - sum(args, torch.zeros(()))
        return (y - self.loc) / self.scale, -self.scale.log().sum().expand(len(y))

    def unstep(self, k: int, y: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        x = y * self.scale + self.loc + sum(args, torch.zeros(()))
        return x, self.scale.log().sum().expand(len(y))


LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5])


def normal(*args: Tensor, seed: int | None = 0) -> tuple[interop.FlowDistribution, Any]:
    """The same law, by us and by torch."""
    loc, scale = LOC.to(DEVICE, torch.float64), SCALE.to(DEVICE, torch.float64)
    draws = None if seed is None else generator(seed)
    ours = interop.FlowDistribution(
        fs.Flow(fs.Normal(2), Affine(loc, scale)), *args, generator=draws, validate_args=True
    )
    return ours, td.Independent(td.Normal(loc + sum(args, torch.zeros(())), scale), 1)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_flow_is_a_distribution(rows: int) -> None:
    args = (torch.randn(rows, 2, generator=generator(1)),) if rows else ()
    ours, theirs = normal(*args)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    assert ours.has_rsample
    assert str(ours.support) == str(theirs.support)
    x = theirs.sample((5,))
    assert torch.allclose(ours.log_prob(x), theirs.log_prob(x))
    count = 20_000
    drawn = ours.sample((count,))
    assert drawn.shape == (count, *theirs.batch_shape, 2)
    error = theirs.stddev / math.sqrt(count)
    assert bool(((drawn.mean(0) - theirs.mean).abs() < 4.5 * error).all())
    density = ours.log_prob(drawn)
    spread = density.std(0) / math.sqrt(count)
    assert bool(((density.mean(0) + theirs.entropy()).abs() < 4.5 * spread).all())
    assert ours.sample().shape == (*theirs.batch_shape, 2)
    assert ours.rsample().requires_grad
    assert not torch.equal(ours.sample(), ours.sample())
    with pytest.raises(ValueError, match="support"):
        ours.log_prob(torch.full((2,), torch.nan))
    with pytest.raises(TypeError, match="generator"):
        normal(*args, seed=None)[0].sample()


def test_a_distribution_expands() -> None:
    c = torch.randn(3, 2, generator=generator(1))
    for args, shape in (((), (4,)), ((), (2, 3)), ((c,), (2, 3)), ((c[:1],), (5,))):
        ours, theirs = (law.expand(shape) for law in normal(*args))
        assert ours.batch_shape == theirs.batch_shape == shape
        assert ours.sample((7,)).shape == (7, *shape, 2)
        x = theirs.sample((2,))
        assert torch.allclose(ours.log_prob(x), theirs.log_prob(x))
        assert ours.log_prob(x[0, ..., :1, :]).shape == shape
    with pytest.raises(ValueError, match="expand"):
        normal(c)[0].expand((4,))


def test_distributions_compose() -> None:
    c = torch.randn(3, 2, generator=generator(1))
    choice, x = td.Categorical(torch.tensor([0.2, 0.3, 0.5])), torch.randn(6, 2)
    for wrap in (
        lambda law: td.MixtureSameFamily(choice, law),
        lambda law: td.TransformedDistribution(law, [td.AffineTransform(1.0, 2.0)]),
    ):  # fmt: skip
        ours, theirs = (wrap(law) for law in normal(c))
        at = x if isinstance(ours, td.MixtureSameFamily) else x[:, None].expand(6, 3, 2)
        assert torch.allclose(ours.log_prob(at), theirs.log_prob(at))
        assert ours.sample((4,)).shape == theirs.sample((4,)).shape
    ours, theirs = (td.Independent(law, 1) for law in normal(c))
    assert torch.allclose(ours.log_prob(x[:3]), theirs.log_prob(x[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_dynamics_are_transforms(kind: str) -> None:
    made, c = flow(kind), torch.randn(1, 2, generator=generator(1))
    move = interop.FlowTransform(made.dynamics, c, solver=made.solver)
    x = torch.randn(4, 3, 2, generator=generator(2))
    y, ladj = move.call_and_ladj(x)
    assert torch.allclose(move(x), y)
    assert torch.allclose(move.inv(y), x, atol=1e-6)
    assert torch.allclose(move.log_abs_det_jacobian(x, y), ladj)
    assert torch.allclose(move.inv.call_and_ladj(y)[1], -ladj, atol=1e-6)
    assert move.inv.inv is move
    noise = td.Independent(td.Normal(torch.zeros(2), torch.ones(2)), 1)
    law = td.TransformedDistribution(noise, [move.inv])
    assert torch.allclose(law.log_prob(x), made.log_prob(x, c), atol=1e-6)
    assert law.sample((5,)).shape == (5, 2)
    jacobian = torch.autograd.functional.jacobian(lambda v: move(v[None])[0], x[0, 0])
    assert ladj[0, 0].item() == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-6)


@pytest.mark.parametrize("narrow", [models.nice, models.realnvp])
def test_a_map_narrower_than_the_event_is_refused(narrow: Any) -> None:
    """Its last components would be left out of the density."""
    flow = fs.Flow(fs.Normal(5), narrow(3, generator=CPU))
    with pytest.raises(ValueError, match="3 rows"):
        flow.log_prob(torch.zeros(2, 5))


@pytest.mark.parametrize(
    "law", [fs.Normal(2), bases.Componentwise(td.Laplace, loc=torch.zeros(2), scale=torch.ones(2))]
)
def test_a_law_takes_samples_of_its_shape_alone(law: bases.Base) -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        law.log_prob(torch.randn(3, 7))


def test_bases_of_numbers() -> None:
    x = torch.randn(3)
    assert torch.allclose(fs.Normal(()).log_prob(x), td.Normal(0.0, 1.0).log_prob(x))


def test_a_number_a_channel_scales_every_place() -> None:
    channels, x = Standardize((3, 1, 1)), torch.randn(2, 3, 4, 4)
    channels.std.fill_(2.0)
    whole = Standardize((3, 4, 4))
    whole.std.fill_(2.0)
    assert torch.allclose(channels.step(0, x)[1], whole.step(0, x)[1])


def test_rounding_is_no_spread() -> None:
    """What is constant, or told by the rest, to rounding."""
    with pytest.raises(ValueError, match="constant"):
        Standardize.of(torch.full((1001, 1), 0.1, dtype=torch.float32))
    z = torch.randn(1000, 2, dtype=torch.float32)
    with pytest.raises(torch.linalg.LinAlgError, match="leave some out"):
        Whiten.of(torch.cat((z, z.sum(1, keepdim=True)), 1))


def test_another_dynamics_has_another_density() -> None:
    flow, other = fs.Flow(fs.Normal(2), models.ActNorm(2)), models.ActNorm(2)
    nn.init.ones_(other.log_scale)
    flow.dynamics = other
    drawn, log_prob = flow.sample_and_log_prob((1,), seed=0)
    assert torch.equal(drawn, flow.sample((1,), seed=0))
    assert torch.allclose(log_prob, flow.log_prob(drawn))


def test_whole_numbers_and_half_precision() -> None:
    pixels = torch.randint(0, 256, (4, 2), generator=CPU)
    flow = fs.Flow(fs.Normal(2), stack(), transform=Dequantize(256))
    with pytest.raises(TypeError, match=r"x\.float"):
        flow.log_prob(pixels, generator=generator(0))
    with pytest.raises(TypeError, match="levels"):
        Dequantize(256).prepare(pixels.bfloat16(), 0)
    inside = fs.Flow(fs.Normal(2), fs.Composed([Dequantize(256), Logit(), stack()]))
    inside.start(pixels.double(), generator=generator(0))


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-9])
def test_small_cotangents_of_a_residuals_inverse(size: float) -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.8)
    y = torch.ones(1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(size * models.InvertibleResidual(net).unstep(0, y)[0].sum(), y)
    assert found.item() / size == pytest.approx(1.0 / 1.8, rel=1e-12)


def test_laws_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="not all 0"):
        bases.Mixture(torch.zeros(2), [fs.Normal(2), fs.Normal(2)])
    with pytest.raises(TypeError, match="floating"):
        bases.Componentwise(td.Normal, loc=torch.tensor([0, 1]), scale=torch.ones(2))
    for make in (models.LatentODE, models.GRUODEBayes):
        with pytest.raises(ValueError, match="noise"):
            make(2, 3, 0.0)
    with pytest.raises(ValueError, match="noise"):
        models.LatentSDE(torch.linspace(0.0, 1.0, 6), 2, -1.0)


# --- what a review found --------------------------------------------------------------------------


class Bent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * torch.sin(x)


@pytest.mark.parametrize("big", [1.0, 1e3, 1e6, 1e8])
def test_no_row_of_a_residuals_inverse_hangs_on_the_others(big: float) -> None:
    made = models.InvertibleResidual(Bent())
    x = torch.tensor([[0.3, -0.7], [2.0, 3.0], [big, big]])
    y = made.step(0, x)[0]
    back, ladj = made.unstep(0, y)
    _, own = made.unstep(0, y[:2])
    assert torch.allclose(back[:2], x[:2], rtol=1e-12, atol=1e-12)
    assert torch.allclose(ladj[:2], own, rtol=1e-12)
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0], [1e7, 1e7]])
    grads = []
    for rows in (3, 2):
        at = y[:rows].clone().requires_grad_()
        grads.append(torch.autograd.grad((made.unstep(0, at)[0] * weight[:rows]).sum(), at)[0][:2])
    assert torch.allclose(*grads, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_settles_at_its_own_rounding(dtype: torch.dtype) -> None:
    """A network rounds by more than its output's last digit."""
    torch.manual_seed(0)
    blocks = [models.InvertibleResidual(LipschitzMLP([2, 64, 64, 2], 0.95)) for _ in range(3)]
    made = fs.Composed(blocks).to(dtype)
    x = 0.05 * torch.randn(64, 2, dtype=dtype)
    y = x
    for k in range(3):
        y = made.step(k, y)[0]
    for k in reversed(range(3)):
        y = made.unstep(k, y)[0]
    assert float((y - x).detach().abs().max()) < 100.0 * torch.finfo(dtype).eps


def test_vectors_of_an_event_are_whitened_each() -> None:
    data = torch.randn(50, 4, 3) @ torch.randn(3, 3) + 5.0
    made = Whiten(3)
    z = made.start(data)
    assert torch.allclose(torch.cov(z.flatten(0, 1).mT), torch.eye(3), atol=1e-6)

    def moved(x: Tensor) -> Tensor:
        return made.step(0, x.reshape(1, 4, 3))[0].flatten()

    jacobian = torch.autograd.functional.jacobian(moved, data[0].flatten())
    assert torch.allclose(made.step(0, data[:1])[1], torch.linalg.slogdet(jacobian)[1])
    with pytest.raises(ValueError, match="3 components"):
        made.step(0, torch.randn(5, 1))


def test_whitening_is_exact_under_autocast() -> None:
    made = Whiten.of(torch.randn(100, 3).float() @ torch.randn(3, 3).float() + 50.0)
    z = torch.randn(7, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made.unstep(0, z)[0]
    assert torch.equal(mixed, made.unstep(0, z)[0])


def test_a_divergence_may_be_changed() -> None:
    ode = fs.ODE(lambda t, x: torch.tanh(x @ torch.ones(3, 3)))
    made, x = fs.Flow(fs.Normal(3), ode, divergence=fs.Hutchinson()), torch.randn(4, 3)
    made.log_prob(x, generator=generator())
    made.divergence = fs.Exact()
    assert torch.equal(made.log_prob(x), fs.Flow(fs.Normal(3), ode).log_prob(x))


def test_penalties_are_those_of_the_flows_own_dynamics() -> None:
    made, x = fs.Flow(fs.Normal(2), models.cnf(2, 8, 1)), torch.randn(4, 2)
    objective = objectives.MaximumLikelihood(made, kinetic=0.1)
    before = objective(x, generator=generator())
    made.dynamics = models.cnf(2, 8, 1)
    fresh = objectives.MaximumLikelihood(made, kinetic=0.1)
    assert torch.equal(objective(x, generator=generator()), fresh(x, generator=generator()))
    assert not torch.equal(before, fresh(x, generator=generator()))


EMPTY: dict[str, Any] = {
    "nsf": lambda: models.nsf(2, generator=torch.Generator("cpu").manual_seed(1)),
    "nice": lambda: models.nice(2, generator=torch.Generator("cpu").manual_seed(1)),
    "maf": lambda: models.maf(2),
    "residual": lambda: fs.Composed([models.InvertibleResidual(LipschitzMLP([2, 8, 2]))]),
    "planar": lambda: fs.Composed([models.Planar(2)]),
    "cnf": lambda: models.cnf(2, 8, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_batches_of_none(name: str) -> None:
    made = fs.Flow(fs.Normal(2), EMPTY[name]())
    assert made.log_prob(torch.rand(0, 2)).shape == (0,)
    assert made.sample((0,), seed=0).shape == (0, 2)
    assert made.sample_and_log_prob((0,), seed=0)[1].shape == (0,)


@pytest.mark.parametrize("divergence", [fs.Exact(), fs.Hutchinson(2)], ids=str)
def test_numbers_have_densities(divergence: Any) -> None:
    """dx/dt = -x over t in [0, 1] shrinks by e."""
    made = fs.Flow(fs.Normal(()), fs.ODE(lambda t, x: -x), divergence=divergence)
    x = torch.randn(5)
    found = made.log_prob(x, generator=generator())
    assert torch.allclose(found, td.Normal(0.0, 1.0).log_prob(x / math.e) - 1.0, atol=1e-5)
    assert float(models.straightness(made, x).min()) > 0.0


def test_standardize_shares_numbers_as_its_shape_says() -> None:
    data = 2.0 * torch.randn(400, 3, 4, 5) + torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    made = Standardize((3, 1, 1))
    z = made.start(data)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-10)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(3), atol=1e-10)


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_a_continuous_flow_takes_conditions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ode = models.cnf(shape[0] if len(shape) == 1 else shape, 8, 1, condition=3)
    made, x, c = fs.Flow(fs.Normal(shape), ode, STEPS), torch.randn(5, *shape), torch.randn(5, 3)
    found = made.log_prob(x, c)
    plain = fs.Flow(fs.Normal(shape), fs.ODE(ode.f, batched_time=True), STEPS)
    assert torch.allclose(found, plain.log_prob(x, c))
    one = fs.Flow(fs.Normal(shape), fs.ODE(lambda t, y: ode.f(t, y, c[2:3])), STEPS)
    assert torch.allclose(one.log_prob(x[2:3]), found[2:3])
    assert made.sample((4,), c, seed=0).shape == (4, 5, *shape)


def test_a_random_transform_takes_the_generator_on_the_way_out() -> None:
    block = models.InvertibleResidual(LipschitzMLP([2, 8, 2]), models.RouletteLogDet())
    made = fs.Flow(fs.Normal(2), models.ActNorm(2), transform=fs.Composed([block]))
    assert made.sample((3,), generator=generator()).shape == (3, 2)
    assert made.sample_and_log_prob((3,), generator=generator())[1].shape == (3,)


@pytest.mark.parametrize("value", [0.5, 8.0, -1.0])
def test_data_that_is_no_whole_number_is_refused(value: float) -> None:
    made = fs.Flow(fs.Normal(1), models.ActNorm(1), transform=Dequantize(8))
    with pytest.raises(ValueError, match="whole numbers 0 to 7"):
        made.log_prob(torch.tensor([[value]]), generator=generator())


def test_data_beyond_a_logits_range_is_refused() -> None:
    made = fs.Flow(fs.Normal(1), models.ActNorm(1), transform=Logit())
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        made.log_prob(torch.tensor([[0.5], [1.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("law", "values"),
    [
        (td.Uniform, {"low": 1000.0, "high": 1008.0}), (td.Uniform, {"low": 0.0, "high": 1.0}),
        (td.Weibull, {"scale": 1.0, "concentration": 0.3}),
        (td.Weibull, {"scale": 1.0, "concentration": 0.1}),  # beyond the largest float16
        (td.Laplace, {"loc": 0.0, "scale": 1.0}),
    ],
)  # fmt: skip
def test_draws_lie_within_the_support(law: Any, values: Any, dtype: torch.dtype) -> None:
    """Rounding would put some on its bounds, where densities have no value."""
    made = {k: torch.full((4,), x, dtype=dtype, requires_grad=True) for k, x in values.items()}
    base = bases.Componentwise(law, **made)
    x = base.sample(20_000, 0)
    assert bool(torch.isfinite(x).all())
    assert bool(base._made().support.check(x).all())
    if dtype.itemsize > 2:
        assert bool(torch.isfinite(base.log_prob(x)).all())
        assert torch.autograd.grad(x.sum(), next(iter(made.values())))[0].abs().min() > 0.0


def test_whole_numbers_are_drawn_for_where_they_stand() -> None:
    """Behind a map that gives its input another shape, too."""
    flow = fs.Flow(
        fs.Normal((1, 4, 4)), Composed([Inverse(models.Squeeze())]),
        transform=Composed([models.Squeeze(), Dequantize(8)]),
    )  # fmt: skip
    x = torch.randint(0, 8, (5, 1, 4, 4), generator=generator()).to(torch.get_default_dtype())
    z, _ = flow.enter(x, generator())
    assert z.shape == (5, 4, 2, 2)
    assert torch.equal(flow.transform.unstep(1, z)[0], models.Squeeze().step(0, x)[0])


CONDITIONAL = {
    "coupling": lambda n: models.realnvp(2, condition=n, generator=generator(0)),
    "autoregressive": lambda n: models.maf(2, condition=n),
    "continuous": lambda n: models.cnf(2, condition=n),
    "planar": lambda n: Composed([models.Planar(2, condition=n)]),
    "Sylvester": lambda n: Composed([models.Sylvester(2, 2, condition=n)]),
    "planes": lambda n: models.planar_cnf(2, 6, 8, condition=n),
    "score": lambda n: fs.ODE(TimeMLP(2, 16, condition=n), batched_time=True),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_a_number_is_a_condition_of_all_samples(kind: str) -> None:
    flow, x = fs.Flow(fs.Normal(2), CONDITIONAL[kind](1)), torch.randn(4, 2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1)
    wanted = flow.log_prob(x, torch.full((4, 1), 0.5))
    for shared in (0.5, torch.tensor(0.5)):
        torch.testing.assert_close(flow.log_prob(x, shared), wanted)


def test_conditional_vector_fields_take_any_lead() -> None:
    net, t = ConcatSquash([2, 8, 2], condition=3), torch.tensor(0.1)
    x, c = torch.randn(5, 4, 2), torch.randn(5, 4, 3)
    whole = net(t, x, c)
    assert torch.allclose(whole[1, 2], net(t, x[1, 2], c[1, 2]))
    assert torch.allclose(whole[1], torch.func.vmap(lambda a, b: net(t, a, b))(x[1], c[1]))


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_conditions_of_another_size_are_refused(kind: str) -> None:
    made = CONDITIONAL[kind]
    conditional, plain = (fs.Flow(fs.Normal(2), made(n)) for n in (3, 0))
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"one_hot\(labels, classes\)"):
        conditional.log_prob(x, torch.tensor([0, 1, 2, 1]))
    for flow, args in ((conditional, ()), (conditional, (torch.ones(4, 2),)), (plain, (x,))):
        with pytest.raises(ValueError, match="numbers a sample"):
            flow.log_prob(x, *args)
