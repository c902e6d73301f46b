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
from .noising import LinearSDE

__all__ = [
    "CDE", "ODE", "SDE", "Chain", "Composed", "Data", "Denoiser", "Dynamics", "EDMPrediction",
    "Inverse", "Kinetic", "Langevin", "LinearSDE", "Map", "Noise", "NoisePrediction", "Prediction",
    "Score", "SemiLinear", "UnderdampedLangevin", "VPrediction", "Velocity",
]  # fmt: skip
