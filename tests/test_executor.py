"""Compiled steps: one graph, the results and gradients of Eager to rounding."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _pop_mode_temporarily

import flowsde as fs
from flowsde import _random, integrators, models
from flowsde._graph import Graph, quiet
from flowsde.integrators import (
    RK4,
    AsynchronousLeapfrog,
    Bosh3,
    Euler,
    EulerMaruyama,
    Integrator,
    StepDoubling,
    Stochastic,
    StochasticHeun,
    UniPC,
)
from flowsde.integrators.base import Engine
from flowsde.paths import BrownianTree, HermiteCubic, Linear
from flowsde.stepping import rms_norm

from .systems import catalogue, generator, suited
from .test_adjoint import Net, assert_same, gradients, measure

ADJOINTS = [fs.Direct(), fs.Checkpointed(), fs.Reversible(), fs.Backsolve()]
STATIC = [m for m in catalogue(integrators, Integrator) if m.static]
KINDS = {
    (type(m).step, getattr(m, "move", m.step).__func__): m for m in STATIC
}  # one for a formula


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


class Turn(nn.Module):
    """A smooth field with a parameter, a plain attribute and a mode."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(dim, dim))
        self.rate = 1.0

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        k = torch.tanh(y @ self.w) - (self.rate if self.training else 2.0) * y
        return k + torch.cos(t).reshape(-1, *[1] * (y.ndim - 1)) + sum(args)


