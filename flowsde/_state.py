"""States: a tensor, or any pytree of tensors. A bare tensor takes a fast path everywhere, and so
do tuples, as densities and partitioned states are, and lists.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._random import widest
from ._scalar import Scalar, expand, forwarding, forwards

__all__ = [
    "NO_STATE", "State", "asked", "batch_size", "builder", "by_row", "check_like", "combine",
    "contract", "describe", "detach", "dual", "entangled", "factorable", "finite", "fits", "leaves",
    "mapped", "on_device", "pullback", "pulled", "pushforward", "put_rows", "rows_of", "sources",
    "squared", "stack", "transformed", "tree_map", "unflatten", "unhooked", "unstack", "weigh",
    "where",
]  # fmt: skip

State = Any
NO_STATE = (
    "y0 is a tensor or a pytree of tensors: make a number one with torch.as_tensor, and a "
    "dataclass with torch.utils._pytree.register_dataclass(its class)"
)
_LEAF, _ROWS = (Tensor, float, int, type(None)), (tuple, list)
Weights = Sequence[tuple[int, float]]


def tree_map(fn: Callable[..., Any], tree: State, *rest: State) -> State:
    if isinstance(tree, _LEAF):
        return fn(tree, *rest)
    kind = type(tree)
    if kind in _ROWS and all(type(x) is kind for x in rest):
        return kind([tree_map(fn, *parts) for parts in zip(tree, *rest, strict=True)])
    return pytree.tree_map(fn, tree, *rest)


def leaves(tree: State) -> list[Any]:
    if isinstance(tree, _LEAF):
        return [tree]
    if type(tree) in _ROWS:
        return [leaf for part in tree for leaf in leaves(part)]
    return pytree.tree_leaves(tree)


def unflatten(flat: Iterable[Any], like: State) -> State:
    """The state built as ``like`` is, with these leaves."""
    return pytree.tree_unflatten(list(flat), pytree.tree_structure(like))


def builder(like: State) -> Callable[[Sequence[Any]], State]:
    """What builds states as ``like`` is from their leaves, many times over."""
    if isinstance(like, Tensor):
        return lambda flat: flat[0]
    structure = pytree.tree_structure(like)
    return lambda flat: pytree.tree_unflatten(flat, structure)


def detach(tree: Any) -> Any:
    """Leaves cut from their graph that still ask for a gradient where the originals did."""
    return tree_map(
        lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, tree
    )


def rows_of(tree: Any, index: Tensor) -> Any:
    """These rows of every tensor of the tree."""
    return tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, tree)


def by_row(y: State, rows: int) -> list[Tensor]:
    """The leaves as ``(rows, n)``, of no rows too."""
    return [leaf.reshape(rows, leaf.numel() // max(1, rows)) for leaf in leaves(y)]


def finite(y: State) -> bool:
    """Whether all components are: one operation a leaf and one host read, where their sum is.

    No sum of what is not finite is finite; of large components it may overflow.
    """
    flat = [x.detach() for x in leaves(y) if x.numel()]
    sums = [x.sum() for x in flat]
    if len(sums) > 1:
        sound = bool(torch.stack([total.isfinite() for total in sums]).all())
    else:
        sound = all(cmath.isfinite(total.item()) for total in sums)
    return sound or all(bool(x.isfinite().all()) for x in flat)


def put_rows(tree: Any, index: Tensor, part: Any) -> Any:
    """The tree with these rows of its tensors changed."""

    def put(x: Any, new: Any) -> Any:
        return x.index_copy(0, index, new.to(x.dtype)) if isinstance(x, Tensor) else x

    return tree_map(put, tree, part)


def stack(states: Sequence[State]) -> State:
    return tree_map(lambda *xs: torch.stack(xs), *states)


def unstack(states: State) -> list[State]:
    build, rows = builder(states), zip(*map(torch.unbind, leaves(states)), strict=True)
    return [build(row) for row in rows]


def where(mask: bool | Tensor, a: State, b: State) -> State:
    """``a`` where the mask holds, else ``b``; a ``(batch,)`` mask chooses row by row."""
    if not isinstance(mask, Tensor):
        return a if mask else b

    def choose(x: Any, y: Any) -> Any:
        return torch.where(expand(mask, x), x, y) if isinstance(x, Tensor) else x

    return tree_map(choose, a, b)


def weigh(dt: Scalar, weights: Weights, ks: Sequence[State]) -> State:
    """``dt * sum_i w_i k_i`` over the (index, weight) pairs."""
    if not isinstance(ks[0], Tensor):
        return tree_map(lambda *leaf: weigh(dt, weights, leaf), *ks)
    if isinstance(dt, Tensor):
        total = weigh(1.0, weights, ks)
        return total * expand(dt, total)
    i, w = weights[0]
    total = ks[i].mul(w * dt)
    return _add(total, dt, weights[1:], ks, not torch.is_grad_enabled())


def combine(y: State, dt: Scalar, weights: Weights, ks: Sequence[State]) -> State:
    """``y + dt * sum_i w_i k_i``: one fused addition a term where dt is a host float."""
    if isinstance(y, Tensor):
        if isinstance(dt, Tensor):
            return y + weigh(dt, weights, ks) if weights else y
        return _add(y, dt, weights, ks, False)
    return tree_map(lambda x, *leaf: combine(x, dt, weights, leaf), y, *ks)


def _add(y: Tensor, dt: float, weights: Weights, ks: Sequence[Tensor], fresh: bool) -> Tensor:
    """Adds the terms, in place where y is ours and no graph is recorded."""
    for i, w in weights:
        if fresh:
            y.add_(ks[i], alpha=w * dt)
        else:
            y = y.add(ks[i], alpha=w * dt)
            fresh = not torch.is_grad_enabled()
    return y


def on_device(t: Any, y: State) -> Tensor:
    """A time, or a list of times or rows of them, which the host may have kept, where the state
    lies.
    """
    device = leaves(y)[0].device
    kind: dict[str, Any] = {"dtype": widest(device), "device": device}
    rows = [x for x in t if isinstance(x, Tensor)] if isinstance(t, (list, tuple)) else []
    if not rows:
        return torch.as_tensor(t, **kind)
    shape = max((x.shape for x in rows), key=len)
    return torch.stack([torch.as_tensor(x, **kind).expand(shape) for x in t])


def contract(matrix: Tensor, vector: Tensor) -> Tensor:
    """sum_m matrix[b, ..., m] vector[b, m], without conjugation."""
    inner = (1,) * (matrix.ndim - 2)
    rows = vector.reshape(vector.shape[0], *inner, vector.shape[-1])
    return (matrix * rows.to(matrix.dtype)).sum(-1)


def batch_size(y: State) -> int | None:
    """The leading size that all leaves share, or None."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves(y)}
    return sizes.pop() if len(sizes) == 1 else None


