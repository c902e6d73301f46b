"""Discrete normalizing flows: every map inverts, and knows its log-determinant."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import AffineTransform

import flowsde as fs
from flowsde import models
from flowsde.dynamics import Inverse
from flowsde.models import (
    Additive,
    Affine,
    Coupling,
    Elementwise,
    FromTorch,
    RationalQuadraticSpline,
    checkerboard,
    half,
)  # fmt: skip
from flowsde.nn import MLP, ConvNet, LipschitzMLP, MaskedMLP
from flowsde.nn.zeroed import zeroed

from .systems import generator


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def affine(params: Tensor) -> AffineTransform:
    return AffineTransform(params[..., 0], params[..., 1].exp())


LAWS = (Additive(), Affine(), RationalQuadraticSpline(), RationalQuadraticSpline(3, 1.5),
        FromTorch(affine, 2))  # fmt: skip


def dense(inputs: int, outputs: int) -> nn.Module:
    net = MLP([inputs, 8, outputs])
    zeroed(net[-1])
    return net


def conv(inputs: int, outputs: int) -> nn.Module:
    return ConvNet(inputs, 8, outputs)


class Told(fs.Map):
    """A map under one condition."""

    def __init__(self, made: fs.Map) -> None:
        super().__init__()
        self.made = made

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Any, Tensor]:
        return self.made.step(k, y, 0.4, -0.7)

    def unstep(self, k: int, y: Tensor, *args: Any) -> tuple[Any, Tensor]:
        return self.made.unstep(k, y, 0.4, -0.7)


IMAGE = (2, 4, 4)
MAPS: dict[str, tuple[Callable[[], fs.Map], tuple[int, ...]]] = {
    "ActNorm": (lambda: models.ActNorm(3), (3,)),
    "ActNorm of channels": (lambda: models.ActNorm(2), IMAGE),
    "Autoregressive": (
        lambda: models.Autoregressive(4, RationalQuadraticSpline(), 12), (4,)
    ),
    "Autoregressive of one": (lambda: models.Autoregressive(1, Affine(), 3), (1,)),
    "Coupling of an image": (lambda: Coupling(half(IMAGE), Affine(), conv), IMAGE),
    "Coupling on a checkerboard": (
        lambda: Coupling(checkerboard(IMAGE), RationalQuadraticSpline(), conv), IMAGE,
    ),
    "Factored": (lambda: models.Factored(Coupling(half(2), Additive(), dense)), (4,)),
    "Inverse": (lambda: Inverse(models.realnvp(3, 3, 8, generator=draws())), (3,)),
    "InvertibleResidual": (
        lambda: models.InvertibleResidual(LipschitzMLP([3, 8, 8, 3])), (3,)
    ),
    "Mixing": (lambda: models.Mixing(4, generator=draws()), (4,)),
    "Mixing of channels": (lambda: models.Mixing(2, generator=draws()), IMAGE),
    "Permutation": (lambda: models.Permutation(torch.tensor([2, 0, 1])), (3,)),
    "Planar": (lambda: models.Planar(3), (3,)),
    "Planar of a condition": (lambda: Told(models.Planar(3, condition=2)), (3,)),
    "Squeeze": (models.Squeeze, IMAGE),
    "Sylvester": (lambda: models.Sylvester(4, 3), (4,)),
    "Sylvester of a condition": (lambda: Told(models.Sylvester(4, 3, condition=2)), (4,)),
    "glow": (lambda: models.glow((1, 4, 4), 1, 2, 8, generator=draws()), (1, 4, 4)),
    "maf": (lambda: models.maf(4, 2, 8), (4,)),
    "nice": (lambda: models.nice(5, 3, 8, generator=draws()), (5,)),
    "nsf": (lambda: models.nsf(3, 2, 8, generator=draws()), (3,)),
    "realnvp": (lambda: models.realnvp(5, 3, 8, generator=draws()), (5,)),
    **{f"Coupling by {type(law).__name__}": (
        lambda law=law: Coupling(checkerboard(5), law, dense), (5,)  # type: ignore[misc]
    ) for law in LAWS},
}  # fmt: skip
TRIVIAL = ("Permutation", "Squeeze")  # maps without parameters


def shaken(name: str, seed: int = 0, std: float = 0.15) -> tuple[fs.Map, tuple[int, ...]]:
    """A map away from the identity, and the shape of its samples."""
    make, shape = MAPS[name]
    made = make()
    torch.manual_seed(seed)
    for p in made.parameters():
        nn.init.normal_(p, std=std)
    return made, shape


def through(made: fs.Map, x: Tensor, *args: Any, back: bool = False) -> tuple[Tensor, Tensor]:
    """All steps: the state and the log-determinant."""
    whole = fs.Composed([made])
    return (whole.unstep if back else whole.step)(0, x, *args)


def test_every_map_is_tested() -> None:
    """What models exports and is a Map, or builds one of a generator, stands in the list above."""
    for name in models.__all__:
        thing = getattr(models, name)
        if name in models.data.__all__:
            continue  # in test_flow.py
        if inspect.isclass(thing) and issubclass(thing, fs.Map):
            assert any(key.startswith(name) for key in MAPS), name
        elif inspect.isfunction(thing) and inspect.signature(thing).return_annotation == "Composed":
            assert name in MAPS or name == "multiscale", name  # glow is made of it
        elif inspect.isclass(thing) and issubclass(thing, Elementwise) and thing is not Elementwise:
            assert thing in {type(law) for law in LAWS}, name


@pytest.mark.parametrize("name", MAPS)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 3.0), batch=st.integers(1, 4))
@settings(max_examples=5)
def test_maps_invert(name: str, seed: int, scale: float, batch: int) -> None:
    made, shape = shaken(name, seed)
    x = scale * torch.randn(batch, *shape)
    with torch.no_grad():
        y, ladj = through(made, x)
        back, inverse = through(made, y, back=True)
    size = 1.0 + float(y.abs().max()) + float(x.abs().max())
    assert float((back - x).abs().max()) <= 1e-10 * size
    assert ladj.shape == inverse.shape == (batch,)
    assert float((ladj + inverse).abs().max()) <= 1e-9 * size


@pytest.mark.parametrize("name", MAPS)
def test_maps_invert_in_single_precision(name: str) -> None:
    """To 1e-3 of the size: a spline's slope of 1e-3 stretches the rounding, 1e-7, that much."""
    made, shape = shaken(name)
    made, x = made.float(), torch.randn(20, *shape).float()
    with torch.no_grad():
        y, ladj = through(made, x)
        back, inverse = through(made, y, back=True)
    assert y.dtype == ladj.dtype == back.dtype == inverse.dtype == torch.float32
    assert float((back - x).abs().max()) <= 1e-3 * (1.0 + float(x.abs().max()))


