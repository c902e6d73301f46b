"""A device that is not the CPU, where there is none: numbers that lie on the CPU and say that they
lie elsewhere. It refuses what a GPU refuses: tensors of two devices in one operation, generators
of another device, views by NumPy. What crosses over, which a GPU waits for, is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["CROSSINGS", "FAR", "generator"]

_MOVES = {"aten::_to_copy", "aten::copy_"}
_LEAVES = {"aten::_local_scalar_dense", "aten::equal"}  # results on the host
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_WHOLE = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm", "aten::gather"}
_generators: set[int] = set()
CROSSINGS: Counter[str] = Counter()  # copies there, and reads of what lies there


class _Far(Tensor):
    """A tensor there; what it holds is near."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> _Far:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device="far:0",
        )  # fmt: skip
        made.near = near
        return made

    def __repr__(self, **_: Any) -> str:
        return f"far {self.near!r}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, *args, **(kwargs or {}))


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    flat, spec = _pytree.tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, _Far)]
    goal = kwargs.get("device")
    there = bool(far) if goal is None else torch.device(goal).type == "far"
    _check(func._schema.name, args, flat, bool(far), there)
    args, kwargs = _pytree.tree_unflatten([_near(x) for x in flat], spec)
    out = func(*args, **kwargs)
    if func._schema.name in _LEAVES or not there:
        return out
    held = {id(x.near): x for x in far}  # what was written to in place is what it was
    return _pytree.tree_map_only(Tensor, lambda x: held[id(x)] if id(x) in held else _Far(x), out)


def _near(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "far":
        return torch.device("cpu")
    return x.near if isinstance(x, _Far) else x


def _check(name: str, args: Any, flat: list[Any], far: bool, there: bool) -> None:
    """Raises what a GPU would."""
    near = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, _Far)]
    CROSSINGS["copies"] += name == "aten::copy_" and far and bool(near)
    home = name in _LEAVES or (name == "aten::_to_copy" and not there)
    CROSSINGS["reads"] += far and home
    mixed = far and any(x.ndim or name in _WHOLE for x in near) and name not in _MOVES
    if mixed and not (name in _INDEXED and isinstance(args[0], _Far)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, far and cpu")
    for x in flat:
        if isinstance(x, torch._C.Generator) and there != (x._cdata in _generators):
            raise RuntimeError(f"{name}: a generator of another device than the numbers'")


def generator(seed: int) -> torch.Generator:
    """A generator there."""
    made = torch.Generator()
    _generators.add(made._cdata)
    return made.manual_seed(seed)


def _register() -> torch.device:
    """Tells torch of the device. What its C++ makes of Python numbers, or reads of a tensor's
    memory, would pass the device by, and goes through Python instead.
    """
    _setup_privateuseone_for_python_backend("far")
    torch.get_device_module("far").get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._C._set_multithreading_enabled(False)  # its own threads would not hold Python's lock
    for torchs in (torch.tensor, torch.as_tensor):
        setattr(torch, torchs.__name__, _made(torchs))
    lists, arrays = Tensor.tolist, Tensor.numpy

    def listed(self: Tensor) -> Any:
        CROSSINGS["reads"] += isinstance(self, _Far)
        return lists(_near(self.detach()))

    Tensor.tolist = listed  # type: ignore[method-assign]

    def array(self: Tensor, *, force: bool = False) -> Any:
        if isinstance(self, _Far) and not force:
            raise TypeError("can't convert a far tensor to numpy: use Tensor.cpu() first")
        return arrays(_near(self.detach()), force=force) if force else arrays(self)

    Tensor.numpy = array  # type: ignore[method-assign]
    alike = Tensor.new_tensor

    def new(self: Tensor, data: Any, **keywords: Any) -> Tensor:
        if not isinstance(self, _Far):
            return alike(self, data, **keywords)
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **keywords})

    Tensor.new_tensor = new  # type: ignore[method-assign]
    return torch.device("far:0")


def _made(torchs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(data: Any, *args: Any, device: Any = None, **keywords: Any) -> Tensor:
        if device is None or torch.device(device).type != "far":
            return torchs(data, *args, device=device, **keywords)
        if isinstance(data, _Far):
            return data if keywords.get("dtype") is None else data.to(keywords["dtype"])
        leaf = keywords.pop("requires_grad", False)
        made = torchs(data, *args, device="cpu", **keywords).to(device)
        return made.requires_grad_() if leaf else made

    return make


def _factory(func: Any) -> Callable[..., Tensor]:
    """For those that would make an empty tensor there, and then change its size."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        return _Far(func(*args, **{**kwargs, "device": torch.device("cpu")}))

    return make


FAR = _register()
_fallback, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_fallback.fallback(_call, dispatch_key="PrivateUse1")
for _name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _aten.impl(_name, _factory(_op), "PrivateUse1")
