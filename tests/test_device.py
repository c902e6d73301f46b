"""What holds on the CPU holds on another device, whose solves give what lies there.

Where ``FLOWSDE_TEST_DEVICE`` names none, it is the device of ``tests.far``, in a process of its
own: torch's default device stays the CPU, as a user's does who moves a model and its data.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import accuracy, fitting, integrators, models, objectives, paths
from flowsde.integrators import (
    DDIM,
    RK4,
    SEEDS,
    SRIW1,
    DPMSolverPP,
    DriftImplicitEuler,
    EulerMaruyama,
    Heun,
    ImplicitRK,
    Integrator,
    Iterate,
    StepDoubling,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from flowsde.integrators.engines import Engine

from .systems import DEVICE, Mixture, catalogue, suited
from .systems import generator as draws

Y = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
Case = Callable[[torch.device, Callable[[int], torch.Generator]], Any]


class Net(nn.Module):
    """tanh(W y) t u."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        w = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64)
        self.w = nn.Parameter(w.to(device))

    def forward(self, t: Tensor, y: Tensor, u: Tensor | float = 1.0) -> Tensor:
        return torch.tanh(y @ self.w) * t[..., None] * u


def law(device: torch.device) -> Mixture:
    made = Mixture.two()
    return Mixture(made.weights.double().to(device), made.means.double().to(device), made.std)


def steps(method: Integrator, device: torch.device, make: Any) -> Any:
    net = Net(device)
    dynamics, y0 = suited(method, net, Y.to(device))
    stepping: fs.Stepping = fs.Fixed(steps=5)
    if isinstance(method, Engine):
        stepping = fs.Fixed(dt=0.1) if isinstance(method, TorchSDE) else fs.Adaptive()
    path = fs.Brownian(3) if dynamics.noise is not None else None
    with torch.set_grad_enabled(not isinstance(method, Engine)):
        sol = fs.solve(
            dynamics, y0, 0.0, 1.0, integrator=method, stepping=stepping, path=path,
            save_at=None if isinstance(method, Engine) else [0.3, 1.0],
        )  # fmt: skip
        kept = torch.utils._pytree.tree_leaves((sol.ys, sol.y1))
        loss = sum(x.square().sum() for x in kept if x is not None)
    given = isinstance(loss, Tensor) and loss.requires_grad
    return sol.ts, sol.ys, sol.y1, torch.autograd.grad(loss, net.w) if given else ()


def gradients(adjoint: fs.Adjoint, own: bool, device: torch.device, make: Any) -> Any:
    net, y0 = Net(device), Y.to(device).requires_grad_()
    u = torch.tensor([2.0, 1.0], dtype=torch.float64, device=device, requires_grad=True)
    sol = fs.solve(
        fs.ODE(net, batched_time=True), y0, 0.0, 1.0, args=(u,), adjoint=adjoint,
        stepping=fs.Adaptive(per_sample=own, step_at=[0.5]), save_at=[0.2, 0.7], dense=own,
    )  # fmt: skip
    loss = sol.ys.square().sum() + sol.y1.sum()
    between = sol(torch.tensor([0.1, 0.2, 0.3])) if own else ()
    return sol.ts, sol.ys, between, torch.autograd.grad(loss, [y0, u, net.w])


def moving(method: Integrator, device: torch.device, make: Any) -> Any:
    """Times that are differentiated lie there, those beside them on the host."""
    found = []
    stepping = fs.Fixed(steps=4) if isinstance(method, RK4) else fs.Adaptive()
    kinds: list[Any] = [None, fs.Steps(), [0.3, 0.6], torch.tensor([0.3, 0.6], device=device)]
    for save_at in kinds[: 1 if isinstance(method, Engine) else 4]:
        for n in (0, 1):
            ends: list[Any] = [0.0, 1.0]
            ends[n] = torch.tensor(ends[n], dtype=torch.float64, device=device, requires_grad=True)
            sol = fs.solve(
                fs.ODE(Net(device)), Y.to(device), *ends, integrator=method, stepping=stepping,
                save_at=save_at,
            )  # fmt: skip
            found.append((sol.ts, sol.ys, torch.autograd.grad(sol.y1.sum(), ends[n])))
    return found


