"""Models of diffusers as denoisers, and any integrator as a scheduler of its pipelines."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _random
from .._increment import Source
from .._scalar import Scalar, expand
from .._state import State
from ..dynamics.base import Dynamics, SemiLinear
from ..dynamics.denoiser import (
    Data,
    Denoiser,
    NoisePrediction,
    Prediction,
    Velocity,
    VPrediction,
)  # fmt: skip
from ..dynamics.field import Field
from ..dynamics.noising import LinearSDE
from ..dynamics.threshold import clip
from ..fitting import Nonstationary
from ..integrators.base import Integrator
from ..integrators.exponential import Exponential
from ..paths.brownian import Brownian
from ..paths.discrete import Discrete
from ..paths.schedule import FlowMatching, Schedule
from ..stepping import Grid
from ._landing import land

__all__ = ["as_scheduler", "from_diffusers"]

Network = Callable[..., Tensor]
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": NoisePrediction(), "sample": Data(), "v_prediction": VPrediction(),
    "flow_prediction": Velocity(),
}  # fmt: skip
# models that are shown t in [0, 1], as their pipelines do
_UNIT = {
    "AuraFlowTransformer2DModel", "BriaFibo2Transformer2DModel", "ChromaTransformer2DModel",
    "Flux2Transformer2DModel", "Flux3Transformer2DModel", "FluxTransformer2DModel",
    "Krea2Transformer2DModel", "LongCatAudioDiTTransformer", "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel", "PRXTransformer2DModel", "QwenImage21Transformer2DModel",
    "QwenImageTransformer2DModel",
}  # fmt: skip
# models whose pipelines show them another time (1 - t, a step less, EDM's), scale what they see, or
# take the velocity with the other sign
_OTHER = {
    "CosmosTransformer3DModel", "GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel",
    "Ideogram4Transformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel",
    "NucleusMoEImageTransformer2DModel", "ZImageTransformer2DModel",
}  # fmt: skip
_NEAR = 1e-2  # between the numbers of one time
# schedulers that have clip_sample=True by default and never clip
_BOUNDLESS = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "TCDScheduler"}


def from_diffusers(model: Any, scheduler: Any) -> Denoiser:
    """The denoiser that a model is, by what the scheduler it was trained with says.

    From ``alphas_cumprod`` (rescaled to zero terminal signal or not) with ``prediction_type``
    epsilon, sample or v_prediction: on ``Discrete``, whose step i stands at t = (i + 1) / T. From a
    flow-matching scheduler: on ``FlowMatching()``, whose t is its sigma. ``clip_sample`` is kept
    to, and the noise is always that of the clipped x0 (a DDIMScheduler's step under
    ``use_clipped_model_output=True``). Conditions go by the names they have in the model's
    ``forward``, as one dictionary:

        solve(LinearSDE(d.schedule).probability_flow(d), x, ..., args=({"class_labels": labels},))

    Args:
        model: of diffusers, called as ``model(x, timestep=(batch,), **conditions)``, in its own
            dtype, compiled, under PEFT's adapters or wrapped by DDP too. Channels of a learned
            variance are left out.
        scheduler: of diffusers; is read and not altered.

    Raises:
        TypeError: on a scheduler whose convention is none of these, or a model whose pipeline
            does more than that.
    """
    convention = _Convention.of(scheduler)
    return convention.denoiser(_Network(model, convention))


class _Network(nn.Module):
    """A model of diffusers as ``network(t, x, conditions)``."""

    model: Any
    precise_time = True

    def __init__(self, model: Any, convention: _Convention) -> None:
        super().__init__()
        self.model, self.convention = model, convention
        kinds = {kind.__name__ for kind in type(_innermost(model)).__mro__}
        if kinds & _OTHER:
            raise TypeError(
                f"the pipeline of {min(kinds & _OTHER)} shows it another time or another input "
                "than the scheduler's, or turns its answer round: make fs.Denoiser(network, "
                "FlowMatching(), Velocity()) of what its pipeline does"
            )
        self._unit = bool(kinds & _UNIT)

    def forward(self, t: Tensor, x: Tensor, conditions: Mapping[str, Any] | None = None) -> Tensor:
        if not isinstance(conditions, Mapping | None):
            raise TypeError(
                f"conditions go by name, args=({{'class_labels': labels}},); got "
                f"{type(conditions).__name__}"
            )
        step = self.convention.step(t).expand(len(x))
        if self._unit:
            step = step / self.convention.steps
        shown = x.to(_dtype(self.model))
        output = self.model(shown, timestep=step, return_dict=False, **(conditions or {}))[0]
        return _mean(output, x)


def _innermost(model: Any) -> Any:
    """A model within what compiles it, adapts it or spreads it over processes."""
    for name in ("_orig_mod", "module"):
        if (inner := getattr(model, name, None)) is not None:
            return _innermost(inner)
    return _innermost(model.get_base_model()) if hasattr(model, "get_base_model") else model


def _dtype(model: Any) -> torch.dtype:
    """That of a model of diffusers, or of the first parameter of another."""
    inner = _innermost(model)
    found: torch.dtype = getattr(inner, "dtype", None) or next(inner.parameters()).dtype
    return found


def _mean(output: Tensor, x: Tensor) -> Tensor:
    """A model's output without the channels of a learned variance, in the state's dtype."""
    channels = x.shape[1]
    return (output[:, :channels] if output.shape[1] == 2 * channels else output).to(x.dtype)


@dataclass(frozen=True)
class _Convention:
    """What a scheduler of diffusers says of the models that are trained with it.

    Args:
        schedule, prediction: the library's.
        steps: T; step i stands at t = (i + offset) / T.
        offset: 1 for a table, 0 for flow matching.
        bound: x0 is kept within +- this; None where it is not.
    """

    schedule: Schedule
    prediction: Prediction
    steps: int
    offset: float
    bound: float | None

    @classmethod
    def of(cls, scheduler: Any) -> _Convention:
        config: Any = getattr(scheduler, "config", {})
        table: Any = getattr(scheduler, "alphas_cumprod", None)
        matching = isinstance(scheduler, _flow_matching())
        kind = "flow_prediction" if matching else config.get("prediction_type")
        flow = kind == "flow_prediction"
        name = f"{type(scheduler).__name__}(prediction_type={kind!r})"
        strange = (
            config.get("invert_sigmas")
            or config.get("timestep_type") == "continuous"
            or (flow and (config.get("sigma_max") or 1.0) > 1.0)  # EDM's, under the other's name
            or config.get("stages") is not None  # each with times of its own
            or "Inverse" in type(scheduler).__name__
        )
        if kind not in _PREDICTIONS or (table is None and not flow) or strange:
            raise TypeError(
                f"{name} has neither alphas_cumprod, with epsilon, sample or v_prediction and "
                "discrete times, nor flow matching's times: make fs.Denoiser(network, schedule, "
                "prediction) of it"
            )
        if config.get("thresholding"):
            raise TypeError(
                f"{name} thresholds with a cap: leave out thresholding=True, and apply "
                "flowsde.dynamics.dynamic_threshold to the denoiser"
            )
        if config.get("stochastic_sampling"):
            raise TypeError(
                f"{name} draws noise in each step: leave out stochastic_sampling=True, and give "
                "as_scheduler an eta, or reverse_sde(denoiser, eta)"
            )
        clips = config.get("clip_sample") and type(scheduler).__name__ not in _BOUNDLESS
        bound = config.get("clip_sample_range", 1.0) if clips else None
        if not flow and float(table[-1]) == 2.0**-24:  # their stand-in for no signal at all
            table = torch.cat((table[:-1], torch.zeros_like(table[-1:])))
        schedule = FlowMatching() if flow else Discrete.from_alphas_cumprod(table)
        steps, offset = config["num_train_timesteps"], 0.0 if flow else 1.0
        return cls(schedule, _PREDICTIONS[kind], steps, offset, bound)

    def denoiser(self, network: Network) -> Denoiser:
        """The network's."""
        plain = Denoiser(network, self.schedule, self.prediction)
        return plain if self.bound is None else clip(plain, -self.bound, self.bound)

    def step(self, t: Tensor) -> Tensor:
        """What networks are shown; whole where float32 misses it by its rounding alone."""
        step = self.steps * t - self.offset
        miss = (step.round() - step).detach()
        return torch.where(miss.abs() < 1e-3, step + miss, step)

    def time(self, step: Tensor) -> Tensor:
        """The t of a step, on the way back."""
        return (step + self.offset) / self.steps

    def grid(self, scheduler: Any) -> Tensor:
        """The times of the scheduler's own steps, and where they end."""
        sigmas: Any = getattr(scheduler, "sigmas", None)
        if self.offset == 0.0:
            times = sigmas.double()
        elif sigmas is not None:
            lambdas = -sigmas.double().log()
            times = self.time(self.step(torch.as_tensor(self.schedule.time(lambdas))))
        else:
            last = 1.0 / self.steps if scheduler.config.get("set_alpha_to_one") is False else 0.0
            times = self.time(scheduler.timesteps.double())
            times = torch.cat([times, times.new_tensor([last])])
        return times.cpu().unique_consecutive()