def graphs(backend: str = "eager") -> tuple[fs.Compiled, Any]:
    """An executor that traces as the compiler would, runs eagerly, and counts its graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return fs.Compiled(backend=counter), counter


def agree(
    run: Callable[[fs.Executor], fs.Solution], executor: fs.Executor, tolerance: float = 1e-10
) -> fs.Solution:
    """Whether a solve comes to the same, with the same statistics, statuses and messages."""
    plain, sol = run(fs.Eager()), run(executor)
    found = (
        [x for x in torch.utils._pytree.tree_leaves((s.y1, s.ys)) if isinstance(x, Tensor)]
        for s in (sol, plain)
    )
    assert_same(*found, tolerance)
    for name in ("evaluations", "attempts", "accepted", "rejected"):
        mine, theirs = (torch.as_tensor(getattr(s.stats, name)) for s in (sol, plain))
        assert torch.equal(mine, theirs), name
    assert torch.equal(torch.as_tensor(sol.status), torch.as_tensor(plain.status))
    assert torch.allclose(torch.as_tensor(sol.t1), torch.as_tensor(plain.t1), rtol=1e-12)
    assert sol.message.partition("error")[0] == plain.message.partition("error")[0]
    return sol


@pytest.mark.parametrize("method", KINDS.values(), ids=str)
def test_every_static_method_is_one_graph(method: Integrator) -> None:
    dynamics, y0 = suited(method, Turn(), torch.randn(4, 3))
    executor, counter = graphs()

    def run(run: fs.Executor) -> fs.Solution:
        return fs.solve(
            dynamics, y0, 0.2, 1.0, integrator=method, stepping=fs.Fixed(steps=5), executor=run,
            path=fs.Brownian(0) if dynamics.noise is not None else None, save_at=fs.Steps(),
        )  # fmt: skip

    with torch.no_grad():
        agree(run, executor)
    kinds = 3 if isinstance(method, UniPC) else 2  # with a history, steps begin with less of it
    draws = dynamics.noise is not None  # of a path, once more of normals beside it
    assert counter.frame_count <= kinds + draws * 2


@pytest.mark.parametrize(("per_sample", "dt0"), [(False, None), (True, None), (False, 0.05)])
@torch.no_grad()
def test_a_solve_for_its_end_alone_is_one_graph(per_sample: bool, dt0: float | None) -> None:
    """All its steps, further solves, other contents, spans, parameters and arguments."""
    net = Turn()
    dynamics, (executor, counter) = fs.ODE(net, batched_time=True), graphs()
    for seed, end in enumerate((1.0, -0.7, 3.0)):
        torch.manual_seed(seed)
        y0, u = torch.randn(4, 3), torch.randn(3)
        net.w.data.normal_()
        stepping = fs.Adaptive(1e-7, 1e-7, per_sample=per_sample, dt0=dt0)
        agree(
            lambda run: fs.solve(
                dynamics, y0, 0.1, end, integrator=Bosh3(), executor=run, stepping=stepping,
                args=(u,),
            ),
            executor,
        )  # fmt: skip
    assert counter.frame_count == 1


@pytest.mark.parametrize("save_at", [[0.3, 0.9], None], ids=["saved", "end"])
@torch.no_grad()
def test_steps_that_are_seen_share_one_graph(save_at: list[float] | None) -> None:
    dynamics, (executor, counter) = fs.ODE(Turn()), graphs()
    for end in (1.0, 2.0):
        y0 = torch.randn(4, 3)
        agree(
            lambda run: fs.solve(
                dynamics, y0, 0.0, end, integrator=Bosh3(), executor=run, save_at=save_at,
                stepping=fs.Adaptive(1e-6, 1e-6, step_at=(0.5,)),
            ),
            executor,
        )  # fmt: skip
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "method", [Euler(), RK4(), AsynchronousLeapfrog(), EulerMaruyama(), StochasticHeun()], ids=str
)
@torch.no_grad()
def test_given_steps_are_one_graph_however_many(method: Integrator) -> None:
    dynamics, y0 = suited(method, Turn(), torch.randn(4, 3))
    executor, counter = graphs()
    draws = dynamics.noise is not None  # a path's numbers have a graph of their own
    for steps in (3, 64, 150, 2, 1):
        assert counter.frame_count <= 1 + draws
        agree(
            lambda run: fs.solve(
                dynamics, y0, 0.2, 1.0, integrator=method, stepping=fs.Fixed(steps=steps),
                path=fs.Brownian(0) if dynamics.noise is not None else None, executor=run,
            ),
            executor,
        )  # fmt: skip
    assert counter.frame_count == 1 + 2 * draws  # of one step, another


IMPLICIT = [
    m for m in catalogue(integrators, Integrator)
    if isinstance(m, (integrators.DriftImplicitEuler, integrators.ImplicitRK))
]  # fmt: skip


def implicit_solves() -> Iterator[Any]:
    """Of one method after the other: how it takes its steps, and whether they are seen."""
    ways = itertools.cycle(itertools.product(("given", "shared", "per sample"), (None, [0.3, 0.9])))
    for method in IMPLICIT:
        for way in itertools.islice(ways, 2 - (method.error_order is None)):
            yield pytest.param(method, *way, id=f"{type(method).__name__}-{way[0]}-{way[1]}")


@pytest.mark.parametrize(("method", "stepping", "save_at"), [*implicit_solves()])
@torch.no_grad()
def test_implicit_steps_are_graphs(
    method: Integrator, stepping: str, save_at: list[float] | None
) -> None:
    """The same states by the same attempts; the Jacobian is made in each, not once a state."""
    dynamics, start = suited(method, Turn(), 3.0 * torch.randn(4, 3))
    chosen = fs.Adaptive(1e-4, 1e-4, per_sample=stepping == "per sample")
    executor, counter = graphs()
    for end in (1.2, -0.4):
        y0 = start if dynamics.noise is not None else start + end
        plain, sol = (
            fs.solve(
                dynamics, y0, 0.2, end, integrator=method, executor=run,
                save_at=save_at and [0.2 + x * (end - 0.2) for x in save_at],
                stepping=fs.Fixed(steps=6) if stepping == "given" else chosen,
                path=fs.Brownian(0) if dynamics.noise is not None else None,
            )
            for run in (fs.Eager(), executor)
        )  # fmt: skip
        for mine, theirs in ((sol.y1, plain.y1), (sol.ys, plain.ys)):
            assert mine is theirs is None or torch.allclose(mine, theirs, rtol=1e-9)
        assert sol.stats.attempts == plain.stats.attempts
        again, rest = divmod(sol.stats.products - plain.stats.products, 3)
        assert rest == 0
        began = sol.stats.evaluations - plain.stats.evaluations - again
        assert began in (0, 1)  # where the first step is a graph's, too
        if stepping == "shared":
            assert again == plain.stats.rejected
    draws = dynamics.noise is not None
    assert counter.frame_count <= 2 + draws


@torch.no_grad()
def test_inductor_takes_newtons_iteration() -> None:
    """A batch in which one sample needs short steps, one none, beside one that fails."""
    ode = fs.ODE(lambda t, y: -(10.0 ** torch.arange(4)[:, None]) * (y**3 - 1.0), rowwise=False)
    y0 = torch.tensor([[2.0, -1.0], [0.5, 1.0], [3.0, 0.1], [1.0, 1.0]])
    stepping = fs.Adaptive(1e-5, 1e-5)
    method = integrators.Kvaerno3()
    plain, sol = (
        fs.solve(ode, y0, integrator=method, stepping=stepping, executor=run)
        for run in (fs.Eager(), fs.Compiled())
    )
    assert torch.allclose(sol.y1, plain.y1, rtol=1e-9)
    assert sol.stats.attempts == plain.stats.attempts


@pytest.mark.parametrize("newton", [1, 2, 4])
@torch.no_grad()
def test_newton_is_allowed_as_many_corrections_in_a_graph(newton: int) -> None:
    """Where they do not do, on given steps, both fail."""
    ode, y0, (executor, _) = fs.ODE(lambda t, y: -(y**3)), torch.ones(2, 1), graphs()
    plain, sol = (
        fs.solve(
            ode, y0, integrator=integrators.Trapezoid(newton=newton), executor=run, throw=False,
            stepping=fs.Fixed(steps=2),
        )
        for run in (fs.Eager(), executor)
    )  # fmt: skip
    assert sol.status == plain.status
    assert sol.stats.evaluations == plain.stats.evaluations + 1
    assert torch.allclose(sol.y1, plain.y1, rtol=1e-9, equal_nan=True)


def implicit_gradients() -> Iterator[Any]:
    """Each method in one way, and each way with some method."""
    for i, method in enumerate(IMPLICIT):
        chosen = ("given", "shared", "per sample")[i % 3]
        way = "given" if method.error_order is None else chosen
        adjoint, saves = (fs.Direct(), fs.Checkpointed())[i // 2 % 2], (None, [0.3, 0.9])[i % 2]
        name = f"{type(method).__name__}-{way}-{saves}-{type(adjoint).__name__}"
        yield pytest.param(method, way, saves, adjoint, id=name)


@pytest.mark.parametrize(("method", "stepping", "save_at", "adjoint"), [*implicit_gradients()])
def test_implicit_gradients_are_graphs(
    method: Integrator, stepping: str, save_at: list[float] | None, adjoint: fs.Adjoint
) -> None:
    """By the state, by parameters and by both ends; one graph finds what another one records.

    Chosen steps are solved to a hundredth of the tolerance, here and there: 1e-8 in each stage.
    """
    net = Turn()
    dynamics, start = suited(method, net, 2.0 * torch.randn(4, 3))
    chosen = fs.Adaptive(1e-6, 1e-6, per_sample=stepping == "per sample")
    executor, counter = graphs("aot_eager")
    made = 0
    for end in (1.2, 1.0):
        y0 = start.clone().requires_grad_()
        ends = [torch.tensor(t, requires_grad=stepping == "shared") for t in (0.2, end)]
        found = []
        for run in (fs.Eager(), executor):
            sol = fs.solve(
                dynamics, y0, *ends, integrator=method, executor=run, adjoint=adjoint,
                save_at=save_at and [0.2 + x * (end - 0.2) for x in save_at],
                stepping=fs.Fixed(steps=6) if stepping == "given" else chosen,
                path=fs.Brownian(0) if dynamics.noise is not None else None,
            )  # fmt: skip
            loss = sol.y1.square().sum() + (0.0 if sol.ys is None else sol.ys.sin().sum())
            inputs = [y0, net.w, *(t for t in ends if t.requires_grad)]
            found.append((sol, [sol.y1.detach(), *torch.autograd.grad(loss, inputs)]))
        (plain, values), (sol, again) = found
        assert sol.stats.attempts == plain.stats.attempts
        for mine, theirs in zip(again, values, strict=True):
            gap = (mine - theirs).abs().amax() / theirs.abs().amax()
            assert float(gap) < (1e-11 if stepping == "given" else 1e-7)
        made = made or counter.frame_count
    assert counter.frame_count == made


def test_implicit_gradients_of_inductor() -> None:
    """Pairs, args and a tensor out of a closure; steps that need few corrections and many.

    Its loops that end before they begin, where gradients are recorded, came to something else.
    """
    net, u, rate = nn.Linear(2, 2), torch.randn(2, requires_grad=True), torch.tensor(2.0)
    rate.requires_grad_()

    def field(t: Tensor, y: Any, u: Tensor) -> Any:
        a, b = y
        return net(a).tanh() - rate * a**3 + u, -50.0 * (b - a.sum(-1, keepdim=True))

    y0 = torch.randn(5, 2), torch.randn(5, 1)
    dynamics, executor = fs.ODE(field), fs.Compiled()
    for steps in (2, 40):
        found = []
        for run in (fs.Eager(), executor):
            end = fs.solve(
                dynamics, y0, args=(u,), integrator=integrators.ImplicitEuler(), executor=run,
                stepping=fs.Fixed(steps=steps),
            ).y1  # fmt: skip
            loss = end[0].square().sum() + end[1].sum()
            found.append([loss, *torch.autograd.grad(loss, [u, rate, *net.parameters()])])
        for mine, theirs in zip(*found, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9)


def test_implicit_gradients_in_graphs_are_first_ones() -> None:
    y0 = torch.ones(2, 1, requires_grad=True)
    end = fs.solve(
        fs.ODE(lambda t, y: -(y**3)), y0, integrator=integrators.Kvaerno3(),
        executor=graphs("aot_eager")[0],
    ).y1  # fmt: skip
    (slope,) = torch.autograd.grad(end.sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(slope.sum(), y0)


@pytest.mark.parametrize(
    ("method", "stepping"),
    [
        (integrators.Kvaerno3(), fs.Adaptive(1e-9, 1e-9)),
        (integrators.ImplicitEuler(newton=60), fs.Fixed(steps=8)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_samples_that_meet_on_the_way_have_their_gradients(
    method: Integrator, stepping: fs.Stepping
) -> None:
    """At the start they are apart; their gradients were off by 1e-3, eagerly in the first step."""
    w, y0 = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ode, found = fs.ODE(lambda t, y: -2.0 * y + 3.0 * t * torch.tanh(y @ w).mean(0)), []

    def end(y0: Tensor, run: fs.Executor) -> Tensor:
        return fs.solve(ode, y0, integrator=method, stepping=stepping, executor=run).y1

    for run in (fs.Eager(), graphs("aot_eager")[0]):
        y1 = end(y0, run)
        found.append([y1, *gradients(y1.sum(), [y0, w])])
    assert_same(*found, 1e-9)
    along = torch.randn(4, 3)
    with torch.no_grad():
        ahead, behind = (end(y0 + x * along, fs.Eager()).sum() for x in (1e-4, -1e-4))
    assert_same([(found[0][1] * along).sum()], [(ahead - behind) / 2e-4], 1e-6)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed()], ids=str)
def test_implicit_steps_beyond_the_compilers_limit_are_eager(
    adjoint: fs.Adjoint, recorded: bool
) -> None:
    """Of so many batch sizes there are no more graphs."""
    net, executor = nn.Linear(2, 2), graphs("aot_eager")[0]
    ode = fs.ODE(lambda t, y: torch.tanh(net(y)) - y)
    with torch._dynamo.config.patch(recompile_limit=2), torch.set_grad_enabled(recorded):
        for batch in (2, 3, 4, 5, 2):
            y0, found = torch.randn(batch, 2), []
            for run in (fs.Eager(), executor):
                sol = fs.solve(
                    ode, y0, integrator=integrators.ImplicitEuler(), executor=run, adjoint=adjoint,
                    stepping=fs.Fixed(steps=3),
                )  # fmt: skip
                slopes = gradients(sol.y1.sum(), [net.weight]) if recorded else []
                found.append([sol.y1, *slopes])
            assert_same(*found, 1e-10)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed()], ids=str)
@pytest.mark.parametrize("hooks", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu])
def test_branches_in_implicit_steps_are_told_as_such(adjoint: fs.Adjoint, hooks: Any) -> None:
    ode = fs.ODE(lambda t, y: -y if y.sum().item() > 1e9 else -2.0 * y)
    y0 = torch.ones(2, 1, requires_grad=True)
    with hooks(), pytest.raises(TypeError, match="does not go into one graph"):
        fs.solve(
            ode, y0, integrator=integrators.Trapezoid(), executor=graphs("aot_eager")[0],
            stepping=fs.Fixed(steps=2), adjoint=adjoint,
        )  # fmt: skip


def test_products_have_no_graph() -> None:
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2, 1)
    method = integrators.Kvaerno3(linear=integrators.GMRES())
    with pytest.raises(TypeError, match="linear=Dense"):
        fs.solve(ode, y0, integrator=method, executor=fs.Compiled())


def driven(law: str) -> fs.SDE:
    return fs.SDE(
        Turn(), lambda t, y: 0.3 + (0.0 if law == "additive" else 0.1) * y.cos(),
        noise="diagonal", batched_time=True, additive=law == "additive",
        stratonovich=law == "Stratonovich",
    )  # fmt: skip


def along_a_path() -> list[Any]:
    """The stochastic methods of one formula each, by themselves or else doubled, what suits them,
    and in turn: whether samples have steps of their own, and are seen on the way.
    """
    found: list[Any] = []
    turns = itertools.cycle(itertools.product((False, True), (None, [0.3, 0.9])))
    for plain in (m for m in KINDS.values() if isinstance(m, Stochastic)):
        laws = itertools.product((plain, StepDoubling(plain)), ("Stratonovich", "Ito", "additive"))
        for method, law in laws:
            try:
                method.check(driven(law))
                method.exponent(driven(law))
                method.draws(driven(law), torch.ones(4, 3))
            except TypeError:
                continue
            found.append(pytest.param(method, law, *next(turns), id=f"{method}-{law}"))
            break
    return found


@pytest.mark.parametrize(("method", "law", "per_sample", "save_at"), along_a_path())
@torch.no_grad()
def test_trees_are_asked_within_the_graph(
    method: Integrator, law: str, per_sample: bool, save_at: list[float] | None
) -> None:
    """Steps chosen along a Brownian path are one graph: all of a solve, or each of those seen."""
    stepping, y0 = fs.Adaptive(1e-2, 1e-2, per_sample=per_sample), torch.randn(4, 3)
    dynamics, (executor, counter) = driven(law), graphs()
    for seed, end in ((0, 1.0), (7, 0.5), (torch.arange(4), -1.1)):
        path = BrownianTree(seed, -1.5, 1.0 + 0.1 * end)
        agree(
            lambda run: fs.solve(
                dynamics, y0, 0.1, end, integrator=method, executor=run, stepping=stepping,
                path=path, save_at=save_at if end > 0.9 else save_at and [end],
            ),
            executor, 1e-9,
        )  # fmt: skip
    assert counter.frame_count <= 1 + method.remembers  # a first step stands on y itself


class Pair(nn.Module):
    """Two parts of a state, each moved by the other one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": self.net(t, y["b"]), "b": self.net(t, y["a"])}


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=lambda a: type(a).__name__)
def test_gradients_of_compiled_steps_along_a_path(adjoint: fs.Adjoint) -> None:
    """Of a state of two parts, its increments correlated and in antithetic pairs."""
    net, start, found = Turn(), torch.randn(4, 3, requires_grad=True), []
    sde = fs.SDE(
        Pair(net), lambda t, y: {k: 0.3 + 0.1 * x.cos() for k, x in y.items()},
        noise="diagonal", stratonovich=True,
    )  # fmt: skip
    path = BrownianTree(
        3, 0.0, 1.0, antithetic=True, correlation=0.5 * torch.eye(3) + 0.5 * torch.ones(3, 3)
    )
    for run in (fs.Eager(), fs.Compiled(backend="aot_eager")):
        y1 = fs.solve(
            sde, {"a": start, "b": 2.0 * start}, integrator=StochasticHeun(), path=path,
            stepping=fs.Adaptive(1e-2, 1e-2), adjoint=adjoint, executor=run,
        ).y1  # fmt: skip
        loss = (y1["a"] * y1["b"]).sum()
        found.append([y1["a"], *gradients(loss, [start, net.w])])
    assert_same(found[1], found[0], 1e-9)


