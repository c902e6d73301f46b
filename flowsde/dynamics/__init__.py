"""How states move: differential equations, discrete chains, and the noising process."""

from .base import Dynamics, Kinetic, Noise, SemiLinear
from .denoiser import (
    Data,
    Denoiser,
    EDMPrediction,
    NoisePrediction,
    Prediction,
    Score,
    Velocity,
    VPrediction,
)  # fmt: skip
from .differential import CDE, ODE, SDE
from .discrete import Chain, Composed, Inverse, Map
from .langevin import Langevin, UnderdampedLangevin
from .noising import AnnealedLangevin, LinearSDE
from .threshold import clip, dynamic_threshold

__all__ = [
    "CDE", "ODE", "SDE", "AnnealedLangevin", "Chain", "Composed", "Data", "Denoiser", "Dynamics",
    "EDMPrediction", "Inverse", "Kinetic", "Langevin", "LinearSDE", "Map", "Noise",
    "NoisePrediction", "Prediction", "Score", "SemiLinear", "UnderdampedLangevin", "VPrediction",
    "Velocity", "clip", "dynamic_threshold",
]  # fmt: skip
