"""Functions of tensors as torch.compile runs them, with guards looked at once a solve."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._once import refused
from ._state import State, builder, leaves, on_device, tree_map, unhooked
from .integrators.base import Step

__all__ = ["Calls", "Graph", "as_input", "of_sizes"]

# torch 2.13 writes into a buffer that a fused reduction still reads, and gradients come out wrong
SAFE: dict[str, Any] = {"inplace_buffers": False}
NEAR: dict[str, Any] = {"cpp_wrapper": True}  # no Python between the kernels of a CPU

Call = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]


class Graph:
    """A function ``(method, stepping, field, *trees)`` under ``torch.compile``, with its own cache.

    Its caller keeps one for each method and stepping, whose guards are therefore left out, as are
    those on the modules of this library and of torch. The guards on the dynamics, on the arguments
    and on all tensors stay.
    """

    def __init__(
        self, function: Callable[..., Any], backend: Any, options: Mapping[str, Any] | None
    ) -> None:
        own = types.FunctionType(_renamed(function.__code__), function.__globals__)
        self._usual = backend == "inductor"
        if isinstance(backend, str):
            backend = torch._dynamo.lookup_backend(backend)
        self._backend, self._options, self._heard = backend, options, list[Call]()
        self.sure: set[Callable[..., Any]] = set()  # graphs seen to be called alike twice
        self.fits = True  # whether the compiler takes it as it is
        self.costs: dict[Any, int | None] = {}  # evaluations in one step, for each kind of inputs
        logging.getLogger("torch._inductor.ir").addFilter(_shimmed)  # the same one, once
        with quiet():
            self._compiled = torch.compile(
                own, backend=self._lower, options={"guard_filter_fn": _needed}
            )

    def _lower(self, module: Any, examples: Any) -> Callable[..., Any]:
        """The backend's own callable, overheard: its documented seam."""
        compiler, options = self._backend, self._options
        if self._usual:
            near = all(x.device.type == "cpu" for x in examples if isinstance(x, Tensor))
            options = {**SAFE, **(NEAR if near else {}), **(options or {})}
        if options is not None:  # by the name under which inductor's compiler takes them
            compiler = functools.partial(compiler, config_patches=dict(options))
        graph = compiler(module, examples)

        def called(*inputs: Any) -> Any:
            outputs = graph(*inputs)
            if torch.is_grad_enabled():
                _once_only(inputs, outputs)
            return outputs

        def overheard(*inputs: Any) -> Any:
            outputs = called(*inputs)
            self._heard.append((called, inputs, outputs))
            return outputs

        return overheard

    def __call__(self, *args: Any) -> tuple[Any, list[Call]]:
        """What the function returns, and the calls of graphs that it took."""
        self._heard.clear()
        with quiet(), _traced_apart():
            result = self._compiled(*args)
        heard, self._heard = self._heard, []
        return result, heard


def _once_only(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Has further derivatives of these outputs' gradients raise.

    The compiler's own refusal is met only where autograd finds a way through what the graph saved;
    beside another way to the same tensor its part would be left out without a word.
    """
    known = set(map(id, inputs))
    nodes = {x.grad_fn for x in outputs if isinstance(x, Tensor) and id(x) not in known}
    for node in nodes - {None}:
        node.register_prehook(functools.partial(_refused, inputs))  # type: ignore[union-attr]


def _refused(
    inputs: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    if not torch.is_grad_enabled():
        return None
    causes = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    cure = "Compiled gives first derivatives, Eager all"
    return tuple(None if x is None else refused(cure, x.contiguous(), *causes) for x in cotangents)


@contextmanager
def quiet() -> Iterator[None]:
    """What the compiler says of itself is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _traced_apart() -> Iterator[None]:
    """Has the compiler trace without the hooks of saved tensors; the graphs run with them."""
    handler = torch._dynamo.callback.callback_handler
    with ExitStack() as stack:

        def start(_: Any) -> None:
            stack.enter_context(unhooked())

        def end(_: Any) -> None:
            stack.close()

        handler.register_start_callback(start)
        handler.register_end_callback(end)
        try:
            yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)


def _shimmed(record: logging.LogRecord) -> bool:
    """Leaves out that linear systems go through Python under ``cpp_wrapper``: backward passes are
    compiled when they are first taken, by nobody who could keep quiet about it.
    """
    return "missing a c-shim" not in record.msg


def _renamed(code: types.CodeType) -> types.CodeType:
    """The same under a name of its own.

    The compiler takes what differs from one call of a code to the next, a tolerance even, for an
    unknown of its graphs, which makes them ten times slower; and it knows a code by name and line.
    """
    return code.replace(co_name=f"{code.co_name}_{next(_numbers)}")


_numbers = itertools.count()


def _needed(guards: Sequence[Any]) -> list[bool]:
    """Those on what the graph was not made for, and whose change it would not notice itself."""
    return [not _CONSTANT.search(g.name) for g in guards]


