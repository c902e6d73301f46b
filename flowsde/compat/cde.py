"""torchcde's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..dynamics.differential import Control
from .ode import odeint, odeint_adjoint

__all__ = ["cdeint"]


def cdeint(
    X: Control,  # noqa: N803 (its name there)
    func: Callable[..., Tensor],
    z0: Tensor,
    t: Tensor,
    adjoint: bool = True,
    backend: str = "torchdiffeq",
    **keywords: Any,
) -> Tensor:
    """torchcde's ``cdeint``: dz = func(t, z) dX(t), z(t[0]) = z0.

    Args:
        X: the control, with ``derivative(t)`` of shape ``(..., channels)``: torchcde's paths, and
            those of ``flowsde.paths``.
        func: ``func(t, z)`` of shape ``(..., d, channels)``; or a ``prod(t, z, dx)`` of it,
            ``(..., d)``, if it has one.
        z0: ``(..., d)``.
        t: ``(n,)``, rising or falling.
        adjoint: ``odeint_adjoint`` in the place of ``odeint``.
        backend: ``"torchdiffeq"``, by its methods' names.
        keywords: of these; rtol is 1e-4 and atol 1e-6 where they say nothing. Of a path with kinks
            give ``options={"jump_t": X.grid_points}``.

    Returns:
        ``(..., n, d)``.

    Raises:
        ValueError: on another backend, and as ``odeint``.
        TypeError: on a control without a derivative, a func of other shapes, and as ``odeint``.

    Source: https://github.com/patrick-kidger/torchcde; Kidger et al. 2020, arXiv 2005.08926.
    """
    if backend != "torchdiffeq":
        raise ValueError(
            f"backend is 'torchdiffeq'; got {backend!r}. An SDE's methods on an ODE are its own: "
            "method='midpoint', 'heun2', 'euler'"
        )
    if not isinstance(z0, Tensor):
        raise TypeError("z0 is a tensor (..., d): concatenate parts, and take func's apart")
    if not callable(getattr(X, "derivative", None)):
        raise TypeError("X answers derivative(t); give flowsde.paths.Linear(...) or torchcde's")
    run = odeint_adjoint if adjoint else odeint
    keywords = {"rtol": 1e-4, "atol": 1e-6, **keywords}
    states: Tensor = run(_Driven(X, func), z0, t, **keywords)
    return states.movedim(0, -2)


class _Driven(nn.Module):
    """func(t, z) dX/dt."""

    def __init__(self, control: Control, func: Callable[..., Tensor]) -> None:
        super().__init__()
        self.control, self.func = control, func
        self.product = getattr(func, "prod", None)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        dx = self.control.derivative(t).to(z.dtype)
        if self.product is not None:
            slope: Tensor = self.product(t, z, dx)
            return slope
        matrix = self.func(t, z)
        if matrix.shape != (*z.shape, dx.shape[-1]) or dx.shape[:-1] != z.shape[:-1]:
            raise TypeError(
                f"func returns (..., d, channels) = {(*z.shape, dx.shape[-1])}, and X.derivative "
                f"(..., channels); got {tuple(matrix.shape)} and {tuple(dx.shape)}"
            )
        return (matrix * dx.unsqueeze(-2)).sum(-1)
