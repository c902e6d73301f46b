"""Benchmarks run, and what they compare with is right; their figures are not tested here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowsde as fs
from flowsde.integrators import (
    DDIM,
    Dopri5,
    DPMSolverPP,
    EDMHeun,
    Euler,
    ExponentialAdams,
    UniPC,
)  # fmt: skip
from flowsde.paths import VP

pytest.importorskip("matplotlib")

from benchmarks import (
    adjoints,
    cde,
    chosen_steps,
    cnf,
    flow_matching,
    flows,
    heterogeneous,
    jitted,
    overhead,
    peers,
    problems,
    sampler_overhead,
    samplers,
    sde_gradients,
    sde_overhead,
    spirals,
    trees,
    work_precision,
)
from benchmarks.sampler_peers import SAMPLER_PEERS
from benchmarks.storages import Storages

PROBLEMS = {problem.name: problem for problem in problems.NONSTIFF + problems.STIFF}
HALF = math.sqrt(2.0 / (21.0 * math.pi))  # of the Bessel function of order one half at 21
CLOSED = {
    "A1": [math.exp(-20.0)],
    "A2": [1.0 / math.sqrt(21.0)],
    "A3": [math.exp(math.sin(20.0))],
    "A4": [20.0 / (1.0 + 19.0 * math.exp(-5.0))],
    "E1": [HALF * math.sin(21.0), HALF * (math.cos(21.0) - math.sin(21.0) / 42.0)],
    "E5": [14.117973909, 2.4],  # the slope is sinh(log(25 / (25 - t)))
}
# Mazzia and Magherini, "Test set for initial value problem solvers"
HIRES = (
    0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2,
    0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_a_shell() -> Any:
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        yield


def numbers(record: Any) -> list[float]:
    """Every number of a JSON record."""
    if isinstance(record, dict):
        return [x for value in record.values() for x in numbers(value)]
    if isinstance(record, list):
        return [x for value in record for x in numbers(value)]
    return [record] if isinstance(record, (int, float)) else []


def record(path: Path, name: str) -> dict[str, Any]:
    found = json.loads((path / f"{name}-cpu.json").read_text())
    assert found["torch"] == torch.__version__
    assert {"device", "dtype", "turns"} <= set(found)
    assert all(map(math.isfinite, numbers(found)))
    assert not list(path.glob("*.partial"))
    return found


def adaptive() -> set[str]:
    return {f"flowsde {name}" for name in peers.Flowsde().catalogue}


def test_work_precision(tmp_path: Path) -> None:
    work_precision.main(["--small", "--peers", "scipy", "torchdiffeq", "--out", str(tmp_path)])
    found = record(tmp_path, "work_precision-nonstiff")
    assert set(found["peers"]) == {"scipy", "torchdiffeq"}
    of = found["curves"]["A3"]
    assert adaptive() <= set(of)
    assert {"scipy DOP853", "torchdiffeq dopri5"} <= set(of)
    for name in ("flowsde Tsit5", "scipy DOP853", "torchdiffeq dopri5"):
        assert [point["rtol"] for point in of[name]] == [1e-2, 1e-4]
        assert of[name][1]["error"] < of[name][0]["error"] < 1.0
        assert all(point["seconds"] > 0.0 for point in of[name])
    assert {"DDIM", "RK4"} <= set(found["samplers"])
    assert (tmp_path / "work_precision.png").stat().st_size > 0


def test_work_precision_of_stiff_problems(tmp_path: Path) -> None:
    work_precision.main(["--set", "stiff", "--small", "--peers", "scipy", "--out", str(tmp_path)])
    found = record(tmp_path, "work_precision-stiff")
    assert adaptive() <= set(found["curves"]["HIRES"])
    assert found["curves"]["HIRES"]["scipy Radau"][-1]["error"] < 1e-2
    assert (tmp_path / "work_precision-stiff.png").stat().st_size > 0


def test_heterogeneous(tmp_path: Path) -> None:
    heterogeneous.main(["--small", "--peers", "torchdiffeq", "--out", str(tmp_path)])
    of = record(tmp_path, "heterogeneous")["curves"]
    assert {"flowsde per sample Tsit5", "flowsde shared Tsit5", "torchdiffeq dopri5"} <= set(of)
    for point in of["flowsde per sample Tsit5"]:
        assert 0 < point["needed"] <= point["rows"] <= 16 * point["evaluations"]
    for point in of["flowsde shared Tsit5"]:
        assert point["rows"] == 16 * point["evaluations"]
    assert (tmp_path / "heterogeneous.png").stat().st_size > 0


def test_adjoints(tmp_path: Path) -> None:
    adjoints.main(["--small", "--out", str(tmp_path)])
    (times,) = record(tmp_path, "adjoints-times")["times"].values()
    peak = record(tmp_path, "adjoints-memory")["peak bytes"]
    for of in (times, peak):
        assert {"flowsde Direct", "flowsde Checkpointed", "torchdiffeq odeint"} <= set(of)
    assert times["flowsde Checkpointed"]["gap"] == 0.0
    assert all(row["gap"] < 1e-2 for row in times.values())
    assert peak["flowsde Direct"]["30"] > 2 * peak["flowsde Direct"]["10"]
    assert peak["flowsde Checkpointed"]["30"] < 2 * peak["flowsde Checkpointed"]["10"]
    (implicit,) = record(tmp_path, "adjoints-implicit")["implicit"].values()
    assert all(row["gap"] < 1e-5 for row in implicit.values())
    for table in ("times", "memory"):
        assert (tmp_path / f"adjoints-{table}.png").stat().st_size > 0


def test_samplers(tmp_path: Path) -> None:
    """Its claim too: fitted on other noises, a solver is ahead of all fixed ones."""
    samplers.main(["--small", "--peers", "--out", str(tmp_path)])
    (found,) = record(tmp_path, "samplers")["problems"].values()
    assert found["floor"] > 0.0
    errors: dict[str, list[float]] = {}
    for row in found["rows"]:
        errors.setdefault(row["library"], []).append(row["error"])
    assert min(errors["fitted solver"]) < 0.5 * min(errors["flowsde"])
    assert (tmp_path / "samplers.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of NumPy 2
def test_samplers_of_diffusers() -> None:
    """They are asked as they are meant to be: on one grid they take our steps."""
    pytest.importorskip("diffusers")
    points = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    problem = samplers.Problem(samplers.Points(points, 0.3), VP(), count=4, seed=0)
    times, known = problem.grid("karras", 6), SAMPLER_PEERS["diffusers"].samplers()
    for name, method in (
        ("DDIM", DDIM()), ("Heun", EDMHeun()), ("DPM++ 2M", DPMSolverPP()), ("UniPC-2", UniPC()),
        ("DEIS-2", ExponentialAdams(2, dual=True)),
    ):  # fmt: skip
        asks, run = known[name]
        x, asked = problem.theirs(run, times)
        assert asked == 6 * asks
        own = problem.ours(fs.Solver(method, fs.Grid(times)))
        torch.testing.assert_close(x, own, rtol=1e-5, atol=1e-5)


def test_trees(tmp_path: Path) -> None:
    trees.main(["--small", "--peers", "--out", str(tmp_path)])
    few, many = record(tmp_path, "trees")["memory"]
    assert many["queries"] == 10 * few["queries"]
    assert many["bytes"] < 1.1 * few["bytes"]


def test_sampler_overhead(tmp_path: Path) -> None:
    """Its claim too: twelve operations a step of DPM-Solver++(2M) beyond the network, or fewer."""
    sampler_overhead.main(["--small", "--peers", "--out", str(tmp_path)])
    counted = record(tmp_path, "sampler_overhead")["counts"]
    for row in counted["DPM++ 2M"].values():
        assert row["operations"] <= 12
        assert row["reads"] == 0


def test_overhead(tmp_path: Path) -> None:
    overhead.main(["--small", "--out", str(tmp_path)])
    found = record(tmp_path, "overhead")
    assert set(found["counts"]) == {"flowsde", "torchdiffeq", "by hand"}
    (row,) = found["ratios"].values()
    assert set(found["counts"]) | {"time", "bound"} <= set(row)


def test_jitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(jitted.EXECUTORS, "flowsde, Compiled")
    jitted.main(["--small", "--turns", "2", "--peers", "--out", str(tmp_path)])
    (row,) = record(tmp_path, "jitted")["found"].values()
    assert list(row) == ["flowsde"]
    assert all(reading > 0.0 for reading in row["flowsde"].values())


def test_sde_overhead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim too: four operations an Euler step beyond drift, diffusion and the draw."""
    for solves in (sde_overhead.FORWARD, sde_overhead.GRADIENT):
        for name in [name for name in solves if "Compiled" in name]:
            monkeypatch.delitem(solves, name)
    sde_overhead.main(["--small", "--peers", "torchsde", "--out", str(tmp_path)])
    found = record(tmp_path, "sde_overhead")
    euler = found["counts"]["flowsde Euler"]
    assert euler["operations"] - euler["of the draw"] <= 4
    assert euler["reads"] == 0
    assert found["counts"]["torchsde euler"]["reads"] > 0
    for kind, names in (("forward", sde_overhead.FORWARD), ("gradient", sde_overhead.GRADIENT)):
        (row,) = found[kind].values()
        assert set(names) < set(row)
        assert all(of["us"] > 0.0 for of in row.values())
    assert (tmp_path / "sde_overhead.png").stat().st_size > 0