# a norm is the user's, and so is a module named as torch_this or flowsde_that
_CONSTANT = re.compile(
    r"_flowsde_(method|stepping)(?!.*\bnorm\b)|__import_(flowsde|torch)(_dot_|\b)"
)


class Calls:
    """The calls of a graph within one solve.

    Looking at the guards costs more than the operations of a small step, and within a solve nothing
    changes that they look at, but for the kind of the inputs. So the first call of each kind goes
    through them, and the next ones straight to the graph that they chose. A graph is trusted with
    this when two calls in a row were found to differ by their inputs alone: a field that changes
    itself on the way stays with the guards.
    """

    def __init__(self, graph: Graph, *fixed: Any) -> None:
        self._graph, self._fixed = graph, fixed
        self._ways: dict[Any, _Way | None] = {}

    def __call__(self, *trees: Any) -> Any:
        flat = [x for tree in trees for x in leaves(tree)]
        kind = _kind(flat)
        known = self._ways.get(kind)
        if known is not None and known.graph in self._graph.sure:
            return known(flat)
        result, heard = self._graph(*self._fixed, *trees)
        way = _Way.of(flat, heard, result)
        if way is not None and known is not None and way.like(known):
            self._graph.sure.add(way.graph)
        self._ways[kind] = way
        return result


def _kind(flat: Sequence[Any]) -> tuple[Any, ...]:
    """What of the inputs the guards look at: never the values of tensors."""
    looks = [
        (type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_leaf, x.is_conj())
        if isinstance(x, Tensor) else x
        for x in flat
    ]  # fmt: skip
    ids = [id(x) for x in flat]
    return torch.is_grad_enabled(), *looks, *(ids.index(i) for i in ids)


@dataclass
class _Way:
    """How a call's inputs went into a graph, and its outputs into the result."""

    graph: Callable[..., Any]
    inputs: list[tuple[int | None, Any]]  # the place among the inputs, or the value itself
    outputs: list[tuple[int | None, Any]]  # the place among inputs and outputs in a row, or that
    build: Callable[[list[Any]], Any]

    @classmethod
    def of(cls, flat: Sequence[Any], heard: list[Call], result: Any) -> _Way | None:
        """None where the call was not a graph alone."""
        if len(heard) != 1:
            return None
        (graph, given, found), places = heard[0], dict[int, int]()
        for i, x in enumerate((*flat, *found)):
            if isinstance(x, Tensor):
                places.setdefault(id(x), i)
        rebuild: Callable[[Any], Any]
        result, rebuild = _opened(result) if isinstance(result, Step) else (result, builder(result))
        ends = leaves(result)
        inputs, outputs = ([(places.get(id(x)), x) for x in xs] for xs in (given, ends))
        if any(place is None and isinstance(x, Tensor) for place, x in outputs):
            return None
        return cls(graph, _named(inputs), _named(outputs), rebuild)

    def __call__(self, flat: list[Any]) -> Any:
        found = self.graph(*[x if i is None else flat[i] for i, x in self.inputs])
        row = [*flat, *found]
        return self.build([x if i is None else row[i] for i, x in self.outputs])

    def like(self, other: _Way) -> bool:
        """Whether all that goes another way is the very same."""
        mine, theirs = (way.inputs + way.outputs for way in (self, other))
        return self.graph is other.graph and all(
            i == j and (x is y or (not isinstance(x, Tensor) and x == y))
            for (i, x), (j, y) in zip(mine, theirs, strict=True)
        )


def _named(row: list[tuple[int | None, Any]]) -> list[tuple[int | None, Any]]:
    return [(i, x if i is None else None) for i, x in row]


def _opened(step: Step) -> tuple[State, Callable[[list[Any]], Step]]:
    """What a step holds, and the way to make one that holds other tensors."""
    names = [
        name for kind in type(step).__mro__ for name in getattr(kind, "__slots__", ())
        if hasattr(step, name)
    ]  # fmt: skip
    held = [getattr(step, name) for name in names]
    build = builder(held)

    def rebuild(flat: list[Any]) -> Step:
        new = object.__new__(type(step))
        for name, value in zip(names, build(flat), strict=True):
            object.__setattr__(new, name, value)
        return new

    return held, rebuild


def of_sizes(tree: Any) -> Any:
    """Its tensors as inputs whose sizes, but for the batch's, the compiler does not leave open:
    loops of a graph take no expressions of such. Off the record.
    """

    def settled(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 2:
            return x
        x = x.detach()
        torch._dynamo.mark_static(x, list(range(1, x.ndim)))
        return x

    return tree_map(settled, tree)


def as_input(t: Any, y: State) -> Tensor:
    """A time, or a list of times or rows of them, as an input of a graph that takes this state."""
    return t.contiguous() if isinstance(t, Tensor) else on_device(t, y)
