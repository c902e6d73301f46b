"""Gradients given to a finished solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._once import once
from ._scalar import Scalar, still
from ._state import State, detach, dual, leaves, sources, tree_map, unflatten
from .dynamics.field import Field
from .solution import Solution

__all__ = ["Inputs", "graft"]

Pullback = Callable[[State, State | None], list[Tensor | None]]


@dataclass
class Inputs:
    """What the outputs of a solve may be differentiated by, and a field that ends there.

    ``field`` has arguments cut from their graph; ``targets`` are the tensors that it uses for
    ``args`` and ``parameters``, so that no gradient takes a path twice.
    """

    y0: State
    args: list[Tensor]
    parameters: list[Tensor]
    field: Field
    targets: list[Tensor]

    @classmethod
    def of(cls, field: Field, y0: State) -> Inputs:
        cut = detach(field.args)
        args, mine = (
            [x for x in leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
            for tree in (field.args, cut)
        )
        parameters: list[Tensor] = [p for p in field.dynamics.parameters() if p.requires_grad]
        return cls(y0, args, parameters, Field(field.dynamics, cut, y0), [*mine, *parameters])

    def check(self, name: str, t: Scalar, y: State) -> list[Tensor]:
        """Raises TypeError if the field holds on to a tensor whose gradient would be lost. Returns
        what it gave.
        """
        with torch.enable_grad():
            y = tree_map(lambda x: x.detach().requires_grad_(), y)
            t = still(t)
            now = self.field.time(t)  # a field may ask for a derivative by it
            found = leaves(self.field.drift(t, y))
            if self.field.noise is not None:
                found += leaves(self.field.diffusion(t, y))
        known = {id(x) for x in (now, *leaves(y), *self.targets)}
        for leaf in sources(found):
            if id(leaf) not in known:
                raise TypeError(
                    f"{name} cannot reach a tensor of shape {tuple(leaf.shape)} that the field "
                    "takes from outside: give it in args=(u,) with f(t, y, u), make it a parameter "
                    "of the field's module, or use adjoint=Checkpointed()"
                )
        return found

    def repeats(self, name: str, t: Scalar, y: State, first: Sequence[Tensor]) -> None:
        """Raises TypeError if the drift is something else when it is asked for again."""
        with torch.no_grad():
            before = self.field.written()
            again = leaves(self.field.drift(still(t), detach(y)))
            self.field.check_written(before)
        for a, b in zip(first, again, strict=False):
            if b.numel() and bool((a - b).abs().max() > 1e-3 * a.abs().max()):
                raise TypeError(
                    f"{name} asks the field again on the way back, and this one does not repeat "
                    "itself: is there dropout or another random draw in it? Fix the draw for the "
                    "solve, or use Direct()"
                )

    def any(self, times: Sequence[Tensor]) -> bool:
        return any(x.requires_grad for x in (*leaves(self.y0), *self.targets, *times))


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pullback: Any, values: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.pullback = pullback
        ctx.save_for_backward(*inputs)  # for the sake of ``once``
        return tuple(v.detach().clone() for v in values)  # ours stay as they were

    @staticmethod
    @once("use adjoint=Direct() or Checkpointed(), with an explicit integrator")
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pullback(cotangents)


def graft(
    solution: Solution, inputs: Inputs, times: Sequence[Tensor], pullback: Pullback
) -> Solution:
    """The solution with y1 and ys differentiable by y0, args, parameters and times.

    ``pullback`` takes the cotangents of y1 and of ys and returns those of the leaves of y0, then
    of args, of parameters and of times. Its own derivative is refused, and so are tangents.
    """
    if dual((solution.y1, solution.ys)):
        raise TypeError(
            "Reversible and Backsolve have no forward mode beside their gradients: use "
            "adjoint=Direct() or Checkpointed()"
        )
    ends, saved = leaves(solution.y1), [] if solution.ys is None else leaves(solution.ys)

    def flat(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        first = unflatten(cotangents[: len(ends)], solution.y1)
        rest = None if solution.ys is None else unflatten(cotangents[len(ends) :], solution.ys)
        return pullback(first, rest)

    given = (*leaves(inputs.y0), *inputs.args, *inputs.parameters, *times)
    values = _Graft.apply(flat, (*ends, *saved), *given)  # type: ignore[no-untyped-call]
    y1 = unflatten(values[: len(ends)], solution.y1)
    ys = None if solution.ys is None else unflatten(values[len(ends) :], solution.ys)
    return replace(solution, y1=y1, ys=ys)
