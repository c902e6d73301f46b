"""Transformations return dynamics, and compose."""

from .augmented import Augmented
from .bridge import Bridge, bridge
from .calculus import to_ito, to_stratonovich
from .clock import change_clock
from .costate import costate
from .density import Divergence, Exact, Hutchinson, HutchPlusPlus, Products, log_density
from .horizon import learn_horizon
from .path_kl import girsanov, path_kl
from .regularize import Regularized, regularize

__all__ = [
    "Augmented", "Bridge", "Divergence", "Exact", "HutchPlusPlus", "Hutchinson", "Products",
    "Regularized", "bridge", "change_clock", "costate", "girsanov", "learn_horizon", "log_density",
    "path_kl", "regularize", "to_ito", "to_stratonovich",
]  # fmt: skip
