"""Drivers in time: noise schedules, interpolants, grids, Brownian motion, control paths."""

from .base import Path, RandomPath
from .brownian import Brownian
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
]  # fmt: skip
