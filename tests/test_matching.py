"""Training without simulation: targets, couplings, and what comes of them, by closed forms."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flowsde as fs
from flowsde import paths
from flowsde.integrators import EulerMaruyama, Tsit5
from flowsde.models import StochasticInterpolant, reflow, straightness
from flowsde.objectives import FlowMatching, UniformTime
from flowsde.paths import Coupling, Independent, Interpolant, OptimalTransport, Sinkhorn

from .systems import SCHEDULES, generator

TIGHT = fs.Solver(Tsit5(), fs.Adaptive(1e-10, 1e-10))
INTERPOLANTS = [Interpolant(s, bridge) for s in SCHEDULES for bridge in (0.0, 0.8)]
COUPLINGS = (Independent(), OptimalTransport(), Sinkhorn(2.0))


@dataclass(frozen=True)
class Gaussians:
    """Jointly normal ends, the same in every component, and all that follows from them."""

    interpolant: Interpolant
    means: tuple[float, float] = (0.5, -0.3)
    deviations: tuple[float, float] = (0.6, 1.1)
    correlation: float = 0.0

    def ends(self, shape: tuple[int, ...], draws: torch.Generator) -> tuple[Tensor, Tensor]:
        a, b = torch.randn((2, *shape), generator=draws)
        b = self.correlation * a + math.sqrt(1.0 - self.correlation**2) * b
        (m0, m1), (s0, s1) = self.means, self.deviations
        return m0 + s0 * a, m1 + s1 * b

    def _form(self, u: tuple[Any, Any, Any], v: tuple[Any, Any, Any]) -> Any:
        """Covariance of u . (x0, x1, z) and v . (x0, x1, z)."""
        s0, s1 = self.deviations
        cross = self.correlation * s0 * s1 * (u[0] * v[1] + u[1] * v[0])
        return u[0] * v[0] * s0**2 + u[1] * v[1] * s1**2 + cross + u[2] * v[2]

    def weights(self, t: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
        """Of x_t, and of its rate."""
        at, schedule = self.interpolant, self.interpolant.schedule
        zero = 0.0 * t
        gammas = (at.gamma(t), at.dgamma(t)) if at.bridge else (zero, zero)
        return (
            (schedule.alpha(t), schedule.sigma(t), gammas[0]),
            (schedule.dalpha(t), schedule.dsigma(t), gammas[1]),
        )

    def moments(self, t: Any) -> tuple[Any, Any]:
        """Mean and variance of x_t."""
        weights, _ = self.weights(t)
        return weights[0] * self.means[0] + weights[1] * self.means[1], self._form(weights, weights)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """E[dx_t/dt | x_t]."""
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
        weights, rates = self.weights(t)
        mean, variance = self.moments(t)
        drift = rates[0] * self.means[0] + rates[1] * self.means[1]
        return drift + self._form(weights, rates) / variance * (x - mean)

    def denoiser(self, t: Tensor, x: Tensor) -> Tensor:
        """E[z | x_t]."""
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
        mean, variance = self.moments(t)
        return self.interpolant.gamma(t) / variance * (x - mean)

    def floor(self, t: Tensor) -> Tensor:
        """The least loss at t: Var[dx_t/dt | x_t], and Var[z | x_t] where there is a bridge."""
        weights, rates = self.weights(t)
        variance = self._form(weights, weights)
        least = self._form(rates, rates) - self._form(weights, rates) ** 2 / variance
        return least + (1.0 - weights[2] ** 2 / variance if self.interpolant.bridge else 0.0)


class Shifted(nn.Module):
    """A field moved off by a x + b."""

    def __init__(self, field: Any) -> None:
        super().__init__()
        self.field, self.off = field, nn.Parameter(torch.zeros(2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(t, x) + self.off[0] * x + self.off[1]


# --- interpolants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=str)
def test_the_velocity_is_the_rate_of_the_point(interpolant: Interpolant) -> None:
    x0, x1, z = torch.randn(3, 5, 2)
    t = interpolant.horizon * torch.linspace(0.05, 0.95, 5)
    ends = (x0, x1, z) if interpolant.bridge else (x0, x1)
    point, rate = torch.func.jvp(lambda t: interpolant.point(t, *ends), (t,), (torch.ones(5),))
    assert torch.allclose(interpolant.velocity(t, *ends), rate, rtol=1e-12, atol=1e-12)
    for i, time in enumerate(t.tolist()):  # a host float serves as well
        row = [end[i] for end in ends]
        assert torch.allclose(interpolant.point(time, *row), point[i], rtol=1e-12)
        assert torch.allclose(interpolant.velocity(time, *row), rate[i], rtol=1e-10)


@pytest.mark.parametrize("bridge", [0.0, 0.7])
def test_interpolants_end_in_their_ends(bridge: float) -> None:
    straight, (x0, x1, z) = Interpolant(bridge=bridge), torch.randn(3, 4, 2)
    assert torch.equal(straight.point(0.0, x0, x1, z), x0)
    assert torch.equal(straight.point(1.0, x0, x1, z), x1)


def test_a_bridge_is_brownian_between_its_ends() -> None:
    """Its deviation at t is that of W(t) given W(0) and W(T), on any horizon."""
    for schedule in (paths.FlowMatching(), paths.EDM(4.0)):
        end, bridge = schedule.horizon, Interpolant(schedule, 0.6)
        t = torch.linspace(0.0, end, 9)
        wanted = 0.36 * (t - t**2 / end)
        assert torch.allclose(torch.as_tensor(bridge.gamma(t)) ** 2, wanted, atol=1e-14)


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=str)
def test_the_marginal_velocity_has_the_least_loss(interpolant: Interpolant) -> None:
    """At E[dx_t/dt | x_t] the loss is its floor and its gradient has mean 0: 4.5 deviations."""
    law = Gaussians(interpolant, correlation=0.4)
    field, denoiser = Shifted(law.velocity), Shifted(law.denoiser)
    times = UniformTime(0.1 * interpolant.horizon, 0.9 * interpolant.horizon)
    ode = fs.ODE(field, batched_time=True)
    ode.horizon = interpolant.horizon
    made = FlowMatching(
        ode, interpolant, times=times, paired=True,
        denoiser=denoiser if interpolant.bridge else None,
    )  # fmt: skip
    draws, losses, slopes = generator(), [], []
    for _ in range(16):
        loss = made(*law.ends((512, 2), draws), generator=draws)
        parameters = list(made.parameters())
        slopes.append(torch.cat(torch.autograd.grad(loss, parameters)))
        losses.append(loss.detach())
    u = (torch.arange(1000) + 0.5) / 1000
    floor = law.floor(times.quantile(u)).mean()
    for found, wanted in ((torch.stack(losses)[:, None], floor), (torch.stack(slopes), 0.0)):
        error = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - wanted).abs() < 4.5 * error).all())


def test_gradients_are_those_of_the_loss() -> None:
    """By central differences, on one and the same draw."""
    field, denoiser = Shifted(lambda t, x: x.sin()), Shifted(lambda t, x: x.cos())
    ode = fs.ODE(field, batched_time=True)
    made = FlowMatching(ode, Interpolant(bridge=0.5), denoiser=denoiser)
    x = torch.randn(64, 3)
    grads = torch.autograd.grad(made(x, generator=generator()), list(made.parameters()))
    for parameter, grad in zip(made.parameters(), grads, strict=True):
        for i in range(2):
            values = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[i] += h
                    values.append(float(made(x, generator=generator())))
                    parameter[i] -= h
            assert float(grad[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-7)


def test_opposite_noise_keeps_gradients_finite_at_the_ends() -> None:
    """Times within 1e-8 of 0: the rate of the bridge is 1e4, the gradient is not."""
    field = Shifted(lambda t, x: 0.0 * x)
    made = FlowMatching(
        fs.ODE(field, batched_time=True), Interpolant(bridge=1.0), times=UniformTime(1e-9, 1e-8)
    )
    loss = made(torch.randn(4, 2), generator=generator())
    assert float(loss.detach()) > 1e6
    (slope,) = torch.autograd.grad(loss, [field.off])
    assert float(slope.abs().max()) < 1e2


def test_flow_matching_to_one_point_has_its_closed_form() -> None:
    """For data at one point c the velocity is (x - c) / t."""
    ode = fs.ODE(lambda t, x: (x - 1.5) / t[:, None], batched_time=True)
    loss = FlowMatching(ode)(torch.full((100, 2), 1.5), generator=generator())
    assert float(loss) < 1e-20


@pytest.mark.parametrize("bridge", [0.0, 0.5])
def test_float32_and_its_ends_are_safe(bridge: float) -> None:
    """However often the last of the strata is rounded up."""
    field = Shifted(lambda t, x: x)
    made = FlowMatching(fs.ODE(field, batched_time=True), Interpolant(bridge=bridge))
    assert float(made.times.quantile(torch.ones(())).float()) < 1.0
    assert float(made.times.quantile(torch.zeros(())).float()) > 0.0
    loss = made.float()(torch.randn(8, 2, dtype=torch.float32), generator=generator())
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))


def field_of(data: Tensor, interpolant: Interpolant) -> fs.ODE:
    """E[dx_t/dt | x_t] where x0 is each of these rows as likely as any other, row by row."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        logs, rates = [], []
        s = t.reshape(t.shape + (1,) * (x.ndim - 1))
        alpha, sigma = interpolant.schedule(s)
        for row in data:
            x1 = (x - alpha * row) / sigma
            logs.append(-0.5 * x1.square().reshape(len(x), -1).sum(1))
            rates.append(interpolant.velocity(t, row.expand_as(x), x1))
        weights = torch.stack(logs).softmax(0)
        return (weights.reshape(*weights.shape, *(1,) * (x.ndim - 1)) * torch.stack(rates)).sum(0)

    ode = fs.ODE(velocity, batched_time=True)
    ode.horizon = interpolant.horizon
    return ode


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_stable_targets_are_those_of_the_whole_batch(schedule: Any, shape: Any) -> None:
    """The batch's own field has no loss, where a row's own targets scatter about it."""
    data = 100.0 + 0.3 * torch.randn(12, *shape, generator=generator(5))
    interpolant = Interpolant(schedule)
    times = UniformTime(0.02 * schedule.horizon, 0.98 * schedule.horizon)
    ode = field_of(data, interpolant)
    stable = FlowMatching(ode, interpolant, times=times, points=7)(data, generator=generator())
    own = FlowMatching(ode, interpolant, times=times)(data, generator=generator())
    assert float(stable) < 1e-16 * float(own)


