"""Models: each file only builds dynamics."""

from .autoregressive import Autoregressive
from .cnf import cnf
from .coupling import Coupling, checkerboard, half
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .planar import Planar, Sylvester
from .recipes import glow, maf, nice, nsf, realnvp
from .residual import ExactLogDet, InvertibleResidual, LogDet, RouletteLogDet
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "ActNorm", "Additive", "Affine", "Autoregressive", "Coupling", "Elementwise", "ExactLogDet",
    "Factored", "FromTorch", "InvertibleResidual", "LatentSDE", "LipSwish", "LogDet", "Mixing",
    "PathDiscriminator", "PathGenerator", "Permutation", "Planar", "RationalQuadraticSpline",
    "RouletteLogDet", "Squeeze", "Sylvester", "checkerboard", "cnf", "glow", "half", "maf",
    "multiscale", "nice", "nsf", "realnvp", "score_mlp", "score_unet",
]  # fmt: skip
