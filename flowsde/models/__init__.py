"""Models: each file only builds dynamics."""

from .cnf import cnf, planar_cnf
from .coupling import AffineCoupling, coupling_stack
from .flow_matching import StochasticInterpolant, reflow, straightness
from .latent_sde import LatentSDE
from .neural_cde import NeuralCDE
from .neural_ode import NeuralODE
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "AffineCoupling", "LatentSDE", "LipSwish", "NeuralCDE", "NeuralODE", "PathDiscriminator",
    "PathGenerator", "StochasticInterpolant", "cnf", "coupling_stack", "planar_cnf", "reflow",
    "score_mlp", "score_unet", "straightness",
]  # fmt: skip