def test_stable_targets_are_safe_close_to_the_data() -> None:
    """In float32, where noise is as small as it gets: a row's target is its own there."""
    data = torch.randn(64, 2, generator=generator(2)).float()
    times = UniformTime(1e-5, 1e-4)
    one = FlowMatching(fs.ODE(lambda t, x: 0.0 * x, batched_time=True), times=times, points=64)
    loss = float(one(data, generator=generator()))  # the mean of |x1 - x0|^2
    assert loss == pytest.approx(1.0 + float(data.square().mean()), rel=0.5)


def test_a_batch_of_stable_targets_says_what_it_needs() -> None:
    for more in ({"source": fs.Normal(2)}, {"paired": True}, {"coupling": Sinkhorn(1.0)}):
        with pytest.raises(ValueError, match="or points"):
            FlowMatching(recorder(), points=4, **more)
    with pytest.raises(ValueError, match="or points"):
        FlowMatching(recorder(), Interpolant(bridge=1.0), points=4)
    with pytest.raises(ValueError, match="got 0"):
        FlowMatching(recorder(), points=0)
    made = FlowMatching(recorder(), points=4)
    with pytest.raises(TypeError, match="leave out points"):
        made(torch.randn(8, 2), torch.randn(8, 1), generator=generator())
    with pytest.raises(ValueError, match="one of 3"):
        made(torch.randn(3, 2), generator=generator())


