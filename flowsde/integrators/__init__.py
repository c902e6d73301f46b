"""The catalogue: one step of one method each, as data."""

from .._increment import Draws, Increment
from .base import Integrator, ReversibleIntegrator, Step
from .diffusion import (
    DDIM,
    DEIS,
    SEEDS,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSingle,
    EDMHeun,
    PredictorCorrector,
    UniPC,
)  # fmt: skip
from .discrete import Iterate
from .doubling import StepDoubling
from .drift_implicit import DriftImplicitEuler
from .engines import SciPy, TorchDiffEq, TorchSDE
from .etd import ETDRK4
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
    Vern7,
)  # fmt: skip
from .exponential import ExponentialAdams, ExponentialEuler
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
from .langevin import ALIGN, BAOAB, QUICSORT
from .linear import GMRES, Dense, LinearSolver
from .milstein import Milstein, MilsteinRK
from .multistep import Adams
from .noncommutative import LogODE, NinomiyaNinomiya, PlatenWeak2
from .reversible import AsynchronousLeapfrog, ReversibleHeun, ReversibleRK
from .runge_kutta import ExplicitRK, Tableau
from .stabilised import RKC2
from .stochastic import EulerHeun, EulerMaruyama, Stochastic, StochasticHeun, StochasticMidpoint
from .stochastic_rk import (
    SEA,
    SRA,
    SRA1,
    SRA3,
    SRI,
    SRI2,
    SRIW1,
    ShARK,
    SlowRK,
    SRATableau,
    SRITableau,
)  # fmt: skip
from .symplectic import Leapfrog, Yoshida4

__all__ = [
    "ALIGN", "BAOAB", "DDIM", "DEIS", "ETDRK4", "GMRES", "QUICSORT", "RK4", "RKC2", "SEA", "SEEDS",
    "SRA", "SRA1", "SRA3", "SRI", "SRI2", "SRIW1", "Adams", "AsynchronousLeapfrog", "Bosh3",
    "DPMSolver", "DPMSolverPP", "DPMSolverPPSingle", "Dense", "Dopri5", "Dopri8", "Draws",
    "DriftImplicitEuler", "EDMHeun", "Euler", "EulerHeun", "EulerMaruyama", "ExplicitRK",
    "ExponentialAdams", "ExponentialEuler", "Heun", "ImplicitEuler", "ImplicitRK",
    "ImplicitTableau", "Increment", "Integrator", "Iterate", "KenCarp3", "KenCarp4", "KenCarp5",
    "Kvaerno3", "Kvaerno4", "Kvaerno5", "Leapfrog", "LinearSolver", "LogODE", "Midpoint",
    "Milstein", "MilsteinRK", "NinomiyaNinomiya", "PlatenWeak2", "PredictorCorrector", "Ralston",
    "ReversibleHeun", "ReversibleIntegrator", "ReversibleRK", "SRATableau", "SRITableau", "SciPy",
    "ShARK", "SlowRK", "Step", "StepDoubling", "Stochastic", "StochasticHeun", "StochasticMidpoint",
    "Tableau", "TorchDiffEq", "TorchSDE", "Trapezoid", "Tsit5", "UniPC", "Vern7", "Yoshida4",
]  # fmt: skip
