"""Time series as users have them: of any length, at any times, with gaps, in files."""

from __future__ import annotations

import csv
import functools
import math
import numbers
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ._scalar import narrowed

__all__ = ["Batch", "Scaler", "Series", "collate", "read_csv", "read_ts"]


@dataclass(frozen=True, eq=False)
class Series:
    """One series.

    Args:
        times: ``(n,)``, increasing.
        values: ``(n, channels)``, not-a-number where nothing was observed.
        label: a class's number or a value; None without one.

    Raises:
        ValueError: on shapes that do not fit, times that do not increase, values that are infinite,
            or a label of another kind.
    """

    times: Tensor
    values: Tensor
    label: int | float | None = None

    def __post_init__(self) -> None:
        rising = self.times.ndim == 1 and bool((self.times.diff() > 0).all())
        if not rising or not bool(self.times.isfinite().all()):
            raise ValueError("times are (n,), finite and increasing")
        if self.values.ndim != 2 or len(self.values) != len(self.times) or not len(self.times):
            raise ValueError(
                f"values are ({len(self.times)}, channels), at least one row; got "
                f"{tuple(self.values.shape)}"
            )
        if not self.values.is_floating_point():
            raise ValueError(f"values are in floating point; got {self.values.dtype}: use .float()")
        if bool(self.values.isinf().any()):
            raise ValueError("values are finite, or not-a-number where nothing was observed")
        if not isinstance(self.label, numbers.Real | Tensor | None):
            raise ValueError(f"a label is a class's number, or a value; got {self.label!r}")


@dataclass(frozen=True, eq=False)
class Batch:
    """Series side by side, shorter ones filled up.

    Args:
        times: ``(batch, n)``; they go on by the last gap after a series's end.
        values: ``(batch, n, channels)``; NaN where nothing was observed, and after the end.
        lengths: ``(batch,)``.
        labels: ``(batch,)``, or None.
    """

    times: Tensor
    values: Tensor
    lengths: Tensor
    labels: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Where a value was observed, ``(batch, n, channels)``."""
        return ~self.values.isnan()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same on another device."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        tensors = {name: x for name, x in parts.items() if x is not None}
        move = functools.partial(Tensor.to, device=device, non_blocking=non_blocking)
        return Batch(**{name: move(x) for name, x in tensors.items()})

    def shared(self) -> tuple[Tensor, Tensor]:
        """The same at the times of all, ``(m,)``: ``(batch, m, channels)`` values, not-a-number
        where a series has none. For models of one time for all, such as ``models.LatentSDE``.
        """
        real = self._real
        times, place = torch.unique(self.times[real], return_inverse=True)
        values = self.values.new_full((len(real), len(times), self.values.shape[2]), torch.nan)
        values[real.nonzero()[:, 0], place] = self.values[real]
        return times, values

    def channels(self, *, mask: bool = False, intensity: bool = False) -> Tensor:
        """What a neural CDE is driven by, ``(batch, n, 1 + ...)``: the time, then the values.

        After a series's end all channels are not-a-number: its path stands still there, so that
        all may be solved to the longest one's end.

        Args:
            mask: append for each channel 1 where it was observed, else 0.
            intensity: append for each channel how often it was observed so far.

        Raises:
            ValueError: on times whose gaps the values' dtype rounds away.
        """
        seen = self.mask.to(self.values.dtype)
        parts = [narrowed(self.times, self.values.dtype)[..., None], self.values]
        parts += [seen] * mask + [seen.cumsum(1)] * intensity
        return torch.cat(parts, -1).masked_fill(~self._real[..., None], torch.nan)

    @property
    def _real(self) -> Tensor:
        """Rows that are of their series, ``(batch, n)``."""
        n = torch.arange(self.times.shape[1], device=self.times.device)
        return n < self.lengths[:, None]


def collate(series: Sequence[Series]) -> Batch:
    """A batch of series: the ``collate_fn`` of a ``DataLoader`` over a list of them.

    It has two rows at least, as paths need them, and the widest of the dtypes of values.

    Raises:
        ValueError: on no series, numbers of channels that differ, or labels that some lack.
    """
    if not series or len({s.values.shape[1] for s in series}) != 1:
        raise ValueError("a batch has series, at least one, of one number of channels")
    labels = [s.label for s in series if s.label is not None]
    if labels and len(labels) != len(series):
        raise ValueError("either all series of a batch have a label, or none has")
    n = max(2, *(len(s.times) for s in series))
    lengths = torch.tensor([len(s.times) for s in series], device=series[0].times.device)
    wide = functools.reduce(torch.promote_types, (s.values.dtype for s in series))
    values = torch.full(
        (len(series), n, series[0].values.shape[1]), math.nan, dtype=wide, device=lengths.device
    )
    for i, s in enumerate(series):
        values[i, : len(s.values)] = s.values
    times = torch.stack([_longer(s.times, n) for s in series])
    return Batch(
        times, values, lengths, torch.tensor(labels, device=times.device) if labels else None
    )


def _longer(times: Tensor, n: int) -> Tensor:
    """Times that go on by their last gap."""
    gap = times[-1] - times[-2] if len(times) > 1 else torch.ones_like(times[-1])
    more = torch.arange(1, n - len(times) + 1, device=times.device)
    return torch.cat((times, times[-1] + gap * more))


@dataclass(frozen=True, eq=False)
class Scaler:
    """Values with mean 0 and deviation 1 in every channel, over what was observed.

    Attributes:
        mean, std: ``(channels,)``; a channel that is constant or never observed has std 1.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The scaler of values ``(..., channels)``, such as a training batch's."""
        flat = values.flatten(0, -2)
        mean = flat.nanmean(0).nan_to_num()
        std = (flat - mean).square().nanmean(0).sqrt()
        rounding = 16.0 * torch.finfo(flat.dtype).eps * mean.abs()
        return cls(mean, torch.where(std > rounding, std, 1.0))

    def __call__(self, values: Tensor) -> Tensor:
        at = values.device
        return (values - self.mean.to(at)) / self.std.to(at)

    def inverse(self, scaled: Tensor) -> Tensor:
        """The values that scale to these."""
        return self.mean.to(scaled.device) + self.std.to(scaled.device) * scaled