class Recorder(nn.Module):
    """A field that keeps what it was given."""

    def forward(self, t: Tensor, x: Tensor, *args: Tensor) -> Tensor:
        self.seen = t, x, args
        return torch.zeros_like(x)


def ends(made: FlowMatching, x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The ends of a straight objective, from the point it looked at and the data."""
    made(x0, *args, generator=generator(3))
    t, x, _ = made.dynamics.f.seen
    t = t.reshape(t.shape + (1,) * (x.ndim - 1))
    return x0, (x - (1.0 - t) * x0) / t


def recorder() -> fs.ODE:
    return fs.ODE(Recorder(), batched_time=True)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_any_source_is_carried_through(coupling: Coupling) -> None:
    x0 = torch.randn(16, 3)
    _, normal = ends(FlowMatching(recorder(), coupling=coupling), x0)
    assert 0.5 < float(normal.std()) < 1.5
    _, wide = ends(FlowMatching(recorder(), coupling=coupling, source=fs.Normal(3, 4.0)), x0)
    assert 2.0 < float(wide.std()) < 6.0
    given = torch.randn(7, 3)
    _, drawn = ends(FlowMatching(recorder(), coupling=coupling, source=given), x0)
    assert float(torch.cdist(drawn, given).amin(1).max()) < 1e-10
    made = FlowMatching(recorder(), coupling=coupling, paired=True)
    x1 = torch.randn(16, 3)
    rows = coupling(x0, x1, generator=generator(3))
    assert torch.allclose(ends(made, x0, x1)[1], x1[rows], atol=1e-10)


def test_conditions_stay_with_their_data() -> None:
    x0 = torch.randn(32, 2, 2)
    condition, labels = x0.flatten(1).sum(1, keepdim=True), (x0[:, 0, 0] > 0).long()
    for coupling in (Independent(), OptimalTransport(condition_weight=0.3)):
        made = FlowMatching(recorder(), coupling=coupling, times=UniformTime(1e-9, 1e-8))
        made(x0, condition, labels, generator=generator())
        _, x, args = made.dynamics.f.seen
        assert torch.equal(args[0], condition)
        assert torch.equal(args[1], labels)
        assert torch.allclose(x, x0, atol=1e-6)  # row by row


def test_the_objective_says_what_it_needs() -> None:
    ode = recorder()
    with pytest.raises(TypeError, match="batched_time"):
        FlowMatching(fs.ODE(lambda t, x: x))
    with pytest.raises(TypeError, match=r"Interpolant\(VP"):
        FlowMatching(ode, paths.VP())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bridge"):
        FlowMatching(ode, denoiser=lambda t, x: x)
    with pytest.raises(ValueError, match="leave out source"):
        FlowMatching(ode, source=fs.Normal(2), paired=True)
    with pytest.raises(TypeError, match="the source"):
        FlowMatching(ode, source=fs.Normal(1))(torch.randn(4, 2), generator=generator())
    with pytest.raises(TypeError, match="the field"):
        FlowMatching(fs.ODE(lambda t, x: x[:, :1], batched_time=True))(
            torch.randn(4, 2), generator=generator()
        )
    with pytest.raises(ValueError, match="deviation"):
        Interpolant(bridge=-1.0)


# --- couplings ------------------------------------------------------------------------------------


def cost(x0: Tensor, x1: Tensor) -> float:
    return float((x0 - x1).square().sum())


def test_every_coupling_is_tested() -> None:
    exported = {
        kind for kind in vars(paths).values()
        if isinstance(kind, type) and issubclass(kind, Coupling) and kind is not Coupling
    }  # fmt: skip
    assert exported == {type(c) for c in COUPLINGS}


@given(
    count=st.integers(1, 6), dim=st.integers(1, 3), seed=st.integers(0, 999), copies=st.booleans()
)
def test_optimal_transport_is_optimal(count: int, dim: int, seed: int, copies: bool) -> None:
    """Against all permutations; rows that stand twice included."""
    x0, x1 = torch.randn((2, count, dim), generator=generator(seed))
    if copies:
        x0[-1], x1[-1] = x0[0], x1[0]
    rows = OptimalTransport()(x0, x1, generator=generator())
    assert sorted(rows.tolist()) == list(range(count))
    least = min(cost(x0, x1[list(p)]) for p in itertools.permutations(range(count)))
    assert cost(x0, x1[rows]) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn(1.0)], ids=str)
def test_plans_do_not_see_where_the_origin_is(coupling: Any) -> None:
    x0, x1 = torch.randn(2, 32, 2, generator=generator())
    near, far = (coupling(x0 + c, x1 + c, generator=generator(1)) for c in (0.0, 2.0**30))
    exact = coupling((x0 + 2.0**30) - 2.0**30, (x1 + 2.0**30) - 2.0**30, generator=generator(1))
    assert torch.equal(far, exact)
    assert (far == near).double().mean() > 0.8  # the data itself is rounded there


@pytest.mark.parametrize("coupling", [OptimalTransport(), Sinkhorn(1.0)], ids=str)
def test_a_plan_of_what_is_no_number_is_refused(coupling: Any) -> None:
    x0, x1 = torch.randn(2, 4, 2)
    x0[1, 0] = torch.nan
    with pytest.raises(ValueError, match="nan_to_num"):
        coupling(x0, x1, generator=generator())


def test_no_source_is_lost() -> None:
    """Drawn from the plan with replacement, as elsewhere, 0.37 of the rows would be."""
    x0, x1 = torch.randn((2, 256, 2), generator=generator())
    for coupling in (Independent(), OptimalTransport(), Sinkhorn(1e6)):
        rows = coupling(x0, x1 + 1.0, generator=generator())
        assert sorted(rows.tolist()) == list(range(256))


@given(count=st.integers(2, 12), seed=st.integers(0, 999), reg=st.floats(0.2, 20.0))
def test_entropic_plans_are_optimal(count: int, seed: int, reg: float) -> None:
    """Both marginals, and log plan = f_i + g_j - cost / regularization."""
    x0, x1 = torch.randn((2, count, 2), generator=generator(seed))
    plan = Sinkhorn(reg).plan(x0, x1)
    assert torch.allclose(plan.sum(1), torch.full((count,), 1.0 / count), rtol=1e-12)
    assert float((count * plan.sum(0) - 1.0).square().mean().sqrt()) < 0.01
    rest = plan.log() + (x0[:, None] - x1).square().sum(-1) / reg
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert float(rest.abs().max()) < 1e-8


def test_partners_are_drawn_by_the_plan() -> None:
    """Each row by its own row of the plan, within 4.5 standard errors."""
    x0, x1 = torch.randn((2, 4, 2), generator=generator(1))
    coupling, draws, n = Sinkhorn(2.0), generator(), 250
    plan = 4.0 * coupling.plan(x0, x1)
    counts = sum(
        nn.functional.one_hot(coupling(x0, x1, generator=draws), 4) for _ in range(n)
    )  # fmt: skip
    error = (plan * (1.0 - plan) / n).sqrt() + 1e-9
    assert bool(((counts / n - plan).abs() < 4.5 * error).all())


def test_an_entropic_plan_of_normals_has_their_bridge_s_covariance() -> None:
    """(sqrt(4 + s^4) - s^2) / 2 between standard normals, with regularization 2 s^2."""
    s2, n = 1.0, 700
    u = torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None]
    plan = Sinkhorn(2.0 * s2).plan(u, u)
    wanted = 0.5 * (math.sqrt(4.0 + s2**2) - s2)
    assert float(u[:, 0] @ plan @ u[:, 0]) == pytest.approx(wanted, rel=3e-3)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_couplings_draw_from_the_generator_alone(coupling: Coupling) -> None:
    x0, x1 = torch.randn((2, 64, 3), generator=generator())
    before, state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    rows = coupling(x0, x1, generator=generator(7))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(coupling(x0, x1, generator=generator(7)), rows)
    if isinstance(coupling, Sinkhorn):
        assert not torch.equal(coupling(x0, x1, generator=generator(8)), rows)


def test_a_coupling_sees_conditions() -> None:
    """With a great weight noise stays within its condition; with none it is drawn to its data."""
    labels = torch.arange(40) % 2
    x0 = torch.randn(40, 2) + 6.0 * labels[:, None]
    x1 = torch.randn(40, 2)
    for great in (OptimalTransport(condition_weight=1e6), Sinkhorn(0.5, condition_weight=1e6)):
        for condition in (labels, labels[:, None].double()):
            rows = great(x0, x1, condition, generator=generator())
            assert torch.equal(labels[rows], labels)
    free = OptimalTransport(condition_weight=0.0)(x0, x1, labels, generator=generator())
    assert torch.equal(free, OptimalTransport()(x0, x1, generator=generator()))
    assert float(x1[free].sum(1)[labels == 1].mean()) > 0.5


def test_couplings_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(TypeError, match="condition_weight=w"):
        OptimalTransport()(x, x, torch.arange(4), generator=generator())
    with pytest.raises(ValueError, match="as many"):
        Independent()(x, x[:3], generator=generator())
    with pytest.raises(ValueError, match="regularization"):
        Sinkhorn(0.0)
    with pytest.raises(ValueError, match="condition_weight"):
        OptimalTransport(condition_weight=math.inf)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install flowsde\[couplings\]"):
        OptimalTransport()(x, x, generator=generator())


# --- the ODE and the SDE --------------------------------------------------------------------------


def test_a_matched_field_is_a_flow() -> None:
    """Likelihood by the code of every CNF: the data's own density."""
    law = Gaussians(Interpolant(), means=(0.5, 0.0), deviations=(0.6, 1.0))
    flow = fs.Flow(fs.Normal(2), fs.ODE(law.velocity), TIGHT)
    x = torch.randn(8, 2)
    wanted = torch.distributions.Normal(0.5, 0.6).log_prob(x).sum(-1)
    assert torch.allclose(flow.log_prob(x), wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("schedule", "eta"),
    [*((paths.FlowMatching(), eta) for eta in (0.0, 0.5, 1.0)), (paths.VP(), 1.0)],
)
def test_every_eta_has_the_marginals_of_the_interpolant(schedule: Any, eta: float) -> None:
    law = Gaussians(Interpolant(schedule, 0.9), correlation=0.3)
    sde = StochasticInterpolant(fs.ODE(law.velocity), law.denoiser, law.interpolant, eta)
    mean, variance = law.moments(0.95)
    z = torch.special.ndtri((torch.arange(5000) + 0.5) / 5000)[:, None]  # of the law to 1e-4
    how: Any = {"integrator": EulerMaruyama(), "path": fs.Brownian(1)} if eta else {}
    stepping = fs.Fixed(steps=150 if eta else 20)
    found = fs.solve(sde, mean + math.sqrt(variance) * z, 0.95, 0.05, stepping=stepping, **how).y1
    mean, variance = law.moments(0.05)
    assert float(found.mean()) == pytest.approx(mean, abs=4.5 * math.sqrt(variance / 5000))
    assert float(found.var()) == pytest.approx(variance, rel=4.5 * math.sqrt(2 / 5000))


def test_the_sde_of_an_entropic_coupling_is_the_schroedinger_bridge() -> None:
    """Its paths join the ends as the coupling does; those of another coupling do not."""
    s = 1.0
    for bridge in (True, False):
        right = 0.5 * (math.sqrt(4.0 + s**4) - s**2)
        law = Gaussians(
            Interpolant(bridge=s), (0.0, 0.0), (1.0, 1.0), correlation=right if bridge else 0.0
        )
        sde = StochasticInterpolant(fs.ODE(law.velocity), law.denoiser, law.interpolant)
        x1 = torch.randn(4000, 1, generator=generator())
        x0 = fs.solve(
            sde, x1, 0.9999, 0.0001, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=150),
            path=fs.Brownian(2),
        ).y1  # fmt: skip
        off = abs(float(torch.corrcoef(torch.cat((x0, x1), 1).T)[0, 1]) - law.correlation)
        assert off < 0.04 if bridge else off > 0.2


