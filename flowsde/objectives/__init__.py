"""What models are trained by: modules that take a batch and a generator, and return a loss."""

from .elbo import ELBO
from .likelihood import MaximumLikelihood
from .matching import FlowMatching
from .score_matching import (
    DenoisingScoreMatching,
    LogNormal,
    TimeLaw,
    UniformLambda,
    UniformTime,
    likelihood_weight,
)  # fmt: skip

__all__ = [
    "ELBO", "DenoisingScoreMatching", "FlowMatching", "LogNormal", "MaximumLikelihood", "TimeLaw",
    "UniformLambda", "UniformTime", "likelihood_weight",
]  # fmt: skip
