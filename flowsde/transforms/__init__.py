"""Transformations return dynamics, and compose."""

from .augmented import Augmented
from .calculus import to_ito, to_stratonovich
from .clock import change_clock
from .costate import costate
from .density import Divergence, Exact, Hutchinson, log_density
from .path_kl import girsanov, path_kl

__all__ = [
    "Augmented", "Divergence", "Exact", "Hutchinson", "change_clock", "costate", "girsanov",
    "log_density", "path_kl", "to_ito", "to_stratonovich",
]  # fmt: skip
