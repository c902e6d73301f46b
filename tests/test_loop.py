"""The loop itself: what it costs, where its tensors live, what it keeps, who may drive it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowsde as fs
from benchmarks.counting import Counter, uncounted
from flowsde import integrators
from flowsde._loop import Loop
from flowsde.integrators import RK4, Dopri5, ExplicitRK, Heun, Integrator, Step, TorchDiffEq
from flowsde.integrators.base import Engine
from flowsde.models import realnvp

from .systems import admits, catalogue, generator, suited


def test_a_dopri5_step_costs_at_most_forty_operations_and_one_read() -> None:
    counts = []
    y0 = torch.randn(64, 2)
    for end in (2.0, 12.0):
        counter = Counter()
        f = uncounted(lambda t, y: torch.stack((y[:, 1], -4.0 * y[:, 0]), 1), counter)
        with torch.no_grad(), counter:
            sol = fs.solve(
                fs.ODE(f), y0, 0.0, end, integrator=Dopri5(), stepping=fs.Adaptive(1e-6, 1e-6)
            )
        counts.append((counter.operations, counter.reads, sol.stats.attempts))
    (ops0, reads0, n0), (ops1, reads1, n1) = counts
    assert n1 > n0 + 20
    assert (ops1 - ops0) / (n1 - n0) <= 40
    assert (reads1 - reads0) / (n1 - n0) <= 1


def test_given_steps_read_nothing_on_the_way() -> None:
    reads = []
    for steps in (5, 50):
        counter = Counter()
        with torch.no_grad(), counter:
            fs.solve(
                fs.ODE(lambda t, y: -y), torch.ones(3), integrator=RK4(),
                stepping=fs.Fixed(steps=steps), save_at=[0.1, 0.55],
            )  # fmt: skip
        reads.append(counter.reads)
    assert reads[0] == reads[1]


class Strays(TorchDispatchMode):
    """Notes operations that make a tensor anywhere but on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self.found.append(func.name())
        return out


@pytest.mark.parametrize(
    "method", [m for m in catalogue(integrators, Integrator) if not isinstance(m, Engine)], ids=str
)
def test_a_given_grid_on_meta_makes_no_other_tensor(method: Integrator) -> None:
    y0 = torch.ones(3, 2, device="meta")
    f = lambda t, y: -y
    keywords: dict[str, Any] = {"stepping": fs.Fixed(steps=4)}
    if isinstance(method, integrators.Iterate):
        made = realnvp(2, 2, 4, generator=torch.Generator("cpu").manual_seed(0))
        systems: list[tuple[fs.Dynamics, Any]] = [(made.to("meta"), y0)]
        keywords = {}
    else:
        systems = [suited(method, f, y0)]
        flow = fs.LinearSDE(fs.paths.VP()).probability_flow(f)
        if admits(method, flow):
            systems.append((flow, y0))
        if systems[0][0].noise is not None:
            keywords["path"] = fs.Brownian(0)
    for dynamics, start in systems:
        if dynamics.noise is None and not isinstance(dynamics, fs.Chain):
            keywords["t0"], keywords["t1"] = 0.9, 0.1
        with Strays() as strays:
            sol = fs.solve(dynamics, start, integrator=method, **keywords)
        assert {y.device.type for y in torch.utils._pytree.tree_leaves(sol.y1)} == {"meta"}
        assert not strays.found


# --- what is kept ---------------------------------------------------------------------------------


def test_saved_steps() -> None:
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2)
    sol = fs.solve(ode, y0, integrator=Heun(), stepping=fs.Fixed(steps=10), save_at=fs.Steps(4))
    assert sol.ts is not None
    assert torch.allclose(sol.ts, torch.tensor([0.0, 0.4, 0.8, 1.0]))
    assert torch.equal(sol.ys[0], y0)
    assert torch.equal(sol.ys[-1], sol.y1)
    sol = fs.solve(ode, y0, integrator=Heun(), stepping=fs.Fixed(steps=10), save_at=fs.Steps())
    assert len(sol.ts) == 11  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_states_keep_their_dtype(dtype: torch.dtype) -> None:
    y0 = torch.ones(3, dtype=dtype)
    for stepping in (fs.Fixed(steps=20), fs.Adaptive()):
        sol = fs.solve(fs.ODE(lambda t, y: -y * t), y0, stepping=stepping, save_at=[0.3, 1.0],
                       integrator=Dopri5())  # fmt: skip
        assert sol.y1.dtype == sol.ys.dtype == dtype
        assert torch.allclose(sol.y1, y0 * math.exp(-0.5), rtol=1e-4)