@pytest.mark.parametrize("name", MAPS)
def test_maps_invert_under_autocast(name: str) -> None:
    """Networks may be coarse: the state is not, and neither is what undoes a step."""
    made, shape = shaken(name)
    made, x = made.float(), torch.randn(20, *shape).float()
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        y, ladj = through(made, x)
        back, inverse = through(made, y, back=True)
    assert y.dtype == ladj.dtype == back.dtype == inverse.dtype == torch.float32
    assert float((back - x).abs().max()) <= 1e-3 * (1.0 + float(x.abs().max()))


@pytest.mark.parametrize("name", MAPS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=3)
def test_log_determinants(name: str, seed: int) -> None:
    """Against slogdet of the Jacobian that autograd finds, both ways."""
    made, shape = shaken(name, seed)
    x = torch.randn(2, *shape)
    for back in (False, True):
        x = through(made, x)[0].detach() if back else x
        ladj = through(made, x, back=back)[1].detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda v: through(made, v[None], back=back)[0].flatten(), x[1]
        )
        truth = torch.linalg.slogdet(jacobian.reshape(x[1].numel(), -1))[1]
        assert float(ladj[1]) == pytest.approx(float(truth), abs=1e-8)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_against_differences(name: str) -> None:
    """Of both results, by the sample and by the parameters, both ways."""
    made, shape = shaken(name)
    parameters, x = tuple(made.parameters()), 0.7 * torch.randn(2, *shape)
    for back in (False, True):
        x = through(made, x)[0].detach() if back else x
        ways = [torch.randn_like(p) for p in (x, *parameters)]

        def along(s: Tensor) -> Tensor:
            moved = [p.detach() + s * way for p, way in zip((x, *parameters), ways, strict=True)]
            names = [name for name, _ in made.named_parameters()]
            state = {f"0.{n}": p for n, p in zip(names, moved[1:], strict=True)}
            y, ladj = torch.func.functional_call(_Whole(made, back), state, (moved[0],))
            return y.sin().sum() + ladj.sum()

        s = torch.zeros((), requires_grad=True)
        torch.autograd.gradcheck(along, s, eps=1e-5, atol=1e-6)


