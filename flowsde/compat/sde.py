"""torchsde's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _random
from .._scalar import moving
from ..adjoint import Adjoint, Checkpointed, Direct
from ..dynamics.differential import SDE
from ..integrators.base import Integrator
from ..integrators.doubling import StepDoubling
from ..integrators.milstein import Milstein, MilsteinRK
from ..integrators.noncommutative import LogODE
from ..integrators.reversible import ReversibleHeun
from ..integrators.stochastic import (
    EulerHeun,
    EulerMaruyama,
    Stochastic,
    StochasticHeun,
    StochasticMidpoint,
)
from ..integrators.stochastic_rk import SRA1, SRI2
from ..paths.base import RandomPath
from ..paths.brownian import Brownian
from ..solve import Solver
from ..stepping import Adaptive, Fixed
from ..transforms.path_kl import path_kl

__all__ = ["sdeint", "sdeint_adjoint"]

Motion = RandomPath | Callable[..., Any]


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Motion | None = None,
    method: str | None = None,
    dt: float = 1e-3,
    adaptive: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-4,
    dt_min: float = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
) -> Any:
    """torchsde's ``sdeint``: dy = f(t, y) dt + g(t, y) dW, y(ts[0]) = y0.

    Args:
        sde: with ``noise_type`` ("diagonal", "scalar", "additive", "general"), ``sde_type`` ("ito",
            "stratonovich"), ``f(t, y)``, ``(batch, d)``, and ``g(t, y)``, ``(batch, d)`` for
            diagonal noise, else ``(batch, d, m)``; or ``f_and_g(t, y)``, which is asked for each.
        y0: ``(batch, d)``.
        ts: rising times.
        bm: torchsde's ``BrownianInterval``, a function ``bm(ta, tb)`` of that kind, or a path of
            this library. None draws the seed of one from torch's default generator, so that
            ``torch.manual_seed`` decides.
        method: ``"euler"``, ``"milstein"``, ``"srk"``, ``"midpoint"``, ``"heun"``,
            ``"euler_heun"``, ``"reversible_heun"``, ``"log_ode"``; by default as torchsde:
            ``"srk"`` for Ito noise but general one, which takes ``"euler"``, and ``"midpoint"`` for
            Stratonovich.
        dt: size of the steps, or of the first; states between them lie on chords.
        adaptive: choose the steps, by ``rtol``, ``atol`` and ``dt_min``, of methods whose strong
            order for that noise is 1 at least. Those without an error estimate of their own take
            ``StepDoubling``.
        options: ``{"grad_free": True}`` for Milstein's method without derivatives of g.
        names: what f and g are called: of "drift", "diffusion", "prior_drift".
        logqp: gather the divergence from the law with drift ``h(t, y)``, as ``path_kl``: where
            f - h lies outside of what g reaches it is infinite, and the solve fails.

    Returns:
        ``(n, batch, d)``, the first being y0. With logqp also ``(n - 1, batch)``, what was gathered
        between the times.

    Raises:
        ValueError: on other methods, noise or SDE types, or times that do not rise.
        TypeError: on an sde without f or g, a method that does not fit its noise, other options,
            and times that ask for a gradient.
        SolveError: with ``solution``, what was computed, if the solve fails.

    Source: https://github.com/google-research/torchsde; Li et al. 2020, arXiv 2001.01328.
    """
    return _run(
        Direct(), sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp
    )


def sdeint_adjoint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Motion | None = None,
    method: str | None = None,
    adjoint_method: str | None = None,
    dt: float = 1e-3,
    adaptive: bool = False,
    adjoint_adaptive: bool = False,
    rtol: float = 1e-5,
    adjoint_rtol: float = 1e-5,
    atol: float = 1e-4,
    adjoint_atol: float = 1e-4,
    dt_min: float = 1e-5,
    options: Mapping[str, Any] | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
) -> Any:
    """torchsde's ``sdeint_adjoint``: ``sdeint`` in little memory.

    By ``Checkpointed()``: the gradient is that of the solve, on its path, to rounding, and reaches
    all that f and g depend on. What torchsde's adjoint_* arguments say is how a second solve
    backwards finds another one: here there is none, and nothing for them to say.

    Args:
        sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp: as of
            ``sdeint``.
        adjoint_method, adjoint_adaptive, adjoint_rtol, adjoint_atol, adjoint_options,
            adjoint_params: not used.

    Returns:
        As ``sdeint``.

    Raises:
        ValueError, TypeError, SolveError: as ``sdeint``.
        RuntimeError: from the backward pass, if f or g does not repeat itself, as with dropout.
    """
    return _run(
        Checkpointed(), sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names,
        logqp,
    )  # fmt: skip


def _run(
    adjoint: Adjoint, sde: Any, y0: Tensor, ts: Tensor | Sequence[float], bm: Motion | None,
    method: str | None, dt: float, adaptive: bool, rtol: float, atol: float, dt_min: float,
    options: Mapping[str, Any] | None, names: Mapping[str, str] | None, logqp: bool,
) -> Any:  # fmt: skip
    if not isinstance(y0, Tensor) or y0.ndim != 2:
        raise ValueError("y0 is a tensor (batch, d)")
    if moving(ts) or moving(dt):
        raise TypeError("no gradient passes by ts or dt: detach() them")
    times = ts if isinstance(ts, Tensor) else torch.tensor(ts, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError("ts are two times or more, (n,), strictly rising")
    form = _Form(sde, names or {}, float(times[0]), y0)
    integrator = form.method(method, dict(options or {}))
    stepping: Fixed | Adaptive = Fixed(dt=float(dt))
    if adaptive:
        stepping = Adaptive(float(rtol), float(atol), dt0=float(dt), dt_min=float(dt_min))
        if isinstance(integrator, Stochastic) and integrator.error_order is None:
            integrator = StepDoubling(integrator)
    solver = Solver(integrator, stepping, adjoint, max_steps=sys.maxsize)
    if bm is None:
        bm = Brownian(_random.draw_seed(torch.default_generator))
    span = float(times[0]), float(times[-1])
    if not logqp:
        return solver.solve(form.sde("drift"), y0, *span, save_at=times, path=bm).ys
    both = path_kl(form.sde("drift"), form.sde("prior_drift"))
    found = solver.solve(both, both.enter(y0), *span, save_at=times, path=bm)
    assert isinstance(found.ys, Tensor)
    ys, gathered = both.leave(found.ys)
    return ys, gathered.diff(dim=0)


class _Form:
    """An object as torchsde asks for it, in this library's words."""

    def __init__(self, sde: Any, names: Mapping[str, str], t0: float, y0: Tensor) -> None:
        self._owner = sde
        self._names = {"drift": "f", "diffusion": "g", "prior_drift": "h", **names}
        if unknown := set(self._names) - {"drift", "diffusion", "prior_drift"}:
            raise TypeError(f"names are of drift, diffusion and prior_drift; got {sorted(unknown)}")
        for name, known in (
            ("noise_type", ("diagonal", "scalar", "additive", "general")),
            ("sde_type", ("ito", "stratonovich")),
        ):
            if getattr(sde, name, None) not in known:
                raise ValueError(f"an sde has a {name}, one of {', '.join(known)}")
        self._kind, self._ito = sde.noise_type, sde.sde_type == "ito"
        self._g = self._part("diffusion")
        self._size: int | None = None
        if self._kind in ("additive", "general"):
            with torch.no_grad():
                self._size = self._g(y0.new_tensor(t0), y0).shape[-1]

    def sde(self, drift: str) -> SDE:
        kind: Literal["diagonal", "scalar", "general"] = (
            "general" if self._size is not None else self._kind
        )
        return SDE(
            self._part(drift), self._g, noise=kind, stratonovich=not self._ito,
            additive=self._kind == "additive", noise_size=self._size,
        )  # fmt: skip

    def _part(self, role: str) -> _Part:
        name, place = self._names[role], {"drift": 0, "diffusion": 1}.get(role)
        column = role == "diffusion" and self._kind == "scalar"  # (batch, d, 1), there
        if callable(getattr(self._owner, name, None)):
            return _Part(self._owner, name, None, column)
        if place is None or not callable(getattr(self._owner, "f_and_g", None)):
            raise TypeError(f"an sde has a {role}, {name}(t, y), or f_and_g(t, y) for f and g")
        return _Part(self._owner, "f_and_g", place, column)

    def method(self, name: str | None, options: dict[str, Any]) -> Integrator:
        """By its name there."""
        if name is None:
            name = "midpoint" if not self._ito else "euler" if self._kind == "general" else "srk"
        free = name == "milstein" and bool(options.pop("grad_free", False))
        known: dict[str, Integrator] = {
            "euler": EulerMaruyama(), "milstein": MilsteinRK() if free else Milstein(),
            "srk": SRA1() if self._kind == "additive" else SRI2(),
            "midpoint": StochasticMidpoint(), "heun": StochasticHeun(),
            "euler_heun": EulerHeun(), "reversible_heun": ReversibleHeun(), "log_ode": LogODE(),
        }  # fmt: skip
        if name not in known:
            raise ValueError(f"method is one of {sorted(known)}; got {name!r}")
        if options:
            raise TypeError(f"{name} has no options {sorted(options)}")
        return known[name]


class _Part(nn.Module):
    """Drift or diffusion of an object, with its parameters."""

    def __init__(self, owner: Any, name: str, place: int | None, column: bool) -> None:
        super().__init__()
        self.owner, self.name, self.place, self.column = owner, name, place, column

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        found = getattr(self.owner, self.name)(t, y)
        x: Tensor = found if self.place is None else found[self.place]
        return x.squeeze(-1) if self.column else x
