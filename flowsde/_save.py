"""What is kept of a solve on its way."""

from __future__ import annotations

import copy
from abc import ABC
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from ._plan import Accept
from ._scalar import Scalar, moving, nonzero, to_float
from ._scalar import where as choose
from ._state import State, on_device, stack, tree_map, where
from .integrators.base import Step
from .solution import Steps

__all__ = ["SaveEnd", "SaveRows", "SaveSteps", "SaveTimes", "Saver", "scatter"]


class Saver(ABC):
    """What is kept on the way.

    Attributes:
        times: those asked for, by which something may be differentiated; None if there are none.
    """

    times: Tensor | None = None

    @property
    def count(self) -> int:
        """How many states were saved so far."""
        return 0

    def value(self, i: int, t: Scalar, t0: Scalar, t1: Scalar, step: Step) -> State:
        """The i-th saved state, at t within this step."""
        raise NotImplementedError

    def select(self, index: Tensor) -> Saver | None:
        """What is kept of these rows alone; None where all are needed."""
        return None

    def absorb(self, index: Tensor, part: Saver) -> None:
        """Takes what was kept of these rows."""

    def begin(self, t: Scalar, y: State) -> None:
        """Told where the solve starts."""

    def keep(self, t0: Scalar, t1: Scalar, y: State, step: Step, accept: Accept) -> None:
        """Told of each attempt."""

    def finish(self, t: Scalar, y: State) -> tuple[Tensor | None, State | None]:
        """(ts, ys), told where the solve ends; kept no longer, as an adjoint may keep this."""
        return None, None


class SaveEnd(Saver):
    def select(self, index: Tensor) -> Saver:
        return self


class SaveSteps(Saver):
    def __init__(self, steps: Steps) -> None:
        self._every, self._count = steps.every, 0
        self._ts: list[Scalar] = []
        self._ys: list[State] = []

    @property
    def count(self) -> int:
        return len(self._ys)

    def value(self, i: int, t: Scalar, t0: Scalar, t1: Scalar, step: Step) -> State:
        return step.y1

    def begin(self, t: Scalar, y: State) -> None:
        self._ts.append(t)
        self._ys.append(y)

    def keep(self, t0: Scalar, t1: Scalar, y: State, step: Step, accept: Accept) -> None:
        if accept is False:
            return
        self._count += 1
        self._latest = choose(accept, t1, t0)
        if self._count % self._every == 0:
            self.begin(self._latest, where(accept, step.y1, y))

    def finish(self, t: Scalar, y: State) -> tuple[Tensor | None, State | None]:
        if self._count % self._every:
            self.begin(self._latest, y)
        ts, ys, self._ts, self._ys = self._ts, self._ys, [], []
        return on_device(ts, y), stack(ys)


class SaveTimes(Saver):
    """At times that all samples share."""

    times: Tensor

    def __init__(self, times: Tensor, sign: float) -> None:
        self.times, self._sign, self._moving = times, sign, moving(times)
        self._at: list[float] = (sign * times.detach()).tolist()
        self._entries: list[Scalar] = list(times.unbind()) if self._moving else times.tolist()
        self._ys: list[State] = []

    @property
    def count(self) -> int:
        return len(self._ys)

    def value(self, i: int, t: Scalar, t0: Scalar, t1: Scalar, step: Step) -> State:
        ends = self._at[i] == self._sign * to_float(t1)
        return step.y1 if ends and not self._moves(t1) else step.dense((t - t0) / nonzero(t1 - t0))

    def _moves(self, t1: Scalar) -> bool:
        """Whether a saved time and the end of a step may be equal, yet move apart."""
        return self._moving or isinstance(t1, Tensor)

    def _rest(self, t: Scalar, y: State) -> None:
        """Times reached by t, at which the solve stands."""
        self._ys += [y] * (bisect_right(self._at, self._sign * to_float(t)) - len(self._ys))

    def begin(self, t: Scalar, y: State) -> None:
        if not self._moves(t):  # else left to the first step, which differentiates
            self._rest(t, y)

    def keep(self, t0: Scalar, t1: Scalar, y: State, step: Step, accept: Accept) -> None:
        if accept is not False:
            inside = bisect_right if self._moves(t1) else bisect_left
            due = self._entries[len(self._ys) : inside(self._at, self._sign * to_float(t1))]
            self._ys += step.between([(t - t0) / nonzero(t1 - t0) for t in due])
            self._rest(t1, step.y1)

    def finish(self, t: Scalar, y: State) -> tuple[Tensor | None, State | None]:
        self._rest(t, y)
        ys, self._ys = self._ys, []
        ts = on_device(self.times[: len(ys)], y)
        return ts, stack(ys) if ys else tree_map(lambda x: x[None][:0], y)


