"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import AffineCoupling, coupling_stack
from .data import Dequantize, Logit, Standardize
from .flow_matching import StochasticInterpolant, reflow, straightness
from .latent_sde import LatentSDE
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "AffineCoupling", "Dequantize", "LatentSDE", "LipSwish", "Logit", "PathDiscriminator",
    "PathGenerator", "Standardize", "StochasticInterpolant", "cnf", "coupling_stack", "reflow",
    "score_mlp", "score_unet", "straightness",
]  # fmt: skip
