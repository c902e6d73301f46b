"""The dynamics as one solve sees them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _has_any_global_hook

from .._random import widest
from .._scalar import Scalar
from .._state import (
    State,
    batch_size,
    check_like,
    combine,
    contract,
    describe,
    entangled,
    fits,
    leaves,
    pushforward,
    rows_of,
    tree_map,
)
from .base import Dynamics, Kinetic, Noise, SemiLinear
from .discrete import Chain

__all__ = ["MIXED", "Field", "Product", "check_apart"]

MIXED = (
    "this field mixes the samples of its batch, or their times, so that none can have times of its "
    "own: write t[:, None] where a time meets (batch, d), call eval() on what normalises batches, "
    "or let the samples share t0, t1 and steps"
)
_WATCHED = 8  # evaluations, at which is looked whether a field writes over what methods need


def _versions(tree: Any) -> list[tuple[Tensor, int]]:
    """Of its tensors, as far as they have any."""
    flat = leaves(tree)
    return [(x, x._version) for x in flat if isinstance(x, Tensor) and not x.is_inference()]


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than the ``forward`` of its class."""
    own = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks,
        module._backward_hooks, module._compiled_call_impl, "forward" in vars(module),
        _has_any_global_hook(),  # type: ignore[no-untyped-call]
    )  # fmt: skip
    return any(own)


class Product:
    """A diffusion that is known by what it makes of dW: ``g(dw)``. Sums of such are such."""

    def __init__(self, multiply: Callable[[State], State]) -> None:
        self._multiply = multiply
        self._last: tuple[State, State] | None = None

    def __call__(self, dw: State) -> State:
        if self._last is None or self._last[0] is not dw:  # methods ask for the same one twice
            self._last = dw, self._multiply(dw)
        return self._last[1]

    def __add__(self, other: Product) -> Product:
        return Product(lambda dw: tree_map(torch.add, self(dw), other(dw)))

    def __sub__(self, other: Product) -> Product:
        return Product(lambda dw: tree_map(torch.sub, self(dw), other(dw)))


