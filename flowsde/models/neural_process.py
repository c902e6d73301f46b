"""Neural processes: laws over functions, given some of their points.

A set of points is one tensor, ``(batch, n, inputs + channels)``, of rows (x, y) in any order; a row
with not-a-number in it is no point, so that sets of different sizes share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

from ..dynamics.base import Dynamics
from ..dynamics.differential import ODE
from ..integrators.explicit import Dopri5
from ..nn import MLP
from ..solve import Solver
from ..stepping import Adaptive
from ._latent import beside, draw

__all__ = [
    "AttentionAggregator", "ConstantPath", "ContextSplit", "GaussianHead", "MeanAggregator",
    "NeuralProcess", "SolvedPath", "attentive_process", "conditional_process",
    "neural_ode_process", "neural_process",
]  # fmt: skip


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextSplit:
    """Contexts and targets to train on: as many points of each function as a draw says.

    Args:
        context: least and greatest number of points in the context.
        extra: the same, of the targets beside it. A function of fewer points gives what it has.

    Raises:
        ValueError: on ranges that are empty or negative.
    """

    context: tuple[int, int] = (1, 10)
    extra: tuple[int, int] = (0, 5)

    def __post_init__(self) -> None:
        for low, high in (self.context, self.extra):
            if not 0 <= low <= high:
                raise ValueError(f"a range is 0 <= least <= greatest; got {low} and {high}")

    def draw(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(context, targets), the former a part of the latter; others are not-a-number."""
        if points.ndim != 3:
            raise ValueError(f"points are (batch, n, inputs + channels); got {tuple(points.shape)}")
        batch, n, width = points.shape
        place = torch.rand(
            (batch, n), generator=generator, device=points.device, dtype=torch.float32
        )
        order = place.masked_fill(~_seen(points), 2.0).argsort(1)
        targets = points.gather(1, order[..., None].expand(-1, -1, width))
        targets = targets[:, : self.context[1] + self.extra[1]]
        counts = [
            torch.randint(low, high + 1, (batch, 1), generator=generator, device=points.device)
            for low, high in (self.context, self.extra)
        ]
        place = torch.arange(targets.shape[1], device=points.device)
        targets = targets.masked_fill((place >= sum(counts))[..., None], torch.nan)
        few = place[: self.context[1]] >= counts[0]
        context = targets[:, : self.context[1]].masked_fill(few[..., None], torch.nan)
        return context, targets


class GaussianHead(nn.Module):
    """N(m, s^2) with (m, r) = net(h), s = least + (1 - least) squash(r), feature by feature.

    Args:
        net: from ``(..., features)`` to twice the size of the law.
        squash: to positive numbers, such as ``torch.sigmoid``.
        least: of the standard deviation.
    """

    def __init__(
        self, net: nn.Module, squash: Callable[[Tensor], Tensor], least: float = 0.1
    ) -> None:
        super().__init__()
        self.net, self.squash, self.least = net, squash, least

    def forward(self, h: Tensor) -> Normal:
        out = self.net(h)
        own = next(self.net.parameters(), out).dtype  # autocast narrows what the net makes
        mean, raw = out.to(own).chunk(2, -1)
        std = self.least + (1.0 - self.least) * self.squash(raw)
        return Normal(mean, std, validate_args=False)


