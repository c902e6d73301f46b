"""Functions by the names and signatures of torchdiffeq, torchsde and torchcde, solved here.

    from flowsde.compat import odeint_adjoint as odeint    # for ``from torchdiffeq import ...``

They are thin: each says in the words of ``solve`` what it was asked. Gradients are those of the
steps that were taken, exact, in the place of the ones that the ``_adjoint`` functions approximate
elsewhere; failures are this library's typed errors.
"""

from .cde import cdeint
from .ode import odeint, odeint_adjoint, odeint_event
from .sde import sdeint, sdeint_adjoint

__all__ = ["cdeint", "odeint", "odeint_adjoint", "odeint_event", "sdeint", "sdeint_adjoint"]
