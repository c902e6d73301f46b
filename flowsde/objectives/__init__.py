"""What models are trained by: modules that take a batch and a generator, and return a loss."""

from .elbo import ELBO
from .likelihood import MaximumLikelihood
from .matching import FlowMatching
from .score import EnergyScore, ScoreMatching, SlicedScoreMatching
from .score_matching import (
    DenoisingScoreMatching,
    EDMWeight,
    Levels,
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    MinSNR,
    TimeLaw,
    UniformLambda,
    UniformTime,
    likelihood_weight,
    noise_weight,
    v_weight,
)  # fmt: skip
from .variational import (
    Ancestral,
    Bound,
    Discretized,
    FixedVariance,
    HybridLoss,
    LearnedVariance,
    Transition,
    VariationalBound,
)  # fmt: skip

__all__ = [
    "Ancestral", "Bound", "DenoisingScoreMatching", "Discretized", "EDMWeight", "ELBO",
    "EnergyScore", "FixedVariance", "FlowMatching", "HybridLoss", "LearnedVariance", "Levels",
    "LogNormal", "LogitNormal", "LowDiscrepancy", "MaximumLikelihood", "MinSNR", "ScoreMatching",
    "SlicedScoreMatching", "TimeLaw", "Transition", "UniformLambda", "UniformTime",
    "VariationalBound", "likelihood_weight", "noise_weight", "v_weight",
]  # fmt: skip
