"""One object for sampling and likelihood, whatever the dynamics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _random
from ._batch import conditions, rows, spread
from ._scalar import to_float
from ._state import State
from .bases import Base, Normal
from .dynamics.base import Dynamics
from .dynamics.discrete import Map
from .dynamics.noising import Reverse
from .solve import Solver
from .stepping import Grid
from .transforms.density import Divergence, log_density

__all__ = ["Flow", "bits_per_dim"]


class Flow(nn.Module):
    """A base distribution and dynamics that carry it to data.

    Data at t = 0, noise at the dynamics' horizon. A coupling stack, a continuous normalizing
    flow and the probability flow of a diffusion are all this one class.

        log p(x) = log p_base(y(T)) - l(T),    (y, l) solved from (x, 0) at t0 to T
        x = y(t0),                             y solved from y(T) ~ base down to t0

    Args:
        base: of the noise, such as ``Normal(64)``.
        dynamics: a ``Map``, an ODE, a CDE or a probability flow.
        solver: how it is integrated; by default as ``solve`` would.
        transform: a map from the data to where the dynamics starts, such as
            ``models.Standardize.of(data)``; densities are those of the data.
        t0: where data stands; a little above 0 for a diffusion whose score blows up there.
        divergence: as of ``log_density``; ``Hutchinson(n)`` for many dimensions (its draws come
            from ``generator``).

    Quacks like ``torch.distributions``: ``log_prob``, ``sample``, ``rsample``, ``event_shape``;
    ``interop.FlowDistribution`` is one.

    Conditions are ``args`` of the dynamics. A tensor among them has a row a condition,
    ``(batch, ...)``; numbers and 0-d tensors are shared. As everywhere in ``torch.distributions``
    samples then have shape ``(*sample_shape, batch, *event_shape)``, and in ``log_prob(x, c)`` the
    x of shape ``(..., *event_shape)`` broadcasts against ``(batch, *event_shape)``.

    ``torch.compile(flow.log_prob)`` is one graph where the dynamics is a map without randomness.
    Inside of it nothing is checked.

    Raises:
        TypeError: on a base, dynamics or solver of another kind.
    """

    def __init__(
        self,
        base: Base,
        dynamics: Dynamics,
        solver: Solver | None = None,
        *,
        transform: Map | None = None,
        t0: float = 0.0,
        divergence: Divergence | None = None,
    ) -> None:
        super().__init__()
        _check_parts(base, dynamics, solver)
        _check_noise(base, dynamics)
        self.base, self.dynamics, self.transform, self.t0 = base, dynamics, transform, t0
        self.solver, self.divergence = solver or Solver(), divergence
        # in a tuple, so that the parameters stand once in a state_dict; beside what it is made of
        self._density = dynamics, divergence, log_density(dynamics, divergence)

    @property
    def event_shape(self) -> torch.Size:
        """Of one sample."""
        return self.base.event_shape

    @property
    def density(self) -> Dynamics:
        """The dynamics with the log-density that it carries."""
        dynamics, divergence, _ = self._density
        if dynamics is not self.dynamics or divergence is not self.divergence:
            made = log_density(self.dynamics, self.divergence)
            self._density = self.dynamics, self.divergence, made
        return self._density[2]

    def log_prob(self, x: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
        """Log-density in nats of x, ``(..., *event_shape)``; differentiable.

        Args:
            x: the data.
            args: conditions.
            generator: for divergences and transforms that draw.

        Raises:
            ValueError: where x does not end with the event's shape, or conditions do not fit.
        """
        flat, args, batch = rows(x, self.event_shape, args)
        state = self.enter(flat, generator)
        z, change = self._solve(self.density, state, args, generator, inverse=False)
        return (self.base.log_prob(z) - change).reshape(batch)

    def rsample(
        self,
        sample_shape: int | Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Samples ``(*sample_shape, *event_shape)`` that carry gradients to the parameters.

        Args:
            sample_shape: how many, of each condition: a shape, or a number.
            args: conditions; with some, samples are ``(*sample_shape, batch, *event_shape)``.
            generator: from which one seed is drawn; or
            seed: an int, or one a sample, ``(count,)``: sample i is then the same in any batch, to
                the solver's tolerance where the batch shares its steps.
        """
        z, args, batch = self._noise(sample_shape, args, generator, seed)
        probes = None
        if self.dynamics.random:  # for a determinant, which does not reach the samples
            probes = generator or torch.Generator(z.device).manual_seed(0)
        x = self._solve(self.dynamics, z, args, probes, inverse=True)
        if self.transform is not None:
            x = _through(self._leaving(x, generator), x, inverse=True)
        return x.reshape(*batch, *self.event_shape)

    @torch.no_grad()
    def sample(
        self,
        sample_shape: int | Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """``rsample`` without gradients."""
        return self.rsample(sample_shape, *args, generator=generator, seed=seed)

    def rsample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``rsample`` and the log-densities of what it draws, from one solve.

        Probes of the divergence come from ``generator``, beside ``seed`` where both are given.
        """
        z, args, batch = self._noise(sample_shape, args, generator, seed)
        state = z, self.base.log_prob(z)
        state = self._solve(self.density, state, args, generator, inverse=True)
        if self.transform is not None:
            state = _through(log_density(self._leaving(state[0], generator)), state, inverse=True)
        return state[0].reshape(*batch, *self.event_shape), state[1].reshape(batch)

    @torch.no_grad()
    def sample_and_log_prob(
        self,
        sample_shape: int | Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``rsample_and_log_prob`` without gradients."""
        return self.rsample_and_log_prob(sample_shape, *args, generator=generator, seed=seed)

    def start(self, x: Tensor, *args: Any, generator: torch.Generator | None = None) -> None:
        """Sets what data set before training, such as ``Standardize`` and ``ActNorm``.

        Args:
            x, args, generator: a batch, as ``log_prob`` takes it.
        """
        flat, args, _ = rows(x, self.event_shape, args)
        for part in (self.transform, self.dynamics):
            if isinstance(part, Map):
                flat = _prepared(part, flat, generator).start(flat, *args)

    def enter(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(y, l) at t0, of data ``(batch, *event_shape)``: what the density is solved from."""
        state = x, x.new_zeros(len(x))
        if self.transform is None:
            return state
        return _through(log_density(_prepared(self.transform, x, generator)), state)

    def _leaving(self, x: Tensor, generator: torch.Generator | None) -> Map:
        """The transform on the way out, with draws where it may have them: few want any there."""
        assert self.transform is not None
        draws = self.transform.random and generator is not None
        return _prepared(self.transform, x, generator) if draws else self.transform

    def _solve(
        self, dynamics: Dynamics, state: State, args: tuple[Any, ...],
        generator: torch.Generator | None, *, inverse: bool,
    ) -> State:  # fmt: skip
        if torch.compiler.is_compiling() and isinstance(dynamics, Map) and not dynamics.random:
            return _through(dynamics, state, args, inverse=inverse)
        span = self.t0, self.dynamics.horizon
        t0, t1 = reversed(span) if inverse else span
        solver = self.solver
        if isinstance(solver.stepping, Grid):  # as samplers have it, or densities
            solver = replace(solver, stepping=solver.stepping.towards(t0, t1))
        return solver.solve(dynamics, state, t0, t1, args=args, generator=generator).y1

    def _noise(
        self, sample_shape: int | Sequence[int], args: tuple[Any, ...],
        generator: torch.Generator | None, seed: int | Tensor | None,
    ) -> tuple[Tensor, tuple[Any, ...], tuple[int, ...]]:  # fmt: skip
        """Draws of the base, the conditions of each, and the shape that both are to have."""
        lead = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        batch = (*lead, *conditions(args))
        count = math.prod(batch)
        if seed is None:
            seed = _random.draw_seed(_given(generator, "sampling draws"))
        return self.base.sample(count, seed), spread(args, count), batch


def _given(generator: torch.Generator | None, what: str) -> torch.Generator:
    if generator is None:
        raise TypeError(f"{what}, and needs its randomness: generator=... (or seed=... of samples)")
    return generator


def _prepared(map_: Map, x: Tensor, generator: torch.Generator | None) -> Map:
    """The map with its draws."""
    seed = _random.draw_seed(_given(generator, "the map draws")) if map_.random else None
    return map_.prepare(x, seed)


def _through(
    map_: Map, state: State, args: tuple[Any, ...] = (), *, inverse: bool = False
) -> State:
    """All steps of a map, one after the other."""
    order = range(len(map_))
    for k in reversed(order) if inverse else order:
        state, _ = (map_.unstep if inverse else map_.step)(k, state, *args)
    return state


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = 1) -> Tensor:
    """Bits a dimension of data of ``levels`` integer values, dequantised by uniform noise.

    For x = (v + u) / levels, v in 0 .. levels - 1 and u uniform on [0, 1):
    -log p(x) / (dims ln 2) + log2(levels). An upper bound of the discrete cross-entropy.

    Args:
        log_prob: of x, in nats.
        dims: components of one sample.
        levels: number of values; 1 where x is v + u, as of a flow whose transform dequantises.

    Source: Theis et al. 2016, arXiv 1511.01844.
    """
    return -log_prob / (dims * math.log(2.0)) + math.log2(levels)


def _check_noise(base: Base, dynamics: Dynamics) -> None:
    """Refuses a normal law that is no noise of this diffusion."""
    if not isinstance(dynamics, Reverse) or not isinstance(base, Normal):
        return
    sigma, scale = to_float(dynamics.denoiser.schedule.sigma(dynamics.horizon)), base.scale
    if not scale.is_meta and float(scale) < 0.5 * sigma:
        raise ValueError(
            f"this diffusion ends in noise of standard deviation {sigma:.3g}, its base has "
            f"{float(scale):.3g}: give Normal({tuple(base.event_shape)}, scale={sigma:.3g})"
        )


def _check_parts(base: object, dynamics: object, solver: object) -> None:
    laws = "a Base, Normal(dim), Mixture(...), or Componentwise(law, ...) of torch.distributions"
    for name, given, kind, cure in (
        ("base", base, Base, laws),
        ("dynamics", dynamics, Dynamics, "a Map, ODE(f) or a probability flow"),
        ("solver", solver, Solver | None, "Solver(Tsit5(), Adaptive())"),
    ):
        if not isinstance(given, kind):
            raise TypeError(f"a Flow's {name} is {cure}; got {type(given).__name__}")
