"""Series of any length, scaled, side by side, and from files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from flowsde.paths import Linear
from flowsde.series import Batch, Scaler, Series, collate, read_csv, read_ts

NAN = math.nan


def ragged() -> list[Series]:
    torch.manual_seed(0)
    made = []
    for i, n in enumerate((3, 1, 5)):
        values = torch.randn(n, 2)
        values[n // 2, 1] = NAN
        made.append(Series(torch.rand(n).add(0.1).cumsum(0), values, i))
    return made


def test_a_batch_holds_its_series() -> None:
    series = ragged()
    (batch,) = DataLoader(
        series, batch_size=3, collate_fn=collate, generator=torch.Generator()
    )  # fmt: skip
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.lengths.tolist() == [3, 1, 5]
    assert bool((batch.times.diff() > 0).all())
    for i, s in enumerate(series):
        n = len(s.times)
        assert torch.equal(batch.times[i, :n], s.times)
        assert torch.equal(batch.values[i, :n].nan_to_num(9.0), s.values.nan_to_num(9.0))
        assert not bool(batch.mask[i, n:].any())
    for there in (batch.to("meta"), replace(batch, labels=None).to("meta")):
        assert {x.device.type for x in vars(there).values() if x is not None} == {"meta"}
        assert torch.equal(batch.mask[i, :n], ~s.values.isnan())


def test_irregular_series_share_the_times_of_all() -> None:
    series = ragged()
    times, values = collate(series).shared()
    assert torch.equal(times, torch.cat([s.times for s in series]).unique())
    for row, s in zip(values, series, strict=True):
        mine = torch.isin(times, s.times)
        assert torch.equal(row[mine].nan_to_num(7.0), s.values.nan_to_num(7.0))
        assert bool(row[~mine].isnan().all())


def test_channels_count_what_was_seen() -> None:
    batch = Batch(
        torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[[5.0], [NAN], [7.0]]]), torch.tensor([3])
    )
    rows = batch.channels(mask=True, intensity=True)[0].nan_to_num(-1.0)
    assert rows.tolist() == [[0, 5, 1, 1], [1, -1, 0, 1], [2, 7, 1, 2]]
    assert batch.channels().shape == (1, 3, 2)
    ended = Batch(batch.times, batch.values, torch.tensor([2])).channels(mask=True)
    assert bool(ended[0, 2].isnan().all())


def test_scaling_is_undone() -> None:
    values = torch.randn(7, 5, 3) * torch.tensor([2.0, 0.0, 1.0]) + 4.0
    values[..., 2] = NAN
    values[0, 0, 0] = NAN
    scaler = Scaler.of(values)
    scaled = scaler(values)
    seen = scaled[..., 0][~scaled[..., 0].isnan()]
    assert torch.allclose(seen.mean(), torch.zeros(()), atol=1e-12)
    assert torch.allclose(seen.var(correction=0), torch.ones(()))
    assert torch.equal(scaled[..., 1], torch.zeros(7, 5))
    assert torch.allclose(scaler.inverse(scaled), values, equal_nan=True)


def test_ts_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.ts"
    file.write_text(
        "# a comment\n@problemName Made\n@timeStamps false\n@dimensions 2\n"
        "@classLabel true left right\n@data\n1,2,3:4,?,6:right\n\n7,8:9,10.5:left\n"
    )
    series, classes = read_ts(file)
    assert classes == ["left", "right"]
    assert [s.label for s in series] == [1, 0]
    assert series[0].times.tolist() == [0, 1, 2]
    assert series[0].values.nan_to_num(-1.0).tolist() == [[1, 4], [2, -1], [3, 6]]
    assert series[1].values.tolist() == [[7, 9], [8, 10.5]]


def test_ts_files_with_times_and_targets(tmp_path: Path) -> None:
    file = tmp_path / "a.ts"
    file.write_text(
        "@timeStamps true\n@targetlabel true\n@data\n(0,1),(2.5,2):(1,3),(2.5,?):0.25\n"
    )
    (series,), classes = read_ts(file)
    assert classes == []
    assert series.label == 0.25
    assert series.times.tolist() == [0.0, 1.0, 2.5]
    assert series.values.nan_to_num(-1.0).tolist() == [[1, -1], [-1, 3], [2, -1]]
    file.write_text("@timeStamps false\n@classLabel false\n@data\n1,2\n")
    assert read_ts(file)[0][0].label is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("@classLabel true a b\n@data\n1,2:c\n", "line 3: class 'c'"),
        ("@classLabel true a b\n@data\n1,x:a\n", "line 3"),
        ("@timeStamps true\n@data\n(2020-01-01,4)\n", "line 3"),
        ("@timeStamps true\n@data\n1,2\n", "line 3"),
        ("@classLabel true a b\n", "@data"),
        ("@classLabel true\n@data\n1,2:a\n", "names no class"),
        ("@timeStamps true\n@data\n(0,1),(1,2),(2,3\n", "line 3"),
        ("@timeStamps true\n@data\n(0,1),5,(2,3)\n", "line 3"),
        ("@timeStamps true\n@data\n(0,1):garbage\n", "line 3"),
    ],
)
def test_what_is_no_ts_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "a.ts"
    file.write_text(text)
    with pytest.raises(ValueError, match=word):
        read_ts(file)


def test_csv_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("who,when,a,b,kind\nx,1,2,,up\ny,0,5,6,down\nx,0,1,4,up\n")
    series, classes = read_csv(file, series="who", time="when", label="kind")
    assert classes == ["down", "up"]
    assert [s.label for s in series] == [1, 0]
    assert series[0].times.tolist() == [0, 1]
    assert series[0].values.nan_to_num(-1.0).tolist() == [[1, 4], [2, -1]]
    (first, _), none = read_csv(file.with_name("b.csv"), series="who", time="when", target="b") if (
        file.with_name("b.csv").write_text("who,when,a,b\nx,0,1,3.5\ny,0,2,4\n")
    ) else ((None, None), [])  # fmt: skip
    assert none == []
    assert first.label == 3.5
    with pytest.raises(ValueError, match="columns"):
        read_csv(file, series="id", time="when")
    with pytest.raises(ValueError, match="not both"):
        read_csv(file, series="who", time="when", label="kind", target="b")
    file.write_text("who,when,a,kind\nx,0,1,up\nx,1,2,down\n")
    with pytest.raises(ValueError, match="line 3: 'down' of a series that was 'up'"):
        read_csv(file, series="who", time="when", label="kind")
    file.write_text("who,when,a\nx,0,1\nx,soon,1\n")
    with pytest.raises(ValueError, match="line 3"):
        read_csv(file, series="who", time="when")


def test_wrong_series_are_refused() -> None:
    with pytest.raises(ValueError, match="increasing"):
        Series(torch.tensor([1.0, 1.0]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="channels"):
        Series(torch.tensor([1.0]), torch.zeros(2, 1))
    one, two = (Series(torch.zeros(1), torch.zeros(1, c), 0) for c in (1, 2))
    for wrong in ([], [one, two]):
        with pytest.raises(ValueError, match="one number of channels"):
            collate(wrong)
    with pytest.raises(ValueError, match="label"):
        collate([one, Series(one.times, one.values)])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("id,t,a,b\n1,0,1,2\n1,1,2\n", "line 3: a row has 4 cells"),
        ("id,t,a\n1,0,1,5\n", "line 2: a row has 3 cells"),
        ("id,t,a\n1,0,1\n1,0,5\n", "line 3: t = 0 stands here twice"),
        ("id,t,a\n1,nan,1\n", "line 2: times are finite"),
        ("id,t,a,a\n1,0,1,2\n", "a name of its own"),
    ],
)
def test_no_cell_is_dropped(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=word):
        read_csv(tmp_path / "x.csv", series="id", time="t")


def test_times_of_files_keep_their_digits(tmp_path: Path) -> None:
    """Unix seconds, and the mark that some programs put before the head."""
    (tmp_path / "x.csv").write_text("\ufeffid,t,a\n1,1700000000,1\n1,1700000001,2\n")
    ((series,), _) = read_csv(tmp_path / "x.csv", series="id", time="t")
    assert series.times.tolist() == [1700000000.0, 1700000001.0]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 273.15])
def test_a_constant_channel_is_scaled_by_one(value: float) -> None:
    assert Scaler.of(torch.full((1000, 1), value, dtype=torch.float32)).std.item() == 1.0


def test_targets_are_compared_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "targets.csv"
    file.write_text("id,t,v,y\n1,0,2,1.0\n1,1,2,1\n")
    (series,), _ = read_csv(file, series="id", time="t", target="y")
    assert series.label == 1.0
    file.write_text("id,t,v,y\n1,0,2,nan\n")
    with pytest.raises(ValueError, match="a target is a number"):
        read_csv(file, series="id", time="t", target="y")
    file.write_text("id,t,v,y\n1,0,2,\n")
    with pytest.raises(ValueError, match="a series has a label"):
        read_csv(file, series="id", time="t", label="y")


def test_a_batch_has_two_rows_and_the_widest_dtype() -> None:
    single = Series(torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.float32))
    exact = Series(torch.tensor([1.0]), torch.full((1, 2), 1.0 + 1e-12))
    batch = collate([single, exact])
    assert batch.lengths.tolist() == [1, 1]
    assert batch.values.dtype is torch.float64
    assert batch.values[1, 0, 0] == 1.0 + 1e-12
    path = Linear(batch.times, batch.channels())
    assert torch.equal(path.evaluate(batch.times[:, 1]), path.evaluate(batch.times[:, 0]))