@torch.no_grad()
def test_what_no_loop_takes_is_taken_without_one() -> None:
    """A field that looks at its values on the host."""
    dynamics = fs.ODE(lambda t, y: -y if float(y.sum()) > 0 else y.sin())
    y0, (executor, _) = torch.randn(4, 3), graphs()
    for steps in (20, 9):
        agree(
            lambda run: fs.solve(
                dynamics, y0, integrator=RK4(), stepping=fs.Fixed(steps=steps), executor=run
            ),
            executor,
        )
    assert not all(graph.fits for graph in executor._made[dynamics].values())


@pytest.mark.parametrize(
    "stepping",
    [fs.Fixed(steps=9), fs.Adaptive(1e-8, 1e-8, per_sample=True)],
    ids=["given", "own"],
)
@torch.no_grad()
def test_max_steps_is_exact(stepping: fs.Stepping) -> None:
    dynamics, (executor, _) = fs.ODE(Turn(), batched_time=True), graphs()
    for most in (0, 1, 2, 5, 9):
        sol = agree(
            lambda run: fs.solve(
                dynamics, torch.ones(2, 3), 0.0, 3.0, integrator=Bosh3(), stepping=stepping,
                max_steps=most, throw=False, executor=run,
            ),
            executor,
        )  # fmt: skip
        assert sol.stats.attempts == most