class _Whole(nn.ModuleList):
    def __init__(self, made: fs.Map, back: bool) -> None:
        super().__init__([made])
        self.back = back

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return through(self[0], x, back=self.back)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in MAPS if n != "Coupling by FromTorch"])
def test_untrained_maps_move_only_by_permutation(name: str) -> None:
    make, shape = MAPS[name]
    x = torch.randn(3, *shape)
    y, ladj = through(make(), x)
    assert torch.allclose(y.flatten(1).sort().values, x.flatten(1).sort().values, atol=1e-12)
    assert float(ladj.detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("name", MAPS)
def test_maps_travel(name: str) -> None:
    """Pickles and copies are the same map; on meta nothing is read."""
    made, shape = shaken(name)
    x = torch.randn(2, *shape)
    y, ladj = through(made, x)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(through(twin, x)[0], y)
        assert torch.equal(through(twin, x)[1], ladj)
    ghost = made.to("meta")
    for back, start in ((False, x), (True, y)):
        there, change = through(ghost, start.detach().to("meta"), back=back)
        assert change.is_meta
        assert change.shape == (2,)
        assert there.is_meta


PLANE: dict[str, Callable[[], fs.Map]] = {
    "nice": lambda: models.nice(2, 4, 16, generator=draws()),
    "realnvp": lambda: models.realnvp(2, 4, 16, generator=draws()),
    "nsf": lambda: models.nsf(2, 4, 16, generator=draws()),
    "maf": lambda: models.maf(2, 2, 16),
    "planar": lambda: fs.Composed(models.Planar(2) for _ in range(6)),
    "residual": lambda: models.InvertibleResidual(LipschitzMLP([2, 8, 2])),
}


@pytest.mark.parametrize("name", PLANE)
def test_densities_integrate_to_one(name: str) -> None:
    torch.manual_seed(1)
    made = PLANE[name]()
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    flow = fs.Flow(fs.Normal(2), made)
    with torch.no_grad():
        reach = flow.sample((500,), generator=generator()).abs().amax(0) + 2.0
        a, b = (torch.linspace(-float(r), float(r), 201) for r in reach)
        mass = flow.log_prob(torch.cartesian_prod(a, b)).exp().sum() * (a[1] - a[0]) * (b[1] - b[0])
    assert float(mass) == pytest.approx(1.0, abs=2e-3)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_laws_are_finite_at_the_extremes(law: Elementwise, dtype: torch.dtype) -> None:
    """At edges, in tails, far out, at denormals, and for wild numbers: values and gradients."""
    tail = getattr(law, "tail", 3.0)
    edges = torch.linspace(-tail, tail, 9, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal / 8
    extremes = torch.tensor([0.0, tiny, 1e6, tail * (1 - 1e-6), tail * (1 + 1e-6)], dtype=dtype)
    x = torch.cat((edges, extremes, -extremes))[None].requires_grad_()
    for size in (0.0, 1.0) if isinstance(law, FromTorch) else (0.0, 1.0, 1e6):
        params = size * torch.randn(1, law.count, x.shape[1], dtype=dtype)
        params.requires_grad_()
        for way in (law.forward, law.inverse):
            y, ladj = way(x, params)
            assert y.dtype == ladj.dtype == dtype
            grads = torch.autograd.grad((y + ladj).sum(), (x, params))
            for value in (y, ladj, *grads):
                assert bool(torch.isfinite(value).all()), (size, way)


@pytest.mark.parametrize("law", LAWS, ids=lambda x: type(x).__name__)
@given(seed=st.integers(0, 1000), size=st.floats(0.0, 1.0), where=st.floats(-5.0, 5.0))
def test_laws_invert_and_grow(law: Elementwise, seed: int, size: float, where: float) -> None:
    torch.manual_seed(seed)
    params = size * torch.randn(3, law.count, 2, 2)
    x = torch.full((3, 2, 2), where, requires_grad=True)
    y, ladj = law.forward(x, params)
    back, inverse = law.inverse(y, params)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope.log(), ladj, atol=1e-10)
    assert torch.allclose(inverse, -ladj, atol=1e-8)
    assert torch.allclose(back, x, atol=1e-10)


@pytest.mark.parametrize("law", LAWS[:-1], ids=lambda x: type(x).__name__)
def test_zero_numbers_are_the_identity(law: Elementwise) -> None:
    x = 3.0 * torch.randn(50, 2)
    y, ladj = law.forward(x, torch.zeros(50, law.count, 2))
    assert torch.allclose(y, x, atol=1e-14)
    assert torch.allclose(ladj, torch.zeros(()), atol=1e-14)


def test_splines_meet_their_knots_and_tails() -> None:
    """Continuous with its slope at every edge; nothing moves beyond the tail."""
    law, jumps = RationalQuadraticSpline(4, 2.0), []
    numbers = 0.5 * torch.randn(1, law.count, 1)
    for count in (4_001, 40_001):
        x = torch.linspace(-2.5, 2.5, count)[:, None]
        y, ladj = law.forward(x, numbers.expand(count, -1, -1))
        beyond = x.abs() >= 2.0
        assert torch.equal(y[beyond], x[beyond])
        assert bool((y.diff(dim=0) > 0).all())
        jumps.append([float(v.diff(dim=0).abs().max()) for v in (y, ladj)])
    assert jumps[1][0] < 0.15 * jumps[0][0]
    assert jumps[1][1] < 0.15 * jumps[0][1]


def test_a_spline_of_zuko_is_a_law() -> None:
    transforms = pytest.importorskip("zuko.transforms")

    def factory(p: Tensor) -> Any:
        return transforms.MonotonicRQSTransform(p[..., :4], p[..., 4:8], p[..., 8:], bound=3.0)

    made = Coupling(half(4), FromTorch(factory, 11), dense)
    x = torch.randn(5, 4)
    y, ladj = through(made, x)
    back, inverse = through(made, y, back=True)
    assert torch.allclose(back, x, atol=1e-5)  # zuko's own accuracy
    assert torch.allclose(ladj, -inverse, atol=1e-4)


def test_a_law_is_elementwise() -> None:
    softmax = FromTorch(lambda p: torch.distributions.StickBreakingTransform(), 1)
    with pytest.raises(TypeError, match="elementwise"):
        through(Coupling(half(4), softmax, dense), torch.randn(2, 4))


@pytest.mark.parametrize(
    "bad", [lambda: Affine(0.0), lambda: RationalQuadraticSpline(0),
            lambda: RationalQuadraticSpline(8, -1.0), lambda: RationalQuadraticSpline(1000)],
)  # fmt: skip
def test_laws_check_themselves(bad: Callable[[], Elementwise]) -> None:
    with pytest.raises(ValueError, match="> 0"):
        bad()


# --- couplings and what stands between them -------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (4, 2, 2)])
def test_couplings_take_conditions(shape: tuple[int, ...]) -> None:
    network = dense if len(shape) == 1 else conv
    made = Coupling(half(shape), Affine(), network, condition=2)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    x, u = torch.randn(3, *shape), torch.randn(3, 2)
    y, ladj = through(made, x, u)
    assert not torch.allclose(y, through(made, x, u + 1.0)[0])
    back, inverse = through(made, y, u, back=True)
    assert torch.allclose(back, x)
    assert torch.allclose(inverse, -ladj)


@pytest.mark.parametrize("mask", [half(5), ~half(5), checkerboard(5), checkerboard((2, 3, 3))])
def test_what_the_mask_names_stays(mask: Tensor) -> None:
    made = Coupling(mask, Additive(), dense if mask.ndim == 1 else conv)
    for p in made.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, *mask.shape)
    y = through(made, x)[0]
    assert torch.equal(y[:, mask], x[:, mask])
    assert not bool((y == x)[:, ~mask].any())


