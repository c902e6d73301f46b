"""Drivers in time: noise schedules, time grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
from .control import Linear, Piecewise, Rectilinear, TorchCDE
from .couplings import Coupling, Independent, OptimalTransport, Sinkhorn
from .discrete import Discrete
from .grids import (
    aligned,
    beta,
    karras,
    quadratic,
    resampled,
    uniform,
    uniform_lambda,
    uniform_sigma,
)  # fmt: skip
from .interpolant import Interpolant
from .learned import LearnedSchedule
from .logsignature import LogSignature, log_signature, signature
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule, SubVP, Trigonometric
from .splines import HermiteCubic, Monotone, NaturalCubic
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "Coupling", "Discrete", "FlowMatching",
    "HermiteCubic", "Independent", "Interpolant", "LearnedSchedule", "Linear", "LogSignature",
    "Monotone", "NaturalCubic", "OptimalTransport", "Path", "Piecewise", "RandomPath",
    "Rectilinear", "Schedule", "Sinkhorn", "SubVP", "TorchCDE", "Trigonometric", "aligned", "beta",
    "karras", "log_signature", "quadratic", "resampled", "signature", "uniform", "uniform_lambda",
    "uniform_sigma",
]  # fmt: skip
