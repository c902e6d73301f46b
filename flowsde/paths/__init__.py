"""Drivers in time: noise schedules, time grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
from .control import Linear
from .grids import karras, uniform, uniform_lambda
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "FlowMatching", "Linear", "Path",
    "RandomPath", "Schedule", "karras", "uniform", "uniform_lambda",
]  # fmt: skip
