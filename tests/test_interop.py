"""diffusers and k-diffusion: their models here, and every integrator there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde import _random, integrators
from flowsde.fitting import distill_solver
from flowsde.integrators import (
    DDIM,
    SEEDS,
    Adams,
    DPMSolverPP,
    Draws,
    EDMHeun,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    Integrator,
    Tsit5,
    UniPC,
)  # fmt: skip
from flowsde.integrators.exponential import Exponential
from flowsde.interop import as_sampler, as_scheduler, from_diffusers
from flowsde.paths import EDM, VP, FlowMatching, karras

from .systems import DEVICE, Mixture, admits, catalogue, generator

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of NumPy 2

MIXTURE = Mixture.two()


@functools.cache
def unet(dtype: torch.dtype = torch.float64) -> Any:
    model = diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2,
        add_attention=False,
    )  # fmt: skip
    return model.eval().requires_grad_(False).to(dtype)


def pipeline(scheduler: Any, model: Any, x: Tensor, steps: int | None = None, **more: Any) -> Any:
    """What every pipeline of diffusers does; of the steps that are set if none are given."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x, **more).prev_sample
    return x


def precise(scheduler: Any, dtype: torch.dtype) -> Any:
    """With its tables in this dtype."""
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).to(dtype))
    return scheduler


def theirs_of(scheduler: Any, model: Any, x: Tensor, steps: int) -> Tensor:
    """Their result; they make tensors in the default dtype, and mean float32."""
    torch.set_default_dtype(torch.float32)
    return pipeline(scheduler, model, x, steps)


def near(a: Tensor, b: Tensor, bound: float) -> None:
    assert float((a - b).abs().max()) < bound * max(1.0, float(b.abs().max()))


# --- their schedulers' own loops ------------------------------------------------------------------


LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
ZERO = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
LOWERED = DPMSolverPP(3, final=1)
LOOPS: list[tuple[str, dict[str, Any], Integrator]] = [
    ("DDIM", {"clip_sample": False}, DDIM()),
    ("DDIM", {"clip_sample": False, "beta_schedule": "scaled_linear", **LEADING}, DDIM()),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction", **ZERO}, DDIM()),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, DDIM()),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver++"}, DPMSolverPP()),
    ("DPMSolverMultistep", {"prediction_type": "v_prediction"}, DPMSolverPP()),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False},
     DPMSolverPP()),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, DPMSolverPP(final=1)),
    ("DPMSolverMultistep", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, LOWERED),
    ("DEISMultistep", {"solver_order": 3}, ExponentialAdams(3, dual=True, final=1)),
    ("UniPCMultistep", {"timestep_spacing": "trailing"}, UniPC()),
    ("UniPCMultistep", {"final_sigmas_type": "sigma_min"}, UniPC(final=1)),
    ("UniPCMultistep", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, UniPC(3, final=1)),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, DDIM()),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, integrators.Euler()),
    ("FlowMatchHeunDiscrete", {}, Heun()),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize(("name", "config", "method"), LOOPS, ids=str)
def test_schedulers_own_loops(
    name: str, config: dict[str, Any], method: Integrator, dtype: torch.dtype, bound: float
) -> None:
    """Ours in the same loop, and ``solve`` on the denoiser, come to what theirs does."""
    model, x = unet(dtype), torch.randn(2, 1, 4, 4).to(dtype)
    theirs = precise(getattr(diffusers, f"{name}Scheduler")(**config), dtype)
    ours = as_scheduler(method, theirs)
    steps = 4 if method is LOWERED else 5  # in 4 there is none of order 3, where theirs is of 2
    found = pipeline(ours, model, x, steps)
    near(found, theirs_of(theirs, model, x, steps), bound)
    if isinstance(method, Exponential):
        near(direct(model, theirs, x, method, torch.tensor(ours._grid)), found, bound)


