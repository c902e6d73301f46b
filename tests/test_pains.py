"""What users of other solvers of ODEs suffer: each test is named after the cure they meet here.

Most laws are tested at length elsewhere; these are the ends that a user sees.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowsde as fs
from benchmarks.counting import Counter, uncounted
from flowsde.integrators import (
    RK4,
    Adams,
    Dopri5,
    Dopri8,
    ImplicitEuler,
    Kvaerno3,
    Kvaerno5,
    ReversibleRK,
    Tsit5,
)  # fmt: skip

from .systems import generator, slope

ADJOINTS = [
    (fs.Direct(), Tsit5()), (fs.Checkpointed(), Tsit5()), (fs.Reversible(), ReversibleRK(Tsit5())),
    (fs.Backsolve(), Tsit5()), (fs.Direct(), Kvaerno3()), (fs.Checkpointed(), Kvaerno3()),
]  # fmt: skip


def named(value: Any) -> str:
    return type(value).__name__


class Rows:
    """dy/dt = rate (sin t - y), stiff in no one, that counts its calls and their rows."""

    def __init__(self, rate: Tensor | float) -> None:
        self.rate, self.calls, self.rows = rate, 0, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(y)
        return self.rate * (t.sin().reshape(-1, 1) - y)


# --- steps and failures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "error", "told"),
    [
        (lambda t, y: y.square(), fs.StepUnderflow, "may blow up"),
        (lambda t, y: torch.where(t > 0.5, torch.nan, -y), fs.NonFiniteState, "not finite"),
        (lambda t, y: 1e5 * (t.cos() - y), fs.MaxStepsReached, "stiffness is likely.*Kvaerno5"),
    ],
    ids=["blow-up", "nan", "stiff"],
)
def test_a_step_that_underflows_names_its_place_and_a_cure(
    f: Any, error: type[fs.SolveError], told: str
) -> None:
    """torchdiffeq #27, #57, #244: "underflow in dt nan"."""
    with pytest.raises(error, match=told) as caught:
        fs.solve(fs.ODE(f), torch.tensor([0.1, 1.9]), max_steps=400)
    assert re.search(r"at t = .* with dt = .* \(worst component \(\d,\)\)", str(caught.value))
    assert 0.0 < float(caught.value.solution.t1) < 1.0


def test_a_method_that_finds_no_root_does_not_blame_the_field() -> None:
    """A Newton iteration that fails at every step size is not a field that is not finite."""
    f = lambda t, y: torch.where(y > 0, -1.0, 1e9)
    with pytest.raises(fs.SolveError, match="Newton") as caught:
        fs.solve(fs.ODE(f), torch.tensor([[0.5]]), integrator=Kvaerno3(),
                 stepping=fs.Adaptive(1e-9, 1e-9))  # fmt: skip
    assert "field is not finite" not in str(caught.value)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_host_reads_once_a_step(monkeypatch: pytest.MonkeyPatch, per_sample: bool) -> None:
    """torchdiffeq #15, #174, #186: slower on a GPU, which 18 reads a step keep waiting."""
    reads: list[tuple[int, int]] = []
    copied: dict[int, Tensor] = {}  # what tolist() read, which no dispatcher sees
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: tolist(copied.setdefault(id(x), x)))
    for t1 in (1.0, 3.0):
        counter = Counter()
        f = uncounted(Rows(1.0), counter)
        with counter:
            sol = fs.solve(
                fs.ODE(f, batched_time=True), torch.ones(3, 1), 0.0, t1, integrator=Dopri5(),
                stepping=fs.Adaptive(1e-6, 1e-6, per_sample=per_sample, dt0=0.1),
            )  # fmt: skip
        reads.append((counter.reads + len(copied), sol.stats.attempts))
        copied.clear()
    more, steps = (b - a for a, b in zip(*reads, strict=True))
    assert more == steps > 0


def test_a_hard_sample_leaves_the_easy_ones_alone() -> None:
    """diffrax #500: one dt for all follows the hardest of them; here the rest are left out."""
    rows = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal rows
        rows += len(y)
        x, rate = y.unbind(1)
        return torch.stack((rate * (t.sin() - x), 0.0 * rate), 1)

    y0 = torch.tensor([0.0, 1.0]).repeat(16, 1)
    y0[3, 1] = 400.0  # the second component is its rate
    stepping = fs.Adaptive(1e-4, 1e-4, per_sample=True)
    sol = fs.solve(fs.ODE(f, batched_time=True, rowwise=True), y0, 0.0, 2.0, stepping=stepping)
    steps: Any = sol.stats.accepted
    assert int(steps[3]) > 10 * int(steps.sum() - steps[3]) / 15
    assert rows < 16 * sol.stats.evaluations / 4
    for i in (0, 3):
        alone = fs.solve(fs.ODE(f, batched_time=True), y0[i : i + 1], 0.0, 2.0, stepping=stepping)
        assert torch.allclose(sol.y1[i], alone.y1[0], atol=1e-10)


