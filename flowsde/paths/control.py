"""Control paths through observed data: what they share, and those that are straight in pieces."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from .._scalar import narrowed
from .base import Path

__all__ = ["Linear", "Piecewise", "Rectilinear", "Straight", "TorchCDE"]


class Piecewise(Path, nn.Module):
    """A polynomial from each time to the next one,

        X(t) = c_0 + c_1 s + c_2 s^2 / 2 + ... + c_k s^k / k,    s = t - t_i,

    with coefficients that are made once, in a number of operations that does not grow with the
    batch or the channels, nor, but for its logarithm, with the length. Beyond its ends the first
    and the last piece go on.

    A value that is not a number was not observed: each channel goes through its own observed
    values, those before the first and after the last one counting as equal to it; at 0 where it has
    none. After the last row with any value a sample's path stands still.

    Args:
        times: ``(n,)``, or ``(batch, n)`` of each sample's own; increasing, at least two.
        values: ``(batch, n, channels)``. Put time among the channels for a neural CDE. Gradients
            reach the values and the times, by ``Direct()`` and ``Checkpointed()``; those by the
            times are a solve's own where its steps end on the times with their gradient
            (``Grid(path.knots)``), or go by the numbers of rows (``by_row()``).

    Attributes:
        pieces: the coefficients, ``(n - 1, k + 1, batch, channels)``.

    Raises:
        ValueError: on times that do not increase, infinite values, or shapes that do not fit.
    """

    ahead: ClassVar[bool] = False  # whether a piece is made of more than the values up to its end
    times: Tensor
    pieces: Tensor
    _inner: Tensor
    _ends: Tensor

    def __init__(self, times: Tensor, values: Tensor) -> None:
        super().__init__()
        times = _checked(times, values)
        x = _time_first(values)  # a piece is one block of memory
        t = (times.T if times.ndim == 2 else times[:, None]).unsqueeze(-1)
        self.causal, ends, pieces = self._through(t, x)
        self._hold(times, pieces, torch.unique(ends))

    def _hold(self, times: Tensor, pieces: Tensor, ends: Tensor) -> None:
        """Made of data: they move with a module, and are no part of its state."""
        inner = times.detach()[..., 1:-1].contiguous()
        for name, value in (
            ("times", times), ("pieces", pieces), ("_ends", ends), ("_inner", inner),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    @abstractmethod
    def _coefficients(self, x: Tensor, secant: Tensor, rate: Tensor) -> Sequence[Tensor]:
        """c_0 to c_k, ``(n - 1, batch, channels)`` each, of the pieces through x ``(n, ...)``.

        Args:
            secant: slopes of the chords, ``(n - 1, ...)``.
            rate: one over the pieces' lengths, which broadcasts to them. A channel that has fewer
                values ends before: its rates and secants after that are 0.
        """

    def _through(self, t: Tensor, x: Tensor) -> tuple[bool, Tensor, Tensor]:
        """Whether nothing is made of later values, where samples end early, and the pieces."""
        if not bool(x.detach().sum().isnan()):
            rate = t.diff(dim=0).reciprocal().to(x.dtype)
            made = self._coefficients(x, x.diff(dim=0) * rate, rate)
            return not self.ahead, t.detach()[:0], torch.stack(list(made), 1)
        own = _Observed.of(t, x)
        made = self._coefficients(own.x, own.x.diff(dim=0) * own.rate, own.rate)
        ends = t.expand_as(own.ended)[own.ended].detach()
        pieces = own.spread(t, torch.stack(list(made), 1))
        return own.causal and not self.ahead, ends, pieces

    @property
    def knots(self) -> Tensor:
        return self.times if self.times.ndim == 1 else torch.unique(self.times)

    @property
    def ends(self) -> tuple[float, float]:
        first, last = torch.stack(self.times.detach().aminmax()).tolist()
        return first, last

    @property
    def arrivals(self) -> Tensor:
        return self.times

    def by_row(self) -> Self:
        """The same path with the numbers of its rows for times, 0 to n - 1, which samples share
        whatever times they had. What a CDE makes of it is the same; dX/dt jumps at every row.
        """
        rows = copy.copy(self)
        rows._buffers = dict(self._buffers)
        n = torch.arange(self.times.shape[-1], dtype=self.times.dtype, device=self.times.device)
        gaps = self.times.diff().reshape(-1, len(n) - 1).T[:, None, :, None]
        powers = torch.arange(self.pieces.shape[1], device=n.device).reshape(-1, 1, 1)
        rows._hold(n, self.pieces * gaps.to(self.pieces.dtype) ** powers, n)
        return rows

    def select(self, index: Tensor) -> Self:
        rows = copy.copy(self)
        rows._buffers = {**self._buffers, "pieces": self.pieces[:, :, index]}
        if self.times.ndim == 2:
            rows._buffers |= {"times": self.times[index], "_inner": self._inner[index]}
        return rows

    def evaluate(self, t: Tensor) -> Tensor:
        return _value(*self._piece(t))

    def derivative(self, t: Tensor) -> Tensor:
        return _slope(*self._piece(t))

    def _piece(self, t: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """The coefficients that hold at t, ``(batch, channels)``, and the time s."""
        at = t.detach().to(self.times)
        if at.ndim == 0 and self.times.ndim == 1:  # one piece for all: no gather over the batch
            i = torch.searchsorted(self._inner, at.reshape(1), right=True)
            s = t - self.times.index_select(0, i)
            return self.pieces.index_select(0, i)[0].unbind(0), s.to(self.pieces.dtype)
        rows = torch.arange(self.pieces.shape[2], device=self.pieces.device)
        t, at = t.expand(len(rows)), at.expand(len(rows)).contiguous()
        if self.times.ndim == 1:
            i = torch.searchsorted(self._inner, at, right=True)
            start = self.times[i]
        else:
            i = torch.searchsorted(self._inner, at[:, None], right=True)[:, 0]
            start = self.times[rows, i]
        s = (t - start)[:, None].to(self.pieces.dtype)
        return self.pieces.transpose(1, 2)[i, rows].unbind(1), s


class Straight(Piecewise):
    """Pieces that are straight lines."""

    def _coefficients(self, x: Tensor, secant: Tensor, rate: Tensor) -> Sequence[Tensor]:
        return x[:-1], secant


@final
class Linear(Straight):
    """Straight from each observed value to the next: X(t_i) = x_i.

    Its derivative jumps at the times, where it is the one to come: of fixed steps that end there
    take methods without a stage at a step's end, such as ``Midpoint()`` on ``Grid(path.knots)``.

    Causal where nothing is missing: from t_i on it heads for x_{i+1}, so that its state at t_i
    is of the first i observations.

    Source: Kidger et al. 2020, "Neural controlled differential equations", arXiv 2005.08926.
    """


@final
class Rectilinear(Straight):
    """First the time moves on, then the values follow: a path that never looks ahead.

        (t_0, x_0), (t_1, x_0), (t_1, x_1), (t_2, x_1), ...

    at the path's times 0, 1, 2, 3, ..., with the time as its first channel. What is missing stays
    as it was last observed. Always causal; observation i has arrived at 2 i.

    Args:
        times: ``(n,)``, or ``(batch, n)``; they are values here, and the batch shares the path's.
            After the last row with any value a path stands still.
        values: ``(batch, n, channels)``.

    Raises:
        ValueError: also where a channel starts with a missing value, which only a later one could
            fill.

    Source: Morrill et al. 2021, "Neural CDEs for online prediction tasks", arXiv 2106.11028.
    """

    def __init__(self, times: Tensor, values: Tensor) -> None:
        t = narrowed(_checked(times, values, open_ended=True), values.dtype)
        row = torch.arange(values.shape[1], device=values.device)
        last = torch.where(values.isnan().all(-1), 0, row).amax(1, keepdim=True)
        t = torch.where(row <= last, t.expand(values.shape[:2]), torch.nan)
        t, x = _forward(t[..., None])[..., 0], _forward(values)
        if bool(x.isnan().any()):
            raise ValueError(
                "a rectilinear path starts from observed values: fill what is missing at the first "
                "time, with the channel's mean for one"
            )
        late, held = t.repeat_interleave(2, 1)[:, 1:], x.repeat_interleave(2, 1)[:, :-1]
        steps = torch.arange(late.shape[1], device=late.device, dtype=_real(times.dtype))
        super().__init__(steps, torch.cat((late[..., None], held), -1))

    @property
    def arrivals(self) -> Tensor:
        return self.times[::2]


@final
class TorchCDE(Path, nn.Module):
    """A path of torchcde, ``CubicSpline`` or ``LinearInterpolation``, of shape ``(batch, n,
    channels)``; at times of each sample's own too.
    """

    def __init__(self, path: Any) -> None:
        from torchcde.interpolation_base import InterpolationBase

        super().__init__()
        if not isinstance(path, InterpolationBase):
            raise TypeError(f"TorchCDE takes a path of torchcde; got {type(path).__name__}")
        self.path = path

    @property
    def knots(self) -> Tensor:
        return self.path.grid_points

    def evaluate(self, t: Tensor) -> Tensor:
        return _own(self.path.evaluate(t), t)

    def derivative(self, t: Tensor) -> Tensor:
        return _own(self.path.derivative(t), t)


def _own(found: Tensor, t: Tensor) -> Tensor:
    """Of ``(batch, times, channels)``, each sample at its own time."""
    return found.diagonal(dim1=0, dim2=1).T if t.ndim else found


@dataclass(frozen=True)
class _Observed:
    """Channels that are missing values, each with the ones it has in its first rows.

    Attributes:
        t, x: times and values, ``(n, batch, channels)``; 0 after a channel's last.
        rate: one over the gaps between them; 0 after a channel's last.
        rank: of the last value at or before each row.
        ended: rows at which a sample ends before the others, ``(n, batch, 1)``.
        causal: whether nothing was filled in from later values.
    """

    t: Tensor
    x: Tensor
    rate: Tensor
    rank: Tensor
    ended: Tensor
    causal: bool

    @classmethod
    def of(cls, t: Tensor, x: Tensor) -> _Observed:
        """Of x with times t that broadcast to it; values at the ends are filled in."""
        n, seen = len(x), ~x.isnan()
        count, row = seen.cumsum(0), torch.arange(n, device=x.device)[:, None, None]
        first, total = seen.int().argmax(0, keepdim=True), count[-1:]
        last = torch.where(seen, row, -1).cummax(0).values
        filled = x.gather(0, torch.where(last < 0, first, last))
        x = torch.where(total > 0, filled, 0.0)
        end = last[-1:].amax(2, keepdim=True).clamp(min=0)  # of each sample
        kept = (seen | (count == 0) | (count == total)) & (row <= end)
        rank = kept.cumsum(0) - 1
        slot = torch.where(kept, rank, n)  # what is left out goes to a row of its own
        t, x = (
            v.new_zeros(n + 1, *x.shape[1:]).scatter(0, slot, v.expand_as(x))[:-1] for v in (t, x)
        )
        inside = row[1:] <= rank[-1:]
        rate = torch.where(inside, t.diff(dim=0), torch.inf).reciprocal().to(x.dtype)
        causal = not bool((~seen & (count < total)).any())
        return cls(t, x, rate, rank, (row == end) & (row < n - 1), causal)

    def spread(self, t: Tensor, pieces: Tensor) -> Tensor:
        """The pieces between the observed values, cut at the times t of all rows."""
        rank = self.rank[:-1]
        since = (t[:-1] - self.t.gather(0, rank)).to(pieces.dtype)
        x, *slope = pieces.gather(0, rank.unsqueeze(1).expand_as(pieces)).unbind(1)
        moves = rank < self.rank[-1:]
        own = x, *(torch.where(moves, c, 0.0) for c in slope)
        return torch.stack(_recentred(own, since), 1)


def _time_first(values: Tensor) -> Tensor:
    """``(n, batch, channels)``, in a row; few channels one by one, which copies longer runs."""
    x = values.transpose(0, 1)
    return torch.stack(x.unbind(2), 2) if x.shape[2] < 8 else x.contiguous()


def _value(c: Sequence[Tensor], s: Tensor) -> Tensor:
    total = c[-1] / (len(c) - 1)
    for j in range(len(c) - 2, 0, -1):
        total = c[j] / j + s * total
    return torch.addcmul(c[0], s, total)


def _slope(c: Sequence[Tensor], s: Tensor) -> Tensor:
    total = c[-1]
    for coefficient in c[-2:0:-1]:
        total = torch.addcmul(coefficient, s, total)
    return total


def _recentred(c: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """The coefficients of the same polynomial by the time since s (Horner, again and again)."""
    slope = list(c[1:])
    for i in range(len(slope) - 1):
        for j in range(len(slope) - 2, i - 1, -1):
            slope[j] = torch.addcmul(slope[j], s, slope[j + 1])
    return [_value(c, s), *slope]


def _forward(x: Tensor) -> Tensor:
    """Values ``(batch, n, channels)``, missing ones as they were last observed."""
    row = torch.arange(x.shape[1], device=x.device)[:, None]
    return x.gather(1, torch.where(x.isnan(), 0, row).cummax(1).values)


def _real(dtype: torch.dtype) -> torch.dtype:
    """That of times: whole numbers are counted exactly."""
    exact = not dtype.is_floating_point
    return torch.float64 if exact else torch.promote_types(dtype, torch.float32)


def _checked(times: Tensor, values: Tensor, *, open_ended: bool = False) -> Tensor:
    """The times, in floating point and our own; open-ended ones may be NaN from somewhere on."""
    times = times.to(values.device, _real(times.dtype), copy=True)
    rising = times.diff() > 0
    if open_ended:
        rising |= times[..., 1:].isnan() & ~times[..., :1].isnan()
    rising &= ~times[..., 1:].isinf() & ~times[..., :1].isinf()
    if times.ndim not in (1, 2) or times.shape[-1] < 2 or not bool(rising.all()):
        raise ValueError("times are (n,) or (batch, n): at least two, finite and increasing")
    shape = (times.shape[0] if times.ndim == 2 else len(values), times.shape[-1])
    if values.ndim != 3 or values.shape[:2] != shape:
        raise ValueError(
            f"values have shape (batch, n, channels) for times {tuple(times.shape)}; got "
            f"{tuple(values.shape)}"
        )
    known = values.is_floating_point() and bool(values.detach().sum().isfinite())  # mostly
    if not known and not (values.is_floating_point() and not bool(values.isinf().any())):
        raise ValueError("values are finite numbers in floating point, or NaN where none was seen")
    return times
