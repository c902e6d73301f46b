"""Drivers in time: noise schedules, time grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
from .control import Linear
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
from .schedule import EDM, VE, VP, Cosine, FlowMatching, Schedule, SubVP, Trigonometric
from .tree import BrownianTree

__all__ = [
    "EDM", "VE", "VP", "Brownian", "BrownianTree", "Cosine", "Discrete", "FlowMatching",
    "LearnedSchedule", "Linear", "Path", "RandomPath", "Schedule", "SubVP", "Trigonometric",
    "aligned", "beta", "karras", "quadratic", "resampled", "uniform", "uniform_lambda",
    "uniform_sigma",
]  # fmt: skip