def test_the_sde_says_where_it_stands() -> None:
    ode, bridge = fs.ODE(lambda t, x: x), Interpolant(bridge=1.0)
    with pytest.raises(ValueError, match="Interpolant"):
        StochasticInterpolant(ode, ode, Interpolant())
    with pytest.raises(ValueError, match="eta"):
        StochasticInterpolant(ode, ode, bridge, -1.0)
    thin = StochasticInterpolant(ode, lambda t, x: x[:, :1], bridge)
    with pytest.raises(TypeError, match="the denoiser"):
        thin(torch.tensor(0.5), torch.randn(3, 2))
    sde = StochasticInterpolant(ode, ode, bridge)
    for span in ((1.0, 0.1), (0.9, 0.0), (0.1, 0.9)):
        with pytest.raises(ValueError, match=r"0\.999 to 0\.001"):
            fs.solve(
                sde, torch.randn(3, 2), *span, integrator=EulerMaruyama(),
                stepping=fs.Fixed(steps=2), generator=generator(),
            )  # fmt: skip


# --- rectified flow -------------------------------------------------------------------------------


def linear(a: float) -> fs.Flow:
    return fs.Flow(fs.Normal(3), fs.ODE(lambda t, x: a * x), TIGHT)


def test_reflow_pairs_are_the_ends_of_the_flow() -> None:
    x0, x1 = reflow(linear(0.7), 50, generator=generator(1))
    assert torch.allclose(x0, math.exp(-0.7) * x1, atol=1e-8)
    assert torch.equal(reflow(linear(0.7), 50, generator=generator(1))[1], x1)
    assert not torch.equal(reflow(linear(0.7), 50, generator=generator(2))[1], x1)
    assert abs(float(x1.mean())) < 4.5 / math.sqrt(150)
    scaled = fs.Flow(fs.Normal(2), fs.ODE(lambda t, x, u: u * x), TIGHT)
    x0, x1 = reflow(scaled, 5, torch.tensor(0.3), generator=generator())
    assert torch.allclose(x0, math.exp(-0.3) * x1, atol=1e-8)


