"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import AffineCoupling, coupling_stack
from .latent_sde import LatentSDE
from .neural_cde import NeuralCDE
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "AffineCoupling", "LatentSDE", "LipSwish", "NeuralCDE", "PathDiscriminator", "PathGenerator",
    "cnf", "coupling_stack", "score_mlp", "score_unet",
]  # fmt: skip
