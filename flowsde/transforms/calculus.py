"""From one reading of dW to the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final
from weakref import WeakSet

import torch
from torch import Tensor

from .. import _random
from .._scalar import Scalar
from .._state import State, leaves, pushforward, transformed, tree_map
from ..dynamics.base import Dynamics, Noise
from ..dynamics.field import Field
from .augmented import fill, noise_of

__all__ = ["Converted", "check_additive", "check_diagonal", "to_ito", "to_stratonovich"]

_SEEN: WeakSet[Dynamics] = WeakSet()  # whose noise was found to be as declared


def to_stratonovich(sde: Dynamics) -> Dynamics:
    """The Stratonovich SDE with the solutions of this one.

        f - 1/2 sum_j (dg_j/dy) g_j,    g_j the columns of the diffusion

    One Jacobian-vector product for scalar noise and for diagonal noise, whose g_i may depend on y_i
    alone; one a column for general noise. An SDE that is read so already, or whose noise is
    additive, is returned as it is.

    Raises:
        TypeError: on dynamics without noise.

    Source: Stratonovich 1966; Kloeden and Platen 1992, section 4.9.
    """
    noise = noise_of(sde)
    return Converted(sde, noise, -0.5) if noise.ito and not noise.additive else sde


def to_ito(sde: Dynamics) -> Dynamics:
    """The Ito SDE with the solutions of this one: ``to_stratonovich`` taken back.

        f + 1/2 sum_j (dg_j/dy) g_j

    Raises:
        TypeError: on dynamics without noise.
    """
    noise = noise_of(sde)
    return sde if noise.ito or noise.additive else Converted(sde, noise, 0.5)


@final
class Converted(Dynamics):
    """An SDE in its other reading."""

    whitens = True

    def __init__(self, sde: Dynamics, noise: Noise, half: float) -> None:
        super().__init__()
        self.sde, self._noise, self._half = sde, noise, half
        self.noise = replace(noise, ito=not noise.ito)
        self.follow(sde)
        self.pulls = True

    def forward(self, t: Tensor, y: State, *args: Any) -> State:
        shift = self._correction(t, y, args)
        return tree_map(lambda f, c: f.add(c, alpha=self._half), self.sde(t, y, *args), shift)

    def diffusion(self, t: Tensor, y: State, *args: Any) -> Any:
        return self.sde.diffusion(t, y, *args)

    def _correction(self, t: Tensor, y: State, args: tuple[Any, ...]) -> State:
        """sum_j (dg_j/dy) g_j."""

        def g(x: State) -> State:
            matrix = self.sde.diffusion(t, x, *args)
            if self._noise.kind == "general":
                return matrix
            return tree_map(fill, matrix, x)

        out, push = pushforward(g, y)
        total = tree_map(torch.zeros_like, y)
        for j in _columns(self._noise.size):
            pushed = push(tree_map(lambda v: v[j], out))  # noqa: B023
            total = tree_map(lambda s, p: s + p[j], total, pushed)  # noqa: B023
        return total

    def prepare(self, y0: State, seed: int | None) -> Converted:
        sde = self.sde.prepare(y0, seed)
        return Converted(sde, noise_of(sde), self._half)

    def select(self, index: Tensor) -> Dynamics | None:
        part = self.sde.select(index)
        return None if part is None else Converted(part, self._noise, self._half)

    def check_span(self, t0: float, t1: float) -> None:
        self.sde.check_span(t0, t1)


def _columns(size: int | None) -> list[Any]:
    return [...] if size is None else [(..., k) for k in range(size)]


def _leaf(v: Tensor) -> Tensor:
    return v.detach().requires_grad_()


def check_diagonal(known: Dynamics, field: Field, t: Scalar, y: State) -> None:
    """Refuses diagonal noise whose g_i depends on other components than y_i, where formulas take
    dg/dy for diagonal: chosen steps, and conversions between Ito and Stratonovich. Once for each
    dynamics.
    """
    noise = field.noise
    if noise is None or noise.kind != "diagonal" or noise.additive or _settled(known, field, y):
        return
    if any(leaf.ndim < 2 or not leaf.numel() for leaf in leaves(y)):
        return
    with torch.enable_grad(), field.aside():
        x = tree_map(_leaf, y)
        crossed = _crossed(leaves(field.diffusion(t, x)), leaves(x))
    if crossed:
        raise TypeError(
            "a component of this diagonal noise depends on other components than its own, so that "
            "chosen steps and conversions between Ito and Stratonovich, as Backsolve makes, would "
            "lead to another law: give noise='general', noise_size=d and torch.diag_embed(g), or "
            "take Fixed(...) steps and Direct() or Checkpointed()"
        )
    _SEEN.add(known)


def _crossed(values: list[Tensor], inputs: list[Tensor]) -> bool:
    """Whether a component of a sample's values depends on another one of its inputs.

    Of any two components the numbers differ in a bit: a product J^T v, with v of those that have it
    or of those that have not, leaves exact zeros in the others where J is diagonal.
    """
    live = [i for i, value in enumerate(values) if value.requires_grad]
    if not live:
        return False
    numbers, count = [], 0
    for x in inputs:
        size = x.shape[1:].numel()
        numbers.append(torch.arange(count, count + size, device=x.device).reshape(x.shape[1:]))
        count += size
    strays = []
    for bit, side in itertools.product(range((count - 1).bit_length()), (0, 1)):
        chosen = [(n >> bit) & 1 == side for n in numbers]
        probes = [_probe(values[i]) * chosen[i] for i in live]
        found = torch.autograd.grad(
            [values[i] for i in live], inputs, probes, retain_graph=True, materialize_grads=True
        )
        for x, own in zip(found, chosen, strict=True):
            strays.append(torch.where(own, 0.0, x.abs().nan_to_num(0.0)).any())
    return any(bool(stray) for stray in strays)


def check_additive(known: Dynamics, field: Field, t: Scalar, y: State) -> None:
    """Refuses noise declared additive that depends on the state, once for each dynamics: formulas
    leave out what dg/dy brings.
    """
    if field.noise is None or not field.noise.additive or _settled(known, field, y):
        return
    with torch.enable_grad(), field.aside():
        x = tree_map(_leaf, y)
        live = [g for g in leaves(field.diffusion(t, x)) if g.requires_grad]
        slopes: Sequence[Tensor] = ()
        if live:
            probes = [_probe(g) for g in live]
            slopes = torch.autograd.grad(live, leaves(x), probes, materialize_grads=True)
    if any(bool(slope.count_nonzero()) for slope in slopes):
        raise TypeError(
            "this noise was declared additive and depends on the state: leave out additive=True"
        )
    _SEEN.add(known)


def _settled(known: Dynamics, field: Field, y: State) -> bool:
    """Whether a diffusion was looked at before, or derivatives cannot show what it depends on."""
    blind = torch.is_inference_mode_enabled() or transformed() or leaves(y)[0].is_meta
    return known in _SEEN or blind or (field.noise is not None and field.noise.by_products)


def _probe(like: Tensor) -> Tensor:
    """Normals, the same in every row."""
    key = _random.keys(0, 1, like.device, _random.PROBE)
    first = torch.zeros(1, dtype=torch.int64, device=like.device)
    v = _random.normal(key, first, like.shape[1:].numel(), like.dtype.to_real())
    return v.reshape(like.shape[1:]).to(like.dtype).expand(like.shape)