def test_masks_are_checked() -> None:
    for mask in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(ValueError, match="mask"):
            Coupling(mask, Affine(), dense)


def test_permutations_are_checked() -> None:
    for order in (torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="permutation"):
            models.Permutation(order)


def test_start_normalizes_what_leaves_every_actnorm() -> None:
    made = models.glow((1, 4, 4), 2, 2, 8, generator=draws())
    data = 5.0 + 3.0 * torch.randn(64, 1, 4, 4)
    end = made.start(data)
    assert torch.equal(end, through(made, data)[0])
    assert not end.requires_grad
    rows = end.flatten(1)  # untrained couplings are the identity: the last ActNorms decide
    assert torch.allclose(rows.mean(0).mean(), torch.zeros(()), atol=1e-9)
    assert float(rows.var()) == pytest.approx(1.0, abs=0.02)
    one = models.ActNorm(2)
    with pytest.raises(ValueError, match="batch"):
        one.start(torch.randn(1, 2))
    one.start(torch.ones(4, 2))
    assert bool(torch.isfinite(one.step(0, torch.ones(4, 2))[0]).all())


def test_glow_halves_its_sides() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        models.glow((1, 6, 8), generator=draws())


def test_inverse_flips_the_steps() -> None:
    made = models.realnvp(4, 3, 8, generator=draws())
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4)
    y = fs.solve(Inverse(made), x).y1
    assert torch.equal(y, fs.solve(made, x, len(made), 0).y1)
    assert torch.allclose(fs.solve(made, y).y1, x)