class MeanAggregator(nn.Module):
    """a(x) = sum_i r_i / n, the same at every x; zero where there is no point."""

    def forward(self, x: Tensor, keys: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        return _mean(rows, seen)[:, None].expand(-1, x.shape[1], -1)


class AttentionAggregator(nn.Module):
    """a(x): attention from x to the points' x_i, with r_i to be read, and one point of zeros more.

    The latter takes the attention that an empty context leaves over.

    Args:
        inputs, width: sizes of x and of r_i.
        heads: that attend, by ``width / heads`` features each.

    Raises:
        ValueError: on a width that so many heads do not share evenly.

    Source: Kim et al. 2019, "Attentive neural processes", arXiv 1901.05761.
    """

    def __init__(self, inputs: int, width: int, heads: int = 5) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads share a width evenly: give a multiple; got {width}")
        self.embed = MLP([inputs, width, width])
        self.attend = nn.MultiheadAttention(width, heads, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        query, key = self.embed(x), self.embed(keys)
        return self.attend(query, key, rows, key_padding_mask=~seen, need_weights=False)[0]


class ConstantPath(nn.Module):
    """l(x) = z: a latent that stays as it is."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return z[:, None].expand(-1, x.shape[1], -1)


class SolvedPath(nn.Module):
    """(l(x), d) of dl/dx = f(x, l, d), l(start) = l_0, where z = (l_0, d).

    One solve for all rows, over the union of their times, of which each row takes its own: times
    that rows share cost once.

    Args:
        dynamics: takes d, ``(batch, control)``, as its argument.
        state: size of l; what is left of z is d.
        start: where l_0 stands, not after any x.
        solver: of the solve.

    Raises:
        ValueError: on x of more than one feature, or before the start.
        TypeError: on x that asks for a gradient, which the union of times would lose.

    Source: Norcliffe et al. 2021, "Neural ODE processes", arXiv 2103.12413.
    """

    def __init__(self, dynamics: Dynamics, state: int, start: float, solver: Solver) -> None:
        super().__init__()
        self.dynamics, self.state, self.start, self.solver = dynamics, state, start, solver

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if x.shape[-1] != 1:
            raise ValueError(f"a path is solved over one time; x has {x.shape[-1]} features")
        if x.requires_grad:
            raise TypeError("a path takes its times without a gradient: detach() x")
        start, control = z[:, : self.state], z[:, self.state :]
        if not x.numel():
            return z.new_empty((*x.shape[:2], z.shape[1]))
        times, place = torch.unique(x[..., 0], return_inverse=True)
        if times[0] < self.start:
            raise ValueError(f"x = {float(times[0])} lies before the path's start, {self.start}")
        saved = self.solver.solve(
            self.dynamics, start, self.start, float(times[-1]), args=(control,), save_at=times
        ).ys
        assert isinstance(saved, Tensor)
        path = saved[place, torch.arange(len(x), device=x.device)[:, None]]
        return torch.cat((path, control[:, None].expand(-1, x.shape[1], -1)), -1)


# --- the frame ------------------------------------------------------------------------------------


class NeuralProcess(nn.Module):
    """A law over functions y(x), given a context C of their points.

        r_i = encoder(x_i, y_i)
        z ~ q(z | C) = law(mean of r_i)
        l(x) = path(x, z)                   z itself, or the solution of an ODE from it
        a(x) = aggregator(x, x_i, r_i)      their mean, or attention from x
        y(x) ~ decoder(x, l(x), a(x))

    Without z it is a conditional neural process; without a(x), and with a path that moves, a neural
    ODE process. Order and number of the points are free, and no point at all is a context.

    Args:
        inputs: size of x; the rest of a row is y.
        encoder: of rows (x, y).
        decoder: of (x, l, a) next to each other.
        law: of z; None for no latent.
        path: of the latent over x: ``ConstantPath()`` or a ``SolvedPath``.
        aggregator: of what the decoder sees of the context itself: ``MeanAggregator()`` or an
            ``AttentionAggregator``; None for nothing.
        split: of the points that ``elbo`` gets.

    Raises:
        ValueError: where there is neither a law nor an aggregator.

    Source: Garnelo et al. 2018, "Conditional neural processes", arXiv 1807.01613, and "Neural
    processes", arXiv 1807.01622.
    """

    def __init__(
        self, inputs: int, encoder: nn.Module, decoder: GaussianHead, *,
        law: GaussianHead | None = None, path: nn.Module = ConstantPath(),
        aggregator: nn.Module | None = None, split: ContextSplit = ContextSplit(),
    ) -> None:  # fmt: skip
        super().__init__()
        if law is None and aggregator is None:
            raise ValueError("the decoder sees the context by a law, an aggregator, or both")
        self.inputs, self.split = inputs, split
        self.encoder, self.decoder, self.law = encoder, decoder, law
        self.path, self.aggregator = path, aggregator

    def infer(self, points: Tensor) -> Normal | None:
        """q(z | points), of ``(batch, latent)``; None without a latent."""
        return None if self.law is None else self.law(_mean(*self._rows(points)))

    def decode(self, context: Tensor, x: Tensor, z: Tensor | None) -> Normal:
        """The law of y at x, ``(batch, m, inputs)``, given the context and z.

        Raises:
            ValueError: on an x that is not of the context's rows, or not of ``inputs``.
        """
        if x.ndim != 3 or context.ndim != 3 or x.shape[::2] != (len(context), self.inputs):
            raise ValueError(
                f"x is (batch, m, {self.inputs}), of as many rows as the context (batch, n, "
                f"{self.inputs} + channels); got {tuple(x.shape)} and {tuple(context.shape)}"
            )
        sees = [x]
        if z is not None:
            sees.append(self.path(x, z))
        if self.aggregator is not None:
            rows, seen = self._rows(context)
            keys = torch.where(seen[..., None], context[..., : self.inputs], 0.0)
            sees.append(self.aggregator(x, keys, rows, seen))
        return self.decoder(torch.cat(sees, -1))

    def bound(
        self, context: Tensor, targets: Tensor, *, generator: torch.Generator, weight: float = 1.0
    ) -> Tensor:
        """A lower bound of log p(y_T | x_T, C), in one draw of z, ``(batch,)``.

            E_q(z | T) log p(y_T | x_T, z, C) - weight KL(q(z | T) || q(z | C))

        Args:
            context, targets: points; the targets hold the context too.
            generator: of z.
            weight: of the divergence.

        Raises:
            ValueError: on targets that are not of the decoder's channels.
        """
        prior, posterior, seen = self.infer(context), self.infer(targets), _seen(targets)
        x = _somewhere(targets[..., : self.inputs], seen)
        y = torch.where(seen[..., None], targets[..., self.inputs :], 0.0)
        z = None if posterior is None else draw(posterior.mean, posterior.stddev, generator)
        law = self.decode(context, x, z)
        if law.mean.shape != y.shape:
            raise ValueError(
                f"the targets have {y.shape[-1]} channels, the decoder {law.mean.shape[-1]}: their "
                "rows are (x, y), as those of the context"
            )
        logs: Tensor = law.log_prob(y)  # type: ignore[no-untyped-call]
        fit = torch.where(seen[..., None], logs, 0.0).sum((1, 2))
        if posterior is None or prior is None:
            return fit
        return fit - weight * kl_divergence(posterior, prior).sum(-1)

    def elbo(self, points: Tensor, *, generator: torch.Generator, weight: float = 1.0) -> Tensor:
        """``bound`` of a context and of targets drawn from the points by ``split``."""
        return self.bound(*self.split.draw(points, generator), generator=generator, weight=weight)

    def functions(
        self, context: Tensor, x: Tensor, *, samples: int, generator: torch.Generator | None = None
    ) -> Normal:
        """Laws of y at x, ``(samples, batch, m, channels)``: one for each draw of z, whose means
        are functions of the posterior. Without a latent they are all the same.

        Args:
            context: points.
            x: ``(batch, m, inputs)``.
            samples: number of draws.
            generator: of z.
        """
        law, z, real = self.infer(context), None, _seen(x)
        if law is not None:
            if generator is None:
                raise TypeError("a process with a latent draws it: give generator=")
            z = draw(law.mean.repeat(samples, 1), law.stddev.repeat(samples, 1), generator)
        context, x = (v.repeat(samples, 1, 1) for v in (context, _somewhere(x, real)))
        drawn = self.decode(context, x, z)
        mean, std = (
            v.reshape(samples, *real.shape, v.shape[-1]).masked_fill(~real[..., None], torch.nan)
            for v in (drawn.mean, drawn.stddev)
        )
        return Normal(mean, std, validate_args=False)

    def predict(
        self, context: Tensor, x: Tensor, *, samples: int = 20,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mean and standard deviation of y at x, ``(batch, m, channels)``: those of the mixture
        of ``functions``.
        """
        drawn = self.functions(context, x, samples=samples, generator=generator)
        spread = drawn.variance.mean(0) + drawn.mean.var(0, correction=0)
        return drawn.mean.mean(0), spread.sqrt()

    def _rows(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """r_i, ``(batch, n, width)``, and which of them are of points."""
        seen = _seen(points)
        if bool(points.isinf().any()):
            raise ValueError("points are finite, or not-a-number where there is none")
        return self.encoder(torch.where(seen[..., None], points, 0.0)), seen


def _seen(points: Tensor) -> Tensor:
    return ~points.isnan().any(-1)


def _somewhere(x: Tensor, seen: Tensor) -> Tensor:
    """x, with what is no point laid where some point is, so that no path goes further for it."""
    place = x[seen][:1] if bool(seen.any()) else x.new_zeros(())
    return torch.where(seen[..., None], x, place)


def _mean(rows: Tensor, seen: Tensor) -> Tensor:
    """Mean over the points, ``(batch, width)``; zero where there is none."""
    weight = seen[..., None].to(rows.dtype)
    return (rows * weight).sum(1) / weight.sum(1).clamp(min=1.0)


# --- the processes --------------------------------------------------------------------------------


def conditional_process(
    inputs: int = 1, channels: int = 1, *, width: int = 50, least: float = 0.1,
    split: ContextSplit = ContextSplit(),
) -> NeuralProcess:  # fmt: skip
    """Conditional neural process: y ~ N(g(x, r), s(x, r)^2), r the mean of the context's r_i.

    Args:
        inputs, channels: sizes of x and y.
        width: of r and of the hidden layers.
        least: standard deviation of y.
        split: of the points to train on.
    """
    return NeuralProcess(
        inputs, _encoder(inputs, channels, width), _decoder(inputs + width, channels, width, least),
        aggregator=MeanAggregator(), split=split,
    )  # fmt: skip


def neural_process(
    inputs: int = 1, channels: int = 1, *, latent: int = 50, width: int = 50, least: float = 0.1,
    split: ContextSplit = ContextSplit(),
) -> NeuralProcess:  # fmt: skip
    """Neural process: y ~ N(g(x, z), s(x, z)^2), z ~ q(z | C) of size ``latent``; the rest as in
    ``conditional_process``.
    """
    return NeuralProcess(
        inputs, _encoder(inputs, channels, width),
        _decoder(inputs + latent, channels, width, least), law=_law(latent, width), split=split,
    )  # fmt: skip


def attentive_process(
    inputs: int = 1, channels: int = 1, *, latent: int = 50, width: int = 50, least: float = 0.1,
    split: ContextSplit = ContextSplit(),
) -> NeuralProcess:  # fmt: skip
    """Attentive neural process: a neural process that also looks at the context from each x."""
    return NeuralProcess(
        inputs, _encoder(inputs, channels, width),
        _decoder(inputs + latent + width, channels, width, least), law=_law(latent, width),
        aggregator=AttentionAggregator(inputs, width), split=split,
    )  # fmt: skip


def neural_ode_process(
    start: float, channels: int = 1, *, state: int = 10, control: int = 50, width: int = 50,
    least: float = 0.1, second_order: bool = False, split: ContextSplit = ContextSplit(),
    solver: Solver = Solver(Dopri5(), Adaptive(1e-3, 1e-4)),
) -> NeuralProcess:  # fmt: skip
    """Neural ODE process: a neural process, one part of whose latent (l_0, d) moves by the other,
    dl/dx = f(x, l, d); the decoder sees (x, l, d).

    Args:
        start: where l_0 stands, before all x.
        channels, width, least, split: as in ``conditional_process``.
        state, control: sizes of l and d.
        second_order: l = (p, v) with dp/dx = v, dv/dx = f(x, p, v, d).
        solver: of the path.

    Source: Norcliffe et al. 2021, "Neural ODE processes", arXiv 2103.12413.
    """
    if second_order and state % 2:
        raise ValueError(f"position and velocity share the state: an even size, not {state}")
    moved = state // 2 if second_order else state
    net = MLP([state + control + 1, width, width, moved], nn.Tanh)
    dynamics = ODE((_Acceleration if second_order else _Velocity)(net), batched_time=True)
    return NeuralProcess(
        1, _encoder(1, channels, width), _decoder(1 + state + control, channels, width, least),
        law=_law(state + control, width), path=SolvedPath(dynamics, state, start, solver),
        split=split,
    )  # fmt: skip


class _Velocity(nn.Module):
    """dl/dx = net(l, d, x)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor, control: Tensor) -> Tensor:
        return self.net(beside(t, torch.cat((y, control), -1)))


class _Acceleration(_Velocity):
    """d(p, v)/dx = (v, net(p, v, d, x))."""

    def forward(self, t: Tensor, y: Tensor, control: Tensor) -> Tensor:
        return torch.cat((y.chunk(2, -1)[1], super().forward(t, y, control)), -1)


def _encoder(inputs: int, channels: int, width: int) -> MLP:
    return MLP([inputs + channels, width, width, width])


def _law(latent: int, width: int) -> GaussianHead:
    return GaussianHead(MLP([width, width, 2 * latent]), torch.sigmoid)


def _decoder(features: int, channels: int, width: int, least: float) -> GaussianHead:
    return GaussianHead(MLP([features, width, width, 2 * channels]), softplus, least)