def direct(
    model: Any, scheduler: Any, x: Tensor, method: Integrator, grid: Tensor, eta: float = 0.0,
    **more: Any,
) -> Tensor:  # fmt: skip
    """``solve`` on the denoiser that a model is."""
    denoiser = from_diffusers(model, scheduler)
    return fs.solve(
        fs.LinearSDE(denoiser.schedule).reverse_sde(denoiser, eta), x, float(grid[0]),
        float(grid[-1]), integrator=method, stepping=fs.Grid(grid), **more,
    ).y1  # fmt: skip


class Toy(nn.Module):
    """A model with the manners of diffusers', which take their timesteps in float32."""

    dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        self.seen.append(x)
        t = timestep.float().reshape(-1, *[1] * (x.ndim - 1)) / 1000
        output = torch.sin(1.3 * x + t) + 0.2 * x.flip(0)
        return SimpleNamespace(sample=output) if return_dict else (output,)


def test_flow_matching_by_multistep_schedulers() -> None:
    """Theirs cut off what their timesteps have after the point, 874.125 for one: ours do not."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    ours, x = as_scheduler(DPMSolverPP(), scheduler), torch.randn(2, 1, 4, 4)
    still = lambda x, t: Toy()(x, torch.zeros(1))
    found = pipeline(ours, still, x, 8)
    assert float(ours.timesteps[1]) == 874.125
    near(found, theirs_of(scheduler, still, x, 8), 1e-6)


# --- models ---------------------------------------------------------------------------------------


STEP, TIME = 400, 0.401


def x0_of(noise: Tensor, x: Tensor, scheduler: Any) -> Tensor:
    square = scheduler.alphas_cumprod[STEP].double()
    return (x - (1 - square).sqrt() * noise) / square.sqrt()


def test_conditions_go_by_name() -> None:
    model = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
    ).eval().requires_grad_(False)  # fmt: skip
    scheduler, x, text = diffusers.DDPMScheduler(clip_sample=False), *torch.randn(2, 2, 1, 4, 4)
    states = {"encoder_hidden_states": text[:, 0]}
    x0 = from_diffusers(model, scheduler)(torch.tensor(TIME), x, states)
    output = model(x.to(model.dtype), STEP, text[:, 0].to(model.dtype)).sample
    assert torch.allclose(x0, x0_of(output, x, scheduler), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="by name"):
        from_diffusers(model, scheduler)(torch.tensor(TIME), x, text)


def test_learned_variances_are_left_out() -> None:
    """A DiT in float32, a state in float64."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1,
        norm_num_groups=1, sample_size=4, num_embeds_ada_norm=5,
    ).eval().requires_grad_(False).float()  # fmt: skip
    scheduler, x = diffusers.DDIMScheduler(clip_sample=False), torch.randn(2, 1, 4, 4)
    labels = torch.tensor([1, 3])
    t = torch.tensor([TIME, TIME])
    x0 = from_diffusers(model, scheduler)(t, x, {"class_labels": labels})
    output = model(x.float(), torch.tensor([STEP, STEP]), class_labels=labels).sample
    assert output.shape[1] == 2
    assert x0.dtype == torch.float64
    assert torch.allclose(x0, x0_of(output[:, :1].double(), x, scheduler), rtol=1e-5, atol=1e-5)


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False).double()  # fmt: skip


def flux_conditions() -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8),
        "txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(5, 3),
    }  # fmt: skip


