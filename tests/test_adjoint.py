"""Gradients are those of the accepted grid, in both modes, whatever the direction of time."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

import flowsde as fs
from flowsde import _tape, integrators
from flowsde._state import leaves
from flowsde.integrators import (
    RK4,
    Dopri5,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    ImplicitRK,
    Integrator,
    Iterate,
    Tsit5,
)  # fmt: skip
from flowsde.integrators.base import Engine
from flowsde.models import realnvp

from .systems import catalogue, suited


class Net(nn.Module):
    """A field with a weight used twice, a frozen one, a buffer and one used only late."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(dim, dim))
        self.b = nn.Parameter(torch.randn(dim))
        self.late = nn.Parameter(torch.randn(dim))
        self.frozen = nn.Parameter(torch.randn(dim), requires_grad=False)
        self.register_buffer("shift", torch.randn(dim))

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        column = t[..., None]
        h = torch.tanh(y @ self.w + self.b + self.shift) @ self.w.T + self.frozen * column.cos()
        h = h + torch.where(column > 0.5, column, 0.0) * self.late
        for arg in args:
            h = h + arg * y.cos()
        return h - 0.3 * y


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def measure(sol: fs.Solution) -> Tensor:
    loss = (sol.y1 * torch.arange(1.0, 1.0 + sol.y1.shape[-1])).sum()
    return loss if sol.ys is None else loss + sol.ys.square().sum()


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        x, y = x.detach(), y.detach()
        assert float((x - y).abs().max()) <= tolerance * (1.0 + float(y.abs().max()))


STEPPINGS = [
    fs.Fixed(steps=23), fs.Adaptive(1e-5, 1e-6), fs.Adaptive(1e-5, 1e-6, per_sample=True),
    fs.Grid(torch.linspace(0.0, 1.3, 9, device="cpu").double() ** 2 / 1.3),
]  # fmt: skip