def test_chosen_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in chosen_steps.OURS if "Compiled" in name]:
        monkeypatch.delitem(chosen_steps.OURS, name)
    chosen_steps.main(["--small", "--peers", "torchsde", "--out", str(tmp_path)])
    found = record(tmp_path, "chosen_steps")["found"]
    assert [row[""] for row in found] == ["flowsde", "flowsde, per sample", "torchsde"]
    assert all(0.0 < row["error"] < 0.05 for row in found)


def test_sde_gradients(tmp_path: Path) -> None:
    sde_gradients.main(["--small", "--peers", "torchsde", "--out", str(tmp_path)])
    errors = record(tmp_path, "sde_gradients")["errors"]
    assert errors["flowsde StochasticHeun, Checkpointed"] == {"1": 0.0, "4": 0.0}
    assert max(errors["flowsde ReversibleHeun, Reversible"].values()) < 1e-14
    for name in ("flowsde StochasticHeun, Backsolve", "torchsde heun, sdeint_adjoint"):
        assert 1e-3 < errors[name]["4"] < errors[name]["1"]
    assert (tmp_path / "sde_gradients.png").stat().st_size > 0


def test_cde(tmp_path: Path) -> None:
    cde.main(["--small", "--out", str(tmp_path)])
    found = record(tmp_path, "cde")
    assert all(row["gap"] < 1e-4 for row in found["splines"].values())
    assert found["training"]["torchcde, midpoint, backpropagation"]["gap"] < 1e-5
    evaluations = {name: row["evaluations"] for name, row in found["long"].items()}
    assert evaluations == {"point by point": 199, "log-ODE, depth 1": 20, "log-ODE, depth 2": 20}