def test_models_that_are_shown_parts_of_the_way() -> None:
    """Flux and its kin multiply by 1000 themselves."""
    model, conditions = flux(), flux_conditions()
    x, t = torch.randn(2, 5, 4), torch.tensor([0.3, 0.3])
    denoiser = from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler())
    velocity = model(x, timestep=t, return_dict=False, **conditions)[0]
    assert torch.allclose(denoiser(t, x, conditions), x - 0.3 * velocity, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(model, backend="eager")
    again = from_diffusers(compiled, diffusers.FlowMatchEulerDiscreteScheduler())
    assert torch.equal(again(t, x, conditions), denoiser(t, x, conditions))


def test_models_whose_pipelines_turn_them_round_are_refused() -> None:
    class Lumina2Transformer2DModel(Toy):
        pass

    class Tuned(Lumina2Transformer2DModel):
        pass

    class CosmosTransformer3DModel(Toy):
        pass

    for model in (Tuned(), CosmosTransformer3DModel(), torch.compile(Tuned(), backend="eager")):
        with pytest.raises(TypeError, match=r"the pipeline of (Lumina2|Cosmos)Transformer"):
            from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler())


class Spread(nn.Module):
    """As DDP wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.module(*args, **more)


class Adapted(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.base_model(*args, **more)


def test_models_are_known_within_their_wrappers() -> None:
    """Adapters of PEFT hid what a model is shown; DDP's wrapper has no dtype."""
    model = flux()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x, t, conditions = torch.randn(2, 5, 4), torch.tensor([0.3, 0.3]), flux_conditions()
    plain = from_diffusers(model, scheduler)(t, x, conditions)
    for wrapped in (Adapted(model), Spread(model), Spread(Adapted(model))):
        assert torch.equal(from_diffusers(wrapped, scheduler)(t, x, conditions), plain)


@pytest.mark.parametrize("name", ["DDIMInverse", "Helios", "EDMEuler"])
def test_schedulers_of_other_conventions_are_refused(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    with pytest.raises(TypeError, match=r"make fs\.Denoiser"):
        as_scheduler(DDIM(), scheduler)


def test_continuous_times_are_refused() -> None:
    svd = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
    )
    with pytest.raises(TypeError, match="discrete times"):
        from_diffusers(Toy(), svd)


