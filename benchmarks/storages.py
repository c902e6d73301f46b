"""How many bytes of tensors are alive."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Storages"]


class Storages(TorchDispatchMode):
    """Bytes of the storages made while it is on, ``live`` now and at the ``peak``.

    Counts what operations return, forward and backward, until the last tensor on a storage is gone;
    workspaces inside an operation and the nodes of the graph are not tensors and do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x.untyped_storage() for x in args if isinstance(x, Tensor)]
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not any(x.untyped_storage() is s for s in given):
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