# --- files ----------------------------------------------------------------------------------------


def read_ts(path: str | Path) -> tuple[list[Series], list[str]]:
    """The series of a ``.ts`` file of the UEA and UCR archives, and the names of their classes.

    A line holds a series: dimensions apart by ``:``, values by ``,``, ``?`` where one is missing,
    and last a class, or with ``@targetLabel`` a number. Times are 0, 1, 2, ..., or with
    ``@timeStamps true`` those of the points ``(time,value)``, which may differ between dimensions.
    A label is the place of its class among the names. Times are float64: for models of float32
    count great ones from the first of each series.

    Raises:
        ValueError: with the line's number, on what is not in the format.

    Source: Loning et al. 2019, "sktime", arXiv 1909.07872.
    """
    header: dict[str, list[str]] = {}
    series, classes, data = [], list[str](), False
    for number, line in _lines(path):
        if data:
            try:
                series.append(_case(line, header, classes))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        elif line.lower() == "@data":
            data = True
            if _flag(header, "classlabel"):
                classes = header["classlabel"][1:]
                if not classes:
                    raise ValueError(f"{path}, line {number}: @classLabel true names no class")
        else:
            name, *rest = line.split()
            header[name.lower().removeprefix("@")] = rest
    if not data:
        raise ValueError(f"{path} has no line @data")
    return series, classes


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip()


def _flag(header: dict[str, list[str]], name: str) -> bool:
    return header.get(name, ["false"])[0].lower() == "true"


def _case(line: str, header: dict[str, list[str]], classes: list[str]) -> Series:
    parts = line.split(":")
    label: float | None = None
    if classes:
        label = _place(parts.pop().strip(), classes)
    elif _flag(header, "targetlabel"):
        label = float(parts.pop())
    count = " ".join(header.get("dimensions", [])) or str(len(parts))
    if str(len(parts)) != count:
        raise ValueError(f"a series has {count} dimensions, as @dimensions says; got {len(parts)}")
    return _joined([_points(part, _flag(header, "timestamps")) for part in parts], label)


