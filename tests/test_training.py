"""Training: objectives find what they should, and an interrupted run ends as if it had not been."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import models, objectives, training
from flowsde.dynamics import EDMPrediction, VPrediction
from flowsde.nn import UNet
from flowsde.objectives import (
    DenoisingScoreMatching,
    LogNormal,
    MaximumLikelihood,
)  # fmt: skip
from flowsde.paths import EDM, VP

from .systems import DEVICE, generator


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=DEVICE.type == "cpu")


def test_maximum_likelihood_fits_a_map() -> None:
    torch.set_default_dtype(torch.float32)
    data = torch.randn(2000, 2, generator=generator())
    data[:, 1] = data[:, 0].square() + 0.3 * data[:, 1]
    flow = fs.Flow(
        fs.Normal(2),
        models.realnvp(2, 4, 32, generator=torch.Generator("cpu").manual_seed(0)),
    ).to(DEVICE)
    fitted = training.fit(
        MaximumLikelihood(flow), data, steps=300, batch_size=200, seed=0, lr=5e-3, warmup=10,
        progress=False, accelerator=accelerator(), ema=0.9,
    )  # fmt: skip
    entropy = 0.5 * math.log(2 * math.pi * math.e) * 2 + math.log(0.3)
    assert fitted.losses[-1] < fitted.losses[0] - 0.5
    with torch.no_grad():
        assert -float(flow.log_prob(data).mean()) < entropy + 0.25


@pytest.mark.parametrize("name", ["cnf", "score_mlp", "score_unet"])
def test_every_model_builds_dynamics_that_start_in_order(name: str) -> None:
    """Untrained models are the Gaussian denoiser, or finite; of maps see ``test_maps``."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    if name == "cnf":
        assert bool(torch.isfinite(fs.solve(models.cnf(6), x).y1).all())
    else:
        prediction = EDMPrediction(1.0)
        if name == "score_unet":
            x = torch.randn(4, 1, 4, 4)
            denoiser = models.score_unet(1, EDM(10.0), prediction, 8)
        else:
            denoiser = models.score_mlp(6, EDM(10.0), prediction, 16)
        flow = fs.LinearSDE(EDM(10.0)).probability_flow(denoiser)
        y = fs.solve(flow, x, 0.1, 5.0, stepping=fs.Adaptive(1e-9, 1e-9)).y1
        assert torch.allclose(y, x * math.sqrt((25 + 1) / (0.01 + 1)), rtol=1e-6)


def test_networks_take_both_kinds_of_time() -> None:
    torch.manual_seed(0)
    for net, x in ((UNet(2, 8, 2), torch.randn(3, 2, 4, 4)),
                   (models.score_mlp(5, VP(), VPrediction(), 16).network, torch.randn(3, 5)),
                   (models.cnf(5, 8).f, torch.randn(3, 5))):  # fmt: skip
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
        t = torch.tensor(0.3)
        assert torch.allclose(net(t, x), net(t.expand(3), x), atol=1e-12)


# --- fit ------------------------------------------------------------------------------------------


def objective(seed: int = 0) -> DenoisingScoreMatching:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(seed)
    denoiser = models.score_mlp(3, EDM(5.0), EDMPrediction(1.0), 16, 1, dropout=0.2).to(DEVICE)
    return DenoisingScoreMatching(denoiser, LogNormal(EDM(5.0)))


def run(made: nn.Module, data: Tensor, **more: Any) -> training.Fitted:
    given = {"steps": 12, "batch_size": 8, "seed": 3, "progress": False, **more}
    if "accelerator" not in given:  # they share their state
        given["accelerator"] = accelerator()
    return training.fit(made, data, **given)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 5])