class Field:
    """Dynamics with the arguments bound, times made tensors, outputs checked, calls counted.

    Integrators call this, never the dynamics: ``drift``, ``explicit`` and ``implicit``,
    ``diffusion``, ``residual``, ``acceleration``, ``step``.
    """

    __slots__ = (
        "_device", "_drift", "_dtype", "_given", "_made", "_t", "_tensor", "args", "dynamics",
        "evaluations", "kinetic", "mixes", "noise", "parts", "products", "split",
    )  # fmt: skip

    def __init__(self, dynamics: Dynamics, args: tuple[Any, ...], y0: State) -> None:
        first = leaves(y0)[0]
        self.dynamics, self.args = dynamics, args
        self._drift = dynamics if _hooked(dynamics) else dynamics._bare()
        self.noise: Noise | None = dynamics.noise
        self.split: SemiLinear | None = dynamics.split()
        self.parts = dynamics.parts()
        self.kinetic: Kinetic | None = dynamics.kinetic()
        self.evaluations = self.products = 0
        self.mixes = False  # whether samples were found to depend on each other
        self._made: tuple[Scalar, weakref.ref[Tensor], Any] | None = None
        self._device = first.device
        self._dtype = widest(first.device) if dynamics.precise_time else first.dtype.to_real()
        self._given: dict[str, list[tuple[weakref.ref[Any], int]]] = {}  # what fs returned last
        self._t, self._tensor = math.nan, torch.empty((), device="meta")

    def __getstate__(self) -> dict[str, Any]:
        """All but what is known of the last calls, which lives by weak references."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "_made": None, "_given": {},
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def select(self, index: Tensor, y: State) -> Field | None:
        """The field of these rows of y; None where the dynamics cannot tell, or args have rows."""
        dynamics, batch = self.dynamics.select(index), batch_size(y)
        if dynamics is None or any(
            isinstance(x, Tensor) and x.ndim and len(x) == batch for x in leaves(self.args)
        ):
            return None
        return Field(dynamics, self.args, rows_of(y, index))

    def parameters(self) -> list[Tensor]:
        """The dynamics' parameters and buffers, and the tensors among the arguments."""
        given = [x for x in leaves(self.args) if isinstance(x, Tensor)]
        return [*self.dynamics.parameters(), *self.dynamics.buffers(), *given]

    def time(self, t: Scalar) -> Tensor:
        """t as a tensor of the state's real dtype, or the device's most precise where the dynamics
        asks for that; made once where stages share it.
        """
        if isinstance(t, Tensor):
            return t.to(device=self._device, dtype=self._dtype)
        if t != self._t:
            self._t = t
            self._tensor = torch.scalar_tensor(t, dtype=self._dtype, device=self._device)
        return self._tensor

    def drift(self, t: Scalar, y: State) -> State:
        """f(t, y), shaped as y."""
        return self._ask(self._drift, t, y, "the vector field")

    def _ask(
        self, f: Callable[..., State], t: Scalar, y: State, what: str, **more: Any
    ) -> State:  # fmt: skip
        """f(t, y, *args), shaped as y: one evaluation. The first ones are looked at."""
        at = self.time(t)
        if torch.compiler.is_compiling():  # a compiled step counts its calls from outside
            k = f(at, y, *self.args, **more)
        else:
            self.evaluations += 1
            watched = self.evaluations <= _WATCHED
            before = [*_versions(at), *_versions(y)] if watched else []
            k = f(at, y, *self.args, **more)
            if watched:
                self._watch(what, k, before)
        tensors = isinstance(k, Tensor) and isinstance(y, Tensor)
        if tensors and k.shape == y.shape and k.dtype is y.dtype:  # check_like's fast path
            return k
        return check_like(k, y, what)

    def _watch(self, what: str, k: State, before: list[tuple[Tensor, int]]) -> None:
        """Raises TypeError where f wrote over its input, or over what it had returned: methods
        need both.
        """
        if any(x._version != version for x, version in before):
            raise TypeError(
                f"{what} changed its time or its state in place: write y.clamp(...) for "
                "y.clamp_(...), inplace=False for a module, or take y.clone() first"
            )
        found = _versions(k)
        for (x, version), (last, then) in zip(found, self._given.get(what, ()), strict=False):
            if x is last() and version != then:
                raise TypeError(
                    f"{what} returned the same tensor twice, written over in between, and the "
                    "solver needs both: return a new one, or its clone()"
                )
        self._given[what] = [(weakref.ref(x), version) for x, version in found]

    def explicit(self, t: Scalar, y: State) -> State:
        """The part of the drift that is not stiff, shaped as y."""
        assert self.parts is not None
        return self._ask(self.parts[0], t, y, "the explicit part")

    def implicit(self, t: Scalar, y: State) -> State:
        """The stiff part of the drift, shaped as y."""
        assert self.parts is not None
        return self._ask(self.parts[1], t, y, "the implicit part")

    def written(self) -> dict[str, int]:
        """The versions of its buffers in floating point, but for running statistics."""
        return {
            f"{name}.{key}".lstrip("."): x._version
            for name, module in self.dynamics.named_modules() if not isinstance(module, _NormBase)
            for key, x in module._buffers.items()
            if x is not None and x.is_floating_point() and not x.is_inference()
        }  # fmt: skip

    def check_written(self, before: dict[str, int]) -> None:
        """Raises TypeError where one of them was written to since."""
        for name, version in self.written().items():
            if before.get(name, version) != version:
                raise TypeError(
                    f"the field writes to its buffer {name} when it is asked, as spectral_norm "
                    "does in training, so that no step can be taken again as it was: call eval() "
                    "on that module for the solve, or use adjoint=Direct()"
                )

    @contextmanager
    def still(self) -> Iterator[None]:
        """Calls that leave running statistics as they were: their versions never tell."""
        norms = (m for m in self.dynamics.modules() if isinstance(m, _NormBase) and m.training)
        held = [(x, x.clone()) for norm in norms for x in norm.buffers(recurse=False)]
        try:
            yield
        finally:
            for x, value in held:
                x.data.copy_(value)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Calls that do not count, and leave the modules' attributes and buffers as they were."""
        counts, modules = (self.evaluations, self.products), list(self.dynamics.modules())
        made, self._made = self._made, None
        held = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
        buffers = [(x, x._version, x.clone()) for x in self.dynamics.buffers()]
        try:
            with self.still():
                yield
        finally:
            (self.evaluations, self.products), self._made = counts, made
            for module, own, named in held:
                vars(module).update(own)
                module._buffers.clear()
                module._buffers.update(named)
            with torch.no_grad():
                for x, version, value in buffers:
                    if x._version != version:
                        x.copy_(value)

    def count(self, products: int) -> None:
        """Told of Jacobian-vector products, passes through the field that call it not."""
        self.products += products

    def spend(self, spent: Tensor) -> None:
        """Told of what steps in a graph have ``spent``."""
        evaluations, products, mixed = spent.tolist()
        self.evaluations += evaluations
        self.products += products
        self.mixes |= bool(mixed)

    def once(self, t: Scalar, y: State, make: Callable[[], Any]) -> Any:
        """What make() returns; made once where a rejected step starts again from the same y."""
        first = leaves(y)[0]
        if self._made is not None:
            now, of, made = self._made
            same = now == t if isinstance(now, float) and isinstance(t, float) else now is t
            if same and of() is first:
                return made
        made = make()
        self._made = t, weakref.ref(first), made
        return made

    def forget(self) -> None:
        """Lets go of what was made once, which may know the field itself."""
        self._made = None

    def residual(self, t: Scalar, x: State, split: SemiLinear | None = None) -> State:
        """The residual, shaped as x, of the split or of this form of it."""
        split = self.split if split is None else split
        assert split is not None
        return self._ask(split.residual, t, x, "the residual", now=t)

    def acceleration(self, t: Scalar, x: State) -> State:
        """The part of dv/dt that depends on the position, shaped as x."""
        assert self.kinetic is not None
        return self._ask(self.kinetic.acceleration, t, x, "the force")

    def noise_term(self, t: Scalar, y: State, dw: State) -> State:
        """g(t, y) dW, shaped as y."""
        return self.product(self.diffusion(t, y), dw)

    def diffusion(self, t: Scalar, y: State) -> State:
        """g(t, y), shaped as y, or ``(*y.shape, m)`` for general noise; a ``Product`` where it is
        known by its products with dW alone.
        """
        assert self.noise is not None
        if self.noise.by_products:
            return Product(partial(self.dynamics.product, self.time(t), y, args=self.args))
        g, kind = self.dynamics.diffusion(self.time(t), y, *self.args), self.noise.kind
        if not isinstance(y, Tensor):
            if len(leaves(g)) != len(leaves(y)):
                raise TypeError(f"diagonal diffusion has the state's structure: {describe(y)}")
            return tree_map(_diagonal, y, g)
        if kind != "general" and isinstance(g, Tensor) and g.shape == y.shape:
            return check_like(g, y, "the diffusion")
        if kind == "diagonal":
            return _diagonal(y, g)
        if kind == "scalar":
            return check_like(g, y, "the diffusion")
        shape = (*y.shape, self.noise.size)
        if not isinstance(g, Tensor) or g.shape != shape:
            raise TypeError(
                f"general diffusion returns (batch, d, m) = {shape}; got "
                f"{tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__}"
            )
        return check_like(g, y.unsqueeze(-1).expand(shape), "the diffusion")

    def diffusion_along(self, t: Scalar, y: State) -> tuple[State, Callable[[State], State]]:
        """g(t, y), and what takes a direction at y to the derivative of g along it, shaped as g."""
        at = self.time(t)  # made outside of what is differentiated, where others may use it
        return pushforward(lambda x: self.diffusion(at, x), y)

    def product(self, g: State, dw: State) -> State:
        """g dW, shaped as the state, for a g that ``diffusion`` returned."""
        assert self.noise is not None
        if self.noise.by_products:
            return g(dw)
        if self.noise.kind == "general":
            return contract(g, dw)
        return tree_map(lambda a, b: a * _over(a, b), g, dw)

    def diffuse(self, y: State, g: State, dw: State, weight: float = 1.0) -> State:
        """y + weight g dW, for a g that ``diffusion`` returned: one fused operation a leaf, but
        for general noise.
        """
        assert self.noise is not None
        if self.noise.by_products:
            return combine(y, weight, ((0, 1.0),), [g(dw)])
        if self.noise.kind == "general":
            return y.add(contract(g, dw), alpha=weight)
        if isinstance(y, Tensor):
            return y.addcmul(g, _over(g, dw), value=weight)
        return tree_map(lambda x, a, b: x.addcmul(a, _over(a, b), value=weight), y, g, dw)

    def step(self, k: int, y: State) -> State:
        """The state after step k of a chain."""
        self.evaluations += 1
        assert isinstance(self.dynamics, Chain)
        return _state(self.dynamics.step(k, y, *self.args))

    def unstep(self, k: int, y: State) -> State:
        """The state before step k of a map."""
        self.evaluations += 1
        return _state(self.dynamics.unstep(k, y, *self.args))  # type: ignore[operator]


