"""Programs of torchdiffeq's, torchsde's, diffrax's and diffusers' users, as they stand: each of
these once went wrong, was refused, or was told the wrong cause.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import flowsde as fs
from flowsde import integrators, objectives, training
from flowsde.integrators import (
    DDIM,
    DEIS,
    RK4,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialAdams,
    ImplicitRK,
    UniPC,
)
from flowsde.interop import as_scheduler
from flowsde.paths import VP, uniform_lambda

from .systems import catalogue, generator

GIVEN: dict[str, Any] = {"integrator": RK4(), "stepping": fs.Fixed(steps=3)}


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = spectral_norm(nn.Linear(3, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


@pytest.mark.parametrize(
    "adjoint", [fs.Checkpointed(), fs.Checkpointed(1), fs.Backsolve()], ids=str
)
def test_buffers_that_a_field_writes_to_are_told(adjoint: fs.Adjoint) -> None:
    """The power iteration moves with every call, so that no step can be taken again."""
    field, y0 = Spectral(), torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"writes to its buffer .*_u .* call eval\(\)"):
        fs.solve(fs.ODE(field), y0, adjoint=adjoint, **GIVEN)
    field.eval()
    fs.solve(fs.ODE(field), y0, adjoint=adjoint, **GIVEN).y1.sum().backward()
    found = [p.grad for p in field.parameters()]
    other = copy.deepcopy(field)
    other.zero_grad()
    fs.solve(fs.ODE(other), y0, **GIVEN).y1.sum().backward()
    if not isinstance(adjoint, fs.Backsolve):
        assert all(torch.equal(a, p.grad) for a, p in zip(found, other.parameters(), strict=True))


class Traced(nn.Module):
    """FFJORD's field, which asks for derivatives by its time too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        with torch.enable_grad():
            z.requires_grad_(True)
            t.requires_grad_(True)
            dz = torch.tanh(self.net(torch.cat((z, t.expand(len(z), 1)), 1)))
            parts = (
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in (0, 1)
            )
            return dz, -sum(parts)[:, None]  # type: ignore[index]


