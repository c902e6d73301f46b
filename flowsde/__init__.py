"""flowsde: every model is dynamics, every dynamics takes any integrator that its structure admits.

    import flowsde as fs
    sol = fs.solve(fs.ODE(f), y0, 0.0, 1.0)

Catalogues stay in their modules: ``flowsde.integrators``, ``flowsde.paths``, ``flowsde.models``,
``flowsde.objectives``, ``flowsde.nn``, ``flowsde.training``, ``flowsde.fitting``,
``flowsde.accuracy``, ``flowsde.series``, ``flowsde.interop``.
"""

from importlib import import_module
from types import ModuleType

from .adjoint import Adjoint, Backsolve, Checkpointed, Direct, Reversible
from .bases import Base, Componentwise, Mixture, Normal
from .dynamics import CDE, ODE, SDE, Chain, Composed, Denoiser, Dynamics, LinearSDE, Map, Noise
from .errors import MaxStepsReached, NonFiniteState, NotSettled, SolveError, StepUnderflow
from .events import Event
from .executor import Compiled, Eager, Executor, Picard
from .flow import Flow, bits_per_dim
from .integrators.base import Integrator
from .paths import Brownian, BrownianTree, Path, Schedule
from .solution import Crossings, Solution, Stats, Status, Steps
from .solve import Solver, solve
from .steady import steady_state
from .stepping import Adaptive, Fixed, Grid, Stepping
from .transforms import (
    Divergence,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    bridge,
    change_clock,
    costate,
    girsanov,
    learn_horizon,
    log_density,
    path_kl,
    regularize,
    to_ito,
    to_stratonovich,
)  # fmt: skip

__version__ = "0.1.0"

_CATALOGUES = (
    "accuracy", "fitting", "integrators", "interop", "models", "nn", "objectives", "paths",
    "series", "training",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """Catalogues are imported when they are asked for."""
    if name in _CATALOGUES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CDE", "ODE", "SDE", "Adaptive", "Adjoint", "Backsolve", "Base", "Brownian", "BrownianTree",
    "Chain", "Checkpointed", "Compiled", "Componentwise", "Composed", "Crossings", "Denoiser",
    "Direct", "Divergence", "Dynamics", "Eager", "Event", "Exact", "Executor", "Fixed", "Flow",
    "Grid", "HutchPlusPlus", "Hutchinson", "Integrator", "LinearSDE", "Map", "MaxStepsReached",
    "Mixture", "Noise", "NonFiniteState", "Normal", "NotSettled", "Path", "Picard", "Reversible",
    "Schedule", "Solution", "SolveError", "Solver", "Stats", "Status", "StepUnderflow", "Stepping",
    "Steps", "bits_per_dim", "bridge", "change_clock", "costate", "girsanov", "learn_horizon",
    "log_density", "path_kl", "regularize", "solve", "steady_state", "to_ito", "to_stratonovich",
]  # fmt: skip
