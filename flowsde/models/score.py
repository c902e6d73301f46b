"""Score models are denoisers; ``LinearSDE`` makes dynamics of them."""

from __future__ import annotations

from ..dynamics.denoiser import Denoiser, Prediction
from ..nn import TimeMLP, UNet
from ..paths.schedule import Schedule

__all__ = ["score_mlp", "score_unet"]


def score_mlp(
    dim: int,
    schedule: Schedule,
    prediction: Prediction,
    width: int = 256,
    depth: int = 3,
    *,
    condition: int = 0,
    dropout: float = 0.0,
) -> Denoiser:
    """A residual dense network for samples of shape ``(dim,)``.

    sde = LinearSDE(schedule)
    sde.reverse_sde(score_mlp(...)), sde.probability_flow(score_mlp(...))
    """
    return Denoiser(TimeMLP(dim, width, depth, condition, dropout), schedule, prediction)


def score_unet(
    channels: int,
    schedule: Schedule,
    prediction: Prediction,
    width: int = 32,
    levels: int = 2,
    *,
    dropout: float = 0.0,
) -> Denoiser:
    """A small U-Net for images of shape ``(channels, height, width)``."""
    return Denoiser(UNet(channels, width, levels, dropout), schedule, prediction)
