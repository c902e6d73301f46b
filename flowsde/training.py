"""Training on an engine that exists: ``fit`` is a loop over accelerate."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _random
from ._files import load_checkpoint, save_checkpoint
from ._scalar import whole
from ._state import sources

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["EMA", "Fitted", "fit", "load_checkpoint", "save_checkpoint"]


class EMA:
    """Exponential moving average of a module's parameters and buffers; all but numbers with a
    fraction is copied.

        average += (1 - decay_n) (value - average),    decay_n = min(decay, (1 + n) / (10 + n))

    Averages of half precision, in which such small changes are lost, are kept in float32.

    Args:
        module: what is averaged.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay lies in [0, 1); got {decay}")
        self.decay, self.count = decay, 0
        self.average = {
            k: v.detach().to(_wide(v), copy=True) if isinstance(v, Tensor) else v
            for k, v in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's values as they are now into the averages: call it after each step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, value in module.state_dict().items():
            if not isinstance(value, Tensor):  # a module's extra state
                self.average[name] = value
            elif value.is_floating_point() or value.is_complex():
                average, value = self.average[name], value.to(_wide(value))
                moved = average.lerp(value, 1.0 - decay)  # NaN from an infinity to the same one
                average.copy_(torch.where(moved.isfinite(), moved, value))
            else:
                self.average[name].copy_(value)

    def copy_to(self, module: nn.Module) -> None:
        """Puts the averages into the module."""
        module.load_state_dict(self.average)

    def state_dict(self) -> dict[str, Any]:
        """The averages as they are now and how many values they are of, for ``torch.save``."""
        average = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.average.items()}
        return {"average": average, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave, of a module with the same names and shapes.

        Raises:
            ValueError: on others.
        """
        given, own = (
            {k: getattr(v, "shape", None) for k, v in averages.items()}
            for averages in (state["average"], self.average)
        )
        if given != own:
            odd = sorted({k for k, _ in given.items() ^ own.items()})
            raise ValueError(f"these averages are of another module: {odd[:4]} are not in both")
        self.count = int(state["count"])
        for name, value in state["average"].items():
            if isinstance(value, Tensor):
                self.average[name].copy_(value)
            else:
                self.average[name] = value


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype


@dataclass
class Fitted:
    """What ``fit`` returns: the loss of every step, and how many steps a checkpoint gave."""

    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0


def fit(
    objective: nn.Module,
    data: Tensor | tuple[Tensor, ...],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 100,
    ema: float = 0.999,
    clip: float = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    accelerator: Accelerator | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
    description: str = "fit",
) -> Fitted:
    """Trains ``objective(*batch, generator=...)`` by AdamW; leaves its averaged weights in it.

    Linear warm-up, then a cosine to zero. Batches, augmentation and the objective's draws are
    functions of (seed, step, process) alone, so that a resumed run equals an uninterrupted one to
    the bit.

    Args:
        objective: a module that returns a scalar loss.
        data: ``(n, ...)``, on any device; or several that go together row by row, such as samples
            and their conditions, or the pairs of ``models.reflow``.
        steps, batch_size: the batch is that of one process.
        seed: of every draw.
        lr, weight_decay, warmup, clip: of the optimizer; clip is the gradient's greatest norm.
        ema: decay of the averaged weights.
        augment: ``(batch, generator) -> batch``, such as dequantisation; of the first of several.
        accelerator: device, mixed precision and processes; by default accelerate's own choice.
        checkpoint: file to resume from where it exists, and to write.
        checkpoint_every: steps between writes, and between looks at the losses, >= 1.
        progress: show a bar with the loss.
        description: of the bar.

    Returns:
        ``Fitted``, with the loss of every step, those before a resumption included.

    Raises:
        TypeError: on data that is no tensor, or tuple of them.
        ValueError: on a checkpoint of another run, counts below one, or an accelerator that gathers
            gradients over several steps.
        RuntimeError: where gradients are switched off.
        FloatingPointError: when the loss or its gradient is not finite, with the step and what to
            try.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    parts = data if isinstance(data, tuple) else (data,)
    seed, steps, batch_size, warmup = map(operator.index, (seed, steps, batch_size, warmup))
    lr, weight_decay, ema, clip = map(float, (lr, weight_decay, ema, clip))  # none of numpy's
    size = _rows(parts, steps, batch_size, checkpoint_every)
    accelerator = _ready(accelerator or Accelerator())
    with _own_forward(objective):
        optimizer = torch.optim.AdamW(
            [p for p in objective.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay
        )
        model, optimizer = accelerator.prepare(objective, optimizer)
        plain = accelerator.unwrap_model(model)
        fitted = Fitted()
        settings = {
            "seed": seed, "steps": steps, "batch_size": batch_size, "size": size, "lr": lr,
            "weight_decay": weight_decay, "warmup": warmup, "ema": ema, "clip": clip,
            "processes": accelerator.num_processes,
        }  # fmt: skip
        run = _Run(settings, accelerator, plain, optimizer, EMA(plain, ema), fitted)
        if checkpoint is not None and Path(checkpoint).exists():
            run.resume(checkpoint)
        parts = tuple(part.to(accelerator.device) for part in parts)
        bar = tqdm(
            total=steps,
            initial=len(fitted.losses),
            desc=description,
            disable=not (progress and accelerator.is_main_process),
            mininterval=0.5,
        )
        pending: list[Tensor] = []
        optimizer.zero_grad()
        model.train()
        while (step := len(fitted.losses) + len(pending)) < steps:
            draws = _generator(accelerator, seed, step)
            rows = torch.randint(size, (batch_size,), generator=draws, device=accelerator.device)
            batch = [part[rows] for part in parts]
            if augment is not None:
                batch[0] = augment(batch[0], draws)
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps, warmup)
            with _after(pending, fitted):
                with _forked(accelerator.device), accelerator.autocast():
                    torch.manual_seed(_apart(draws))  # for dropout, which takes no generator
                    loss = _number(model(*batch, generator=draws))
                _look_for_others(loss, plain, accelerator.num_processes == 1 and step == 0)
                accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            run.average.update(plain)
            if norm is None or accelerator.scaler is not None:  # which leaves such steps out itself
                norm = torch.zeros_like(loss)
            pending.append(torch.stack((loss.detach(), norm.to(loss))))
            bar.update()
            if step + 1 == steps or (step + 1) % checkpoint_every == 0:
                _read(pending, fitted, accelerator)
                bar.set_postfix(loss=f"{fitted.losses[-1]:.4f}")
                if checkpoint is not None and accelerator.is_main_process:
                    save_checkpoint(checkpoint, run.state())
        bar.close()
        run.end()
        return fitted


def _look_for_others(loss: Tensor, objective: nn.Module, now: bool) -> None:
    """Warns of parameters of the loss that the objective does not hold."""
    if not now:
        return
    own = {id(p) for p in objective.parameters()}
    leaves = [x for x in sources([loss]) if isinstance(x, nn.Parameter) and id(x) not in own]
    if leaves:
        warnings.warn(
            f"the loss hangs on {len(leaves)} parameters that its objective does not hold, and "
            f"that are not trained, one of shape {tuple(leaves[0].shape)}: give the module itself "
            "where its method, or a closure over it, stands, as in ODE(module); or call "
            "requires_grad_(False) on what is not to be trained",
            stacklevel=3,
        )


def _rows(parts: tuple[Tensor, ...], steps: int, batch_size: int, every: int) -> int:
    """Of the data, checked."""
    if not all(isinstance(part, Tensor) for part in parts):
        kinds = [type(part).__name__ for part in parts]
        raise TypeError(
            f"data is a tensor, or a tuple of tensors; got {', '.join(kinds)}: give "
            "torch.as_tensor(array)"
        )
    size = len(parts[0]) if len({len(part) for part in parts}) == 1 else 0
    if steps < 1 or batch_size < 1 or size < 1 or not whole(every, 1):
        raise ValueError(
            "steps, batch_size, checkpoint_every and rows of data are at least one, and as many in "
            f"each part; got {steps}, {batch_size}, {every} and {[len(part) for part in parts]}"
        )
    return size


def _ready(accelerator: Accelerator) -> Accelerator:
    """One that takes a step with every batch, where steps can be taken."""
    if not torch.is_grad_enabled():
        raise RuntimeError("fit takes gradients: call it outside of no_grad and inference_mode")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "fit takes a step with every batch: leave out gradient_accumulation_steps, and give a "
            "larger batch_size"
        )
    return accelerator


@contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """Takes out again the forward of lower precision that accelerate puts into a module."""
    names = "forward", "_original_forward"
    before = {name: value for name, value in vars(module).items() if name in names}
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(before)


def _rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate's part of its height."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _generator(accelerator: Accelerator, seed: int, step: int) -> torch.Generator:
    """The draws of one step on one process."""
    device = torch.device("cpu")
    start = torch.tensor([_random.word(seed)])
    key = _random.keys(start, 1, device, step * 65536 + accelerator.process_index)
    generator = torch.Generator(device=accelerator.device)
    return generator.manual_seed(int(key) & (2**63 - 1))


def _apart(draws: torch.Generator) -> int:
    """A seed whose numbers are not those of this generator."""
    seed = torch.tensor([draws.initial_seed()])
    return int(_random.keys(seed, 1, seed.device, _random.CHOICE)) & (2**63 - 1)


def _read(pending: list[Tensor], fitted: Fitted, accelerator: Accelerator) -> None:
    """Losses, and norms of their gradients, to the host, in one read."""
    _note(accelerator.reduce(torch.stack(pending), reduction="mean"), fitted)
    pending.clear()


@contextmanager
def _after(pending: list[Tensor], fitted: Fitted) -> Iterator[None]:
    """A step, whose failure is told of the one before that broke the weights, if one did."""
    try:
        yield
    except Exception:
        if pending:
            _note(torch.stack(pending), fitted)
        raise