def test_times_are_kept_to_float64() -> None:
    """A float32 state does not round the clock."""
    ends = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        ends.append(t)
        return 0.0 * y

    at = [0.1, 0.3, 0.7]
    sol = fs.solve(fs.ODE(f), torch.ones(2, dtype=torch.float32), 0.1, 0.7, save_at=at,
                   integrator=RK4(), stepping=fs.Fixed(steps=3))  # fmt: skip
    assert sol.ts is not None
    assert sol.ts.tolist() == at
    assert ends[0].dtype == torch.float32


@pytest.mark.parametrize(
    "method", [m for m in catalogue(integrators, Integrator) if not isinstance(m, Engine)], ids=str
)
def test_many_saved_times_are_the_states_between_steps_and_so_are_their_gradients(
    method: Integrator,
) -> None:
    if isinstance(method, integrators.Iterate):
        pytest.skip("a chain has no states between its steps")
    dynamics, y0 = suited(method, lambda t, y: torch.cos(y) - t, torch.linspace(0.5, 1.0, 6))
    timed = dynamics.noise is None
    keywords: dict[str, Any] = {"integrator": method, "stepping": fs.Fixed(steps=2)}
    keywords |= {"t0": 0.2, "t1": 1.2} if timed else {"path": fs.Brownian(0)}
    found = []
    for together in (True, False):
        rate = torch.tensor(0.3, requires_grad=True)
        start = torch.utils._pytree.tree_map(lambda y, rate=rate: (rate * y)[:, None], y0)
        times = torch.linspace(0.25, 1.0, 30, requires_grad=timed)
        if together:
            ys = fs.solve(dynamics, start, save_at=times, **keywords).ys
        else:
            sol = fs.solve(dynamics, start, dense=True, **keywords)
            ys = torch.utils._pytree.tree_map(lambda *y: torch.stack(y), *map(sol, times))
        flat = torch.cat([y.flatten() for y in torch.utils._pytree.tree_leaves(ys)])
        weights = torch.linspace(0.5, 2.0, len(flat))
        inputs = (rate, times) if timed else (rate,)
        found.append((flat, *torch.autograd.grad((weights * flat.square()).sum(), inputs)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
@pytest.mark.parametrize("method", [Dopri5(), Heun(), integrators.Kvaerno5()], ids=str)
def test_states_of_any_shape_are_saved_at_many_times(
    method: Integrator, shape: tuple[int, ...], mixed: bool
) -> None:
    start = {"a": torch.ones(shape), "b": torch.full(shape, 2.0)}
    if mixed:
        start["c"] = torch.ones(2, 1, 2, 1)
    elif isinstance(method, ExplicitRK):
        start["c"] = torch.ones(shape) * 1j
    ode = fs.ODE(lambda t, y: {name: -t * value for name, value in y.items()})
    times = torch.linspace(0.0, 1.0, 40)
    keywords: dict[str, Any] = {"integrator": method, "stepping": fs.Fixed(steps=2)}
    many = fs.solve(ode, start, save_at=times, **keywords).ys
    sol = fs.solve(ode, start, dense=True, **keywords)
    for name, value in start.items():
        assert many[name].shape == (40, *value.shape)
        each = torch.stack([sol(t)[name] for t in times])
        assert torch.allclose(many[name], each, rtol=1e-13, atol=1e-13)


def test_many_saved_times_cost_no_more_than_a_few() -> None:
    counts = []
    for n in (100, 1000):
        with torch.no_grad(), Counter() as counter:
            fs.solve(fs.ODE(lambda t, y: -y), torch.ones(3), integrator=Dopri5(),
                     stepping=fs.Fixed(steps=4), save_at=torch.linspace(0.0, 1.0, n))  # fmt: skip
        counts.append(counter.operations)
    assert counts[0] == counts[1]


def test_dense_output_meets_saved_times() -> None:
    for method in catalogue(integrators, ExplicitRK):
        times = [0.0, 0.13, 0.5, 0.77, 1.0]
        keywords: dict[str, Any] = {"integrator": method, "stepping": fs.Fixed(steps=7)}
        ode, y0 = fs.ODE(lambda t, y: -y * t.cos()), torch.ones(2)
        dense = fs.solve(ode, y0, dense=True, **keywords)
        saved = fs.solve(ode, y0, save_at=times, **keywords)
        assert torch.allclose(dense(times), saved.ys, atol=1e-14)


def test_solver_bundles_keywords() -> None:
    solver = fs.Solver(Dopri5(), fs.Adaptive(1e-9, 1e-9), max_steps=500)
    ode, y0 = fs.ODE(lambda t, y: -y), torch.ones(2)
    assert torch.equal(
        solver.solve(ode, y0).y1,
        fs.solve(ode, y0, integrator=Dopri5(), stepping=fs.Adaptive(1e-9, 1e-9)).y1,
    )
    with pytest.raises(fs.MaxStepsReached):
        solver.solve(ode, y0, max_steps=1)


def test_a_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for stepping in (fs.Fixed(steps=5), fs.Adaptive(), fs.Adaptive(per_sample=True)):
        fs.solve(fs.ODE(lambda t, y: -y, batched_time=True), torch.ones(2, 1), stepping=stepping,
                 integrator=Dopri5(), progress=True)  # fmt: skip
        assert "100%" in capsys.readouterr().err
    fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "stepping", [fs.Fixed(steps=5), fs.Adaptive(), fs.Adaptive(per_sample=True)], ids=str
)
def test_a_function_sees_every_step(stepping: fs.Stepping) -> None:
    """With the whole batch, also where samples that have arrived are left out."""
    y0, ends = torch.linspace(0.5, 2.0, 16)[:, None], torch.linspace(0.1, 3.0, 16)
    ode, seen = fs.ODE(lambda t, y: -y * y, batched_time=True, rowwise=True), list[Any]()
    own = isinstance(stepping, fs.Adaptive) and stepping.per_sample
    sol = fs.solve(
        ode, y0, 0.0, ends if own else 1.0, stepping=stepping, integrator=Dopri5(),
        progress=lambda done, t, y: seen.append((done, t, y)),
    )  # fmt: skip
    parts, times, states = zip(*seen, strict=True)
    assert parts[-1] == pytest.approx(1.0)
    assert all(a <= b for a, b in itertools.pairwise(parts))
    assert torch.allclose(torch.as_tensor(times[-1]), torch.as_tensor(sol.t1))
    assert torch.equal(states[-1], sol.y1)
    for t, y in zip(times, states, strict=True):
        t = torch.as_tensor(t).reshape(-1, 1)
        assert torch.allclose(y, y0 / (1.0 + y0 * t), rtol=1e-3)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("norm", [fs.stepping.rms_norm, fs.stepping.max_norm])
def test_norms_controllers_and_first_steps(norm: Any, per_sample: bool) -> None:
    y0 = torch.randn(3, 2)
    ode = fs.ODE(lambda t, y: -y.sin(), batched_time=True)
    truth = fs.solve(ode, y0, 0.0, 3.0, stepping=fs.Adaptive(1e-12, 1e-12)).y1
    for more in (
        {}, {"pcoeff": 0.2, "icoeff": 0.65}, {"pcoeff": 0.3, "icoeff": 0.4, "dcoeff": 0.1},
        {"dt0": 1e-3}, {"dt_max": 0.2}, {"rtol": torch.tensor([1e-6, 1e-7])},
    ):  # fmt: skip
        given = {"rtol": 1e-7, "atol": 1e-7, "norm": norm, "per_sample": per_sample, **more}
        sol = fs.solve(ode, y0, 0.0, 3.0, stepping=fs.Adaptive(**given), save_at=fs.Steps())
        assert float((sol.y1 - truth).abs().max()) < 2e-5
        assert sol.ts is not None
        if "dt_max" in more:
            assert float(sol.ts.diff(dim=0).max()) < 0.203
        if "dt0" in more:
            assert float(sol.ts[1].max()) == pytest.approx(1e-3)


def test_norms_of_pytrees_are_those_of_the_whole() -> None:
    a, b = torch.randn(3, 2), torch.randn(3, 5)
    whole = torch.cat((a, b), 1)
    for norm in (fs.stepping.rms_norm, fs.stepping.max_norm):
        for per_sample in (False, True):
            assert torch.allclose(norm((a, b), per_sample), norm(whole, per_sample))


# --- seams ----------------------------------------------------------------------------------------


def test_an_executor_takes_the_steps() -> None:
    @dataclass(frozen=True)
    class Counting(fs.Executor):
        calls: list[int]

        def prepare(self, loop: Loop, dynamics: fs.Dynamics) -> None:
            def counted(*args: Any) -> Step:
                self.calls.append(1)
                return loop.step(*args)

            loop.advance = counted

    counting = Counting([])
    fs.solve(fs.ODE(lambda t, y: -y), torch.ones(2), integrator=RK4(), executor=counting,
             stepping=fs.Fixed(steps=7))  # fmt: skip
    assert len(counting.calls) == 7


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "rk4"])
def test_torchdiffeq_plugs_in(method: str) -> None:
    """Its answers are its own odeint's, pytrees included, and they differentiate."""
    from torchdiffeq import odeint

    w = torch.randn(2, 2, requires_grad=True)
    ode = fs.ODE(lambda t, y: (torch.tanh(y[0] @ w), -y[1] * t))
    y0 = torch.randn(3, 2, requires_grad=True), torch.ones(4)
    stepping = fs.Fixed(dt=0.01) if method == "rk4" else fs.Adaptive(1e-7, 1e-7)
    sol = fs.solve(ode, y0, 0.0, 1.0, integrator=TorchDiffEq(method), stepping=stepping,
                   save_at=[0.0, 0.4, 1.0])  # fmt: skip
    exact = fs.solve(ode, y0, 0.0, 1.0, stepping=fs.Adaptive(1e-10, 1e-10), save_at=[0.0, 0.4, 1.0])
    for ours, theirs in zip(sol.ys, exact.ys, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    (g,) = torch.autograd.grad(sol.y1[0].sum(), [w])
    (h,) = torch.autograd.grad(exact.y1[0].sum(), [w])
    assert torch.allclose(g, h, atol=1e-3)
    if method == "dopri5":
        direct = odeint(
            ode, y0, torch.tensor([0.0, 0.4]), method="dopri5", rtol=1e-7,
            atol=1e-7,
        )  # fmt: skip
        assert torch.equal(sol.ys[0][1], direct[0][1])
    assert sol.stats.evaluations > 0


def test_maps_run_in_pieces() -> None:
    made = realnvp(3, 5, 8, generator=torch.Generator("cpu").manual_seed(0))
    x = torch.randn(4, 3)
    whole = fs.solve(made, x, save_at=[0, 2, len(made)])
    part = fs.solve(made, x, 0, 2).y1
    assert torch.equal(whole.ys[1], part)
    assert torch.equal(fs.solve(made, part, 2, len(made)).y1, whole.y1)
    nested = fs.Composed([fs.Composed(list(made.layers)[:2]), fs.Composed(list(made.layers)[2:])])  # type: ignore[arg-type]
    y, ladj = nested.step(0, x)
    assert torch.equal(y, part)
    back, inverse = nested.unstep(0, y)
    assert torch.allclose(back, x)
    assert torch.allclose(ladj + inverse, torch.zeros(4))
    assert generator().device.type


class Doubling(fs.Chain):
    """A chain that does not invert, and changes shape."""

    def __len__(self) -> int:
        return 3

    def step(self, k: int, y: Tensor, *args: Any) -> tuple[Tensor, None]:
        return torch.cat((y, y), -1), None


def test_chains_may_change_shape_and_need_not_invert() -> None:
    assert fs.solve(Doubling(), torch.ones(2, 1)).y1.shape == (2, 8)
    with pytest.raises(TypeError, match="does not invert"):
        fs.solve(Doubling(), torch.ones(2, 8), 3, 0)
    with pytest.raises(TypeError, match="make the chain a Map"):
        fs.log_density(Doubling())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("dt_max", "steps"), [(math.inf, 1), (1.0, 2)])