# --- autoregressive, of low rank, residual --------------------------------------------------------


@pytest.mark.parametrize("condition", [0, 2])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_masked_networks_see_what_came_before(dim: int, condition: int) -> None:
    made = MaskedMLP(dim, 3, 41, 2, condition)
    for p in made.parameters():
        nn.init.normal_(p)
    points = torch.randn(20, dim + condition)  # at one of them some units rest
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x).sum(0), points)
    seen = jacobian.reshape(3, dim, 20, -1).abs().sum((0, 2)) > 0
    earlier = torch.arange(dim) < torch.arange(dim)[:, None]
    assert torch.equal(seen[:, :dim], earlier)
    assert bool(seen[:, dim:].all())


def test_autoregressive_maps_and_residuals_take_conditions() -> None:
    x, u = torch.randn(3, 4), torch.randn(3, 2)
    for made in (models.Autoregressive(4, Affine(), 16, condition=2),
                 models.Planar(4, condition=2), models.Sylvester(4, 3, condition=2),
                 models.InvertibleResidual(LipschitzMLP([6, 8, 4]))):  # fmt: skip
        for p in made.parameters():
            nn.init.normal_(p, std=0.3)
        y, ladj = through(made, x, u)
        assert not torch.allclose(y, through(made, x, u + 1.0)[0])
        back, inverse = through(made, y, u, back=True)
        assert torch.allclose(back, x)
        assert torch.allclose(inverse, -ladj)
        for i in range(3):  # each sample by its own condition
            alone, own = through(made, x[i : i + 1], u[i : i + 1])
            assert torch.allclose(alone[0], y[i])
            assert torch.allclose(own[0], ladj[i])


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_maps_of_low_rank_invert_where_they_nearly_fold(size: float) -> None:
    """Whatever the parameters, near points and far: slopes stay above 1e-3."""
    for make in (lambda: models.Planar(3), lambda: models.Sylvester(3, 2)):
        made = make()
        for p in made.parameters():
            nn.init.normal_(p, std=size)
        for scale in (1e-3, 1.0, 1e6):
            x = scale * torch.randn(50, 3)
            y, ladj = through(made, x)
            back, inverse = through(made, y, back=True)
            error = (back - x).abs().amax().detach() / (scale + size)
            assert float(error) < 1e-9
            assert bool(torch.isfinite(ladj).all())
            assert torch.allclose(inverse, -ladj, atol=1e-6 * size)