_POINT = r"\s*\(([^(),]*),([^(),]*)\)\s*"


def _points(part: str, stamped: bool) -> dict[float, float]:
    """The values of one dimension, by their times."""
    if not stamped:
        return dict(enumerate(map(_number, part.split(","))))
    points: dict[float, float] = {}
    if part.strip() and not re.fullmatch(rf"{_POINT}(?:,{_POINT})*", part):
        raise ValueError(f"points are (time,value),(time,value), their times numbers; got {part!r}")
    for time, value in re.findall(_POINT, part):
        _put(points, time, value)
    return points


def _put(points: dict[float, float], time: str, value: str) -> None:
    """One more value of a channel."""
    at = float(time)
    if not math.isfinite(at):
        raise ValueError(f"times are finite; got {time}")
    if at in points:
        raise ValueError(f"t = {time} stands here twice")
    points[at] = _number(value)


def _joined(dimensions: Sequence[dict[float, float]], label: float | None) -> Series:
    """The series of dimensions that each have times of their own."""
    times = sorted({time for points in dimensions for time in points})
    rows = [[points.get(time, math.nan) for points in dimensions] for time in times]
    return Series(torch.tensor(times, dtype=torch.float64), torch.tensor(rows), label)


def _number(text: str) -> float:
    text = text.strip()
    if text in ("", "?"):
        return math.nan
    if math.isinf(value := float(text)):
        raise ValueError(f"values are finite, and a missing one is empty, ? or NaN; got {text}")
    return value


def _place(name: str, classes: list[str]) -> int:
    if name not in classes:
        raise ValueError(f"class {name!r} is none of {classes}")
    return classes.index(name)


def read_csv(
    path: str | Path, *, series: str, time: str, label: str | None = None, target: str | None = None
) -> tuple[list[Series], list[str]]:
    """The series of a CSV file with a head and a row for each time, and the names of their classes.

    All columns but those named are channels; a cell that is empty, ``?`` or NaN is a missing value.
    Rows may stand in any order. Times are float64, as from ``read_ts``, and values of torch's
    default dtype.

    Args:
        series, time: names of the columns that say which series a row is of, and when it was.
        label: that of the class, any text; or
        target: that of a number to predict. All rows of a series have the same.

    Raises:
        ValueError: on a label and a target; on a column that is missing or stands twice; with the
            line's number, on a cell that is missing or no number, on a second row of a series at a
            time, and on a second label or target of a series.
    """
    if label is not None and target is not None:
        raise ValueError("a series has a label, of a class, or a target, a number: not both")
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        named = [name for name in (series, time, label, target) if name is not None]
        columns = list(rows.fieldnames or ())
        if missing := set(named) - set(columns):
            raise ValueError(f"{path} has columns {columns}, none of them {sorted(missing)}")
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path} has columns {columns}: give each a name of its own")
        channels = [name for name in columns if name not in named]
        if not channels:
            raise ValueError(f"{path} has columns {columns}, of which none is left for values")
        found: dict[str, list[dict[float, float]]] = {}
        said: dict[str, str] = {}
        for row in rows:
            try:
                cells = len(columns) - sum(x is None for x in row.values())
                cells += len(row.get(None, ()))  # what the reader keeps of a row that is too long
                if cells != len(columns):
                    raise ValueError(f"a row has {len(columns)} cells, as the head; this {cells}")
                dimensions = found.setdefault(row[series], [{} for _ in channels])
                about = row[label or target or series].strip()
                if label is not None and not about:
                    raise ValueError("a series has a label: give it one, or leave the series out")
                if target is not None and not math.isfinite(number := float(about)):
                    raise ValueError(f"a target is a number; got {about}")
                about = about if target is None else repr(number)
                if said.setdefault(row[series], about) != about:
                    raise ValueError(f"{about!r} of a series that was {said[row[series]]!r} before")
                for points, name in zip(dimensions, channels, strict=True):
                    _put(points, row[time], row[name])
            except ValueError as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    classes = sorted(set(said.values())) if label is not None else []
    made = []
    for key, dimensions in found.items():
        own = _place(said[key], classes) if classes else None
        made.append(_joined(dimensions, float(said[key]) if target is not None else own))
    return made, classes