def _flow_matching() -> tuple[type, ...]:
    import diffusers

    return (
        diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler,
        diffusers.FlowMatchLCMScheduler,
    )  # fmt: skip


# --- in a pipeline --------------------------------------------------------------------------------


def as_scheduler(
    integrator: Integrator,
    scheduler: Any,
    eta: float = 0.0,
    grid: Callable[[int], Tensor] | None = None,
) -> _Scheduler:
    """An integrator as a scheduler of diffusers' pipelines: ``pipe.scheduler = as_scheduler(...)``,
    set on a pipeline that is there: one that is being made puts diffusers' own in its place.

    The pipeline calls the network, once for every entry of ``timesteps``: as many as the integrator
    has evaluations in the steps that are asked for. State, noise and grid are those of ``solve`` on
    ``from_diffusers(model, scheduler)``, and so is the result. Between steps a pipeline may alter
    the sample (as inpainting does), and it may begin at any step. ``generator`` is one, or one a
    sample.

    Args:
        integrator: one whose evaluations fall at the same times whatever the values; one that
            ``distill_solver`` fitted brings its own grid, which must be taken whole.
        scheduler: of diffusers, with which the model was trained; is copied.
        eta: of the reverse SDE that is integrated; 0 is the probability flow.
        grid: times of the schedule for a number of steps; by default the scheduler's own.

    Raises:
        TypeError: on an integrator whose evaluations go by what it finds, or that puts noise on
            a state before it asks; while sampling, on noise without a generator.
        ValueError: while sampling, where a pipeline begins, or alters a sample, within a step.
    """
    return _Scheduler(integrator, scheduler, eta, grid)