def test_each_sample_has_its_own_span_and_save_times() -> None:
    """torchdiffeq #122, torchode #21."""
    t0, t1 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.5, 4.0])
    save = t0[:, None] + (t1 - t0)[:, None] * torch.tensor([0.25, 1.0])
    ode = fs.ODE(lambda t, y: -y * t[:, None], batched_time=True)
    sol = fs.solve(ode, torch.ones(3, 1), t0, t1, save_at=save, stepping=fs.Adaptive(1e-8, 1e-8))
    exact = (0.5 * (t0[:, None].square() - save.square())).exp()
    assert torch.allclose(sol.ys[..., 0].T, exact, atol=1e-6)
    assert torch.allclose(sol.y1[:, 0], exact[:, 1], atol=1e-6)


def test_the_step_cap_hands_back_what_there_is() -> None:
    """torchdiffeq #278, diffrax #268: a cap that raises and drops it all."""
    sol = fs.solve(
        fs.ODE(Rows(300.0)), torch.ones(2, 1), 0.0, 1.0, max_steps=40, throw=False,
        save_at=[0.01, 0.9], dense=True,
    )  # fmt: skip
    assert sol.status is fs.Status.MAX_STEPS
    assert "max_steps = 40" in sol.message
    assert 0.01 < float(sol.t1) < 0.9
    assert sol.ts is not None
    assert sol.ts.tolist() == [0.01]
    assert torch.allclose(sol(0.01), sol.ys[0])
    assert bool(torch.isfinite(sol.y1).all())


def test_evaluations_are_counted_there_and_back() -> None:
    """torchdyn #131, diffrax #195: they are the cost, and could not be seen."""
    for adjoint in (fs.Checkpointed(1), fs.Backsolve()):
        f, y0 = Rows(1.0), torch.ones(2, 1, requires_grad=True)
        ode = fs.ODE(lambda t, y, f=f: f(t, y.sin()))
        sol = fs.solve(ode, y0, adjoint=adjoint, stepping=fs.Adaptive(1e-4, 1e-4))
        before = f.calls
        assert sol.stats.backward_evaluations == 0
        sol.y1.sum().backward()
        # for tensors held from outside, and whether it repeats itself
        checks = 3 if isinstance(adjoint, fs.Backsolve) else 0
        assert before == sol.stats.evaluations + checks
        assert f.calls - before == sol.stats.backward_evaluations > 0


def test_output_times_are_never_the_step_grid() -> None:
    """torchdiffeq #137: rk4 stepped from one output to the next, without a word."""
    coarse, fine = [0.5, 1.0], torch.linspace(0.1, 1.0, 10).tolist()
    for stepping in (fs.Fixed(steps=7), fs.Adaptive(1e-5, 1e-5)):
        method = RK4() if isinstance(stepping, fs.Fixed) else Tsit5()
        ends = [
            fs.solve(fs.ODE(Rows(3.0)), torch.ones(1, 1), integrator=method, stepping=stepping,
                     save_at=at)
            for at in (coarse, fine)
        ]  # fmt: skip
        assert torch.equal(ends[0].y1, ends[1].y1)
        assert ends[0].stats.accepted == ends[1].stats.accepted
    with pytest.raises(TypeError, match="needs its steps named"):
        fs.solve(fs.ODE(Rows(3.0)), torch.ones(1, 1), integrator=RK4(), save_at=fine)