def test_schedulers_that_never_clip() -> None:
    """They have clip_sample=True, and do not read it."""
    model, x = unet(), torch.randn(2, 1, 4, 4)
    scheduler = diffusers.CogVideoXDDIMScheduler()
    assert scheduler.config.clip_sample
    wide, narrow = (from_diffusers(model, s)(torch.tensor(TIME), 30.0 * x) for s in (
        scheduler, diffusers.DDIMScheduler(),
    ))  # fmt: skip
    assert float(wide.abs().max()) > 2.0
    assert float(narrow.abs().max()) <= 1.0
    with pytest.raises(TypeError, match="stochastic_sampling"):
        from_diffusers(model, diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_clip_sample_is_kept_to() -> None:
    """Theirs takes eps from the clipped x0 when asked to; ours always."""
    model, x = unet(), 3.0 * torch.randn(2, 1, 4, 4)
    scheduler = precise(diffusers.DDIMScheduler(clip_sample_range=0.5), torch.float64)
    found = pipeline(as_scheduler(DDIM(), scheduler), model, x, 6)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        output = model(x, t).sample
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    near(found, x, 1e-6)


def test_conventions_that_are_none_of_these_are_refused() -> None:
    for scheduler, cure in (
        (diffusers.EDMEulerScheduler(), "fs.Denoiser"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "fs.Denoiser"),
        (diffusers.DDIMScheduler(thresholding=True), "dynamic_threshold"),
    ):
        with pytest.raises(TypeError, match=cure):
            from_diffusers(Toy(), scheduler)


# --- integrators in their pipelines ---------------------------------------------------------------


DDPM = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler()


def spread(n: int) -> Tensor:
    """A grid that ends where there is noise left."""
    return torch.linspace(0.9, 0.05, n + 1)


def served(eta: float) -> list[Integrator]:
    """All that a pipeline can run."""
    dynamics = fs.LinearSDE(VP()).reverse_sde(MIXTURE.denoiser(VP()), eta)
    every = catalogue(integrators, Integrator)
    return [m for m in [*every, DDIM(0.5)] if m.static and admits(m, dynamics)]


@pytest.mark.parametrize(
    ("method", "eta"), [(m, eta) for eta in (0.0, 1.0) for m in served(eta)], ids=str
)
def test_a_pipeline_comes_to_what_solve_does(method: Integrator, eta: float) -> None:
    """Whatever the method, with and without noise; but for those that add noise before they ask."""
    x, ours, toy = torch.randn(2, 1, 2, 2), as_scheduler(method, FLOW, eta, grid=spread), Toy()
    expected = direct(toy, FLOW, x, method, spread(4), eta, generator=generator(3))
    if not torch.equal(toy.seen[0], x):
        with pytest.raises(TypeError, match="put back no noise"):
            ours.set_timesteps(4)
        return
    found = pipeline(ours, Toy(), x, 4, generator=generator(3))
    assert len(ours.timesteps) == len(toy.seen)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end", [0.05, 0.0])
def test_a_fitted_solver_is_served_on_its_own_grid(end: float) -> None:
    x, toy = torch.randn(2, 1, 2, 2), Toy()
    dynamics = fs.LinearSDE(FlowMatching()).probability_flow(from_diffusers(toy, FLOW))
    starts = [fs.Solver(DPMSolverPP(), fs.Grid(torch.linspace(0.9, end, 5)))]
    fitted = distill_solver(dynamics, starts, x, iterations=4)
    ours = as_scheduler(fitted, FLOW)
    found = pipeline(ours, toy, x, 4)
    assert len(ours.timesteps) == 4
    assert torch.allclose(found, direct(toy, FLOW, x, fitted, fitted.times), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [DDIM(1.0), DPMSolverPP(), SEEDS(2), Heun()], ids=str)
def test_in_real_pipelines(method: Integrator) -> None:
    """Down to no noise, with one generator a sample."""
    model, draws = unet(), [generator(1), generator(2)]
    pipe = diffusers.DDPMPipeline(model, as_scheduler(method, DDPM))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, generator=draws, num_inference_steps=5, output_type="np").images
    alone = pipe(1, generator=[generator(2)], num_inference_steps=5, output_type="np").images
    assert abs(images[1:] - alone).max() < 1e-12
    if isinstance(method, Exponential):
        draws = [generator(1), generator(2)]
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in draws])
        seeds = torch.tensor([_random.draw_seed(g) for g in draws])
        y = direct(
            model, DDPM, x, method, torch.tensor([0.801, 0.601, 0.401, 0.201, 0.001, 0.0]),
            path=fs.Brownian(seeds) if method.draws(fs.ODE(torch.sin), x) else None,
        )  # fmt: skip
        assert torch.allclose(torch.from_numpy(images).movedim(-1, 1), (y / 2 + 0.5).clamp(0, 1))


def test_in_a_ddim_pipeline() -> None:
    """Which hands its own keywords on: none of them may say otherwise."""
    pipe = diffusers.DDIMPipeline(unet(), DDPM)
    pipe.scheduler = as_scheduler(UniPC(), DDPM)
    pipe.set_progress_bar_config(disable=True)
    pipe(generator=generator(), num_inference_steps=3, output_type="np")
    with pytest.raises(TypeError, match="eta"):
        pipe(generator=generator(), num_inference_steps=3, eta=0.5, output_type="np")


def test_it_begins_where_the_pipeline_does() -> None:
    """As image to image does, with the noise that add_noise has added; Heun too."""
    x0, noise, ours = *torch.randn(2, 2, 1, 2, 2), as_scheduler(Heun(), DDPM, grid=spread)
    ours.set_timesteps(4)
    ours.timesteps = ours.timesteps[2 * ours.order :]
    x = ours.add_noise(x0, noise, ours.timesteps[:1].expand(2))
    alpha, sigma = from_diffusers(Toy(), DDPM).schedule(spread(4)[2])
    assert torch.allclose(x, alpha * x0 + sigma * noise, atol=1e-6)
    found = pipeline(ours, Toy(), x)
    assert torch.allclose(found, direct(Toy(), DDPM, x, Heun(), spread(4)[2:]), atol=1e-12)
    with pytest.raises(ValueError, match="begins at timestep 777"):
        ours.step(x, 777, x)