def falls(own: bool, device: torch.device, make: Any) -> Any:
    """A ball that bounces; its turns are events too."""

    def height(t: Tensor, y: Tensor) -> Tensor:
        return y[..., 0] if own else y[0, 0]

    def speed(t: Tensor, y: Tensor) -> Tensor:
        return y[..., 1] if own else y[0, 1]

    y0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device, requires_grad=True)
    fall = fs.ODE(
        lambda t, y: torch.stack((y[..., 1], torch.full_like(y[..., 0], -9.81)), -1),
        batched_time=True,
    )
    sol = fs.solve(
        fall, y0, 0.0, 1.5, stepping=fs.Adaptive(per_sample=own), save_at=fs.Steps(),
        events=[
            fs.Event(height, direction=-1, update=lambda t, y: torch.stack((y[:, 0], -y[:, 1]), 1)),
            fs.Event(speed, direction=-1, terminal=False),
        ],
    )  # fmt: skip
    assert sol.events is not None
    gradient = torch.autograd.grad(sol.events.ts[0].sum(), y0)
    return sol.ts, sol.events.ts, sol.events.ys, gradient


def noise(path: Any, own: bool, device: torch.device, make: Any) -> Any:
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.3 + 0.1 * y, noise="diagonal", batched_time=True)
    method: Integrator = SRIW1() if own else EulerMaruyama()
    stepping = fs.Adaptive(0.1, 0.1, per_sample=True) if own else fs.Fixed(steps=5)
    if path is None:
        return fs.solve(
            sde, Y.to(device), 0.0, 1.0, integrator=StepDoubling(method) if own else method,
            stepping=stepping, generator=make(0),
        ).y1  # fmt: skip
    return fs.solve(sde, Y.to(device), 0.0, 1.0, integrator=method, stepping=stepping, path=path).y1


def flows(build: Callable[[torch.Generator], fs.Dynamics], device: torch.device, make: Any) -> Any:
    torch.manual_seed(0)
    dynamics = build(torch.Generator().manual_seed(0))
    flow = fs.Flow(fs.Normal(4), dynamics).double().to(device)
    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4).to(device)
    loss = objectives.MaximumLikelihood(flow)(x, generator=make(0))
    slopes = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    return flow.log_prob(x), flow.sample_and_log_prob((2,), seed=0), slopes


def samples(schedule: fs.Schedule, start: float, device: torch.device, make: Any) -> Any:
    denoiser = law(device).denoiser(schedule)
    process = fs.LinearSDE(schedule)
    x = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64).reshape(4, 2).to(device)
    grid = paths.uniform_lambda(schedule, start, 0.1, 5)
    run = partial(fs.solve, y0=x, t0=start, t1=0.1)
    flow, reverse = process.probability_flow(denoiser), process.reverse_sde(denoiser, 1.0)
    found = [
        run(flow, integrator=method, stepping=fs.Grid(at)).y1
        for method in (DDIM(), DPMSolverPP(), Heun()) for at in (grid, grid.to(device))
    ] + [
        run(reverse, integrator=method, stepping=fs.Grid(grid), path=fs.Brownian(2)).y1
        for method in (SEEDS(), EulerMaruyama())
    ]  # fmt: skip
    return found


def fitted(device: torch.device, make: Any) -> Any:
    flow = fs.LinearSDE(paths.VP()).probability_flow(law(device).denoiser(paths.VP()))
    x, fine = Y.to(device), fs.Solver(RK4(), fs.Fixed(steps=10))
    grid = fs.Grid(paths.uniform_lambda(paths.VP(), 1.0, 0.1, 3).to(device))
    solver = fitting.distill_solver(
        flow, [fs.Solver(DPMSolverPP(), grid)], x, fine=fine, iterations=2
    )
    sol = fs.solve(flow, x, 1.0, 0.1, integrator=solver, stepping=solver.grid)
    return sol.y1, accuracy.solve_with_error(
        flow, x, 0.9, 0.1, integrator=DPMSolverPP(), stepping=fs.Fixed(steps=4)
    )[1]


def controlled(rule: Callable[..., fs.Path], device: torch.device, make: Any) -> Any:
    """Times on the host, values there."""
    torch.manual_seed(0)
    x = torch.sin(torch.linspace(0.0, 3.0, 24, dtype=torch.float64)).reshape(3, 4, 2)
    path = rule(torch.linspace(0.0, 1.0, 4, dtype=torch.float64), x.to(device))
    channels = path.derivative(torch.tensor(0.5, dtype=torch.float64)).shape[-1]
    model = models.NeuralCDE(channels, 2, hidden=4, width=8, depth=1)
    return model.double().to(device)(path)


