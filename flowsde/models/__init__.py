"""Models: each file only builds dynamics."""

from .autoregressive import Autoregressive
from .cnf import cnf
from .coupling import Coupling, checkerboard, half
from .data import Dequantize, Logit, Standardize, Whiten
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .flow_matching import StochasticInterpolant, reflow, straightness
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .planar import Planar, Sylvester
from .recipes import glow, maf, nice, nsf, realnvp
from .residual import ExactLogDet, InvertibleResidual, LogDet, RouletteLogDet
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "ActNorm", "Additive", "Affine", "Autoregressive", "Coupling", "Dequantize", "Elementwise",
    "ExactLogDet", "Factored", "FromTorch", "InvertibleResidual", "LatentSDE", "LipSwish", "LogDet",
    "Logit", "Mixing", "PathDiscriminator", "PathGenerator", "Permutation", "Planar",
    "RationalQuadraticSpline", "RouletteLogDet", "Squeeze", "Standardize", "StochasticInterpolant",
    "Sylvester", "Whiten", "checkerboard", "cnf", "glow", "half", "maf", "multiscale", "nice",
    "nsf", "realnvp", "reflow", "score_mlp", "score_unet", "straightness",
]  # fmt: skip