def test_the_last_step_leaves_no_sliver(per_sample: bool, dt_max: float, steps: int) -> None:
    """A few per cent that would be left are taken along, unless a bound forbids it."""
    stepping = fs.Adaptive(dt0=1.0, dt_max=dt_max, factor_max=1.001, per_sample=per_sample)
    dynamics = fs.ODE(lambda t, y: torch.ones_like(y), batched_time=True)
    solution = fs.solve(dynamics, torch.zeros(2, 1), 0.0, 1.04, stepping=stepping)
    assert (torch.as_tensor(solution.stats.accepted) == steps).all()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("safety", [0.5, 0.9, 0.999])
def test_a_last_step_that_is_rejected_becomes_shorter(safety: float, per_sample: bool) -> None:
    stepping = fs.Adaptive(1e-6, 1e-6, safety=safety, per_sample=per_sample)
    dynamics = fs.ODE(lambda t, y: torch.stack((y[:, 1], -y[:, 0]), 1), batched_time=True)
    y0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for end in torch.linspace(0.5, 8.0, 40).tolist():
        solution = fs.solve(dynamics, y0, 0.0, end, stepping=stepping, max_steps=300)
        turned = torch.tensor([[math.cos(end), -math.sin(end)], [math.sin(end), math.cos(end)]])
        torch.testing.assert_close(solution.y1, turned, atol=1e-3, rtol=0.0)
