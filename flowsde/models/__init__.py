"""Models: each file only builds dynamics."""

from .cnf import cnf
from .coupling import Coupling, checkerboard, half
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .recipes import glow, nice, nsf, realnvp
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "ActNorm", "Additive", "Affine", "Coupling", "Elementwise", "Factored", "FromTorch",
    "LatentSDE", "LipSwish", "Mixing", "PathDiscriminator", "PathGenerator", "Permutation",
    "RationalQuadraticSpline", "Squeeze", "checkerboard", "cnf", "glow", "half", "multiscale",
    "nice", "nsf", "realnvp", "score_mlp", "score_unet",
]  # fmt: skip
