"""What comes in at a door is looked at there: each of these once went on, or fell over later."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

import flowsde as fs
from flowsde import models, objectives, series
from flowsde.dynamics import NoisePrediction
from flowsde.integrators import (
    DDIM,
    GMRES,
    RK4,
    RKC2,
    Dopri5,
    DPMSolverPP,
    Heun,
    Kvaerno3,
    PredictorCorrector,
)  # fmt: skip
from flowsde.paths import (
    EDM,
    VE,
    VP,
    Discrete,
    FlowMatching,
    Independent,
    Linear,
    LogSignature,
    OptimalTransport,
    SubVP,
    aligned,
)  # fmt: skip

from .systems import DEVICE
from .systems import generator as draws

TIMES = torch.linspace(0.0, 1.0, 5, device=DEVICE)


class Decay(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("integrator", [Dopri5(), RK4()], ids=str)
def test_a_solve_stands_beside_anothers_graph(integrator: fs.Integrator, backend: str) -> None:
    """Its host numbers are no guards, chosen steps or given ones; gradients come through."""
    net = nn.Linear(2, 2)
    ode = fs.ODE(lambda t, y: net(y).tanh() - y)
    stepping = fs.Adaptive() if isinstance(integrator, Dopri5) else fs.Fixed(steps=3)

    def end(y0: Tensor) -> Tensor:
        found = fs.solve(ode, 1.0 * y0, integrator=integrator, stepping=stepping).y1
        assert isinstance(found, Tensor)
        return found.square()

    y0 = torch.rand(3, 2).requires_grad_()
    with _pop_mode_temporarily(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(end, backend=backend)
        assert torch.equal(compiled(y0), end(y0))
        slopes = [torch.autograd.grad(f(y0).sum(), y0)[0] for f in (compiled, end)]
    assert torch.allclose(*slopes, atol=1e-12)


@pytest.mark.parametrize(
    "dynamics",
    [
        fs.ODE(Decay()),
        fs.ODE(Decay(), linear=-1.0),
        fs.ODE(Decay(), implicit=Decay()),
        fs.SDE(Decay(), lambda t, y: y, noise="diagonal"),
    ],
    ids=["ODE", "linear", "implicit", "SDE"],
)
def test_hooks_see_every_evaluation(dynamics: fs.Dynamics) -> None:
    def solve() -> fs.Solution:
        method = fs.integrators.EulerMaruyama() if dynamics.noise is not None else RK4()
        path = None if dynamics.noise is None else fs.Brownian(0)
        return fs.solve(
            dynamics, torch.ones(2, 3, requires_grad=True), 0.0, 1.0, integrator=method,
            stepping=fs.Fixed(steps=3), path=path, adjoint=fs.Direct(),
        )  # fmt: skip

    plain, calls, slopes = solve(), [], []
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append("all") if module is dynamics else None
    )
    own = (
        dynamics.register_forward_pre_hook(lambda *_: calls.append("before")),
        dynamics.register_forward_hook(lambda *_: calls.append("after")),
        dynamics.register_full_backward_hook(lambda *_: slopes.append(1)),
    )
    try:
        seen = solve()
        seen.y1.sum().backward()
    finally:
        everywhere.remove()
        for hook in own:
            hook.remove()
    evaluations = plain.stats.evaluations
    assert [calls.count(name) for name in ("all", "before", "after")] == 3 * [evaluations]
    assert len(slopes) == evaluations
    assert torch.equal(seen.y1, plain.y1)
    solve()
    assert calls.count("after") == evaluations


class Damped(fs.ODE):  # type: ignore[misc]
    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Any:
        return super().forward(t, y, *args) - y


class Called(fs.ODE):  # type: ignore[misc]
    def __call__(self, t: Tensor, y: Tensor, *args: Any) -> Any:
        return super().__call__(t, y, *args) - y


class Branched(fs.Dynamics):
    """With a common name for one of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = Decay()

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Any:
        return 2.0 * self.shortcut(t, y)


def _wrapped() -> fs.ODE:
    ode = fs.ODE(Decay())
    inner = ode.forward
    ode.forward = lambda t, y: 2.0 * inner(t, y)  # type: ignore[method-assign]
    return ode


