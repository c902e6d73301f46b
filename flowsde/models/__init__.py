"""Models: each file only builds dynamics."""

from .autoregressive import Autoregressive
from .cnf import cnf, planar_cnf
from .coupling import Coupling, checkerboard, half
from .data import Dequantize, Logit, Standardize, Whiten
from .elementwise import Additive, Affine, Elementwise, FromTorch, RationalQuadraticSpline
from .flow_matching import StochasticInterpolant, reflow, straightness
from .gru_ode_bayes import GRUODEBayes
from .latent_ode import ODERNN, Encoder, GapGRU, LatentODE
from .latent_sde import LatentSDE
from .mixing import ActNorm, Mixing, Permutation
from .multiscale import Factored, Squeeze, multiscale
from .neural_cde import NeuralCDE
from .neural_ode import NeuralODE
from .neural_process import (
    AttentionAggregator,
    ConstantPath,
    ContextSplit,
    GaussianHead,
    MeanAggregator,
    NeuralProcess,
    SolvedPath,
    attentive_process,
    conditional_process,
    neural_ode_process,
    neural_process,
)  # fmt: skip
from .planar import Planar, Sylvester
from .recipes import glow, maf, nice, nsf, realnvp
from .residual import ExactLogDet, InvertibleResidual, LogDet, RouletteLogDet
from .score import score_mlp, score_unet
from .sde_gan import LipSwish, PathDiscriminator, PathGenerator

__all__ = [
    "GRUODEBayes", "ODERNN", "ActNorm", "Additive", "Affine", "AttentionAggregator",
    "Autoregressive", "ConstantPath", "ContextSplit", "Coupling", "Dequantize", "Elementwise",
    "Encoder", "ExactLogDet", "Factored", "FromTorch", "GapGRU", "GaussianHead",
    "InvertibleResidual", "LatentODE", "LatentSDE", "LipSwish", "LogDet", "Logit", "MeanAggregator",
    "Mixing", "NeuralCDE", "NeuralODE", "NeuralProcess", "PathDiscriminator", "PathGenerator",
    "Permutation", "Planar", "RationalQuadraticSpline", "RouletteLogDet", "SolvedPath", "Squeeze",
    "Standardize", "StochasticInterpolant", "Sylvester", "Whiten", "attentive_process",
    "checkerboard", "cnf", "conditional_process", "glow", "half", "maf", "multiscale",
    "neural_ode_process", "neural_process", "nice", "nsf", "planar_cnf", "realnvp", "reflow",
    "score_mlp", "score_unet", "straightness",
]  # fmt: skip