def test_the_root_of_a_planar_map_is_twice_differentiable() -> None:
    made, _ = shaken("Planar", std=0.7)
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: through(made, v, back=True)[0], x)


def test_lipschitz_networks_do_not_stretch() -> None:
    made = LipschitzMLP([4, 16, 16, 4], bound=0.7)
    for p in made.parameters():
        nn.init.normal_(p, std=2.0)
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x).sum(0), torch.randn(200, 4))
    assert float(torch.linalg.matrix_norm(jacobian.transpose(0, 1), 2).max()) <= 0.7 + 1e-12


def test_what_stretches_does_not_settle_in_silence() -> None:
    made = models.InvertibleResidual(nn.Linear(2, 2))
    nn.init.normal_(made.net.weight, std=3.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="below one"):
        made.unstep(0, torch.randn(3, 2))


def test_a_residuals_inverse_has_first_derivatives_only() -> None:
    made, _ = shaken("InvertibleResidual")
    y = torch.randn(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(made.unstep(0, y)[0].sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        first.sum().backward()


def residuals(log_det: models.LogDet) -> fs.Composed:
    torch.manual_seed(0)
    made = fs.Composed(
        models.InvertibleResidual(LipschitzMLP([3, 8, 3], 0.8), log_det) for _ in range(2)
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.6)
    return made


def test_the_roulette_is_unbiased() -> None:
    """Log-determinants and their gradients, within five standard errors."""
    net, x = LipschitzMLP([3, 8, 3], 0.8), torch.randn(1, 3).expand(32, 3).clone().requires_grad_()
    for p in net.parameters():
        nn.init.normal_(p, std=0.6)
    g, bias = net(x), net.layers[0].bias

    def drawn(log_det: models.LogDet) -> Tensor:
        ladj = log_det(g, x, True).mean()
        grad = torch.autograd.grad(ladj, bias, retain_graph=True)[0]  # type: ignore[arg-type]
        return torch.cat((ladj.detach()[None], grad))

    exact, loose = drawn(models.ExactLogDet()), models.RouletteLogDet(1, 0.75)
    found = torch.stack([drawn(loose.prepare(seed)) for seed in range(100)])
    error = found.std(0) / 100**0.5
    assert float(error[0]) < 0.05 * float(exact[0].abs())
    assert bool(((found.mean(0) - exact).abs() < 5.0 * error).all())


def test_the_roulette_turns_by_the_solves_generator() -> None:
    flow, x = fs.Flow(fs.Normal(3), residuals(models.RouletteLogDet())), torch.randn(4, 3)
    one, two, three = (flow.log_prob(x, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.allclose(flow.log_prob(x[:2], generator=generator(0)), one[:2])
    with pytest.raises(TypeError, match="generator"):
        flow.log_prob(x)
    blocks = residuals(models.RouletteLogDet()).prepare(x, 3).layers
    assert blocks[0].log_det != blocks[1].log_det  # each block its own draws


@pytest.mark.parametrize(
    "bad", [lambda: models.RouletteLogDet(-1), lambda: models.RouletteLogDet(2, 1.0),
            lambda: models.Sylvester(3, 4), lambda: MaskedMLP(9, 1, 7),
            lambda: LipschitzMLP([2, 2], 0.0)],
)  # fmt: skip
def test_what_cannot_be_is_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="got"):
        bad()


def test_mixed_channels_are_taken_apart_in_half_precision() -> None:
    flow = models.nsf(4, generator=generator()).bfloat16()
    x = torch.randn(2, 4, generator=generator()).bfloat16()
    for k in range(len(flow)):
        z, _ = flow.step(k, x)
        back, _ = flow.unstep(k, z)
        assert back.dtype == torch.bfloat16
        assert torch.allclose(back, x, atol=0.1)
