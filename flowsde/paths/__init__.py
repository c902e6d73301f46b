"""Drivers in time: noise schedules, interpolants, grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
<<<<<<< HEAD
from .control import Linear, Piecewise, Rectilinear, TorchCDE
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
from .learned import LearnedSchedule
from .logsignature import LogSignature, log_signature, signature
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule, SubVP, Trigonometric
from .splines import HermiteCubic, Monotone, NaturalCubic
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "Discrete", "FlowMatching",
    "HermiteCubic", "LearnedSchedule", "Linear", "LogSignature", "Monotone", "NaturalCubic", "Path",
    "Piecewise", "RandomPath", "Rectilinear", "Schedule", "SubVP", "TorchCDE", "Trigonometric",
    "aligned", "beta", "karras", "log_signature", "quadratic", "resampled", "signature", "uniform",
    "uniform_lambda", "uniform_sigma",
=======
from .control import Linear
from .couplings import Coupling, Independent, OptimalTransport, Sinkhorn
from .grids import karras, uniform, uniform_lambda
from .interpolant import Interpolant
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "Coupling", "FlowMatching",
    "Independent", "Interpolant", "Linear", "OptimalTransport", "Path", "RandomPath", "Schedule",
    "Sinkhorn", "karras", "uniform", "uniform_lambda",
>>>>>>> matching
]  # fmt: skip