_APART: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def check_apart(known: Dynamics, field: Field, t: Tensor, y: State) -> None:
    """Refuses a field that mixes samples, where each has times of its own: once for each dynamics,
    batch, and mode of its modules.
    """
    if len(t) < 2:
        return
    kind = len(t), *(module.training for module in known.modules())
    seen = _APART.setdefault(known.anchor, set())
    if kind in seen or torch.is_inference_mode_enabled():
        return
    with torch.enable_grad(), field.aside():
        at, x = tree_map(lambda leaf: leaf.detach().requires_grad_(), (t, y))
        try:
            values = leaves(field.drift(at, x))
        except RuntimeError:  # of what autograd does not follow, as numpy's
            return
        mixed = entangled(values, [at, *leaves(x)])
    if mixed:
        raise TypeError(MIXED)
    if mixed is False:
        seen.add(kind)


def _state(stepped: Any) -> State:
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError("a chain's step returns (state, log-determinant or None)")
    return stepped[0]


def _diagonal(y: Tensor, g: Any) -> Tensor:
    shape = g.shape if isinstance(g, Tensor) else torch.Size()
    if not fits(shape, y.shape):
        raise TypeError(
            f"diagonal diffusion broadcasts to the state's shape {tuple(y.shape)}; got "
            f"{tuple(shape)}"
        )
    if not isinstance(g, Tensor):
        return torch.full_like(y, g)
    if not g.ndim:  # a number's precision is the state's
        g = g.to(y.dtype.to_complex() if g.is_complex() else y.dtype)
    return check_like(g.expand(y.shape), y, "the diffusion")


def _over(g: Tensor, dw: Tensor) -> Tensor:
    """dw ready to multiply g: one number a sample where the noise is scalar."""
    return dw if dw.ndim == g.ndim else dw.reshape(dw.shape + (1,) * (g.ndim - dw.ndim))