class _Stepped(NamedTuple):
    """What diffusers' schedulers return, with ``return_dict`` and without."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Scheduler:
    """From ``as_scheduler``."""

    init_noise_sigma = 1.0

    def __init__(
        self, integrator: Integrator, scheduler: Any, eta: float,
        grid: Callable[[int], Tensor] | None,
    ) -> None:  # fmt: skip
        self._name = type(integrator).__name__
        if isinstance(integrator, Nonstationary):
            own = integrator.times
            grid = grid or (lambda steps: own)
        elif not (integrator.static or isinstance(integrator, Exponential)):
            raise TypeError(
                f"{self._name} asks the network as often as it finds needed, a pipeline as often "
                "as was said before: use DPMSolverPP(), UniPC() or Heun()"
            )
        self._convention = _Convention.of(scheduler)
        self._integrator, self._eta, self._times = land(integrator), eta, grid
        self._scheduler, self.config = copy.deepcopy(scheduler), scheduler.config
        self._integrator.check(self._dynamics(lambda t, x: x))
        self.order = 1
        self.timesteps = torch.empty(0)
        self._grid: list[float] = []
        self._starts: list[tuple[float, int]] = []
        self._run: _Run | None = None

    def _dynamics(self, network: Network) -> Dynamics:
        denoiser = self._convention.denoiser(network)
        return LinearSDE(denoiser.schedule).reverse_sde(denoiser, self._eta)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None,
        timesteps: Any = None, sigmas: Any = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        """So many steps, or those that diffusers' own scheduler makes of what else is given."""
        own = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        own = {name: value for name, value in own.items() if value is not None}
        if self._times is None:
            self._scheduler.set_timesteps(num_inference_steps, **own)
            self._grid = self._convention.grid(self._scheduler).tolist()
        elif own or num_inference_steps is None:
            raise TypeError("as_scheduler(grid=...) says the times: give a number of steps alone")
        else:
            self._grid = self._times(num_inference_steps).tolist()
        self._rehearse(device)

    def _rehearse(self, device: Any) -> None:
        """Learns at what times the network will be asked, and which of them begin a step."""
        shown: list[float] = []
        costs = [0] * (len(self._grid) - 1)  # evaluations of each step
        self._starts = []
        run = self._begin(torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0, self._grid)
        while run.asked is not None:
            step, x = run.step, run.asked[1]
            if run.starting:
                self._starts.append((step, run.place))
            shown.append(step)
            costs[run.place] += 1
            run.tell(torch.zeros_like(x), x, x.dtype)
        if not self._starts or self._starts[0][0] != shown[0]:
            raise TypeError(
                f"{self._name} moves the sample before it asks the network, which a pipeline asks "
                "first: use DDIM(eta) or SEEDS(), or put back no noise"
            )
        steps = torch.tensor(shown, dtype=torch.float64)
        whole = bool((steps == steps.round()).all())
        self.timesteps = steps.to(device, torch.int64 if whole else torch.float32)
        self.order = statistics.median_low(costs)  # of most steps: the first or last may differ
        self._run = None

    def _begin(self, y: Tensor, seed: int | Tensor | None, grid: Sequence[float]) -> _Run:
        return _Run(self._integrator, self._dynamics, self._convention, grid, y, seed)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Those of the scheduler that it was made from."""
        return self._scheduler.alphas_cumprod

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines tell it; where they begin is seen from the first timestep."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise``, as pipelines of flow matching call it."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """As it is: the sample is alpha x0 + sigma eps."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at these steps, 0-d or ``(batch,)``."""
        x0 = original_samples
        wide = torch.promote_types(x0.dtype, torch.float32)
        t = self._convention.time(timesteps.to(x0.device, wide))
        alpha, sigma = (expand(part, x0) for part in self._convention.schedule(t))
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True, **more: Any,
    ) -> _Stepped:  # fmt: skip
        """On to where the network is wanted next, or to the end; and the x0 found here."""
        more.pop("use_clipped_model_output", None)  # which is how it is
        if any(more.values()):
            raise TypeError(f"as_scheduler(integrator, eta=...) says all of the step; got {more}")
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self._run is not None and not self._run.awaits(float(timestep)):
            self._run = None  # given up, or taken up elsewhere: from there it is a solve anew
        if self._run is None:
            seed = None if generator is None else _seed(generator)
            self._run = self._begin(wide, seed, self._grid[self._place(timestep) :])
        run = self._run
        output = _mean(model_output, wide)
        assert run.asked is not None
        x0 = self._convention.denoiser(lambda t, x: output)(run.asked[0], wide)
        run.tell(output, wide, sample.dtype)
        x = run.y if run.asked is None else run.asked[1]
        if run.asked is None:
            self._run = None
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError("the sample is not finite: look at the model's outputs")
        return _Stepped(x.to(sample.dtype), x0.to(sample.dtype))

    def _place(self, timestep: Any) -> int:
        """The step of the grid that begins there."""
        for step, place in self._starts:
            if abs(step - float(timestep)) < _NEAR:
                return place
        raise ValueError(
            f"no step of {self._name} begins at timestep {float(timestep)}: call set_timesteps, "
            "and begin at the first of its timesteps, or with DPMSolverPP() at any"
        )