def squared(v: Tensor) -> Tensor:
    """|v|^2 of each sample, ``(batch,)``."""
    return by_row(v.abs().square(), len(v))[0].sum(-1)


def factorable(dtype: torch.dtype) -> torch.dtype:
    """The precision in which matrices of this one are factored and solved with: never half."""
    return torch.promote_types(dtype, torch.float32)


def pulled(out: Tensor, y: Tensor, probes: Tensor, graph: bool) -> Tensor:
    """v^T dout/dy for each v of ``(n, *out.shape)``: in one batched pass, where torch can."""

    def back(v: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            out, y, v, is_grads_batched=batched, create_graph=graph, retain_graph=True,
            materialize_grads=True,
        )  # fmt: skip
        return found

    if len(probes) == 1:  # to map over one costs a third of the pass itself
        return back(probes[0], False)[None]
    try:
        return back(probes, True)
    except RuntimeError:  # an operation that torch cannot batch, as GroupNorm's with a graph
        return torch.stack([back(v, False) for v in probes])


def pullback(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """f(x), and what takes many cotangents ``(n, *f(x).shape)`` back to x, by transformations that
    torch.compile traces.
    """
    found: Any = torch.func.vjp(f, x)
    value, pull = found
    return value, torch.func.vmap(lambda v: pull(v)[0])


def pushforward(
    g: Callable[[State], State], y: State
) -> tuple[State, Callable[[State], State]]:  # fmt: skip
    """g(y), and what takes a direction at y to the derivative of g along it, shaped as g(y).

    By a backward pass through a backward pass, which is linear in its cotangent: one call takes a
    tenth of the time of eager forward mode. Differentiable where gradients are asked for.
    """
    still = torch.is_inference_mode_enabled() or any(v.is_inference() for v in leaves(y))
    if still or torch.compiler.is_compiling() or transformed() or forwarding():
        return g(y), partial(_forwards, g, y)  # where no backward pass can be taken
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = tree_map(
            lambda v: v.view_as(v) if graph and v.requires_grad else v.detach().requires_grad_(), y
        )
        out = g(x)
        values = leaves(out)
        graph = graph and (any(v.requires_grad for v in leaves(y)) or asked(values, x))
        live = [v for v in values if v.requires_grad]
        duals = [torch.zeros_like(v, requires_grad=True) for v in live]
        pulled: Sequence[Tensor] = ()
        if live:
            pulled = torch.autograd.grad(
                live, leaves(x), duals, create_graph=True, materialize_grads=True
            )
    rows = [i for i, p in enumerate(pulled) if p.requires_grad]

    def push(v: State) -> State:
        if not rows:
            return tree_map(torch.zeros_like, out)
        along = [leaves(v)[i] for i in rows]
        pushed = iter(torch.autograd.grad(
            [pulled[i] for i in rows], duals, along, retain_graph=True,
            create_graph=graph or any(a.requires_grad for a in along), materialize_grads=True,
        ))  # fmt: skip
        return unflatten(
            [next(pushed) if x.requires_grad else torch.zeros_like(x) for x in values], out
        )

    return out if graph else tree_map(torch.detach, out), push


def _forwards(g: Callable[[State], State], y: State, v: State) -> State:
    found: Any = torch.func.jvp(g, (tree_map(Tensor.contiguous, y),), (v,))  # tangents lie as y
    value, slope = found  # of which that of no dimensions comes in another precision
    return tree_map(lambda s, of: s.to(of.dtype), slope, value)


def sources(values: Iterable[Tensor], but: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """The leaves from which the graphs of these values come, but by way of those others."""
    values = list(values)
    yield from (x for x in values if x.requires_grad and x.grad_fn is None)
    nodes: list[Any] = [x.grad_fn for x in values if x.grad_fn is not None]
    seen = {*nodes, *(x.grad_fn for x in but)}
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        nodes += new


def asked(values: Iterable[Tensor], own: State) -> bool:
    """Whether somebody asks for gradients of these values but by our own leaves: by the way to a
    derivative nobody's graph need grow.
    """
    ours = {id(x) for x in leaves(own)}
    return transformed() or any(id(x) not in ours for x in sources(values))


def entangled(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool | None:
    """Whether the values of the first sample depend on other samples' inputs: by one backward
    pass, which leaves exact zeros in their rows where they do not. None where that cannot be seen,
    as of a network that starts at zero.
    """
    live = [x for x in values if x.requires_grad]
    if inputs[0].is_meta or transformed():
        return None
    if not live or len(inputs[0]) < 2:
        return False
    probes = [torch.zeros_like(x) for x in live]
    for probe in probes:  # numbers that no symmetry of a field makes cancel
        first = torch.arange(1.0, probe[0].numel() + 1.0, device=probe.device).cos()
        probe[0] = first.reshape(probe[0].shape)
    found = torch.autograd.grad(live, inputs, probes, retain_graph=True, materialize_grads=True)
    sizes = [x.detach().abs().nan_to_num(0.0) for x in found]
    if any(bool(x[1:].any()) for x in sizes):
        return True
    return False if any(bool(x[0].any()) for x in sizes) else None


def mapped(y: State) -> bool:
    """Whether ``torch.func.vmap`` maps over the state, so that the host cannot read its values."""
    functorch = torch._C._functorch
    for leaf in leaves(y):
        while isinstance(leaf, Tensor) and functorch.is_functorch_wrapped_tensor(leaf):
            if functorch.is_batchedtensor(leaf):
                return True
            leaf = functorch.get_unwrapped(leaf)
    return False


def transformed() -> bool:
    """Whether this is called within one of ``torch.func``'s transformations."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def unhooked() -> Iterator[None]:
    """Without the hooks of saved tensors that stand around this: what an inner graph saves is no
    business of theirs, and ``torch.func`` takes no derivatives beside them.
    """
    autograd, held = torch._C._autograd, list[Any]()
    while (hooks := autograd._top_saved_tensors_default_hooks(False)) is not None:
        held.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        while held:
            autograd._push_saved_tensors_default_hooks(*held.pop())


def dual(y: State) -> bool:
    """Whether forward-mode differentiation follows a tensor among these."""
    if not forwarding():  # at once, within every step
        return False
    return any(isinstance(leaf, Tensor) and forwards(leaf) for leaf in leaves(y))


def fits(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether the one broadcasts to the other."""
    inner = whole[len(whole) - len(shape) :]
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(shape, inner, strict=True))


def describe(y: State) -> str:
    if isinstance(y, Tensor):
        return f"{tuple(y.shape)} {str(y.dtype).removeprefix('torch.')} on {y.device}"
    return f"{type(y).__name__} of [{', '.join(describe(leaf) for leaf in leaves(y))}]"


def check_like(k: State, y: State, what: str) -> State:
    """``k`` if it has the structure, shapes and dtypes of ``y``; nothing is ever broadcast.

    A lower precision (autocast) is brought up to the state's; anything else is a TypeError.
    """
    if isinstance(y, Tensor) and isinstance(k, Tensor):
        if k.shape == y.shape:
            if k.dtype == y.dtype:
                return k
            if torch.promote_types(k.dtype, y.dtype) == y.dtype:
                return k.to(y.dtype)
        raise TypeError(
            f"{what} returned {describe(k)} for a state of {describe(y)}: return the state's "
            f"own shape and dtype (reshape the output, or give y0 as {str(k.dtype)[6:]})"
        )
    structure = pytree.tree_structure(y)
    try:
        parts = [] if isinstance(y, Tensor) else structure.flatten_up_to(k)  # dicts in any order
    except ValueError:
        parts = []
    if not parts:
        raise TypeError(
            f"{what} returned {type(k).__name__} for a state of {describe(y)}: "
            "return the state's own structure"
        )
    pairs = zip(parts, leaves(y), strict=True)
    return pytree.tree_unflatten([check_like(a, b, what) for a, b in pairs], structure)