def test_a_field_may_ask_for_derivatives_by_its_time() -> None:
    field, found = Traced(), []
    for adjoint in (fs.Direct(), fs.Backsolve()):
        field.zero_grad()
        start = torch.randn(5, 2, generator=generator()), torch.zeros(5, 1)
        sol = fs.solve(fs.ODE(field), start, adjoint=adjoint, stepping=fs.Adaptive(1e-10, 1e-10))
        (sol.y1[0].square().sum() + sol.y1[1].sum()).backward()
        found.append([p.grad.clone() for p in field.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


class Member(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.net, self.more = nn.Linear(2, 2), more

    def forward(self, y: Tensor) -> Tensor:
        return fs.solve(fs.ODE(_Field(self.net)), y, **self.more).y1


class _Field(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


def test_ensembles_by_vmap() -> None:
    """Over parameters: by given steps they are those of each; else the cure is named."""
    y = torch.randn(4, 2)

    def run(**more: Any) -> tuple[Tensor, list[Member]]:
        members = [Member(**more) for _ in range(3)]
        parameters, _ = torch.func.stack_module_state(members)  # type: ignore[arg-type]
        base = copy.deepcopy(members[0])
        call = lambda p: torch.func.functional_call(base, p, (y,))
        return torch.func.vmap(call)(parameters), members

    ends, members = run(**GIVEN)
    assert torch.allclose(ends, torch.stack([m(y) for m in members]))
    with pytest.raises(TypeError, match="vmap cannot choose steps"):
        run()
    with pytest.raises(TypeError, match="neither events nor ends"):
        run(**GIVEN, events=fs.Event(lambda t, y: y.sum()))
    with pytest.raises(TypeError, match="neither events nor ends"):
        torch.func.vmap(lambda t: fs.solve(fs.ODE(_Field(nn.Tanh())), y, 0.0, t, **GIVEN).y1)(
            torch.ones(3)
        )


@dataclass
class Unknown:
    a: Tensor


def test_the_cause_is_named() -> None:
    ode, y = fs.ODE(_Field(nn.Tanh())), torch.ones(100, 2)
    with pytest.raises(TypeError, match="register_dataclass"):
        fs.solve(ode, Unknown(y))
    with pytest.raises(ValueError, match=r"t1\[0\], for a time that the batch shares"):
        fs.solve(ode, y, 0.0, torch.ones(1))
    with pytest.raises(ValueError, match="With an event, a late time will do"):
        fs.solve(ode, y, 0.0, torch.inf, events=fs.Event(lambda t, y: y.sum()))


@pytest.mark.parametrize(
    "method", [m for m in catalogue(integrators, ImplicitRK) if m.error_order], ids=str
)
def test_implicit_methods_and_jumps(method: Any) -> None:
    """Those that look beyond a step's end are refused; the others are exact on both sides."""
    ode = fs.ODE(lambda t, y: torch.where(t < 0.5, 1.0, 100.0) + 0.0 * y)
    stepping = fs.Adaptive(0.1, 1e3, jump_at=[0.5], dt0=1.0)
    if max(method.tableau.c) > 1.0:
        with pytest.raises(TypeError, match=r"beyond a jump: use Kvaerno3\(\)"):
            fs.solve(ode, torch.zeros(1), integrator=method, stepping=stepping)
    elif method.tableau.explicit is None:
        sol = fs.solve(ode, torch.zeros(1), integrator=method, stepping=stepping)
        assert float(sol.y1) == pytest.approx(50.5, rel=1e-12)
    else:
        parts = fs.ODE(lambda t, y: 0.0 * y, implicit=ode.f)
        sol = fs.solve(parts, torch.zeros(1), integrator=method, stepping=stepping)
        assert float(sol.y1) == pytest.approx(50.5, rel=1e-12)


def test_a_budget_below_one_step_is_no_cliff() -> None:
    """States that are small beside a step are kept all the same."""
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    spent = []
    for steps in (50, 100):
        sol = fs.solve(
            fs.ODE(lambda t, y: net(y)), torch.randn(32, 2), integrator=RK4(),
            stepping=fs.Fixed(steps=steps), adjoint=fs.Checkpointed(1 << 12),
        )  # fmt: skip
        sol.y1.sum().backward()
        spent.append(sol.stats.backward_evaluations)
    assert spent[1] < 3 * spent[0]
    assert spent[1] < 16 * 4 * 100


@pytest.mark.parametrize("more", [{}, GIVEN], ids=["chosen", "given"])
def test_ends_without_noise_are_named(more: dict[str, Any]) -> None:
    flow, x = fs.LinearSDE(VP()).probability_flow(lambda t, x: 0.3 * x), torch.randn(4, 2)
    for run in (
        lambda: fs.solve(flow, x, 1.0, 0.0, **more),
        lambda: fs.Flow(fs.Normal(2), flow, fs.Solver(**more)).log_prob(x),
    ):
        with pytest.raises(fs.SolveError, match=r"no noise at t = 0, .* use DDIM\(\)"):
            run()
    assert fs.solve(flow, x, 1.0, 0.0, integrator=DDIM(), stepping=GIVEN["stepping"]).success


# --- graphs ---------------------------------------------------------------------------------------


class Energy(nn.Module):
    """A Hamiltonian's, by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(self.net(y)).sum(), y, create_graph=True)
        return torch.stack((slope[:, 1], -slope[:, 0]), 1)


@pytest.mark.parametrize("more", [{}, GIVEN, {"save_at": [0.5]}], ids=["chosen", "given", "saved"])
def test_graphs_of_fields_that_differentiate_are_refused(more: dict[str, Any]) -> None:
    ode, y0 = fs.ODE(Energy()), torch.randn(3, 2)
    executor = fs.Compiled("eager")
    with pytest.raises(TypeError, match=r"write torch.func.grad in it, or use executor=Eager\(\)"):
        fs.solve(ode, y0, executor=executor, **more)
    flow = fs.Flow(fs.Normal(2), fs.ODE(_Field(nn.Tanh())), fs.Solver(executor=executor, **GIVEN))
    assert bool(flow.log_prob(y0).isfinite().all())  # the library's own derivatives are none


@pytest.mark.parametrize(
    "method",
    [DPMSolverPP(), DPMSolverPP(order=3), DEIS(), UniPC(), ExponentialAdams(), DDIM()],
    ids=str,
)
@torch.no_grad()
def test_samplers_with_a_history_are_graphs(method: fs.Integrator) -> None:
    """Of which another grid takes no other."""
    net = nn.Linear(3, 3)
    flow, x = fs.LinearSDE(VP()).probability_flow(lambda t, x: net(x)), torch.randn(8, 3)
    frames = torch._dynamo.testing.CompileCounter()
    executor, made = fs.Compiled(frames), []
    for steps in (10, 14):
        grid = fs.Grid(uniform_lambda(VP(), 1.0, 0.01, steps))
        run = lambda how: fs.solve(
            flow, x, 1.0, 0.01, integrator=method, stepping=grid, executor=how
        )
        ours, theirs = run(executor), run(fs.Eager())
        assert torch.allclose(ours.y1, theirs.y1, rtol=1e-12, atol=1e-12)
        assert ours.stats.evaluations == theirs.stats.evaluations
        made.append(frames.frame_count)
    assert 0 < made[0] <= made[1] <= made[0] + isinstance(method, UniPC)


@torch.no_grad()
def test_a_number_for_the_noise_breaks_no_graph() -> None:
    sde = fs.SDE(_Field(nn.Tanh()), lambda t, y: 0.1 + t, noise="diagonal", additive=True)
    torch._dynamo.utils.counters.clear()
    more: dict[str, Any] = {"integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=20)}
    ends = [
        fs.solve(sde, torch.ones(4, 3), path=fs.Brownian(0), executor=how, **more).y1
        for how in (fs.Compiled("eager"), fs.Eager())
    ]
    assert torch.allclose(*ends)
    assert not torch._dynamo.utils.counters["graph_break"]


# --- beside torchsde, accelerate and diffusers ----------------------------------------------------


def test_a_path_from_outside_ends_where_it_ends() -> None:
    torchsde = pytest.importorskip("torchsde")
    path = torchsde.BrownianInterval(0.0, 1.0, size=(4, 1), dtype=torch.float64, entropy=1)
    sde = fs.SDE(lambda t, y: 0.0 * y, lambda t, y: 1.0 + 0.0 * y, noise="diagonal")
    more: dict[str, Any] = {"integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=4)}
    y0 = torch.zeros(4, 1, device="cpu")
    assert fs.solve(sde, y0, 0.0, 1.0, path=path, **more).success
    assert fs.solve(sde, y0, 1.0, 0.0, path=path, **more).success
    with pytest.raises(ValueError, match="make one of the whole span"):
        fs.solve(sde, y0, 0.0, 2.0, path=path, **more)


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


@pytest.mark.parametrize("whole", [True, False])
def test_parameters_that_are_not_trained_are_told(whole: bool) -> None:
    """A method brings no parameters of its module."""
    accelerate = pytest.importorskip("accelerate")
    methods = Methods()
    base = fs.Componentwise(
        torch.distributions.Normal, loc=nn.Parameter(torch.zeros(2)), scale=torch.ones(2)
    )
    field = _Field(methods.net) if whole else methods.drift
    objective = objectives.MaximumLikelihood(fs.Flow(base, fs.ODE(field), fs.Solver(**GIVEN)))
    more: dict[str, Any] = {"steps": 2, "batch_size": 4, "seed": 0, "progress": False}
    run = lambda: training.fit(
        objective, torch.randn(8, 2), accelerator=accelerate.Accelerator(cpu=True), **more
    )
    if whole:
        run()
    else:
        with pytest.warns(UserWarning, match="2 parameters that its objective does not hold"):
            run()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_schedulers_tell_the_x0_they_found(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(prediction_type=kind)
    ours = as_scheduler(DDIM(), theirs)
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    x, output = torch.randn(2, 2, 1, 4, 4, device="cpu")
    t = ours.timesteps[0]
    found = ours.step(output, t, x, use_clipped_model_output=True).pred_original_sample
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.allclose(found, theirs.step(output, t, x).pred_original_sample, atol=1e-6)
