"""Transformations return dynamics, and compose."""

from .calculus import to_ito, to_stratonovich
from .clock import change_clock
from .costate import costate
from .density import Divergence, Exact, Hutchinson, log_density

__all__ = [
    "Divergence", "Exact", "Hutchinson", "change_clock", "costate", "log_density", "to_ito",
    "to_stratonovich",
]  # fmt: skip