def _note(read: Tensor, fitted: Fitted) -> None:
    """Losses that are numbers.

    Raises:
        FloatingPointError: on the first that is none.
    """
    for loss, norm in read.tolist():
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} is {value} at step {len(fitted.losses)}: lower lr, clip harder, "
                    "or look at the data; the last checkpoint is from before"
                )
        fitted.losses.append(loss)


def _number(loss: Tensor) -> Tensor:
    if loss.ndim:
        raise ValueError(f"a loss is one number; got {tuple(loss.shape)}: take its mean")
    return loss


def _forked(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves the global generators of the CPU and of this device as they are."""
    if device.type in ("cuda", "xpu"):
        return torch.random.fork_rng([device], device_type=device.type)
    return torch.random.fork_rng([])


@dataclass
class _Run:
    """What a checkpoint is made of, and what is left at the end."""

    settings: dict[str, Any]
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    average: EMA
    fitted: Fitted

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "run": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": self.fitted.losses,
        }

    def resume(self, path: str | Path) -> None:
        """Goes on from a checkpoint."""
        state, scaler = load_checkpoint(path), self.accelerator.scaler
        if state["run"] != self.settings:
            raise ValueError(
                f"{path} is the checkpoint of another run, {state['run']}, not of {self.settings}: "
                "delete it, or write to another place"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        self.fitted.losses[:] = state["losses"]
        self.fitted.resumed_at = len(self.fitted.losses)

    def end(self) -> None:
        """Leaves the averages in the model: of running statistics, of which each process has its
        own, the first one's in all.
        """
        from accelerate.utils import broadcast

        if self.accelerator.num_processes > 1:
            average = self.average.average
            for name, _ in self.model.named_buffers():
                if name in average:
                    average[name] = broadcast(average[name])
        self.average.copy_to(self.model)
        self.model.eval()