CASES: dict[str, Case] = {
    **{f"steps of {m}": partial(steps, m) for m in catalogue(integrators, Integrator)
       if not isinstance(m, Iterate) and m != TorchSDE()},
    **{f"{adjoint}, per sample {own}": partial(gradients, adjoint, own)
       for adjoint in (fs.Direct(), fs.Checkpointed(), fs.Checkpointed(budget=2), fs.Backsolve())
       for own in (False, True) if not (own and isinstance(adjoint, fs.Backsolve))},
    **{f"moving times of {m}": partial(moving, m) for m in (Tsit5(), RK4(), TorchDiffEq())},
    **{f"events, per sample {own}": partial(falls, own) for own in (False, True)},
    "noise of one seed": partial(noise, fs.Brownian(1), False),
    "noise of seeds": partial(noise, fs.Brownian(torch.tensor([1, 2, 3])), False),
    "noise of a tree": partial(noise, fs.BrownianTree(1, 0.0, 1.0), True),
    "noise of a generator": partial(noise, None, False),
    **{f"flow of {name}": partial(flows, build) for name, build in {
        "nice": lambda g: models.nice(4, 2, 8, generator=g),
        "realnvp": lambda g: models.realnvp(4, 2, 8, generator=g),
        "nsf": lambda g: models.nsf(4, 2, 8, generator=g),
        "maf": lambda g: models.maf(4, 2, 8),
        "cnf": lambda g: models.cnf(4),
    }.items()},
    **{f"samples of {s}": partial(samples, s, start) for s, start in (
        (paths.VP(), 0.9), (paths.EDM(20.0), 10.0), (paths.FlowMatching(), 0.9),
        (paths.Discrete.linear(), 0.9),
    )},
    "fitted": fitted,
    **{f"control by {rule.__name__}": partial(controlled, rule) for rule in (
        paths.Linear, paths.NaturalCubic, paths.HermiteCubic, paths.Monotone, paths.Rectilinear,
    )},
}  # fmt: skip


METHODS = [
    m for m in catalogue(integrators, Integrator)
    if not isinstance(m, (Engine, Iterate, ImplicitRK, DriftImplicitEuler))
]  # fmt: skip


@torch.no_grad()
def crosses(method: Integrator, device: torch.device, count: Counter[str]) -> str:
    """What is copied or read in more steps and not in fewer; empty where nothing is."""
    found = []
    for steps in (8, 24):
        dynamics, y0 = suited(method, Net(device), Y.to(device))
        path = fs.Brownian(1) if dynamics.noise is not None else None
        count.clear()
        fs.solve(
            dynamics, y0, 0.0, 1.0, integrator=method, stepping=fs.Fixed(steps=steps), path=path
        )
        found.append(Counter(count))
    more = found[1] - found[0]
    return f"{dict(more)} in 16 steps more" if more else ""


def differs(case: Case, device: torch.device, make: Callable[[int], torch.Generator]) -> str:
    """How the case comes out otherwise there; empty where it does not."""
    tree = torch.utils._pytree.tree_leaves
    near = tree(case(torch.device("cpu"), torch.Generator().manual_seed))
    there = tree(case(device, make))
    for x, y in zip(near, there, strict=True):
        if isinstance(x, Tensor):
            if y.device.type != device.type:
                return f"{tuple(y.shape)} came back on {y.device}"
            gap = float((x - y.cpu()).detach().abs().nan_to_num().amax()) if x.numel() else 0.0
            if not gap < 1e-6:
                return f"{gap} between {x} and {y}"
    return ""


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    if DEVICE.type != "cpu":
        return {}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_device"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", CASES)
def test_it_holds_there(name: str, reports: dict[str, str]) -> None:
    told = reports[name] if reports else differs(CASES[name], DEVICE, draws)
    assert not told


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_given_steps_wait_for_nothing(method: Integrator, reports: dict[str, str]) -> None:
    if not reports:
        pytest.skip("what crosses over is counted on the device of tests.far")
    assert not reports[f"crossings of {method}"]


def main() -> None:
    """Prints how each case comes out on the device of ``tests.far``."""
    from .far import CROSSINGS, FAR, generator

    torch.set_default_dtype(torch.float64)
    reports = {}
    for name, case in CASES.items():
        try:
            reports[name] = differs(case, FAR, generator)
        except Exception as error:  # told by the test of its name
            reports[name] = f"{type(error).__name__}: {error}"
    for method in METHODS:
        reports[f"crossings of {method}"] = crosses(method, FAR, CROSSINGS)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