def test_spirals(tmp_path: Path) -> None:
    """Both models forecast; and a run that has ended is taken as it is."""
    arguments = ["--small", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    found = []
    for _ in range(2):
        spirals.main(arguments)
        of = record(tmp_path, "spirals")["found"]
        found.append({name: of[name]["30"][0]["rmse"] for name in spirals.MODELS})
    assert found[0] == found[1]
    assert all(0.0 < error < 20.0 for error in found[0].values())


def test_spirals_are_seen_on_their_way() -> None:
    """What is seen is the spiral with noise, and what follows it goes on from there."""
    options = spirals.reporting.parser(None, dtype="float64").parse_args([])
    options.real = torch.float64
    of = spirals.Spirals.of(400, 100, 200, 0, options)
    assert of.points.shape == of.ahead.shape == (400, 100, 2)
    assert torch.allclose(of.times, spirals.GAP * torch.arange(100.0, dtype=torch.float64))
    step = of.ahead.diff(dim=1)
    last = of.ahead[:, 0] - step[:, 0]
    noise = (of.points[:, -1] - last) * spirals.SCALE / spirals.NOISE
    assert float(noise.std()) == pytest.approx(1.0, abs=0.15)  # 800 draws
    few = spirals.Spirals.of(400, 30, 100, 0, options)
    assert few.ahead.shape == (400, 0, 2)
    assert bool((few.times.diff(dim=1) > 0).all())


def test_cnf(tmp_path: Path) -> None:
    cnf.main(["--small", "--out", str(tmp_path)])
    found = record(tmp_path, "cnf")["found"]
    assert len(found) == 2
    for of in found.values():
        assert {"flowsde Direct", "flowsde Checkpointed", "torchdiffeq"} <= set(of["times"])
        assert all(row["gap"] < 1e-3 for row in of["times"].values())
    assert (tmp_path / "cnf.png").stat().st_size > 0


def test_flows(tmp_path: Path) -> None:
    """As many parameters in each; and ours dispatches fewer operations a step than zuko."""
    flows.main(["--small", "--peers", "zuko", "--out", str(tmp_path)])
    (scores,) = record(tmp_path, "flows_likelihood")["found"].values()
    ours = {"flowsde nsf", "flowsde maf, splines", "flowsde cnf, flow matching"}
    assert {*ours, "zuko NSF", "zuko CNF"} == set(scores)
    for row in scores.values():
        assert row["parameters"] == pytest.approx(4000, rel=0.1)
        assert row["steps"][0] >= 2
    steps = record(tmp_path, "flows_steps")["found"]
    for row in steps.values():
        assert row["flowsde"]["parameters"] == row["zuko"]["parameters"]
        assert row["flowsde"]["operations"] < row["zuko"]["operations"]
    assert (tmp_path / "flows_likelihood.png").stat().st_size > 0


def test_flow_matching(tmp_path: Path) -> None:
    flow_matching.main(["--small", "--out", str(tmp_path)])
    (of,) = record(tmp_path, "flow_matching-rectified")["toys"].values()
    assert of["straightness"]["after"][0] < of["straightness"]["before"][0]
    assert set(of["distance"]["after"]) == {str(n) for n in flow_matching.STEPS}
    (of,) = record(tmp_path, "flow_matching-likelihood")["toys"].values()
    assert of["part"][0] > 0.0
    for name in ("rectified", "likelihood"):
        assert (tmp_path / f"flow_matching-{name}.png").stat().st_size > 0


def test_an_executor_gets_a_row() -> None:
    options = overhead.reporting.parser(None, dtype="float32").parse_args(["--turns", "1"])
    options.real = torch.float32
    row = overhead.ratios(
        overhead.SIZES[0], {"flowsde": overhead.ours}, {"again": overhead.ours}, options
    )
    assert row["again evaluations"] == row["flowsde evaluations"]
    assert row["again time"] > 0.0


@dataclass(frozen=True)
class Picky(fs.Adjoint):
    """Takes Euler steps of one size, nothing else."""

    def run(self, loop: Any) -> fs.Solution:
        if not isinstance(loop.integrator, Euler):
            raise TypeError("Picky takes Euler()")
        return loop.run(adjoints_recorder())


def adjoints_recorder() -> Any:
    from flowsde._loop import Recorder

    return Recorder()


def test_an_adjoint_gets_what_it_takes() -> None:
    adaptive, fixed = fs.Adaptive(), fs.Fixed(steps=3)
    assert adjoints.admitted(Picky(), Dopri5(), [adaptive, fixed]) == (Euler(), fixed)
    assert adjoints.admitted(Picky(), Dopri5(), [adaptive]) == "Picky takes Euler()"


def test_a_peer_that_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Missing(peers.TorchDyn):
        name = "no_such_library"

    known = dict(peers.PEERS)
    try:
        peers.PEERS["no_such_library"] = Missing
        found, versions = peers.peers(["no_such_library", "scipy"])
    finally:
        del peers.PEERS["no_such_library"]
    assert known == peers.PEERS
    assert [peer.name for peer in found] == ["scipy"]
    assert versions["no_such_library"] == "not installed"
    assert "no_such_library: not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", CLOSED)