Found = tuple[Tensor, Tensor, State]


def scatter(found: list[Found], count: int, like: State) -> State:
    """Rows that were found one batch at a time, in their places of ``(count, batch, ...)``.

    Each entry is (which rows, their places in n * batch + row, values); where nothing was found
    there is NaN.
    """

    def gather(leaf: Tensor, *values: Tensor) -> Tensor:
        batch = len(leaf)
        out = torch.full((count * batch, *leaf.shape[1:]), torch.nan).to(leaf)
        if values:
            due = torch.cat([d for d, _, _ in found])
            place = torch.cat([p for _, p, _ in found])
            out = out.index_put((place[due],), torch.cat(values)[due])
        return out.reshape(count, *leaf.shape)

    return tree_map(gather, like, *(value for _, _, value in found))


class SaveRows(Saver):
    """At each sample's own times, ``(n, batch)``; one host read a step."""

    times: Tensor

    def __init__(self, times: Tensor, sign: Tensor) -> None:
        self.times, self._sign, self._moving = times, sign, moving(times)
        self._at = (times.detach() * sign).mT.contiguous()
        self._next = torch.zeros(times.shape[1], dtype=torch.int64, device=times.device)
        self._ids = torch.arange(times.shape[1], device=times.device)
        self._found: list[Found] = []
        self._batch = times.shape[1]

    def select(self, index: Tensor) -> SaveRows:
        part = copy.copy(self)
        part.times = self.times[:, index]
        part._at, part._sign, part._next, part._ids = (
            x[index] for x in (self._at, self._sign, self._next, self._ids)
        )
        return part  # what it finds goes into the list that both share

    def absorb(self, index: Tensor, part: Saver) -> None:
        assert isinstance(part, SaveRows)
        self._next = self._next.index_copy(0, index, part._next)

    def _take(self, t: Scalar, accept: Accept, at: Callable[[Tensor, Tensor], State]) -> None:
        """Keeps the states ``at(times, due)``, at each row's next times up to t, ``(n, batch)``, as
        far as these are due.
        """
        if not self._batch:
            return
        reached = (torch.as_tensor(t).detach() * self._sign).to(self._at)
        stop = torch.searchsorted(self._at, reached[:, None], right=True)[:, 0]
        stop = where(accept, stop, self._next)
        count = int((stop - self._next).max())
        if count <= 0:
            return
        index = self._next + torch.arange(count, device=stop.device)[:, None]
        due = index < stop
        value = at(self.times.gather(0, torch.where(due, index, 0)), due)
        value = tree_map(lambda leaf: leaf.flatten(0, 1), value)
        self._found.append((due.flatten(), (index * self._batch + self._ids).flatten(), value))
        self._next = stop

    def begin(self, t: Scalar, y: State) -> None:
        if not self._moving:
            self._rest(t, y)

    def _rest(self, t: Scalar, y: State) -> None:
        """Times at which the row stands."""
        self._take(
            t, True,
            lambda times, _: tree_map(lambda leaf: leaf.expand(len(times), *leaf.shape), y),
        )  # fmt: skip

    def keep(self, t0: Scalar, t1: Scalar, y: State, step: Step, accept: Accept) -> None:
        width = nonzero(torch.as_tensor(t1 - t0))
        self._take(
            t1, accept,
            lambda times, due: step.by_rows(torch.where(due, (times - t0) / width, 1.0)),
        )  # fmt: skip

    def finish(self, t: Scalar, y: State) -> tuple[Tensor | None, State | None]:
        self._rest(t, y)
        ys = scatter(self._found, len(self.times), y)
        self._found.clear()
        return self.times, ys