def test_time_is_continuous_and_a_grid_is_used_verbatim() -> None:
    """diffusers #5687, #12771, #10146: integer timesteps merge; the grid belongs to the sampler."""
    seen: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return -y

    grid = torch.cat((torch.linspace(0.999, 0.9985, 6), torch.tensor([0.4, 0.0])))
    keywords: dict[str, Any] = {"integrator": fs.integrators.Euler(), "stepping": fs.Grid(grid)}
    ends = [fs.solve(fs.ODE(f), torch.ones(2), 0.999, 0.0, **keywords).y1 for _ in range(2)]
    assert seen[:7] == seen[7:] == grid[:-1].tolist()
    assert torch.equal(ends[0], ends[1])  # a functional step has no index to overrun


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adjoint", "method"), ADJOINTS, ids=named)
def test_arguments_are_differentiated_by_every_adjoint(
    adjoint: fs.Adjoint, method: fs.Integrator
) -> None:
    """torchdiffeq #23, #102, #204, #246: no args, and closures whose gradient is lost."""
    u, held = (torch.tensor(v, requires_grad=True) for v in (0.7, 0.3))
    keywords: dict[str, Any] = {
        "integrator": method, "adjoint": adjoint, "stepping": fs.Adaptive(1e-6, 1e-6)
    }  # fmt: skip
    y1 = fs.solve(fs.ODE(lambda t, y, u: -u * y), torch.ones(1, 1), args=(u,), **keywords).y1
    (g,) = torch.autograd.grad(y1.sum(), u)
    assert float(g) == pytest.approx(-math.exp(-0.7), rel=1e-4)
    closure = fs.ODE(lambda t, y: -held * y)
    if isinstance(adjoint, (fs.Direct, fs.Checkpointed)):
        (g,) = torch.autograd.grad(fs.solve(closure, torch.ones(1, 1), **keywords).y1.sum(), held)
        assert float(g) == pytest.approx(-math.exp(-0.3), rel=1e-4)
    else:
        with pytest.raises(TypeError, match=r"args=\(u,\)"):
            fs.solve(closure, torch.ones(1, 1), **keywords)


def test_checkpointed_gradients_are_exact_and_bounded_in_memory() -> None:
    """torchdiffeq #243, #259, #54: an adjoint that is neither exact nor O(1)."""
    w, y0 = torch.randn(8, 8) / 8, torch.randn(64, 8, requires_grad=True)
    kept, found = {}, {}
    for adjoint in (fs.Direct(), fs.Checkpointed(300_000)):
        for steps in (40, 160):
            held: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, h=held: h.append(x) or x, _is):
                sol = fs.solve(
                    fs.ODE(lambda t, y: torch.tanh(y @ w)), y0, integrator=RK4(), adjoint=adjoint,
                    stepping=fs.Fixed(steps=steps),
                )  # fmt: skip
            kept[named(adjoint), steps] = sum(x.nbytes for x in held)
            (found[named(adjoint), steps],) = torch.autograd.grad(sol.y1.square().sum(), y0)
    assert kept["Direct", 160] > 3 * kept["Direct", 40] > 0
    assert kept["Checkpointed", 160] == kept["Checkpointed", 40] < 300_000
    assert torch.equal(found["Direct", 160], found["Checkpointed", 160])


def _is(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("adjoint", "method"), [*ADJOINTS, (fs.Direct(), ImplicitEuler())], ids=named
)  # fmt: skip
def test_second_derivatives_are_right_or_refused(
    adjoint: fs.Adjoint, method: fs.Integrator
) -> None:
    """torchdiffeq #29, #217. Also as one term of a loss, where a lost one would not be seen."""
    u = torch.tensor(0.8, requires_grad=True)
    ode = fs.ODE(lambda t, y, u: -u * u * y.square())
    y1 = fs.solve(ode, torch.ones(1, 1), args=(u,), integrator=method, adjoint=adjoint,
                  stepping=fs.Fixed(steps=20)).y1.sum()  # fmt: skip
    (g,) = torch.autograd.grad(y1, u, create_graph=True)
    twice = isinstance(adjoint, (fs.Direct, fs.Checkpointed)) and isinstance(method, Tsit5)
    if twice:
        (h,) = torch.autograd.grad(u.square() + g, u)
        exact = 1.6 + (6.0 * 0.64 - 2.0) / 1.64**3  # g is the slope of 1 / (1 + u^2)
        assert float(h) == pytest.approx(exact, rel=1e-8)
    else:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (u.square() + g).backward()


def test_vmap_maps_solves_on_given_steps() -> None:
    """torchdiffeq #282; per-sample stepping is what adaptive batches are for."""
    y0, u = torch.rand(3, 2), torch.rand(3)

    def end(y: Tensor, u: Tensor, stepping: fs.Stepping) -> Tensor:
        return fs.solve(fs.ODE(lambda t, y, u: -u * y), y, args=(u,), stepping=stepping).y1

    ends = torch.func.vmap(lambda y, u: end(y, u, fs.Fixed(steps=8)))(y0, u)
    assert torch.allclose(ends, y0 * (-u).exp()[:, None], atol=1e-7)
    with pytest.raises(TypeError, match="per_sample=True"):
        torch.func.vmap(lambda y, u: end(y, u, fs.Adaptive()))(y0, u)