@pytest.mark.parametrize("method", [DPMSolverPP(), UniPC(), Heun()], ids=str)
def test_a_loop_that_goes_back_begins_anew(method: Integrator) -> None:
    """An image that was given up, and video pipelines that take steps once more."""
    x, ours = torch.randn(2, 1, 2, 2), as_scheduler(method, DDPM, grid=spread)
    expected = pipeline(ours, Toy(), x, 4)
    ours.set_timesteps(4)
    ours.step(Toy()(x, ours.timesteps[0]).sample, ours.timesteps[0], x)
    assert torch.allclose(pipeline(ours, Toy(), x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "order"),
    [(DPMSolverPP(start=2), 1), (DPMSolverPP(3, start=3), 1), (UniPC(3), 1), (Heun(), 2),
     (integrators.Bosh3(), 3)],
    ids=str,
)  # fmt: skip
def test_the_order_is_that_of_most_steps(method: Integrator, order: int) -> None:
    """Image to image begins ``strength`` of the way in by it."""
    ours = as_scheduler(method, DDPM, grid=spread)
    ours.set_timesteps(10)
    assert ours.order == order


def test_add_noise_is_theirs() -> None:
    x0, noise, steps = *torch.randn(2, 3, 1, 2, 2), torch.tensor([0, 500, 999])
    found = as_scheduler(DDIM(), DDPM).add_noise(x0, noise, steps)
    assert torch.allclose(found, DDPM.add_noise(x0, noise, steps), atol=1e-6)


def test_noise_is_put_on_as_flow_matching_pipelines_do() -> None:
    scheduler, (x, noise) = diffusers.FlowMatchEulerDiscreteScheduler(), torch.randn(2, 2, 1, 4, 4)
    ours = as_scheduler(DDIM(), scheduler)
    for each in (ours, scheduler):
        each.set_timesteps(5)
        each.set_begin_index(0)
    step = scheduler.timesteps[:1].repeat(2)
    assert torch.allclose(ours.scale_noise(x, step, noise), scheduler.scale_noise(x, step, noise))


@pytest.mark.parametrize("method", [DDIM(), DPMSolverPP(), UniPC(), UniPC(3)], ids=str)
def test_what_is_done_to_a_sample_between_steps_stays(method: Integrator) -> None:
    """Of a network that says 0, x1 = sigma1 / sigma0 x0 at every order."""
    data = diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False)
    ours, ends = as_scheduler(method, data, grid=spread), []
    for change in (0.0, 1.0):
        ours.set_timesteps(6)
        y = torch.ones(1, 1, 1, 1)
        for n, t in enumerate(ours.timesteps):
            y = ours.step(torch.zeros_like(y), t, y).prev_sample + change * (n == 3)
        ends.append(y)
    sigma = from_diffusers(Toy(), data).schedule.sigma(spread(6)[[4, 6]])
    torch.testing.assert_close(ends[1] - ends[0], (sigma[1] / sigma[0]).reshape(1, 1, 1, 1))


def test_samples_may_be_altered_between_steps_alone() -> None:
    x, times = torch.randn(2, 1, 2, 2), spread(3)
    ours = as_scheduler(DDIM(), DDPM, grid=spread)
    ours.set_timesteps(3)
    found = expected = x
    for n, t in enumerate(ours.timesteps):
        found = 0.5 * ours.step(Toy()(found, t).sample, t, found).prev_sample
        expected = 0.5 * direct(Toy(), DDPM, expected, DDIM(), times[n : n + 2])
    assert torch.allclose(found, expected, atol=1e-12)
    ours = as_scheduler(Heun(), DDPM, grid=spread)
    ours.set_timesteps(3)
    y = ours.step(x, ours.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="within a step"):
        ours.step(x, ours.timesteps[1], y + 1.0)


