"""Drivers in time: noise schedules, time grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
from .control import Linear, Piecewise, Rectilinear, TorchCDE
from .grids import karras, uniform, uniform_lambda
from .logsignature import LogSignature, log_signature, signature
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule
from .splines import HermiteCubic, Monotone, NaturalCubic
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "FlowMatching", "HermiteCubic",
    "Linear", "LogSignature", "Monotone", "NaturalCubic", "Path", "Piecewise", "RandomPath",
    "Rectilinear", "Schedule", "TorchCDE", "karras", "log_signature", "signature", "uniform",
    "uniform_lambda",
]  # fmt: skip