def test_references_are_closed_forms(name: str) -> None:
    np.testing.assert_allclose(PROBLEMS[name].reference[0], CLOSED[name], rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("name", ["D1", "D3", "D5"])
def test_orbits_solve_keplers_equation(name: str) -> None:
    e = 0.2 * int(name[1]) - 0.1
    anomaly = 20.0
    for _ in range(100):
        anomaly -= (anomaly - e * math.sin(anomaly) - 20.0) / (1.0 - e * math.cos(anomaly))
    wanted = math.cos(anomaly) - e, math.sqrt(1.0 - e * e) * math.sin(anomaly)
    np.testing.assert_allclose(PROBLEMS[name].reference[0, :2], wanted, atol=1e-9)


def test_the_stiff_reference_is_the_published_one() -> None:
    np.testing.assert_allclose(PROBLEMS["HIRES"].reference[0], HIRES, rtol=1e-8)


@pytest.mark.parametrize("problem", [*problems.NONSTIFF, *problems.STIFF], ids=lambda p: p.name)
def test_a_field_is_one_formula(problem: problems.Problem) -> None:
    """numpy and torch, one time and a time for each row, agree."""
    f, y0 = problem.torch("cpu", torch.float64)
    y = y0 + 0.1
    numpy = problem.bind(np, np.asarray)(0.7, y.numpy())
    shared = f(torch.tensor(0.7, dtype=torch.float64), y)
    apart = f(torch.full((len(y),), 0.7, dtype=torch.float64), y)
    np.testing.assert_allclose(shared.numpy(), numpy, rtol=1e-12)
    np.testing.assert_allclose(apart.numpy(), numpy, rtol=1e-12)
    assert numpy.shape == problem.y0.shape


def test_costs_are_interpolated() -> None:
    curve = [{"error": 1e-2, "evaluations": 100.0}, {"error": 1e-6, "evaluations": 10_000.0}]
    assert work_precision.cost(curve, 1e-4, "evaluations") == pytest.approx(1000.0)
    assert work_precision.cost(curve, 1e-1, "evaluations") == 100.0
    assert work_precision.cost(curve, 1e-7, "evaluations") is None


def test_storages_follow_the_graph() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Storages() as storages:
        y = x
        for _ in range(10):
            y = y.tanh()
        assert storages.live == 10 * 4000
        y.sum().backward()
        del y
        x.grad = None
        assert storages.live == 0
        assert 10 * 4000 < storages.peak < 14 * 4000