@pytest.mark.parametrize(
    ("per_sample", "dt_min", "tolerance"), [(False, 0.0, 1e-3), (True, 1e-3, 1e-8)]
)  # at its pole the state magnifies rounding
@torch.no_grad()
def test_failures_are_told_alike(per_sample: bool, dt_min: float, tolerance: float) -> None:
    """One of the samples blows up on the way; alone with its time, the others arrive."""
    dynamics, (executor, _) = fs.ODE(lambda t, y: y * y, batched_time=True), graphs()
    y0 = torch.tensor([[0.1], [1.0], [-1.0]])
    sol = agree(
        lambda run: fs.solve(
            dynamics, y0, 0.0, 1.5, throw=False, integrator=Bosh3(), executor=run,
            stepping=fs.Adaptive(1e-5, 1e-5, per_sample=per_sample, dt_min=dt_min),
        ),
        executor, tolerance,
    )  # fmt: skip
    failed = torch.as_tensor(sol.status) > 0
    assert failed.tolist() == ([False, True, False] if per_sample else True)


@torch.no_grad()
def test_changes_between_solves_are_seen() -> None:
    """A plain attribute, the mode, another shape: each compiles again, none is ignored."""
    net = Turn()
    dynamics, (executor, _) = fs.ODE(net), graphs()

    def same(y0: Tensor, save_at: Any) -> None:
        agree(
            lambda run: fs.solve(
                dynamics, y0, stepping=fs.Fixed(steps=6), save_at=save_at, executor=run
            ),
            executor,
        )

    for save_at in (None, fs.Steps()):
        net.rate = 1.0
        same(torch.ones(2, 3), save_at)
        net.rate = 3.0
        same(torch.ones(2, 3), save_at)
        net.eval()
        same(torch.ones(2, 3), save_at)
        same(torch.ones(5, 3), save_at)
        net.train()