@torch.no_grad()
def test_stiff_systems_cost_what_their_solutions_ask() -> None:
    """torchdiffeq #75, #214, #254, torchode #39: van der Pol's oscillator, mu = 1000."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack((v, 1000.0 * (1.0 - x * x) * v - x), -1)

    y0 = torch.tensor([[2.0, 0.0], [1.9, 0.0]])
    stepping = fs.Adaptive(1e-5, 1e-7, per_sample=True)
    sol = fs.solve(fs.ODE(f, batched_time=True), y0, 0.0, 100.0, integrator=Kvaerno5(),
                   stepping=stepping)  # fmt: skip
    assert sol.stats.attempts < 60
    with pytest.raises(fs.MaxStepsReached, match="Use an implicit method, such as Kvaerno5"):
        fs.solve(fs.ODE(f, batched_time=True), y0, 0.0, 100.0, stepping=stepping, max_steps=300)


# --- events ---------------------------------------------------------------------------------------


def test_events_are_each_samples_own_and_differentiate() -> None:
    """torchdiffeq #208, #221: one event for the whole batch, and no gradient of its time."""
    height = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    y0 = torch.stack((height, torch.zeros(3)), 1)
    fall = fs.ODE(lambda t, y: torch.stack((y[:, 1], -torch.ones(len(y))), 1), batched_time=True)
    sol = fs.solve(fall, y0, 0.0, 10.0, events=fs.Event(lambda t, y: y[:, 0]),
                   stepping=fs.Adaptive(1e-8, 1e-8, per_sample=True))  # fmt: skip
    assert torch.allclose(sol.t1, (2.0 * height).sqrt(), atol=1e-9)
    (g,) = torch.autograd.grad(sol.t1.sum(), height)
    assert torch.allclose(g, (2.0 * height.detach()).rsqrt(), atol=1e-7)


def test_events_see_both_crossings_within_one_step() -> None:
    """torchdiffeq #282: signs at the ends of steps alone do not change."""
    rise = fs.ODE(lambda t, y: torch.ones_like(y))
    dip = fs.Event(lambda t, y: (y - 0.3) * (y - 0.6), terminal=False)
    sol = fs.solve(rise, torch.zeros(()), events=dip, integrator=RK4(), stepping=fs.Fixed(steps=1))
    assert sol.events is not None
    assert torch.allclose(sol.events.ts[0], torch.tensor([0.3, 0.6]))


# --- devices and dtypes ---------------------------------------------------------------------------


class _Dtypes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = torch.utils._pytree.tree_leaves(out)
        self.seen |= {x.dtype for x in found if isinstance(x, Tensor) and not x.is_meta}
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_single_precision_solves_make_no_double(dtype: torch.dtype) -> None:
    """torchdiffeq #223, #257, #133: devices without float64, and complex states."""
    y0, w = torch.ones(2, dtype=dtype), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    ode, ways = fs.ODE(lambda t, y, w: -w * y * t), ((fs.Fixed(4), RK4()), (fs.Adaptive(), Tsit5()))
    with _Dtypes() as dtypes:
        for stepping, method in ways:
            sol = fs.solve(ode, y0, args=(w,), integrator=method, stepping=stepping)
            (g,) = torch.autograd.grad(sol.y1.abs().sum(), w)
            assert sol.y1.dtype == g.dtype == dtype
            assert torch.allclose(sol.y1.detach(), torch.full_like(y0, math.exp(-0.25)), rtol=1e-4)
    assert not dtypes.seen & {torch.float64, torch.complex128}


# --- flows ----------------------------------------------------------------------------------------


def test_the_probe_of_a_density_is_fixed_for_the_solve() -> None:
    """torchdiffeq #120: a probe drawn anew makes the field random, and its steps vanish."""
    a = torch.randn(4, 4)
    flow = fs.log_density(fs.ODE(lambda t, y: torch.tanh(y @ a)), fs.Hutchinson(1))
    y0, calls = (torch.randn(8, 4), torch.zeros(8)), []
    for _ in range(2):
        sol = fs.solve(flow, y0, generator=generator(), stepping=fs.Adaptive(1e-6, 1e-6))
        calls.append((sol.stats.evaluations, sol.y1[1]))
    plain = fs.solve(flow.dynamics, y0[0], stepping=fs.Adaptive(1e-6, 1e-6)).stats.evaluations
    assert calls[0][0] == calls[1][0] < 2 * plain
    assert torch.equal(calls[0][1], calls[1][1])


