"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import Coupling, checkerboard, half
from .data import Dequantize, Logit, Standardize, Whiten
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .flow_matching import StochasticInterpolant, reflow, straightness
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .recipes import glow, nice, nsf, realnvp
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "ActNorm", "Additive", "Affine", "Coupling", "Dequantize", "Elementwise", "Factored",
    "FromTorch", "LatentSDE", "LipSwish", "Logit", "Mixing", "PathDiscriminator", "PathGenerator",
    "Permutation", "RationalQuadraticSpline", "Squeeze", "Standardize", "StochasticInterpolant",
    "Whiten", "checkerboard", "cnf", "glow", "half", "multiscale", "nice", "nsf", "realnvp",
    "reflow", "score_mlp", "score_unet", "straightness",
]  # fmt: skip
