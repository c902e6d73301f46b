"""Drivers in time: noise schedules, time grids, Brownian motion, control paths."""

from .base import Path
from .brownian import Brownian
from .control import Linear
from .grids import karras, uniform, uniform_lambda
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule

__all__ = [
    "EDM", "VE", "VP", "Brownian", "Cosine", "FlowMatching", "Linear", "Path", "Schedule",
    "karras", "uniform", "uniform_lambda",
]  # fmt: skip
