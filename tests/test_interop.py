"""diffusers and k-diffusion: their models here, and every integrator there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsde as fs
from flowsde import integrators
from flowsde.dynamics import NoisePrediction, Velocity, VPrediction
from flowsde.integrators import (
    DDIM,
    SEEDS,
    Adams,
    DPMSolverPP,
    EDMHeun,
    EulerMaruyama,
    Heun,
    Integrator,
    Tsit5,
    UniPC,
)  # fmt: skip
from flowsde.interop import as_sampler, as_scheduler, from_diffusers
from flowsde.paths import EDM, VP, karras

from .systems import DEVICE, Mixture, admits, catalogue, generator

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of NumPy 2

MIXTURE = Mixture.two()


def unet(**more: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2,
        add_attention=False, **more,
    ).eval().requires_grad_(False)  # fmt: skip


def pipeline(scheduler: Any, model: Any, x: Tensor, steps: int | None = None, **more: Any) -> Any:
    """What every pipeline of diffusers does; of the steps that are set if none are given."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, **more).prev_sample
    return x


def precise(scheduler: Any, dtype: torch.dtype) -> Any:
    """With its tables in this dtype."""
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).to(dtype))
    return scheduler


def near(a: Tensor, b: Tensor, bound: float) -> None:
    assert float((a - b).abs().max()) < bound * max(1.0, float(b.abs().max()))


# --- their schedulers' own loops ------------------------------------------------------------------


LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
ZERO = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
LOOPS: list[tuple[str, dict[str, Any], Integrator]] = [
    ("DDIM", {"clip_sample": False}, DDIM()),
    ("DDIM", {"clip_sample": False, "beta_schedule": "scaled_linear", **LEADING}, DDIM()),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction", **ZERO}, DDIM()),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, DDIM()),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver++"}, DPMSolverPP()),
    ("DPMSolverMultistep", {"prediction_type": "v_prediction"}, DPMSolverPP()),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, DPMSolverPP()),
    ("UniPCMultistep", {"timestep_spacing": "trailing"}, UniPC()),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, DDIM()),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, integrators.Euler()),
    ("FlowMatchHeunDiscrete", {}, Heun()),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
     DPMSolverPP()),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize(("name", "config", "method"), LOOPS, ids=str)
def test_schedulers_own_loops(
    name: str, config: dict[str, Any], method: Integrator, dtype: torch.dtype, bound: float
) -> None:
    """Ours in the same loop, and ``solve`` on the denoiser, come to what theirs does."""
    model, x = unet().to(dtype), torch.randn(2, 1, 4, 4).to(dtype)
    theirs = precise(getattr(diffusers, f"{name}Scheduler")(**config), dtype)
    ours = as_scheduler(method, theirs)
    found = pipeline(ours, model, x, 8)
    near(found, pipeline(theirs, model, x, 8), bound)
    denoiser, grid = from_diffusers(model, theirs), torch.tensor(ours._grid)
    flow = fs.LinearSDE(denoiser.schedule).probability_flow(denoiser)
    if grid[-1] > 0.0 or isinstance(method, DDIM | DPMSolverPP | UniPC):
        y = fs.solve(
            flow, x, float(grid[0]), float(grid[-1]), integrator=method, stepping=fs.Grid(grid)
        ).y1  # fmt: skip
        near(y, found, bound)
