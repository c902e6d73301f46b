"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import AffineCoupling, coupling_stack
from .latent_sde import LatentSDE
from .score import score_mlp, score_unet

__all__ = ["AffineCoupling", "LatentSDE", "cnf", "coupling_stack", "score_mlp", "score_unet"]
