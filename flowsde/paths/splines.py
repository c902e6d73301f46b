"""Cubic control paths through observed data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .control import Piecewise

__all__ = ["Cubic", "HermiteCubic", "Monotone", "NaturalCubic"]


class Cubic(Piecewise):
    """Cubic pieces that meet with one slope d_i at t_i: dX/dt jumps only where a sample ends early.

    With m the slope of the chord over a piece of length h, from slope d to slope e,

        c_0 = x,    c_1 = d,    c_2 = 2 (3 m - 2 d - e) / h,    c_3 = 3 (d + e - 2 m) / h^2
    """

    @property
    def jumps(self) -> Tensor:
        return self._ends

    def _coefficients(self, x: Tensor, secant: Tensor, rate: Tensor) -> Sequence[Tensor]:
        slopes = self._slopes(secant, rate)
        d, e = slopes[:-1], slopes[1:]
        bend = (d + e).sub_(secant, alpha=2.0)
        c2 = (secant - d).sub_(bend).mul_(2.0 * rate)
        return x[:-1], d, c2, bend.mul_(3.0 * rate.square())

    @abstractmethod
    def _slopes(self, secant: Tensor, rate: Tensor) -> Tensor:
        """d ``(n, ...)``, of the chords' slopes and one over their lengths, ``(n - 1, ...)``."""


@final
class NaturalCubic(Cubic):
    """The spline of continuous second derivative that ends straight: the interpolation of least
    bending. It looks ahead, so it is never causal.

        d_{i-1} / h_{i-1} + 2 (1/h_{i-1} + 1/h_i) d_i + d_{i+1} / h_i
            = 3 (m_{i-1} / h_{i-1} + m_i / h_i),    1/h_{-1} = 1/h_{n-1} = 0

    Source: Kidger et al. 2020, arXiv 2005.08926; de Boor 1978, chapter IV.
    """

    ahead = True

    def _slopes(self, secant: Tensor, rate: Tensor) -> Tensor:
        before, after = _beside(rate)
        diagonal = 2.0 * (before + after)
        pull = 3.0 * rate * secant
        rhs = torch.cat((pull[:1], pull[:-1] + pull[1:], pull[-1:]))
        return tridiagonal(torch.where(diagonal > 0, diagonal, 1.0), rate, rhs)


@final
class HermiteCubic(Cubic):
    """Slopes from behind: d_i = m_{i-1}, and d_0 = m_0. Smoother than straight pieces, and causal
    where they are. Missing values are left out, where torchcde first puts them on straight lines.

    Source: Morrill et al. 2021, "Neural CDEs for online prediction tasks", arXiv 2106.11028.
    """

    def _slopes(self, secant: Tensor, rate: Tensor) -> Tensor:
        return torch.cat((secant[:1], secant))


@final
class Monotone(Cubic):
    """Slopes that overshoot nowhere: between two values the path stays between them.

    Weighted harmonic means of the chords' slopes, 0 where these differ in sign; at the ends a
    parabola's, as far as it keeps the shape. Looks one value ahead.

    Source: Fritsch and Butland 1984 (PCHIP).
    """

    ahead = True

    def _slopes(self, secant: Tensor, rate: Tensor) -> Tensor:
        n = len(secant) + 1
        wide = (0, 0) * (secant.ndim - 1) + (2, 2)
        m = [pad(secant, wide)[i : i + n] for i in range(4)]
        r = [pad(rate, wide)[i : i + n] for i in range(4)]
        same = m[1] * m[2] > 0
        mean = (2.0 * r[1] + r[2]) * m[2] + (r[1] + 2.0 * r[2]) * m[1]
        inner = 3.0 * (r[1] + r[2]) * m[1] * m[2] / torch.where(same, mean, 1.0)
        first, last = _end(m[2], r[2], m[3], r[3]), _end(m[1], r[1], m[0], r[0])
        ends = torch.where(r[1] == 0, first, last)
        return torch.where((r[1] == 0) | (r[2] == 0), ends, torch.where(same, inner, 0.0))


def _end(m: Tensor, r: Tensor, beyond: Tensor, r_beyond: Tensor) -> Tensor:
    """The slope at an end, of the chord there and the next one."""
    total = r + r_beyond
    d = ((2.0 * r_beyond + r) * m - r_beyond * beyond) / torch.where(total > 0, total, 1.0)
    d = torch.where((m * beyond <= 0) & (d.abs() > 3.0 * m.abs()), 3.0 * m, d)
    return torch.where(d * m > 0, d, 0.0)


def _beside(x: Tensor) -> tuple[Tensor, Tensor]:
    """Before and after each of n points what holds between them, ``(n - 1, ...)``; 0 outside."""
    wide = pad(x, (0, 0) * (x.ndim - 1) + (1, 1))
    return wide[:-1], wide[1:]


def tridiagonal(diagonal: Tensor, beside: Tensor, rhs: Tensor) -> Tensor:
    """x of beside_{i-1} x_{i-1} + diagonal_i x_i + beside_i x_{i+1} = rhs_i, along the first axis.

    Cyclic reduction: every other unknown is eliminated, all at once, log2(n) times, until one is
    left. Stable where the diagonal dominates.

    Args:
        diagonal, beside: of the symmetric matrix, ``(n, ...)`` and ``(n - 1, ...)``, which
            broadcast to
        rhs: ``(n, ...)``.

    Source: Hockney 1965; Buzbee, Golub and Nielson 1970.
    """
    if len(rhs) == 1:
        return rhs / diagonal
    here, given = diagonal[::2], rhs[::2]  # rows to be eliminated, between the others
    left, right = beside[::2], beside[1::2]  # what the others have of those to their sides
    k, m = len(left), len(right)
    a, b = left / here[:k], right / here[1:]
    inner = torch.addcmul(diagonal[1::2], a, left, value=-1.0)
    inner[:m].addcmul_(b, right, value=-1.0)
    rest = torch.addcmul(rhs[1::2], a, given[:k], value=-1.0)
    rest[:m].addcmul_(b, given[1:], value=-1.0)
    others = tridiagonal(inner, -b[: k - 1] * left[1:], rest)
    own = given / here
    own[:k].addcmul_(a, others, value=-1.0)
    own[1:].addcmul_(b, others[:m], value=-1.0)
    x = torch.empty_like(rhs)
    x[::2], x[1::2] = own, others
    return x