@pytest.mark.parametrize("method", [DPMSolverPP(), Heun()], ids=str)
def test_samples_of_half_precision(method: Integrator) -> None:
    """Are stepped in float32, and handed to the pipeline as they came."""
    x = torch.randn(2, 1, 2, 2).bfloat16()
    found = pipeline(as_scheduler(method, DDPM, grid=spread), Toy(), x, 4)
    assert found.dtype == torch.bfloat16
    near(found.double(), direct(Toy(), DDPM, x.double(), method, spread(4)), 0.03)


def test_what_a_pipeline_cannot_run_is_refused() -> None:
    with pytest.raises(TypeError, match="as often as"):
        as_scheduler(Adams(), DDPM)
    with pytest.raises(TypeError, match="integrates SDEs"):
        as_scheduler(EulerMaruyama(), DDPM)
    with pytest.raises(TypeError, match="put back no noise"):
        as_scheduler(EDMHeun(gamma=0.4), DDPM).set_timesteps(5)
    with pytest.raises(TypeError, match="number of steps alone"):
        as_scheduler(DDIM(), DDPM, grid=spread).set_timesteps(5, sigmas=[1.0, 0.5])
    ours, x = as_scheduler(DDIM(1.0), DDPM), torch.randn(2, 1, 2, 2)
    with pytest.raises(TypeError, match="generator="):
        pipeline(ours, Toy(), x, 5)
    with pytest.raises(FloatingPointError, match="not finite"):
        pipeline(as_scheduler(DDIM(), DDPM), Toy(), x + torch.nan, 5)
    noisy = diffusers.DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="signal is zero"):
        as_scheduler(DDIM(), noisy).set_timesteps(5)


def test_times_that_a_pipeline_gives() -> None:
    """As those of flow matching do, with the shift that goes by an image's size."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = as_scheduler(UniPC(), scheduler)
    ours.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    assert torch.allclose(ours.timesteps.double(), scheduler.timesteps.double())


# --- k-diffusion ----------------------------------------------------------------------------------


SIGMAS = torch.cat((karras(EDM(20.0), 10.0, 0.05, 6), torch.zeros(1))).to(DEVICE)


def model(x: Tensor, sigma: Tensor, gain: float = 1.0) -> Tensor:
    """x0 of a mixture, as k-diffusion's models are called."""
    assert sigma.shape == x.shape[:1]
    return gain * MIXTURE.denoiser(EDM())(sigma, x)


def begin() -> Tensor:
    return SIGMAS[0] * torch.randn(4, 2)


def theirs(x: Tensor, update: Callable[..., Tensor], **extra: Any) -> Tensor:
    """The published loop with this update of (x, denoised, sigma, next sigma, old denoised, its
    lambda).
    """
    old = None
    for n in range(len(SIGMAS) - 1):
        s, after = SIGMAS[n], SIGMAS[n + 1]
        found = model(x, s.expand(len(x)), **extra)
        x, old = update(x, found, s, after, old), (found, -s.log())
    return x


def euler(x: Tensor, x0: Tensor, s: Tensor, after: Tensor, old: Any) -> Tensor:
    return x + (x - x0) / s * (after - s)


def heun(x: Tensor, x0: Tensor, s: Tensor, after: Tensor, old: Any) -> Tensor:
    end = euler(x, x0, s, after, old)
    if after == 0:
        return end
    slope = (end - model(end, after.expand(len(x)))) / after
    return x + 0.5 * ((x - x0) / s + slope) * (after - s)


def two_m(x: Tensor, x0: Tensor, s: Tensor, after: Tensor, old: Any) -> Tensor:
    h = s.log() - after.log()
    if old is not None and after > 0:
        r = (-s.log() - old[1]) / h
        x0 = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old[0]
    return after / s * x - torch.expm1(-h) * x0