def test_the_pairs_of_a_linear_flow_have_a_straight_field() -> None:
    """x_t = (1 - t) e^-a x1 + t x1: the field that leads there has no loss, and no bend."""
    a = 0.7
    shrink = math.exp(-a)

    def field(t: Tensor, x: Tensor) -> Tensor:
        rate = (1.0 - shrink) / (shrink + (1.0 - shrink) * t)
        return (rate[:, None] if rate.ndim else rate) * x

    ode = fs.ODE(field, batched_time=True)
    pairs = reflow(linear(a), 200, generator=generator())
    assert float(FlowMatching(ode, paired=True)(*pairs, generator=generator())) < 1e-14
    again = fs.Flow(fs.Normal(3), ode, TIGHT)
    before, after = (straightness(flow, pairs[1]).mean() for flow in (linear(a), again))
    assert float(after.abs()) < 1e-8
    assert float(before) > 1e-2


@pytest.mark.parametrize("t0", [0.0, 0.25])
def test_straightness_of_a_linear_flow_has_its_closed_form(t0: float) -> None:
    a, x1 = 1.3, torch.randn(6, 3)
    flow = fs.Flow(fs.Normal(3), fs.ODE(lambda t, x: a * x), TIGHT, t0=t0)
    span, squared = 1.0 - t0, x1.square().sum(1)
    shrink = math.exp(-a * span)
    energy = 0.5 * a * (1.0 - shrink**2) / span
    wanted = squared * (energy - (1.0 - shrink) ** 2 / span**2)
    assert torch.allclose(straightness(flow, x1), wanted, rtol=1e-8)


