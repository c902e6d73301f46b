"""The catalogue: one step of one method each, as data."""

from .base import Integrator, Step
from .discrete import Iterate
from .engines import TorchDiffEq
from .explicit import (
    RK4,
    Bosh3,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Tsit5,
)  # fmt: skip
from .exponential import DDIM, DPMSolverPP, ExponentialEuler
from .implicit import (
    ImplicitEuler,
    ImplicitRK,
    ImplicitTableau,
    KenCarp3,
    KenCarp4,
    KenCarp5,
    Kvaerno3,
    Kvaerno4,
    Kvaerno5,
    Trapezoid,
)  # fmt: skip
from .linear import GMRES, Dense, LinearSolver
from .runge_kutta import ExplicitRK, Tableau
from .stochastic import EulerMaruyama, StochasticHeun

__all__ = [
    "DDIM", "GMRES", "RK4", "Bosh3", "DPMSolverPP", "Dense", "Dopri5", "Dopri8", "Euler",
    "EulerMaruyama", "ExplicitRK", "ExponentialEuler", "Heun", "ImplicitEuler", "ImplicitRK",
    "ImplicitTableau", "Integrator", "Iterate", "KenCarp3", "KenCarp4", "KenCarp5", "Kvaerno3",
    "Kvaerno4", "Kvaerno5", "LinearSolver", "Midpoint", "Ralston", "Step", "StochasticHeun",
    "Tableau", "TorchDiffEq", "Trapezoid", "Tsit5",
]  # fmt: skip