@pytest.mark.parametrize("stepping", STEPPINGS, ids=lambda s: f"{type(s).__name__}")
@pytest.mark.parametrize("budget", [1, 9_000, 40_000, None])
def test_checkpointed_equals_direct(stepping: fs.Stepping, budget: int | None) -> None:
    net, y0, u = Net(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    inputs = [y0, u, net.w, net.b, net.late]
    found = []
    for adjoint in (fs.Direct(), fs.Checkpointed(budget)):
        sol = fs.solve(
            fs.ODE(net, batched_time=True), y0, 0.0, 1.3, args=(u,), integrator=Dopri5(),
            stepping=stepping, adjoint=adjoint, save_at=[0.1, 0.77, 1.3],
        )  # fmt: skip
        found.append(gradients(measure(sol), inputs))
    assert_same(found[1], found[0], 1e-13)


@pytest.mark.parametrize(
    "method",
    [m for m in catalogue(integrators, Integrator) if not isinstance(m, (Iterate, Engine))],
    ids=str,
)
@pytest.mark.parametrize("backward", [False, True])
def test_every_integrator_differentiates(method: Integrator, backward: bool) -> None:
    """Direct and Checkpointed agree, and meet central differences, with noise held."""
    net, y0 = Net(), torch.randn(2, 3)
    times = (1.0, 0.2) if backward else (0.2, 1.0)
    dynamics, _ = suited(method, net, y0)
    path = fs.Brownian(0) if dynamics.noise is not None else None
    steps = 3 if isinstance(method, ImplicitRK) else 7  # a multistep method has its start behind it

    def solve(y: Tensor, adjoint: fs.Adjoint) -> Tensor:
        start = suited(method, net, y)[1]
        y1 = fs.solve(
            dynamics, start, *times, integrator=method, stepping=fs.Fixed(steps),
            adjoint=adjoint, path=path,
        ).y1  # fmt: skip
        scale = torch.arange(1.0, 1.0 + y.shape[-1])
        return sum((leaf * scale).sum() for leaf in torch.utils._pytree.tree_leaves(y1))

    inputs = [y0.requires_grad_(), net.w]
    direct = gradients(solve(y0, fs.Direct()), inputs)
    assert_same(gradients(solve(y0, fs.Checkpointed(1)), inputs), direct, 1e-13)
    with torch.no_grad():
        for x, g in zip(inputs, direct, strict=True):
            way = torch.randn_like(x)
            values = []
            for sign in (1, -1):
                x.add_(way, alpha=sign * 1e-6)
                values.append(float(solve(y0, fs.Direct())))
                x.add_(way, alpha=-sign * 1e-6)
            slope = (values[0] - values[1]) / 2e-6
            assert slope == pytest.approx(float((g * way).sum()), rel=1e-6, abs=1e-7)


@given(
    seed=st.integers(0, 10_000), batch=st.integers(1, 4), t0=st.floats(-1.0, 1.0),
    length=st.floats(0.2, 1.5), backward=st.booleans(), checkpointed=st.booleans(),
)  # fmt: skip
def test_adaptive_gradients_are_those_of_the_accepted_grid(
    seed: int, batch: int, t0: float, length: float, backward: bool, checkpointed: bool
) -> None:
    """Finite differences on the grid that the adaptive solve accepted."""
    torch.manual_seed(seed)
    net, y0 = Net(), torch.randn(batch, 3, requires_grad=True)
    t1 = t0 - length if backward else t0 + length
    adjoint = fs.Checkpointed(1) if checkpointed else fs.Direct()
    sol = fs.solve(
        fs.ODE(net), y0, t0, t1, integrator=Tsit5(), stepping=fs.Adaptive(1e-4, 1e-4),
        adjoint=adjoint, save_at=fs.Steps(),
    )  # fmt: skip
    (g,) = gradients(measure(fs.Solution(sol.y1, 0.0, None, None, sol.stats, sol.status)), [y0])
    assert sol.ts is not None
    grid = fs.Grid(sol.ts.unique_consecutive())

    def again(y: Tensor) -> float:
        return float(measure(fs.solve(
            fs.ODE(net), y, t0, t1, integrator=Tsit5(), stepping=grid)).detach())  # fmt: skip

    way = torch.randn_like(y0)
    slope = (again(y0 + 1e-6 * way) - again(y0 - 1e-6 * way)) / 2e-6
    assert slope == pytest.approx(float((g * way).sum()), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
@pytest.mark.parametrize(
    "stepping", [fs.Fixed(steps=9), fs.Adaptive(1e-9, 1e-9)], ids=lambda s: type(s).__name__
)
def test_times_differentiate(adjoint: fs.Adjoint, stepping: fs.Stepping) -> None:
    """dy1/dt1 = f(t1, y1); dy1/dt0 = -(dy1/dy0) f(t0, y0); a saved state moves with its time."""
    net, y0 = Net(), torch.randn(2, 3, requires_grad=True)
    t0, t1 = torch.tensor(0.6, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    at = torch.tensor([0.8, 1.1], requires_grad=True)
    sol = fs.solve(
        fs.ODE(net), y0, t0, t1, integrator=Dopri5(), stepping=stepping, adjoint=adjoint,
        save_at=at,
    )  # fmt: skip
    loose = 1e-3 if isinstance(stepping, fs.Fixed) else 1e-6
    g0, g1, gy = torch.autograd.grad(sol.y1.sum(), [t0, t1, y0], retain_graph=True)
    (ga,) = torch.autograd.grad(sol.ys[1].sum(), [at], retain_graph=True)
    with torch.no_grad():
        first, last = float((gy * net(t0, y0)).sum()), float(net(t1, sol.y1).sum())
        moved = float(net(at[1], sol.ys[1]).sum())
    assert float(g1) == pytest.approx(last, rel=loose, abs=loose)
    assert float(g0) == pytest.approx(-first, rel=loose, abs=loose)
    assert float(ga[1]) == pytest.approx(moved, rel=20 * loose, abs=20 * loose)
    assert float(ga[0]) == 0.0


def test_a_grid_can_be_learned() -> None:
    net, y0 = Net(), torch.randn(2, 3)
    grid = torch.tensor([0.0, 0.2, 0.7, 1.0], requires_grad=True)

    def loss(g: Tensor) -> Tensor:
        return fs.solve(fs.ODE(net), y0, integrator=RK4(), stepping=fs.Grid(g)).y1.sum()

    (g,) = torch.autograd.grad(loss(grid), [grid])
    way = torch.tensor([0.0, 1e-6, -2e-6, 0.0])
    with torch.no_grad():
        slope = float(loss(grid + way) - loss(grid - way)) / 2
    assert slope == pytest.approx(float((g * way).sum()), rel=1e-5)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
def test_ends_that_are_told_twice_count_once(adjoint: fs.Adjoint) -> None:
    """Times that are the grid, the ends and the saved times of a solve at once."""
    net, y0 = Net(), torch.randn(2, 3)

    def loss(t: Tensor) -> Tensor:
        return fs.solve(
            fs.ODE(net), y0, t[0], t[-1], integrator=RK4(), stepping=fs.Grid(t), save_at=t,
            adjoint=adjoint,
        ).ys.square().sum()  # fmt: skip

    assert gradcheck(loss, [torch.tensor([0.0, 0.2, 0.7, 1.0], requires_grad=True)], atol=1e-6)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed(1)], ids=str)
def test_second_derivatives(adjoint: fs.Adjoint) -> None:
    net, y0 = Net(), torch.randn(2, 3, requires_grad=True)

    def slope(y: Tensor) -> Tensor:
        y1 = fs.solve(
            fs.ODE(net), y, integrator=RK4(), stepping=fs.Fixed(steps=5), adjoint=adjoint
        ).y1
        (g,) = torch.autograd.grad(y1.square().sum(), [y], create_graph=True)
        return g

    way = torch.randn_like(y0)
    (hv,) = torch.autograd.grad((slope(y0) * way).sum(), [y0])
    step = 1e-5 * way
    near = [(y0 + s).detach().requires_grad_() for s in (step, -step)]
    numeric = (slope(near[0]) - slope(near[1])).detach() / 2e-5
    assert_same([hv], [numeric], 1e-6)


def test_closures_and_encoders_keep_their_gradients() -> None:
    """A context made outside of the field, and a likelihood with its own inner gradient."""
    net, encoder, x = Net(), nn.Linear(3, 3), torch.randn(2, 3)
    found = []
    for adjoint in (fs.Direct(), fs.Checkpointed(1)):
        context = encoder(x)
        dynamics = fs.log_density(fs.ODE(lambda t, y, c=context: net(t, y) + c * y.sin()))
        sol = fs.solve(
            dynamics, (x, torch.zeros(2)), integrator=RK4(), stepping=fs.Fixed(steps=8),
            adjoint=adjoint,
        )  # fmt: skip
        loss = sol.y1[0].sum() + sol.y1[1].square().sum()
        found.append(gradients(loss, [*encoder.parameters(), net.w, net.b]))
    assert_same(found[1], found[0], 1e-12)


def test_checkpointed_on_maps_sdes_and_samplers() -> None:
    stack = realnvp(4, 6, 8, generator=torch.Generator("cpu").manual_seed(0))
    for p in stack.parameters():
        nn.init.normal_(p, std=0.3)
    net = Net(4)
    sde = fs.LinearSDE(fs.paths.VP())
    cases: list[tuple[fs.Dynamics, dict[str, Any], nn.Module]] = [
        (stack, {}, stack),
        (sde.reverse_sde(net), {"integrator": EulerMaruyama(), "stepping": fs.Fixed(steps=9),
                                "path": fs.Brownian(1)}, net),
        (sde.probability_flow(net), {"integrator": DPMSolverPP(),
                                     "stepping": fs.Fixed(steps=9)}, net),
    ]  # fmt: skip
    x = torch.randn(3, 4, requires_grad=True)
    for dynamics, keywords, module in cases:
        found = []
        for adjoint in (fs.Direct(), fs.Checkpointed(1)):
            span = (6, 0) if module is stack else (0.9, 0.1)
            sol = fs.solve(dynamics, x, *span, adjoint=adjoint, **keywords)
            params = [p for p in module.parameters() if p.requires_grad]
            found.append(gradients(sol.y1.square().sum(), [x, *params]))
        assert_same(found[1], found[0], 1e-12)


def test_a_field_that_does_not_repeat_itself_is_caught() -> None:
    drop, y0 = nn.Dropout(0.5), torch.randn(3, 3, requires_grad=True)
    sol = fs.solve(
        fs.ODE(lambda t, y: drop(y).tanh()), y0, integrator=RK4(), stepping=fs.Fixed(steps=20),
        adjoint=fs.Checkpointed(),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="did not repeat itself"):
        sol.y1.sum().backward()


def test_memory_of_saved_tensors() -> None:
    """Bytes that the graph keeps, counted by the storages alive after the forward pass."""
    net, y0 = nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 3)), torch.randn(200, 3)

    def kept(adjoint: fs.Adjoint) -> int:
        total = 0

        def watch(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        def f(t: Tensor, y: Tensor) -> Tensor:
            return net(y)

        with torch.autograd.graph.saved_tensors_hooks(watch, lambda x: x):
            fs.solve(
                fs.ODE(f), y0, integrator=RK4(), stepping=fs.Fixed(steps=30), adjoint=adjoint
            ).y1.sum()
        return total

    assert kept(fs.Checkpointed()) < kept(fs.Direct()) / 50


@pytest.mark.parametrize("steps", [100, 1_000, 10_000])
def test_checkpointed_holds_to_its_budget(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Bytes alive in what is held and kept, after each step there and each new block back."""
    w, y0, budget = torch.randn(8, 8) / 8, torch.randn(16, 8, requires_grad=True), 50_000
    there, back = [], []
    keep, hold = _tape.Tape.keep, _tape.Tape._hold

    def alive(tape: _tape.Tape) -> int:
        frames = [ref() for ref, *_ in tape._held]
        held = [x for frame in frames if frame is not None for x, _ in frame.held or ()]
        held += [x for x in leaves([start for _, *start in tape._held]) if isinstance(x, Tensor)]
        held += [x for x in leaves(list(tape._kept.values())) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        return sum(storages.values())

    def kept(tape: _tape.Tape, accept: bool | Tensor) -> None:
        keep(tape, accept)
        there.append(alive(tape))

    def watched(tape: _tape.Tape, place: int) -> None:
        hold(tape, place)
        back.append(alive(tape))

    monkeypatch.setattr(_tape.Tape, "keep", kept)
    monkeypatch.setattr(_tape.Tape, "_hold", watched)
    sol = fs.solve(
        fs.ODE(lambda t, y: torch.tanh(y @ w)), y0, integrator=Euler(),
        stepping=fs.Fixed(steps=steps), adjoint=fs.Checkpointed(budget),
    )  # fmt: skip
    sol.y1.sum().backward()
    assert max(there + back) <= 1.2 * budget
    assert max(back) >= 0.5 * budget
    assert sol.stats.backward_evaluations <= 8 * sol.stats.evaluations


def test_parts_of_a_batch_share_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of all of them, as one sample after the other is left out."""
    budget, totals = 20_000, []
    y0, seen = torch.randn(16, 8, requires_grad=True), weakref.WeakSet[_tape.Tape]()

    def total() -> None:
        held: list[Any] = []
        for tape in seen:
            frames = [ref() for ref, *_ in tape._held]
            held += [x for frame in frames if frame is not None for x, _ in frame.held or ()]
            held += leaves([*tape._kept.values(), *(start for _, *start in tape._held)])
        sizes = {x.untyped_storage().data_ptr(): x.nbytes for x in held if isinstance(x, Tensor)}
        totals.append(sum(sizes.values()))

    for name in ("keep", "_hold"):

        def watched(tape: _tape.Tape, value: Any, own: Any = getattr(_tape.Tape, name)) -> None:
            seen.add(tape)
            own(tape, value)
            total()

        monkeypatch.setattr(_tape.Tape, name, watched)
    ode = fs.ODE(lambda t, y: 3 * t[:, None].cos() - y, batched_time=True, rowwise=True)
    sol = fs.solve(
        ode, y0, 0.0, torch.linspace(0.2, 8.0, 16), integrator=Dopri5(),
        stepping=fs.Adaptive(1e-9, 1e-9, per_sample=True), adjoint=fs.Checkpointed(budget),
    )  # fmt: skip
    assert len(seen) > 3
    sol.y1.sum().backward()
    assert max(totals) <= 1.2 * budget


@pytest.mark.parametrize("budget", [1, None])
@pytest.mark.parametrize("pulled", [True, False])
def test_graphs_leave_no_cycles_behind(budget: int | None, pulled: bool) -> None:
    """When the outputs go, what was held and kept goes with them, without the garbage collector."""
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    before = tapes()
    gc.disable()
    try:
        sol = fs.solve(
            fs.ODE(net), y0, integrator=RK4(), stepping=fs.Fixed(steps=20),
            adjoint=fs.Checkpointed(budget),
        )  # fmt: skip
        node, made = weakref.ref(sol.y1), weakref.WeakSet(tapes() - before)
        assert len(made) == 1
        if pulled:
            sol.y1.sum().backward()
        del sol
        assert node() is None
        assert not made
    finally:
        gc.enable()


def tapes() -> weakref.WeakSet[_tape.Tape]:
    """Those that are alive."""
    for _ in range(3):
        gc.collect()
    return weakref.WeakSet(x for x in gc.get_objects() if type(x) is _tape.Tape)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["times", "own times", "steps", "event", "rows", "end", "dense"])
def test_what_a_solve_gave_is_not_kept_by_its_adjoint(kind: str, given: bool) -> None:
    """A graph that nobody pulled back goes with the solution: neither holds the other."""
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    own = torch.tensor([0.5, 1.0, 1.5, 2.0], requires_grad=True)
    crossing = fs.Event(lambda t, y: t - 0.7, terminal=kind == "end")
    more: dict[str, Any] = {
        "times": {"save_at": [0.2, 0.5]}, "own times": {"save_at": own[:, None] / 2},
        "steps": {"save_at": fs.Steps()}, "rows": {"t1": own}, "dense": {"dense": True},
        "event": {"events": crossing}, "end": {"events": crossing},
    }[kind]  # fmt: skip
    stepping = fs.Fixed(steps=20) if given else fs.Adaptive(per_sample=kind in ("rows", "end"))
    before = tapes()
    sol = fs.solve(
        fs.ODE(net, batched_time=True, rowwise=True), y0, 0.0, **{"t1": 1.0, **more},
        integrator=Dopri5(), stepping=stepping, adjoint=fs.Checkpointed(),
    )  # fmt: skip
    assert tapes() - before
    del sol
    assert not tapes() - before


def test_recomputed_evaluations_are_counted() -> None:
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    sol = fs.solve(
        fs.ODE(net), y0, integrator=RK4(), stepping=fs.Fixed(steps=20), adjoint=fs.Checkpointed()
    )
    assert (sol.stats.evaluations, sol.stats.backward_evaluations) == (80, 0)
    sol.y1.sum().backward()
    assert (sol.stats.evaluations, sol.stats.backward_evaluations) == (80, 15)  # of four steps


def test_the_last_steps_are_not_taken_again() -> None:
    """Nor is anything of a short solve: it costs what Direct costs, until its graph is used twice,
    or rows have been left out on the way.
    """
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    sol = fs.solve(
        fs.ODE(net), y0, integrator=RK4(), stepping=fs.Fixed(steps=16), adjoint=fs.Checkpointed()
    )
    first = torch.autograd.grad(sol.y1.square().sum(), y0, retain_graph=True)[0]
    assert sol.stats.backward_evaluations == 0
    assert_same(torch.autograd.grad(sol.y1.square().sum(), y0)[0], first, 0.0)


@pytest.mark.parametrize("steps", [4, 40])
def test_what_changed_in_place_is_not_used(steps: int) -> None:
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    sol = fs.solve(
        fs.ODE(net), y0, integrator=RK4(), stepping=fs.Fixed(steps=steps),
        adjoint=fs.Checkpointed(),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        sol.y1.sum().backward()


def test_functional_transforms_through_direct() -> None:
    """Forward and reverse mode and vmap, on given steps; adaptive steps under vmap are refused."""
    net, y0, way = Net(), torch.randn(3), torch.randn(3)

    def end(y: Tensor, **keywords: Any) -> Tensor:
        return fs.solve(fs.ODE(net), y, **keywords).y1

    def fixed(y: Tensor) -> Tensor:
        return end(y, integrator=RK4(), stepping=fs.Fixed(steps=6))

    near = (fixed(y0 + 1e-6 * way) - fixed(y0 - 1e-6 * way)) / 2e-6
    assert_same([torch.func.jacrev(fixed)(y0) @ way], [near], 1e-7)
    assert_same([torch.func.jacfwd(fixed)(y0) @ way], [near], 1e-7)
    assert_same([torch.func.jvp(fixed, (y0,), (way,))[1]], [near], 1e-7)
    rows = torch.randn(5, 3)
    assert_same([torch.func.vmap(fixed)(rows)], [fixed(rows)], 1e-12)
    alone = torch.stack([torch.func.jacrev(fixed)(row) for row in rows])
    assert_same([torch.func.vmap(torch.func.jacrev(fixed))(rows)], [alone], 1e-12)
    with pytest.raises(TypeError, match="per_sample"):
        torch.func.vmap(end)(rows)


def test_gradients_against_torchdiffeq() -> None:
    from torchdiffeq import odeint

    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    ours = fs.solve(
        fs.ODE(net), y0, 0.6, 1.4, stepping=fs.Adaptive(1e-10, 1e-10), adjoint=fs.Checkpointed()
    ).y1
    theirs = odeint(net, y0, torch.tensor([0.6, 1.4]), rtol=1e-10, atol=1e-10)[-1]
    assert_same([ours], [theirs], 1e-8)
    inputs = [y0, net.w, net.late]
    assert_same(gradients(ours.sum(), inputs), gradients(theirs.sum(), inputs), 1e-7)


def test_bad_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="budget"):
        fs.Checkpointed(0)
    with pytest.raises(TypeError, match=r"Direct\(\)"):
        fs.solve(
            fs.ODE(Net()), torch.randn(2, 3), integrator=integrators.TorchDiffEq(),
            adjoint=fs.Checkpointed(),
        )  # fmt: skip