def test_straightness_is_an_integral() -> None:
    """Of |mean velocity - v|^2 along the path, by the midpoint rule; images too."""

    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x.flip(1)) * torch.cos(3.0 * t) - 0.5 * x

    flow, x1 = fs.Flow(fs.Normal((2, 3)), fs.ODE(field), TIGHT), torch.randn(4, 2, 3)
    middle = (torch.arange(400) + 0.5) / 400
    path = TIGHT.solve(flow.dynamics, x1, 1.0, 0.0, save_at=middle.flip(0))
    mean = x1 - path.y1
    terms = [
        (mean - field(t, x)).flatten(1).square().sum(1)
        for t, x in zip(path.ts, path.ys, strict=True)
    ]
    assert torch.allclose(straightness(flow, x1), torch.stack(terms).mean(0), rtol=1e-4)


def test_a_condition_for_all_is_one_for_each() -> None:
    ode = fs.ODE(lambda t, x, c: c * x, batched_time=True)
    flow, x1 = fs.Flow(fs.Normal(2), ode), torch.randn(5, 2)
    one, each = torch.full((1, 1), 0.5), torch.full((5, 1), 0.5)
    assert torch.equal(straightness(flow, x1, one), straightness(flow, x1, each))
    pairs = [reflow(flow, 5, c, generator=generator()) for c in (one, each)]
    assert torch.equal(pairs[0][0], pairs[1][0])
    ode = fs.ODE(lambda t, x, w: -x * w.sum(), batched_time=True)
    rates = torch.tensor([0.2, 0.3])  # of the dynamics, not of its samples
    found = straightness(fs.Flow(fs.Normal(2), ode), torch.ones(4, 2), rates)
    whole = straightness(fs.Flow(fs.Normal(2), ode), torch.ones(4, 2), torch.tensor([0.5]))
    torch.testing.assert_close(found, whole)


def test_straight_paths_have_no_bend() -> None:
    flow = fs.Flow(fs.Normal(2), fs.ODE(lambda t, x: torch.full_like(x, 0.4)), TIGHT)
    assert float(straightness(flow, torch.randn(5, 2)).abs().max()) < 1e-12


@pytest.mark.parametrize("pack", [lambda c: {"c": c}, lambda c: (c,)], ids=["dict", "tuple"])
def test_conditions_within_trees_are_seen_by_couplings(pack: Any) -> None:
    ode = fs.ODE(lambda t, x, c: 0.0 * x, batched_time=True)
    objective = FlowMatching(ode, coupling=OptimalTransport())
    with pytest.raises(TypeError, match="condition_weight"):
        objective(torch.randn(16, 2), pack(torch.zeros(16)), generator=generator())


@pytest.mark.parametrize("source", [[[0.0, 0.0]], 3, torch.distributions.Normal(0.0, 1.0)])
def test_a_source_of_another_kind_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="Componentwise"):
        FlowMatching(fs.ODE(lambda t, y: -y, batched_time=True), source=source)