@pytest.mark.parametrize(
    ("method", "update"),
    [(DDIM(), euler), (integrators.Euler(), euler), (EDMHeun(), heun), (Heun(), heun),
     (DPMSolverPP(), two_m)],
    ids=lambda x: getattr(x, "__name__", None) or str(x),
)  # fmt: skip
def test_published_samplers(method: Integrator, update: Callable[..., Tensor]) -> None:
    """sample_euler, sample_heun and sample_dpmpp_2m of Karras et al. and Lu et al., onto 0 too."""
    x = begin()
    found = as_sampler(method)(model, x, SIGMAS)
    assert torch.allclose(found, theirs(x, update), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [DDIM(), integrators.Euler()], ids=str)
def test_further_arguments_of_the_model(method: Integrator) -> None:
    x = begin()
    found = as_sampler(method)(model, x, SIGMAS, {"gain": 0.5})
    assert torch.allclose(found, theirs(x, euler, gain=0.5), atol=1e-10)


def test_ancestral_noise_is_the_callers() -> None:
    """sample_euler_ancestral: down to sigma_down, then sigma_up of noise; none on the last step."""
    x, path = begin(), fs.Brownian(5)
    grid = SIGMAS.tolist()
    source = path.bind(grid, Draws(x))

    def update(x: Tensor, x0: Tensor, s: Tensor, after: Tensor, old: Any) -> Tensor:
        up = (after**2 * (s**2 - after**2) / s**2).sqrt()
        down, n = (after**2 - up**2).sqrt(), grid.index(float(s))
        noise = source(n, grid[n], grid[n + 1]).w / (s - after).sqrt()
        return euler(x, x0, s, down, old) + up * noise

    found = as_sampler(DDIM(1.0))(model, x, SIGMAS, path=path)
    assert torch.allclose(found, theirs(x, update), atol=1e-10)
    first, again = (as_sampler(DDIM(1.0))(model, x, SIGMAS, generator=generator()) for _ in "ab")
    assert torch.equal(first, again)
    with pytest.raises(TypeError, match="randomness"):
        as_sampler(DPMSolverPP(), eta=1.0)(model, x, SIGMAS)


@pytest.mark.parametrize(
    "method", [DDIM(), UniPC(), EDMHeun(), EDMHeun(gamma=0.3), Heun(), Tsit5()], ids=str
)
def test_callbacks_see_every_step(method: Integrator) -> None:
    """And what the model says at its start, or where noise was put back: nothing else changes."""
    x, told = begin(), list[dict[str, Any]]()
    sample, path = as_sampler(method), fs.Brownian(0) if method == EDMHeun(gamma=0.3) else None
    found = sample(model, x, SIGMAS, callback=told.append, path=path)
    assert torch.equal(found, sample(model, x, SIGMAS, path=path))
    assert [d["i"] for d in told] == list(range(len(SIGMAS) - 1))
    assert torch.equal(told[0]["x"], x)
    more = 1.0 if path is None else 1.3
    for d, sigma in zip(told, SIGMAS, strict=False):
        assert torch.allclose(d["sigma"], sigma)
        assert torch.allclose(d["sigma_hat"], more * sigma)
        if path is None:
            assert torch.allclose(d["denoised"], model(d["x"], sigma.expand(4)), atol=1e-12)


def test_sigmas_fall() -> None:
    with pytest.raises(ValueError, match="sigmas fall"):
        as_sampler(DDIM())(model, begin(), SIGMAS.flip(0))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_their_stand_in_for_no_signal_is_none(name: str) -> None:
    """Some schedulers write 2^-24 for the alpha that a rescaling makes 0, above the one before."""
    kind = getattr(diffusers, name)
    scheduler = kind(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    denoiser = from_diffusers(lambda x, t, **more: (0.0 * x,), scheduler)
    assert float(denoiser.schedule.alpha(1.0)) == 0.0
