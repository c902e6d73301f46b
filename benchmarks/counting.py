"""Counts of what the dispatcher sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counter", "uncounted"]


class Counter(TorchDispatchMode):
    """Dispatcher operations and host reads, outside of the functions wrapped by ``uncounted``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.reads, self.paused = 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            name = func.name()
            self.operations += 1
            self.reads += "_local_scalar_dense" in name or "aten::is_nonzero" in name
        return func(*args, **(kwargs or {}))


def uncounted(f: Callable[..., Tensor], counter: Counter) -> Callable[..., Tensor]:
    """f, whose own operations do not count."""

    def wrapped(*args: Any) -> Tensor:
        counter.paused = True
        try:
            return f(*args)
        finally:
            counter.paused = False

    return wrapped