def test_likelihoods_have_gradients_with_any_number_of_probes() -> None:
    """flow_matching #59, #28, #49."""
    w = torch.full((3,), 0.4, requires_grad=True)
    for divergence in (fs.Exact(), fs.Hutchinson(1), fs.Hutchinson(3)):
        flow = fs.log_density(fs.ODE(lambda t, y, w: -w * y), divergence)
        sol = fs.solve(flow, (torch.randn(5, 3), torch.zeros(5)), args=(w,), generator=generator())
        (g,) = torch.autograd.grad(sol.y1[1].sum(), w)
        assert torch.allclose(g, torch.full((3,), 5.0), rtol=1e-4)  # tr J = -sum w, exactly


# --- where the peers are wrong --------------------------------------------------------------------


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[..., 1], -y[..., 0].sin() + 0.2 * t.cos()), -1)


@torch.no_grad()
def test_tsit5_propagates_its_own_weights() -> None:
    """torchdiffeq's are 20 times off dopri5's error at equal tolerance."""
    y0 = torch.tensor([1.0, 0.3])
    truth = fs.solve(fs.ODE(pendulum), y0, 0.0, 5.0, integrator=Dopri8(),
                     stepping=fs.Adaptive(1e-12, 1e-12)).y1  # fmt: skip
    for tolerance in (1e-5, 1e-8):
        errors = [
            float((fs.solve(fs.ODE(pendulum), y0, 0.0, 5.0, integrator=method,
                            stepping=fs.Adaptive(tolerance, tolerance)).y1 - truth).norm())
            for method in (Tsit5(), Dopri5())
        ]  # fmt: skip
        assert errors[0] < 3 * errors[1]


@torch.no_grad()
def test_adams_keeps_its_order_on_a_grid_of_any_spacing() -> None:
    """torchdiffeq's takes the coefficients of equal steps."""
    y0, errors, counts = torch.tensor([1.0, 0.3]), [], [40, 60, 80]
    truth = fs.solve(fs.ODE(pendulum), y0, 0.0, 3.0, integrator=Dopri8(),
                     stepping=fs.Adaptive(1e-12, 1e-12)).y1  # fmt: skip
    for n in counts:
        u = torch.linspace(0.0, 1.0, n + 1)
        grid = fs.Grid(3.0 * (u + 0.4 / n * torch.tensor([0.0, 1.0]).repeat(n)[: n + 1] * (u < 1)))
        sol = fs.solve(fs.ODE(pendulum), y0, 0.0, 3.0, integrator=Adams(4), stepping=grid)
        errors.append(float((sol.y1 - truth).norm()))
    assert slope(errors, counts) > 3.65, errors


@torch.no_grad()
def test_states_between_steps_are_as_exact_as_those_at_the_end() -> None:
    """torchdiffeq's dopri8: 1e-12 at the end, 2e-6 between."""
    y0, stepping = torch.tensor([1.0, 0.3]), fs.Adaptive(1e-9, 1e-9)
    between = fs.solve(fs.ODE(pendulum), y0, 0.0, 5.0, integrator=Dopri8(), stepping=stepping,
                       save_at=torch.linspace(0.0, 5.0, 12))  # fmt: skip
    truth = fs.solve(
        fs.ODE(pendulum), y0, 0.0, 5.0, integrator=Dopri8(), save_at=between.ts,
        stepping=fs.Adaptive(1e-13, 1e-13, step_at=between.ts),
    )  # fmt: skip
    errors = (between.ys - truth.ys).norm(dim=-1)
    assert float(errors.max()) < 3 * max(float(errors[-1]), 1e-9)


def test_a_failed_sample_neither_stops_the_others_nor_passes_for_one() -> None:
    """torchode: the others stop early and report success; what was not reached is anything."""
    ode = fs.ODE(lambda t, y: y.square(), batched_time=True)
    y0 = torch.tensor([[[0.5, 0.1]], [[2.0, 0.1]], [[0.25, 0.1]]])  # of any rank
    sol = fs.solve(ode, y0, save_at=[0.3, 1.0], throw=False,
                   stepping=fs.Adaptive(1e-6, 1e-6, per_sample=True))  # fmt: skip
    assert (sol.status == fs.Status.SUCCESS).tolist() == [True, False, True]
    others = torch.tensor([0, 2])
    assert torch.allclose(sol.y1[others], 1 / (1 / y0[others] - 1), rtol=1e-4)
    assert bool(torch.isfinite(sol.ys[0]).all())
    assert bool(torch.isnan(sol.ys[1, 1]).all())