@pytest.mark.parametrize(
    "dynamics", [Damped(Decay()), Called(Decay()), Branched(), _wrapped()],
    ids=["subclass", "call", "name", "wrapped"],
)  # fmt: skip
def test_a_call_is_what_its_owner_made_of_it(dynamics: fs.Dynamics) -> None:
    y0 = torch.ones(2, 3)
    one = fs.solve(dynamics, y0, integrator=fs.integrators.Euler(), stepping=fs.Fixed(steps=1))
    assert torch.equal(one.y1, y0 + dynamics(torch.tensor(0.0), y0))
    assert torch.equal(one.y1, -y0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_times_keep_their_digits(dtype: torch.dtype) -> None:
    law, seen = objectives.UniformTime(1e-3, 0.999), []

    def network(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.dtype)
        return x

    x = torch.randn(4096, 2).to(dtype)
    assert float(law.sample(4096, x, draws()).max()) <= 0.999
    denoiser = fs.Denoiser(network, FlowMatching(), NoisePrediction())
    loss = objectives.DenoisingScoreMatching(denoiser, law, objectives.v_weight)
    assert bool(loss(x, generator=draws()).isfinite())
    assert seen == [dtype]


@pytest.mark.parametrize(
    ("schedule", "law"),
    [
        (FlowMatching(), objectives.UniformTime(0.0, 1000.0)),
        (Discrete.linear(), objectives.Levels(tuple(map(float, range(1000))))),
        (VP(), objectives.UniformTime(-0.1, 1.0)),
        (EDM(2.0), objectives.LowDiscrepancy(objectives.UniformTime(0.1, 3.0))),
    ],
)
def test_training_times_are_the_schedules(schedule: Any, law: Any) -> None:
    denoiser = fs.Denoiser(lambda t, x: x, schedule, NoisePrediction())
    with pytest.raises(ValueError, match=r"draws times from .* T is t = \(i \+ 1\) / T"):
        objectives.DenoisingScoreMatching(denoiser, law)


def test_a_base_is_the_diffusions_noise() -> None:
    for schedule, wrong in ((VE(), 1.0), (EDM(), 30.0), (VP(), 0.1)):
        flow = fs.LinearSDE(schedule).probability_flow(lambda t, x: 0.0 * x)
        with pytest.raises(ValueError, match=r"its base has .*: give Normal\("):
            fs.Flow(fs.Normal(2, scale=wrong), flow)
        fs.Flow(fs.Normal(2, scale=float(schedule.sigma(schedule.horizon))), flow)


@pytest.mark.parametrize("method", [DPMSolverPP(), Heun(), DDIM()], ids=str)
def test_a_flows_grid_runs_either_way(method: fs.Integrator) -> None:
    schedule = VP()
    dynamics = fs.LinearSDE(schedule).probability_flow(lambda t, x: 0.2 * x)
    grid, base = aligned(schedule, 1.0, 1e-3, 10), fs.Normal(2)
    down, up = (
        fs.Flow(base, dynamics, fs.Solver(method, fs.Grid(times)), t0=1e-3)
        for times in (grid, grid.flip(0))
    )
    x = down.sample(4, seed=0)
    assert torch.equal(up.sample(4, seed=0), x)
    assert torch.equal(up.log_prob(x), down.log_prob(x))


def test_dense_solutions_pickle() -> None:
    sol = fs.solve(fs.ODE(Decay()), torch.ones(2), dense=True)
    again = pickle.loads(pickle.dumps(sol))
    assert torch.equal(again(0.3), sol(0.3))


X = torch.randn(2, 5, 2, device=DEVICE)
LATENT, GRU = models.LatentODE(2, 2, 0.1), models.GRUODEBayes(2)


@pytest.mark.parametrize(
    ("asked", "kind", "cure"),
    [
        (lambda: GRU.double().predict(X.double(), TIMES, torch.tensor(0.5)), ValueError, "at is"),
        (lambda: LATENT.double().infer(X.double(), TIMES, at=torch.rand(3, 4), generator=draws()),
         ValueError, r"at is \(m,\) or \(2, m\)"),
        (lambda: models.NeuralCDE(4, 1)(Linear(TIMES, torch.randn(2, 5, 3))), ValueError,
         "made for 4 channels; got 3, of which time is one"),
        (lambda: models.LatentODE(3, 2, 0.1).elbo(X.double(), TIMES, generator=draws()), ValueError,
         "made for 3 channels; got 2"),
        (lambda: models.GRUODEBayes(3).log_prob(X.double(), TIMES), ValueError, "3 channels"),
        (lambda: models.GRUODEBayes(2).float().log_prob(X.double(), TIMES), TypeError,
         "model.to"),
        (lambda: models.LatentODE(2, 2, 0.1).elbo(
            X.double().masked_fill(X.double() == X[0, 0, 0].double(), torch.inf), TIMES,
            generator=draws(),
        ), ValueError, "values are finite"),
        (lambda: models.neural_process(1, 1).elbo(
            torch.full((2, 5, 2), torch.inf), generator=draws()
        ), ValueError, "points are finite"),
        (lambda: models.ContextSplit().draw(torch.zeros(5, 2), draws()), ValueError, "points are"),
        (lambda: series.Series(TIMES, torch.full((5, 1), torch.inf)), ValueError, "finite"),
        (lambda: series.Series(TIMES, torch.zeros(5, 1), "a"), ValueError, "a label is"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_series_are_what_a_model_was_made_for(
    asked: Callable[[], object], kind: type[Exception], cure: str
) -> None:
    with pytest.raises(kind, match=cure):
        asked()


def test_other_times_of_series_may_be_their_own() -> None:
    model = models.GRUODEBayes(2)
    x, at = X.double(), torch.rand(2, 3)
    own, _ = model.predict(x, TIMES, at)
    shared, _ = model.predict(x, TIMES, at[0])
    assert torch.equal(own[0], shared[0])


@pytest.mark.parametrize("some", [0, 1.5, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: fs.Fixed(steps=n),
        fs.Steps,
        lambda n: fs.Picard(window=n),
        fs.Hutchinson,
        lambda n: GMRES(restart=n),
        lambda n: GMRES(cycles=n),
        RKC2,
        lambda n: Kvaerno3(newton=n),
        lambda n: PredictorCorrector(DDIM(), corrections=n),
        lambda n: aligned(VP(), 1.0, 0.01, n),
        lambda n: LogSignature(TIMES, torch.rand(2, 5, 1), 2, window=n),
        lambda n: models.RationalQuadraticSpline(bins=n),
        lambda n: objectives.FlowMatching(fs.ODE(Decay(), batched_time=True), points=n),
    ],
)  # fmt: skip
def test_counts_are_whole_numbers(make: Callable[[Any], object], some: Any) -> None:
    with pytest.raises(ValueError, match=f"got .*{some}"):
        make(some)
    make(np.int64(4))


def test_gains_let_a_greater_error_shorten_the_step() -> None:
    with pytest.raises(ValueError, match="their sum is > 0"):
        fs.Adaptive(icoeff=-1.0)
    with pytest.raises(ValueError, match="their sum is > 0"):
        fs.Adaptive(icoeff=0.0)
    assert fs.solve(
        fs.ODE(Decay()), torch.ones(1), stepping=fs.Adaptive(icoeff=0, pcoeff=1)
    ).success


def test_rates_of_an_sde_are_real() -> None:
    for rate in (1j, torch.tensor(1j)):
        with pytest.raises(ValueError, match="real"):
            fs.SDE(Decay(), Decay(), noise="diagonal", linear=rate)


def test_points_take_the_coupling_that_they_have_anyway() -> None:
    field = fs.ODE(Decay(), batched_time=True)
    given = objectives.FlowMatching(field, coupling=Independent(), points=4)
    data = torch.rand(8, 2)
    assert torch.equal(
        given(data, generator=draws()),
        objectives.FlowMatching(field, points=4)(data, generator=draws()),
    )
    with pytest.raises(ValueError, match="leave out"):
        objectives.FlowMatching(field, coupling=OptimalTransport(), points=4)


def test_one_component_has_no_halves() -> None:
    for make in (models.nice, models.realnvp, models.nsf):
        with pytest.raises(ValueError, match="two components or more"):
            make(1, generator=draws())


@pytest.mark.parametrize(
    "make", [lambda: VE(50.0, 0.01), lambda: EDM(-1.0), lambda: VP(-1.0, -5.0), lambda: SubVP(0, 0)]
)
def test_schedules_of_nonsense(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="got"):
        make()


def test_contexts_are_the_same_whatever_the_default_dtype() -> None:
    points = torch.randn(2, 6, 2)
    double = models.ContextSplit().draw(points, draws())[0]
    torch.set_default_dtype(torch.float32)
    assert torch.equal(
        double.nan_to_num(), models.ContextSplit().draw(points, draws())[0].nan_to_num()
    )


def test_files_say_what_they_lack(tmp_path: Path) -> None:
    file = tmp_path / "a.ts"
    file.write_text("@dimensions 2\n@classLabel false\n@data\n1,2,3:4,5,6\n1,2,3\n")
    with pytest.raises(ValueError, match="line 5: a series has 2 dimensions"):
        series.read_ts(file)
    file = tmp_path / "a.csv"
    file.write_text("who,when\na,0\n")
    with pytest.raises(ValueError, match="none is left for values"):
        series.read_csv(file, series="who", time="when")
    for row, complaint in (
        ("a,1,inf", "line 3: values are finite"),
        ("a,1", "a row has 3 cells, as the head; this 2"),
        ("a,1,2,3,4", "a row has 3 cells, as the head; this 5"),
    ):
        file.write_text(f"who,when,what\na,0,NaN\n{row}\n")
        with pytest.raises(ValueError, match=complaint):
            series.read_csv(file, series="who", time="when")