def _seed(generator: torch.Generator | Sequence[torch.Generator]) -> int | Tensor:
    """One seed a solve, or one a sample."""
    if isinstance(generator, torch.Generator):
        return _random.draw_seed(generator)
    return torch.tensor([_random.draw_seed(g) for g in generator])


class _Asked(Exception):
    """The network is wanted at t, x."""

    def __init__(self, t: Tensor, x: Tensor) -> None:
        super().__init__()
        self.t, self.x = t, x


class _Known(Field):
    """A field that remembers, from one attempt at a step to the next, what it was found to be."""

    __slots__ = ("_place", "values")

    def __init__(self, dynamics: Dynamics, y: Tensor) -> None:
        super().__init__(dynamics, (), y)
        self.values: list[State] = []
        self._place = 0

    def again(self) -> None:
        """Told that the step is taken from its start."""
        self._place = 0

    def drift(self, t: Scalar, y: State) -> State:
        return self._recall(partial(super().drift, t, y))

    def residual(self, t: Scalar, x: State, split: SemiLinear | None = None) -> State:
        return self._recall(partial(super().residual, t, x, split))

    def _recall(self, find: Callable[[], State]) -> State:
        if self._place == len(self.values):
            self.values.append(find())
        self._place += 1
        return self.values[self._place - 1]


