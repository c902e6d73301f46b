"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import AffineCoupling, coupling_stack
from .score import score_mlp, score_unet

__all__ = ["AffineCoupling", "cnf", "coupling_stack", "score_mlp", "score_unet"]