def test_no_tolerance_is_an_unknown_of_a_graph() -> None:
    """The compiler would take what differs between solves for one, and graphs ten times slower."""
    seen: list[int] = []

    def backend(module: Any, examples: list[Any]) -> Any:
        seen.append(len(examples))
        return module.forward

    run = fs.Compiled(backend=backend)
    for tolerance, rate in ((1e-2, 1.0), (1e-3, 2.0), (1e-4, 3.0)):
        field = Turn().double()
        field.rate = rate
        with torch.no_grad():
            fs.solve(
                fs.ODE(field), torch.ones(2, 3), 0.0, 1.0, executor=run,
                stepping=fs.Adaptive(rtol=tolerance, atol=tolerance),
            )  # fmt: skip
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_an_unknown_backend_is_told_before_the_first_step() -> None:
    with pytest.raises(torch._dynamo.exc.InvalidBackend, match="inducter"):
        fs.solve(
            fs.ODE(Turn().double()), torch.ones(2, 3), 0.0, 1.0,
            executor=fs.Compiled(backend="inducter"),
        )  # fmt: skip


def test_the_compiler_says_nothing_of_itself(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("torch._inductor.ir")
    monkeypatch.setattr(log, "propagate", True)
    Graph(lambda: None, "eager", None)
    with quiet(), warnings.catch_warnings(record=True) as heard:
        warnings.warn("of torch", stacklevel=1)
    log.warning("%s is missing a c-shim implementation, using proxy executor as fallback", "solve")
    log.warning("to another user")
    assert [record.getMessage() for record in caplog.records] == ["to another user"]
    assert not heard


def test_a_field_that_changes_itself_stays_with_the_guards() -> None:
    """It hands a tensor from one call to the next, which a graph by itself would not."""

    class Tired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("before", torch.ones(2))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            k = -y - self.before
            self.before = y.detach()
            return k

    found = []
    for run in (fs.Eager(), graphs()[0]):
        sol = fs.solve(
            fs.ODE(Tired()), torch.ones(2), integrator=Euler(), stepping=fs.Fixed(steps=6),
            executor=run, save_at=fs.Steps(),
        )  # fmt: skip
        found.append(sol.y1)
    assert_same(found[1:], found[:1], 1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("saved", [False, True], ids=["end", "saved"])
def test_gradients_of_compiled_steps(adjoint: fs.Adjoint, saved: bool) -> None:
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    net.late.data.zero_()  # its jump would make the results hang on rounding
    dynamics, found = fs.ODE(net), []
    stepping = fs.Adaptive(1e-3, 1e-3) if saved else fs.Fixed(steps=5)
    for run in (fs.Eager(), fs.Compiled(backend="aot_eager")):
        sol = fs.solve(
            dynamics, y0, 0.1, 0.9, integrator=AsynchronousLeapfrog(), stepping=stepping,
            adjoint=adjoint, executor=run, save_at=[0.5, 0.9] if saved else None,
        )  # fmt: skip
        loss = measure(sol) if saved else sol.y1.square().sum()
        found.append(gradients(loss, [y0, net.w, net.b]))
    assert_same(found[1], found[0], 1e-9)


def test_inductor_agrees() -> None:
    """The real compiler, forward and back, with noise as an input."""
    net, y0 = Net(), torch.randn(4, 3, requires_grad=True)
    executor, found = fs.Compiled(), []
    sde = fs.SDE(net, lambda t, y: 0.2 + 0.1 * y, noise="diagonal")
    ode = fs.ODE(net)
    for run in (fs.Eager(), executor):
        a = fs.solve(ode, y0, integrator=Bosh3(), executor=run).y1
        b = fs.solve(
            sde, y0, integrator=EulerMaruyama(), stepping=fs.Fixed(steps=5), path=fs.Brownian(3),
            executor=run,
        ).y1  # fmt: skip
        found.append([a, b, *gradients((a * b).sum(), [y0, net.w])])
    assert_same(found[1], found[0], 1e-10)


@pytest.mark.parametrize(("size", "dtype"), [(3, torch.float32), (1, torch.float64)])
def test_compiled_draws_are_the_same(size: int, dtype: torch.dtype) -> None:
    """To rounding, however many steps: one graph draws them, and one a step alone."""
    executor, key = fs.Compiled(), _random.keys(7, 5, torch.device("cpu"), _random.BROWNIAN)
    for first, count in ((0, 8), (8, 8), (16, 100), (3, 1), (9, 1)):
        steps = torch.arange(first, first + count)
        found, known = (e.normal(key, steps, size, dtype) for e in (executor, fs.Eager()))
        assert found.dtype == dtype
        assert_same([found], [known], 20.0 * torch.finfo(dtype).eps)


def test_gradients_of_compiled_densities() -> None:
    """In reductions over the batch torch 2.13 goes wrong where it writes in place."""
    torch.manual_seed(0)
    net, x, found = models.cnf(2, 8).f.double(), torch.randn(16, 2), []
    density = fs.log_density(fs.ODE(net, traced=net.traced))
    for run in (fs.Eager(), fs.Compiled()):
        y, change = fs.solve(
            density, (x, x.new_zeros(16)), integrator=Euler(), stepping=fs.Fixed(steps=3),
            executor=run,
        ).y1  # fmt: skip
        found.append(gradients(y.square().sum() + change.sum(), list(net.parameters())))
    assert_same(found[1], found[0], 1e-10)


def test_steps_of_more_than_one_kind_are_refused() -> None:
    field = fs.ODE(lambda t, y: -y)
    for method in catalogue(integrators, Integrator):
        if not method.static and method not in (*IMPLICIT, integrators.Iterate()):
            dynamics, y0 = suited(method, lambda t, y: -y, torch.ones(2, 2))
            with pytest.raises(TypeError, match=r"Eager\(\)"):
                fs.solve(
                    dynamics, y0, integrator=method, executor=fs.Compiled(),
                    stepping=None if isinstance(method, Engine) else fs.Fixed(steps=3),
                    path=None if dynamics.noise is None else fs.Brownian(0),
                )  # fmt: skip
    with pytest.raises(TypeError, match=r"Compiled\(\)"):
        fs.solve(field, torch.ones(2), executor="compiled")


def test_a_graph_lives_as_long_as_its_dynamics() -> None:
    executor, _ = graphs()
    dynamics = fs.ODE(lambda t, y: -y)
    fs.solve(dynamics, torch.ones(2, 2), stepping=fs.Fixed(steps=3), executor=executor)
    assert len(executor._made) == 1
    del dynamics
    gc.collect()
    assert len(executor._made) == 0


def test_other_batches_and_late_branches_compile_again_and_agree() -> None:
    """A changed batch size is a new graph, not an error; so is a branch that the field takes."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y if y.shape[0] < 4 else -2.0 * y

    dynamics = fs.ODE(f)
    executor, _ = graphs()
    for batch in (3, 5, 3, 8):
        y1 = fs.solve(
            dynamics, torch.ones(batch, 2), stepping=fs.Fixed(steps=20), executor=executor
        ).y1
        rate = -1.0 if batch < 4 else -2.0
        assert_same([y1], [torch.full((batch, 2), rate).exp()], 1e-6)


@pytest.mark.parametrize(
    ("divergence", "penalised"),
    [(None, False), (fs.Exact(), True), (fs.Hutchinson(), True), (fs.Hutchinson(2), False)],
    ids=str,
)
def test_densities_are_one_graph(divergence: fs.Divergence | None, penalised: bool) -> None:
    """By their field's derivatives, with gradients and without, and with a penalty on these."""
    net, x = Turn(), torch.randn(4, 3)
    density, start = fs.log_density(fs.ODE(net), divergence), (x, torch.zeros(4))
    if penalised:
        density = fs.regularize(density)
        start = density.enter(start)
    executor, counter = graphs()
    for stepping, recorded in ((fs.Fixed(steps=3), True), (fs.Adaptive(1e-4, 1e-4), False)):
        with torch.set_grad_enabled(recorded):
            runs = []
            for run in (executor, fs.Eager(), executor):
                sol = fs.solve(
                    density, start, integrator=integrators.Heun(), stepping=stepping,
                    executor=run, generator=generator() if density.random else None,
                )  # fmt: skip
                ends = [*torch.utils._pytree.tree_leaves(sol.y1)]
                loss = sum(end.square().sum() for end in ends)
                runs.append(ends + (list(gradients(loss, [net.w])) if recorded else []))
                if run is executor and len(runs) == 1:
                    once = counter.frame_count
            assert_same(runs[0], runs[1], 1e-10)
            assert_same(runs[2], runs[1], 1e-10)
            assert counter.frame_count == once


def test_densities_are_graphs_under_checkpointed() -> None:
    """The compiler traces what torch.func differentiates beside no hooks of saved tensors, which
    the recorded steps go through; a refusal there had others be refused later on.
    """
    net, start = Turn(), (torch.randn(4, 3), torch.zeros(4))
    density, found = fs.log_density(fs.ODE(net)), []
    for run in (fs.Eager(), graphs("aot_eager")[0]):
        sol = fs.solve(
            density, start, integrator=RK4(), stepping=fs.Fixed(steps=40), executor=run,
            adjoint=fs.Checkpointed(),
        )  # fmt: skip
        found.append([*sol.y1, *gradients(sol.y1[0].square().sum() + sol.y1[1].sum(), [net.w])])
    assert_same(*found, 1e-10)


class Downhill(nn.Module):
    """Minus the gradient of an energy, by ``torch.func``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -torch.func.grad(lambda x: self.net(x).sum())(y)


@pytest.mark.parametrize("adjoint", [fs.Direct(), fs.Checkpointed()], ids=str)
@pytest.mark.parametrize("method", [RK4(), integrators.Trapezoid()], ids=str)
def test_fields_that_call_torch_func_have_gradients(
    method: Integrator, adjoint: fs.Adjoint
) -> None:
    """They were taken for such that call torch.autograd.grad, or met hooks."""
    net, y0, found = Downhill(), torch.randn(4, 3), []
    for run, way in ((fs.Eager(), fs.Direct()), (graphs("aot_eager")[0], adjoint)):
        y1 = fs.solve(
            fs.ODE(net), y0, integrator=method, stepping=fs.Fixed(steps=20), executor=run,
            adjoint=way,
        ).y1  # fmt: skip
        found.append([y1, *gradients(y1.square().sum(), [net.net[0].weight, net.net[0].bias])])
    assert_same(*found, 1e-10)


def test_fields_that_are_differentiated_otherwise_are_not_compiled() -> None:
    y0 = torch.randn(3, 2), torch.zeros(3)
    density = fs.log_density(fs.ODE(lambda t, y: -y), fs.HutchPlusPlus())
    with pytest.raises(TypeError, match="derivatives of its field"):
        fs.solve(density, y0, executor=fs.Compiled("eager"), generator=generator())


class Root(nn.Module):
    """Defined for y > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y.sqrt()


def test_steps_that_fill_a_graph_spoil_no_gradient() -> None:
    """One step more than the five given would leave what the field is defined on."""
    net, y0, found = Root(), torch.ones(3, 1, requires_grad=True), []
    for run in (fs.Eager(), fs.Compiled(backend="aot_eager")):
        y1 = fs.solve(
            fs.ODE(net), y0, 0.0, 1.5, integrator=integrators.Heun(), executor=run,
            stepping=fs.Fixed(steps=5),
        ).y1  # fmt: skip
        found.append([y1, *gradients(y1.sum(), [y0, net.rate])])
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("stepping", [fs.Fixed(steps=4), fs.Adaptive()], ids=["given", "chosen"])
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_derivatives_are_kept(stepping: fs.Stepping, recorded: bool) -> None:
    ode, y0, rate = fs.ODE(lambda t, y, k: -k * y), torch.ones(2, 1), torch.tensor(2.0)
    executor, _ = graphs()
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        for y, k in (
            (forward_ad.make_dual(y0, torch.ones_like(y0)), rate),
            (y0, forward_ad.make_dual(rate, torch.ones(()))),
        ):
            found = [
                forward_ad.unpack_dual(
                    fs.solve(ode, y, args=(k,), stepping=stepping, executor=run).y1
                ).tangent
                for run in (fs.Eager(), executor)
            ]
            assert torch.equal(*found)


@pytest.mark.parametrize("recorded", [False, True])
def test_paths_of_every_kind_take_turns(recorded: bool) -> None:
    sde, y0, (executor, _) = driven("Stratonovich"), torch.rand(4, 3), graphs()
    paths = (BrownianTree(1, 0.0, 1.0), fs.Brownian(1), BrownianTree(2, 0.0, 1.0))
    with torch.set_grad_enabled(recorded):
        for path, save_at in itertools.product(paths, (None, [0.3, 1.0])):
            agree(
                lambda run: fs.solve(
                    sde, y0, integrator=integrators.ReversibleHeun(), path=path, executor=run,
                    stepping=fs.Fixed(steps=5), save_at=save_at,
                ),
                executor,
            )  # fmt: skip


def test_models_that_make_dynamics_for_each_series_compile_once() -> None:
    """Along paths of their own, each with gradients: what is compiled lives as long as the field,
    and is another where the same field is asked as other dynamics.
    """
    grid, (executor, counter) = torch.arange(6.0), graphs()
    solver = fs.Solver(integrators.Midpoint(), fs.Grid(grid), executor=executor)
    model = models.NeuralCDE(3, 2, solver=solver)
    plain = models.NeuralCDE(3, 2, solver=fs.Solver(integrators.Midpoint(), fs.Grid(grid)))
    plain.load_state_dict(model.state_dict())
    found: list[int] = []
    for kind in (Linear, Linear, HermiteCubic, Linear, HermiteCubic):
        path = kind(grid, torch.randn(4, 6, 3))
        runs = []
        for net in (model, plain):
            out = net(path)
            runs.append([out, *gradients(out.square().sum(), list(net.parameters()))])
        assert_same(*runs, 1e-10)
        found.append(counter.frame_count)
    assert found[0] == found[1] < found[2] == found[3] == found[4]
    del model, path, net
    gc.collect()
    assert not executor._made


def test_modules_named_as_ours_are_watched() -> None:
    """A user's own, whose name begins as that of a package which does not change."""
    for name in ("torch_fields", "flowsde_fields"):
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec("SCALE = 1.0\ndef f(t, y):\n    return -SCALE * y\n", vars(module))
        ode, y0, (executor, _) = fs.ODE(module.f), torch.ones(2, 1), graphs()
        for module.SCALE in (1.0, 2.0):
            agree(lambda run: fs.solve(ode, y0, executor=run), executor)
        del sys.modules[name]


class Weighed:
    """A norm of its user's."""

    weight = 1.0

    def __call__(self, x: Any, per_sample: bool) -> Tensor:
        return self.weight * rms_norm(x, per_sample)


@torch.no_grad()
def test_a_norm_that_changes_is_seen() -> None:
    norm, y0, (executor, _) = Weighed(), torch.ones(2, 1), graphs()
    ode, stepping, attempts = fs.ODE(lambda t, y: -y), fs.Adaptive(norm=norm), []
    for norm.weight in (1.0, 1e3):
        run = agree(lambda run: fs.solve(ode, y0, stepping=stepping, executor=run), executor)
        attempts.append(run.stats.attempts)
    assert attempts[1] > attempts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_steps_along_a_path_are_chosen_alike(dtype: torch.dtype) -> None:
    """To rounding of either dtype, each sample by itself."""
    sde = fs.SDE(
        lambda t, y: -0.5 * y, lambda t, y: 0.3 * y.cos(), noise="diagonal", stratonovich=True,
        batched_time=True, rowwise=True,
    )  # fmt: skip
    executor, _ = graphs()
    y0 = torch.linspace(0.1, 2.0, 24, dtype=dtype).reshape(12, 2)
    agree(
        lambda run: fs.solve(
            sde, y0, integrator=StochasticHeun(), path=fs.Brownian(torch.arange(12)),
            stepping=fs.Adaptive(1e-2, 1e-2, per_sample=True), executor=run,
        ),
        executor, 1e3 * torch.finfo(dtype).eps,
    )  # fmt: skip


@pytest.mark.parametrize("keywords", [
    {"integrator": RK4(), "stepping": fs.Fixed(steps=3)},
    {"integrator": RK4(), "stepping": fs.Fixed(steps=3), "adjoint": fs.Checkpointed()},
    {"stepping": fs.Adaptive()},
], ids=["given", "checkpointed", "chosen"])  # fmt: skip
@pytest.mark.parametrize("by", ["state", "weight"])
@pytest.mark.parametrize("of", ["state", "weight"])
def test_gradients_of_graphs_are_not_differentiated_again(
    keywords: dict[str, Any], of: str, by: str
) -> None:
    """Autograd left out the graphs where another way led to the same tensor: -.051 for -.123."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    y0 = torch.randn(3, 2, requires_grad=True)
    leaf = {"state": y0, "weight": net[0].weight}
    run = fs.Compiled(backend="aot_eager")
    found = fs.solve(fs.ODE(lambda t, y: net(y)), y0, executor=run, **keywords).y1.sum()
    first = torch.autograd.grad(found, leaf[of], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"double backward|first derivatives"):
        torch.autograd.grad(first.square().sum(), leaf[by])


def test_implicit_graphs_serve_states_of_any_shape() -> None:
    """The third kind of row was an expression of sizes, which loops do not take."""
    ode, run = fs.ODE(lambda t, y: -y * y), fs.Compiled(backend="eager")
    keywords: dict[str, Any] = {"integrator": integrators.Kvaerno3()}
    with torch.no_grad():
        for shape in ((3, 2, 2), (3, 2, 3), (3, 2, 4), (5, 2, 4)):
            y0 = torch.rand(shape) + 0.5
            found = fs.solve(ode, y0, executor=run, **keywords).y1
            assert torch.allclose(found, fs.solve(ode, y0, **keywords).y1, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{}, {"save_at": torch.tensor([0.2, 1.0])}], ids=str)
def test_fields_that_loops_do_not_hold_are_refused_with_a_cure(keywords: dict[str, Any]) -> None:
    def branches(t: Tensor, y: Tensor) -> Tensor:
        return -y if t > 0.5 else 3.0 * y

    run = fs.Compiled(backend="eager")
    with pytest.raises(TypeError, match=r"use executor=Eager\(\)"):
        fs.solve(
            fs.ODE(branches), torch.ones(2, 2), integrator=integrators.Kvaerno3(), executor=run,
            **keywords,
        )  # fmt: skip


@pytest.mark.parametrize("recorded", [False, True])
def test_an_implicit_solve_stands_in_anothers_graph(recorded: bool) -> None:
    """``torch.compile`` around a solve is not its executor."""
    ode, y0 = fs.ODE(lambda t, y: -y * y), torch.rand(3, 2).requires_grad_(recorded)

    def end(y0: Tensor) -> Tensor:
        found = fs.solve(
            ode, y0, integrator=integrators.ImplicitEuler(), stepping=fs.Fixed(steps=2)
        ).y1
        assert isinstance(found, Tensor)
        return found

    # the tests' default device is a mode of torch's functions, in which the compiler's numpy fails
    with _pop_mode_temporarily(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of what it leaves to Python
        found = torch.compile(end, backend="eager")(y0)
    assert found.requires_grad == recorded
    assert torch.allclose(found, end(y0))
