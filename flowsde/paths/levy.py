"""The algebra of a Brownian increment w and its space-time Levy areas H and K.

On an interval of length h the three are integrals of dW against polynomials of x in [0, 1],

    w = int dW,    H = int (1/2 - x) dW,    K = int (x^2/2 - x/2 + 1/12) dW:

multiples of the shifted Legendre polynomials, hence independent, of variances h, h/12 and h/720.
What follows is polynomial algebra: an interval's (w, H, K) from its pieces', and the normals that
tell the halves apart, which go with the piecewise polynomials of a multiwavelet basis.

Source: Foster, Lyons and Oberhauser 2020, arXiv 1905.05885; Jelincic, Foster and Kidger 2024,
arXiv 2405.06464; the basis: Alpert 1993.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from .._increment import Levy
from .._scalar import Scalar

__all__ = [
    "DEVIATIONS",
    "FUNCTIONALS",
    "LEGENDRE",
    "ORDER",
    "compose",
    "halve",
    "shares",
    "wavelets",
]

ORDER: dict[Levy, int] = {"W": 1, "H": 2, "K": 3}
DEVIATIONS = (1.0, math.sqrt(1 / 12), math.sqrt(1 / 720))  # of w, H, K over an interval of length 1
FUNCTIONALS = np.array([[1, 0, 0], [1 / 2, -1, 0], [1 / 12, -1 / 2, 1 / 2]])  # by powers of x
LEGENDRE = np.sqrt([[1.0], [3.0], [5.0]]) * [[1, 0, 0], [-1, 2, 0], [1, -6, 6]]  # orthonormal


def _fold(even: Sequence[float], odd: Sequence[float]) -> list[list[float]]:
    """(half, j) coefficients by the halves' Legendre polynomials, from those of their sums that
    are even about the middle, (left_j + (-1)^j right_j)/sqrt(2), and of those that are odd.
    """
    pairs = [(e, o, -1.0 if j % 2 else 1.0) for j, (e, o) in enumerate(zip(even, odd, strict=True))]
    return [
        [(e + o) / math.sqrt(2) for e, o, _ in pairs],
        [sign * (e - o) / math.sqrt(2) for e, o, sign in pairs],
    ]


_R3, _R15 = math.sqrt(3), math.sqrt(15)
_PARENT = np.array([
    _fold((1, 0, 0), (0, 0, 0)), _fold((0, 0, 0), (-_R3 / 2, 1 / 2, 0)),
    _fold((0, -_R15 / 4, 1 / 4), (0, 0, 0)),
])  # fmt: skip
_SPLIT = {
    1: np.array([_fold((0, 0, 0), (1, 0, 0))]),
    2: np.array([_fold((0, 0, 0), (1 / 2, _R3 / 2, 0)), _fold((0, 1, 0), (0, 0, 0))]),
    3: np.array([
        _fold((0, 0, 0), (1 / 2, _R3 / 2, 0)), _fold((0, 1 / 4, _R15 / 4), (0, 0, 0)),
        _fold((0, 0, 0), (0, 0, 1)),
    ]),
}  # fmt: skip


def wavelets(order: int) -> np.ndarray:
    """``(order, 2, 3)``: the basis on an interval of length 1 beside the polynomials of degree
    below ``order``, on each half by powers of the place in that half, 0 to 1.
    """
    return math.sqrt(2) * _SPLIT[order] @ LEGENDRE


def shares(start: Scalar, width: Scalar) -> tuple[tuple[Scalar, ...], ...]:
    """What the piece from ``start`` of this width, as parts of a whole, adds to its (w, H, K).

    Row by row the factors of the piece's own w, (w, H) and (w, H, K).
    """
    mid = 0.5 - start - 0.5 * width
    return (
        (1.0,),
        (mid, width),
        (0.5 * mid * mid + (width * width - 1.0) / 24.0, width * mid, width * width),
    )


def compose(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """(w, H, K), as far as they are given, of an interval from those of its halves."""
    left, right = shares(0.0, 0.5), shares(0.5, 0.5)
    parts = (*first, *second)
    return [_weigh((*_pad(left[i], first), *right[i]), parts) for i in range(len(first))]


def halve(whole: Sequence[Tensor], normals: Sequence[Tensor]) -> list[list[Tensor]]:
    """(w, H, K), as far as they are given, of both halves of an interval of length h.

    Args:
        whole: those of the interval.
        normals: as many independent ones of variance h.
    """
    parts = (*whole, *normals)
    return [[_weigh(row, parts) for row in half] for half in _HALVES[len(whole)]]


def _pad(row: Sequence[Scalar], like: Sequence[Tensor]) -> list[Scalar]:
    return [*row, *[0.0] * (len(like) - len(row))]


def _weigh(factors: Iterable[Scalar], parts: Iterable[Tensor]) -> Tensor:
    terms = [x * c for c, x in zip(factors, parts, strict=False) if c != 0.0]
    return functools.reduce(operator.add, terms)


def _both_halves(order: int) -> list[list[list[float]]]:
    """(half, j, i): what the whole's w, H, K and then the normals add to a half's w, H, K."""
    scale = (np.array(DEVIATIONS) * (1.0, -1.0, 1.0))[:order]  # of the Legendre polynomials
    parent = _PARENT[:order, :, :order] / scale[:, None, None]
    basis = np.concatenate((parent, _SPLIT[order][:, :, :order]))
    return (math.sqrt(0.5) * scale[:, None] * basis.transpose(1, 2, 0)).tolist()


_HALVES = {order: _both_halves(order) for order in _SPLIT}
