"""The normals of a path, drawn by counters and shaped for one solve's state."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _random
from .._state import State, batch_size, builder, leaves

__all__ = ["Law", "Normals", "ordered_sum"]


@dataclass(frozen=True, eq=False)
class Law:
    """Where the numbers of a path come from, and how they depend on each other.

    Args:
        seed: an int, or an integer tensor that gives every sample (or antithetic pair) its own.
        antithetic: whether the second half of the batch takes the first half's numbers negated.
        correlation: ``(m, m)``, the covariance per unit of time of the components along the last
            axis; None for independent ones of variance 1.

    Raises:
        TypeError: on a seed that is no whole number.
        ValueError: on a correlation that is not symmetric and positive definite, or asks for
            gradients, which draws do not carry.
    """

    seed: int | Tensor
    antithetic: bool = False
    correlation: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.seed, Tensor):
            try:
                operator.index(self.seed)
            except TypeError:
                raise TypeError(
                    f"a path's seed is a whole number, or an integer tensor with one a sample; got "
                    f"{self.seed!r}"
                ) from None
        c = self.correlation
        if c is None:
            return
        if c.requires_grad:
            raise ValueError(
                "draws carry no gradient by their correlation L L^T: detach it, and give L to the "
                "diffusion, noise='general'"
            )
        if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.is_floating_point():
            raise ValueError(f"correlation is a real (m, m) matrix; got {tuple(c.shape)} {c.dtype}")
        if not torch.allclose(c, c.mT) or bool(torch.linalg.cholesky_ex(c).info):
            raise ValueError(
                "correlation is a covariance: symmetric and positive definite. Of a factor L give "
                "L @ L.T; for components that depend on each other wholly, give noise='general' "
                "fewer of them"
            )


class Normals:
    """Numbers for one solve, ``(..., rows, size)``, and their way into the state's shape.

    Args:
        law: of the path.
        like: a state with the shapes, dtypes and device wanted.
        correlated: whether ``law.correlation`` holds for these numbers.
        normal: what they are drawn by: see ``Draws``.
    """

    def __init__(
        self, law: Law, like: State, correlated: bool = True, normal: _random.Draw = _random.normal
    ) -> None:
        flat, batch, self._normal = leaves(like), batch_size(like), normal
        if batch is None and (isinstance(law.seed, Tensor) or law.antithetic):
            raise ValueError(
                "per-sample seeds and antithetic pairs need a state whose leaves all lead with "
                "the batch"
            )
        self.rows, self.device = 1 if batch is None else batch, flat[0].device
        self.dtype = torch.promote_types(flat[0].dtype.to_real(), torch.float32)
        self._build, self._batched = builder(like), batch is not None
        self._forms = [
            (leaf.shape if batch is None else leaf.shape[1:], leaf.dtype) for leaf in flat
        ]
        self._sizes = [form.numel() for form, _ in self._forms]
        self.size = sum(self._sizes)
        self._roots, self._sign = self._rows(law)
        self._keys: dict[int, Tensor] = {}
        self._factor = self._root(law.correlation) if correlated else None

    def _rows(self, law: Law) -> tuple[Tensor, Tensor | None]:
        """What tells the rows apart: their roots, and the signs of their numbers."""
        if not law.antithetic:
            return _random.roots(law.seed, self.rows, self.device), None
        if self.rows % 2:
            raise ValueError(f"antithetic pairs need an even batch; got {self.rows} samples")
        root = _random.roots(law.seed, self.rows // 2, self.device)
        sign = torch.ones(self.rows, 1, dtype=self.dtype, device=self.device)
        sign[self.rows // 2 :] = -1.0
        return root.repeat(2), sign

    def _root(self, correlation: Tensor | None) -> Tensor | None:
        """The Cholesky factor, transposed, where every leaf has the axis for it."""
        if correlation is None:
            return None
        m = len(correlation)
        if any(form[-1:] != (m,) for form, _ in self._forms):
            shapes = [tuple(form) for form, _ in self._forms]
            raise ValueError(
                f"correlation is ({m}, {m}), for increments whose last axis has {m} components; "
                f"one sample of this solve's has shape {shapes}"
            )
        factor = torch.linalg.cholesky(correlation.detach()).mT
        return factor.to(dtype=self.dtype, device=self.device)

    def keys(self, stream: int) -> Tensor:
        """``(rows,)`` keys of one of the path's streams."""
        if stream not in self._keys:
            self._keys[stream] = _random.keys_of(self._roots, stream)
        return self._keys[stream]

    def draw(self, stream: int, steps: Tensor) -> Tensor:
        """``(len(steps), rows, size)`` normals of one of the path's streams."""
        return self._normal(self.keys(stream), steps, self.size, self.dtype)

    def shape(self, flat: Tensor) -> State:
        """Numbers ``(..., rows, size)`` as a state whose leaves lead with ``...``."""
        if self._sign is not None:
            flat = flat * self._sign
        lead = flat.shape[: -1 if self._batched else -2]
        parts = [
            self._mixed(part.reshape((*lead, *form))).to(dtype)
            for part, (form, dtype) in zip(
                torch.split(flat, self._sizes, -1), self._forms, strict=True
            )
        ]
        return self._build(parts)

    def _mixed(self, x: Tensor) -> Tensor:
        if self._factor is None:
            return x
        return ordered_sum(x.unsqueeze(-1) * self._factor, -2)

    def select(self, rows: Tensor) -> Normals:
        """Those of these rows alone."""
        part = copy.copy(self)
        part._roots, part.rows = self._roots[rows], len(rows)
        part._keys = {}
        part._sign = None if self._sign is None else self._sign[rows]
        return part


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """The sum, one term after the other.

    ``sum`` takes its terms in an order that depends on what stands beside them, so that the last
    bit of a sample's numbers would depend on its batch.
    """
    return x.cumsum(dim).select(dim, -1)