class _Run:
    """A solve on given steps that stands still where its network is asked, until it is told.

    A step is a pure function of its start and of the field. So it is tried anew, from its start,
    with all that is known of the field since; where the network is missing, the attempt ends.

    Attributes:
        y: the state where the step starts.
        asked: (t, x) at which the network is wanted; None at the end.
        place: the number of the step.
    """

    def __init__(
        self, integrator: Integrator, dynamics: Callable[[Network], Dynamics],
        convention: _Convention, grid: Sequence[float], y: Tensor, seed: int | Tensor | None,
    ) -> None:  # fmt: skip
        made, self._convention = dynamics(self._answer), convention
        made.check_span(grid[0], grid[-1])
        self._field, self._grid = _Known(made, y), grid
        stepping = Grid(torch.tensor(grid, dtype=torch.float64))
        self._integrator = integrator.bind(stepping).along(grid)
        self._noise = self._source(y, seed)
        self._output: Tensor | None = None
        self._begun, self._carry = False, None
        self.y, self.place = y, 0
        self.asked: tuple[Tensor, Tensor] | None = None
        self._go()

    def _source(self, y: Tensor, seed: int | Tensor | None) -> Source | None:
        draws = self._integrator.draws(self._field.dynamics, y)
        if draws is None:
            return None
        if seed is None:
            raise TypeError(
                "this integrator draws noise: call the pipeline with "
                "generator=torch.Generator().manual_seed(...)"
            )
        return Brownian(seed).bind(self._grid, draws)

    @property
    def starting(self) -> bool:
        """Whether the network is asked at the very start of a step."""
        return self.asked is not None and self.asked[1] is self.y and not self._field.values

    @property
    def step(self) -> float:
        """The number of the time at which the network is wanted."""
        assert self.asked is not None
        return float(self._convention.step(self.asked[0]))

    def awaits(self, timestep: float) -> bool:
        """Whether it is this one."""
        return abs(self.step - timestep) < _NEAR

    def tell(self, output: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        """What the network says at x, which may have been altered, in this dtype, at a start."""
        assert self.asked is not None
        if self.starting:
            self.y = x
        elif not torch.equal(self.asked[1].to(dtype), x.to(dtype)):
            raise ValueError(
                "the pipeline altered the sample within a step: use an integrator of one "
                "evaluation a step, such as DPMSolverPP() or UniPC()"
            )
        self._output = output
        self._go()

    def _answer(self, t: Tensor, x: Tensor) -> Tensor:
        output, self._output = self._output, None
        if output is None:
            raise _Asked(t, x)
        return output

    def _go(self) -> None:
        """As far as the answers reach."""
        self.asked = None
        while self.place < len(self._grid) - 1:
            self._field.again()
            try:
                self._take()
            except _Asked as asked:
                self.asked = asked.t, asked.x
                return
            self._field.values.clear()

    def _take(self) -> None:
        """The step at hand; before the first one, what it starts from."""
        if not self._begun:
            self._carry = self._integrator.init(self._field, self._grid[0], self.y)
            self._begun = True
            return
        n, (t0, t1) = self.place, self._grid[self.place : self.place + 2]
        dw = None if self._noise is None else self._noise(n, t0, t1)
        step = self._integrator.step(self._field, t0, t1, self.y, dw, self._carry)
        self.y, self._carry, self.place = step.y1, step.carry, n + 1
