"""Models: each file only builds dynamics."""

from .autoregressive import Autoregressive
from .cnf import cnf, planar_cnf
from .coupling import Coupling, checkerboard, half
from .data import Dequantize, Logit, Standardize, Whiten
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .flow_matching import StochasticInterpolant, reflow, straightness
from .latent_ode import ODERNN, Encoder, GapGRU, LatentODE
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .neural_cde import NeuralCDE
from .neural_ode import NeuralODE
from .planar import Planar, Sylvester
from .recipes import glow, maf, nice, nsf, realnvp
from .residual import ExactLogDet, InvertibleResidual, LogDet, RouletteLogDet
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "ActNorm", "Additive", "Affine", "Autoregressive", "Coupling", "Dequantize", "Elementwise",
    "Encoder", "ExactLogDet", "Factored", "FromTorch", "GapGRU", "InvertibleResidual", "LatentODE",
    "LatentSDE", "LipSwish", "LogDet", "Logit", "Mixing", "NeuralCDE", "NeuralODE", "ODERNN",
    "PathDiscriminator", "PathGenerator", "Permutation", "Planar", "RationalQuadraticSpline",
    "RouletteLogDet", "Squeeze", "Standardize", "StochasticInterpolant", "Sylvester", "Whiten",
    "checkerboard", "cnf", "glow", "half", "maf", "multiscale", "nice", "nsf", "planar_cnf",
    "realnvp", "reflow", "score_mlp", "score_unet", "straightness",
]  # fmt: skip