def test_the_scale_of_losses_resumes(tmp_path: Path, stop: int) -> None:
    """That of float16, which began anew and left out the steps that it had left out before."""
    torch.set_default_dtype(torch.float32)
    data, path, ends = torch.randn(50, 3, generator=generator()), tmp_path / "run.pt", []
    for steps in ((stop, 12), (12,)):
        made = objective()
        for until in steps:
            scaled = accelerator()
            scaled.scaler, scaled.native_amp = torch.amp.GradScaler("cpu", 2.0**127), True

            def interrupt(batch: Tensor, draws: torch.Generator) -> Tensor:
                calls[0] += 1
                if calls[0] > until < 12:
                    raise Interrupted
                return batch

            calls = [0]
            with contextlib.suppress(Interrupted):
                fitted = run(
                    made, data, augment=interrupt, checkpoint=path, checkpoint_every=1,
                    accelerator=scaled,
                )  # fmt: skip
        ends.append((fitted.losses, made.state_dict()))
        path.unlink()
    assert ends[0][0] == ends[1][0]
    assert len(set(ends[0][0][-3:])) == 3  # it moves
    for a, b in zip(*(end[1].values() for end in ends), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    torch.set_default_dtype(torch.float32)
    data, whole = torch.randn(50, 3, generator=generator()), objective()
    expected = run(whole, data)
    calls = [0]

    def interrupt(batch: Tensor, draws: torch.Generator) -> Tensor:
        calls[0] += 1
        if calls[0] == stop + 1:
            raise Interrupted
        return batch

    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        run(objective(), data, augment=interrupt, checkpoint=path, checkpoint_every=1)
    again = objective(seed=9)
    found = run(again, data, checkpoint=path, checkpoint_every=1)
    assert found.resumed_at == stop
    assert found.losses == expected.losses
    for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert run(objective(), data, checkpoint=path).resumed_at == 12


def test_the_draws_are_the_seeds_alone() -> None:
    torch.set_default_dtype(torch.float32)
    data = torch.randn(50, 3, generator=generator())
    first = run(objective(), data)
    torch.manual_seed(1234)
    torch.rand(7)
    state = torch.get_rng_state()
    second = objective()
    torch.set_rng_state(state)
    assert run(second, data).losses == first.losses
    assert torch.equal(torch.get_rng_state(), state)
    assert run(objective(), data, seed=4).losses != first.losses


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    data, path = torch.randn(50, 3), tmp_path / "run.pt"
    run(objective(), data, checkpoint=path)
    with pytest.raises(ValueError, match="another run"):
        run(objective(), data, checkpoint=path, steps=13)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    torch.set_default_dtype(torch.float32)
    data = torch.full((50, 3), torch.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        run(objective(), data)
    with pytest.raises(ValueError, match="at least one"):
        run(objective(), data, steps=0)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    training.save_checkpoint(path, {"x": torch.ones(2)})

    class Trap:
        def __reduce__(self) -> Any:
            raise RuntimeError("half written")

    with pytest.raises(RuntimeError, match="half written"):
        training.save_checkpoint(path, {"x": torch.zeros(10_000), "y": Trap()})
    assert torch.equal(training.load_checkpoint(path)["x"], torch.ones(2, device="cpu"))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_checkpoints_hold_data_only(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"f": os.system}, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        training.load_checkpoint(path)


def test_the_average_follows_the_weights() -> None:
    module = nn.Linear(2, 2)
    average = training.EMA(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    for _ in range(60):
        average.update(module)
    average.copy_to(module)
    assert torch.allclose(module.weight, torch.full((2, 2), 3.0))
    with pytest.raises(ValueError, match="decay"):
        training.EMA(module, 1.0)
    assert objectives.__all__


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then the same command again."""
    script = """
import torch
from pathlib import Path
from flowsde import training
from tests.test_training import objective, accelerator
data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
made = objective()
fitted = training.fit(made, data, steps=400, batch_size=8, seed=3, progress=False,
    checkpoint="run.pt", checkpoint_every=10, accelerator=accelerator())
torch.save([fitted.losses, fitted.resumed_at, made.state_dict()], "end.pt")
"""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        root = str(Path(__file__).parents[1])
        return subprocess.Popen(
            [sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": root}
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight = start(whole)
    process = start(killed)
    while not (killed / "run.pt").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "end.pt").exists()
    assert start(killed).wait() == 0
    assert straight.wait() == 0
    a, b = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed))
    assert a[0] == b[0]
    assert 0 < b[1] < 400
    for name in a[2]:
        assert torch.equal(a[2][name], b[2][name])


def test_data_of_several_parts_go_together() -> None:
    """Conditions come with their rows, and ``augment`` sees the samples."""

    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, c: Tensor, *, generator: torch.Generator) -> Tensor:
            assert torch.equal(x, 2.0 * c)
            return (self.gain * c - x).square().mean()

    c = torch.randn(50, 2, dtype=torch.float32)
    how: Any = {"steps": 5, "batch_size": 8, "seed": 0, "progress": False}
    double = lambda x, generator: 2.0 * x
    training.fit(Paired(), (c, c), augment=double, accelerator=accelerator(), **how)
    with pytest.raises(ValueError, match="as many in each part"):
        training.fit(Paired(), (c, c[:-1]), accelerator=accelerator(), **how)


# --- a review of fit ------------------------------------------------------------------------------


class Pull(nn.Module):
    """The mean square of x - w; at one call its value stays finite and its slope does not."""

    def __init__(self, bad: int = 0) -> None:
        super().__init__()
        self.w, self.bad, self.calls = nn.Parameter(torch.zeros(3)), bad, 0

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.calls += 1
        loss = (x - self.w).square().mean()
        return loss + (0.0 * self.w).square().sum().sqrt() if self.calls == self.bad else loss


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Before it is written down, and before it is returned."""
    torch.set_default_dtype(torch.float32)
    path = tmp_path / "run.pt"
    for bad, more in ((8, {"checkpoint": path, "checkpoint_every": 6}), (12, {})):
        with pytest.raises(FloatingPointError, match=f"gradient's norm is nan at step {bad - 1}"):
            run(Pull(bad), torch.randn(50, 3), **more)
    state = training.load_checkpoint(path)
    assert len(state["losses"]) == 6
    assert bool(state["model"]["w"].isfinite().all())


def test_settings_may_be_numpys(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    data, path = torch.randn(50, 3), tmp_path / "run.pt"
    settings = {"checkpoint": path, "lr": np.float64(1e-3), "seed": np.int64(3)}
    first = run(Pull(), data, **settings)
    assert run(Pull(), data, **settings).losses == first.losses


def test_what_a_model_draws_is_not_what_its_objective_draws() -> None:
    torch.set_default_dtype(torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    class Noisy(Pull):
        def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
            eps = torch.randn(64, generator=generator, device=generator.device)
            seen.append((eps, torch.randn(4096, device=generator.device)))
            return super().forward(x, generator)

    run(Noisy(), torch.randn(50, 3), batch_size=32)
    for eps, own in seen:
        assert not bool((own.unfold(0, 64, 1) == eps).all(1).any())


def test_lower_precision_is_that_of_the_run() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.set_default_dtype(torch.float32)
    x = torch.full((50, 3), 1.0 + 2.0**-12)
    for fails in (False, True):
        pull = Pull(12 if fails else 0)
        narrow = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="bf16")
        if fails:
            with pytest.raises(FloatingPointError):
                run(pull, x, accelerator=narrow)
        else:
            run(pull, x, accelerator=narrow)
        assert "forward" not in vars(pull)
        assert "_original_forward" not in vars(pull)
    AcceleratorState._reset_state(True)


def test_a_run_depends_on_what_it_is_given_alone() -> None:
    """No gradient that was there before enters it."""
    torch.set_default_dtype(torch.float32)
    data, found = torch.randn(50, 3), []
    for before in (False, True):
        pull = Pull()
        if before:
            (1e6 * pull(data, generator())).backward()
        found.append((run(pull, data).losses, pull.w.tolist()))
    assert found[0] == found[1]


def test_fit_refuses_what_it_would_not_do() -> None:
    from accelerate import Accelerator

    several = Accelerator(cpu=DEVICE.type == "cpu", gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="batch_size"):
        run(Pull(), torch.randn(50, 3), accelerator=several)
    with pytest.raises(TypeError, match="tuple of tensors"):
        run(Pull(), [torch.randn(50, 3)])


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.complex64, torch.float64])
def test_averages_move_in_small_steps(kind: torch.dtype) -> None:
    module = nn.Linear(1, 1, bias=False).to(kind)
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema = training.EMA(module, 0.999)
        ema.count = 100_000
        module.weight.fill_(1.5)
        for _ in range(1_000):
            ema.update(module)
    wanted = 1.5 - 0.5 * 0.999**1_000
    assert float(ema.average["weight"].real) == pytest.approx(wanted, rel=1e-3)
    ema.copy_to(module)
    assert module.weight.dtype == kind


def test_a_solve_that_fails_of_broken_weights_tells_of_what_broke_them() -> None:
    class Targets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
            y = fs.solve(fs.ODE(lambda t, y: self.net(y)), self.net(x.nan_to_num()), 0.0, 1.0).y1
            return (y - x).square().mean()

    data = torch.randn(30, 2, generator=generator(0))
    data[7] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        training.fit(Targets(), data, steps=60, batch_size=4, seed=3, progress=False)


def test_a_batch_of_which_nothing_was_seen_has_a_bound() -> None:
    model = models.LatentODE(2, 3, 0.1)
    times, x = torch.linspace(0.0, 1.0, 5), torch.full((1, 5, 2), math.nan)
    loss = objectives.ELBO(model)(x, times, generator=generator(0))
    loss.backward()
    assert bool(loss.isfinite())
