"""Streams of pairs: shuffled evenly, resumed to the pair without reading again, and shared by processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from scipy import stats

from diffusion_align.data import PairDataset, PairTransform, StreamedPairs, StreamLoader, load_pairs, make_buckets
from diffusion_align.data.prompts import training_prompts
from diffusion_align.data.reading import shards as reading
from diffusion_align.data.reading.row_order import blocks, spread_order
from diffusion_align.data.reading.shards import Shards
from tests.data.test_data import encoded, keys, rows, streamed, written

IMAGES = ("jpg_0", "jpg_1")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return written(tmp_path / "pairs.parquet", rows())


def files_of_rows(folder: Path) -> Path:
    """Six files of four pairs."""
    table = rows(24)
    for number in range(6):
        part = {name: column[4 * number : 4 * number + 4] for name, column in table.items()}
        Dataset.from_dict(part).to_parquet(folder / f"train-{number:05d}-of-00006.parquet")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,096 pairs in 12 files of unequal size, with row groups of 8 or of a whole file."""
    folder = tmp_path_factory.mktemp("many")
    sizes = [16, 700, 128, 32, 900, 64, 400, 256, 800, 100, 300, 400]
    picture, first = encoded(7), 0
    for number, size in enumerate(sizes):
        table = {
            **dict.fromkeys(IMAGES, [picture] * size),
            "caption": [f"caption {first + i}" for i in range(size)],
            "label_0": [1.0] * size,
        }
        path = folder / f"train-{number:05d}-of-00012.parquet"
        pq.write_table(pa.table(table), path, row_group_size=(8, size)[number % 2])
        first += size
    assert first == 4096
    return folder


def loader(source: Path, **options: Any) -> StreamLoader:
    return StreamLoader(streamed(source), PairTransform(16), options.pop("batch_size", 4), **options)


def resumed(first: StreamLoader, second: StreamLoader) -> StreamLoader:
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    return second


def captions(batches: Any) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


# -- the order -------------------------------------------------------------------------------------------------------


def test_every_stretch_of_the_order_is_spread_evenly() -> None:
    """2^k numbers that follow each other: one of every 2^-k of the range."""
    order = spread_order(64, np.random.default_rng(3))
    for k in range(7):
        width = 64 // 2**k
        for start in range(0, 64, 2**k):
            assert sorted(order[start : start + 2**k] // width) == list(range(2**k))
    assert spread_order(64, np.random.default_rng(4)).tolist() != order.tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 12, 100])
def test_the_order_holds_every_number_once(count: int) -> None:
    assert sorted(spread_order(count, np.random.default_rng(0))) == list(range(count))


def test_every_number_is_as_likely_at_each_place() -> None:
    orders = np.stack([spread_order(8, np.random.default_rng(seed)) for seed in range(800)])
    for place in range(8):
        counts = np.bincount(orders[:, place], minlength=8)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_blocks_have_at_least_so_many_rows() -> None:
    sizes = np.array([10, 1, 30, 5, 5, 9, 20])
    cut = blocks(np.array([3, 1, 4, 0, 2, 6, 5]), sizes, 20)
    assert np.concatenate(cut).tolist() == [3, 1, 4, 0, 2, 6, 5]
    assert [int(sizes[block].sum()) for block in cut] == [21, 30, 29]


def test_the_first_rows_of_a_stream_are_spread_over_all_of_it(many: Path) -> None:
    """Three tests, for files as unequal as these."""
    pairs = streamed(many)
    first = StreamLoader(pairs, PairTransform(16), 4, seed=2, buffer=256).epoch(0)[:2048]
    assert stats.kstest((first + 0.5) / 4096, "uniform").pvalue > 0.05
    files = np.array([pairs.shards.groups[pairs.shards.group_of(row)].file for row in range(4096)])
    expected = np.bincount(files) / 2
    assert stats.chisquare(np.bincount(files[first], minlength=12), expected).pvalue > 0.05
    assert stats.pearsonr(first[:-1], first[1:]).pvalue > 0.01


def test_pairs_are_shuffled_in_blocks_that_change_with_epoch_and_seed(tmp_path: Path) -> None:
    source = files_of_rows(tmp_path)
    found = loader(source, buffer=8)
    epochs = [found.epoch(0).tolist(), found.epoch(1).tolist(), loader(source, buffer=8, seed=1).epoch(0).tolist()]
    for order in epochs:
        assert sorted(order) == list(range(24))
        for start in range(0, 24, 8):  # two files of four rows, mixed
            block = order[start : start + 8]
            assert len({row // 4 for row in block}) == 2
    assert epochs[0] != epochs[1] != epochs[2]
    read = list(islice(loader(source, buffer=8), 12))
    assert keys(read) == [f"row {row}" for row in epochs[0] + epochs[1]]
    assert captions(read) == [f"caption {row}" for row in epochs[0] + epochs[1]]


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_change_nothing(workers: int, many: Path) -> None:
    few, more = (list(islice(loader(many, num_workers=n, buffer=64), 40)) for n in (1, workers))
    assert keys(few) == keys(more)
    assert all(torch.equal(a.seeds, b.seeds) for a, b in zip(few, more, strict=True))


# -- positions -------------------------------------------------------------------------------------------------------


def test_streams_resume_exactly(parquet: Path) -> None:
    options = {"batch_size": 3, "buffer": 6}
    straight = list(islice(loader(parquet, **options), 9))
    assert len(set(keys(straight[:4]))) == 12
    for stop in (1, 3, 4, 5):
        first = loader(parquet, **options)
        list(islice(first, stop))
        rest = list(islice(resumed(first, loader(parquet, **options)), 9 - stop))
        assert keys(rest) == keys(straight[stop:])
        assert all(torch.equal(a.seeds, b.seeds) for a, b in zip(rest, straight[stop:], strict=True))


@pytest.mark.slow
def test_a_resumed_stream_reads_nothing_of_what_came_before(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loader(many, buffer=256)
    list(islice(first, 700))  # of 1,024
    read: list[int] = []
    plain = StreamedPairs.read
    monkeypatch.setattr(StreamedPairs, "read", lambda self, part, rows: read.extend(rows) or plain(self, part, rows))
    again = resumed(first, loader(many, buffer=256))
    next(iter(again))
    assert not set(read) & set(first.epoch(0)[:2800].tolist())
    assert len(read) < 2 * 256


def test_positions_of_earlier_versions_keep_their_number_of_pairs(many: Path) -> None:
    order = loader(many, buffer=256).epoch(1).tolist()
    for state, used in (
        ({"epoch": 1, "block": 3, "offset": 6, "read": 30}, 3 * 256 + 6),
        ({"epoch": 1, "used": 900, "read": 30}, 900),
    ):
        found = loader(many, buffer=256)
        found.load_state_dict(state)
        batch = next(iter(found))
        assert batch.keys == [f"row {row}" for row in order[used : used + 4]]
        assert found.state_dict()["samples"] == 34


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: written(folder / "train-00006-of-00006.parquet", rows(3)), r"files 6, rows 24, .*now files 7"),
        (lambda folder: {"buffer": 9}, "shuffle_buffer 10000; now shuffle_buffer 9"),
        (lambda folder: {"limit": 9}, r"max_pairs None.*; now max_pairs 9"),
    ],
)
def test_a_position_in_other_data_is_refused(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    first = loader(files_of_rows(tmp_path))
    options = change(tmp_path)
    options = options if isinstance(options, dict) else {}
    pairs = streamed(tmp_path, limit=options.pop("limit", None))
    with pytest.raises(ValueError, match=message):
        resumed(first, StreamLoader(pairs, PairTransform(16), 4, **options))


def test_a_position_in_a_data_set_that_is_not_streamed_is_refused(parquet: Path) -> None:
    with pytest.raises(ValueError, match="did not stream its pairs: set streaming to false"):
        loader(parquet).load_state_dict({"batches_read": 3})


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_a_stream_without_overlap(world_size: int, tmp_path: Path) -> None:
    source = files_of_rows(tmp_path)
    shares = [loader(source, batch_size=2, rank=rank, world_size=world_size, buffer=5) for rank in range(world_size)]
    seen = [set(captions(islice(share, 24 // world_size // 2))) for share in shares]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 24


def test_pairs_that_do_not_divide_go_to_the_next_block_and_epoch(tmp_path: Path) -> None:
    """13 pairs for two processes: one is left over, and comes first in the next epoch's share."""
    source = written(tmp_path / "p.parquet", rows(13))
    shares = [loader(source, batch_size=1, rank=rank, world_size=2, buffer=4) for rank in range(2)]
    seen = [row for share in shares for row in keys(islice(share, 13))]
    assert sorted(seen) == sorted(2 * [f"row {i}" for i in range(13)])
    first, second = (loader(source, batch_size=1, rank=1, world_size=2, buffer=4) for _ in range(2))
    list(islice(first, 7))  # in the second epoch
    assert keys(islice(resumed(first, second), 6)) == seen[20:]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(many: Path) -> None:
    """At the same number of pairs of the same block; every later block is whole."""
    first = loader(many, batch_size=1, rank=0, world_size=2, buffer=256)
    list(islice(first, 400))  # and as many of the other process
    position = first.state_dict()
    again = resumed(first, loader(many, batch_size=1, buffer=256))
    seen = [int(key.removeprefix("row ")) for key in keys(islice(again, 4096 - 800))]
    later = again.pairs.rows_of(np.concatenate(again.cut(0)[position["block"] + 1 :]).tolist())
    assert sorted(seen[-len(later) :]) == sorted(later)
    assert again.state_dict()["samples"] == 4096


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_limit_draws_whole_parts_by_the_seed(many: Path) -> None:
    drawn = [{record.key for record in streamed(many, limit=200, seed=seed)} for seed in (None, 0, 0, 1)]
    assert [len(keys) for keys in drawn] == [200] * 4
    assert drawn[0] == {f"row {i}" for i in range(200)}
    assert drawn[1] == drawn[2] != drawn[3]
    places = np.array([int(key.removeprefix("row ")) for key in drawn[1]])
    assert np.bincount(places // 1024, minlength=4).min() >= 32
    found = StreamLoader(streamed(many, limit=200, seed=0), PairTransform(16), 4, buffer=64)
    assert {f"row {row}" for row in found.epoch(5)} == drawn[1]


def test_streams_and_indexes_give_the_same_pairs(tmp_path: Path) -> None:
    table = rows(9, label_0=[1.0, 0.0, 0.5] * 3, label_1=[0.0, 1.0, 0.5] * 3, weight=[0.5, None, 2.0] * 3)
    table["has_label"] = [True, False, True] * 3
    path = written(tmp_path / "p.parquet", table)
    for keep in (False, True):
        indexed: Any = load_pairs(path, keep_ties=keep)
        straight = streamed(path, keep_ties=keep)
        assert list(straight) == [indexed[i] for i in range(len(indexed))]
        assert (straight.counts, straight.used) == (indexed.counts, len(indexed))
        assert straight.captions() == indexed.captions()


def test_no_copy_is_made(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("datasets would copy the files")

    monkeypatch.setattr("datasets.load_dataset", refused)
    assert len(keys(islice(loader(parquet), 3))) == 12
    assert training_prompts(str(parquet.parent), "train")[:2] == ["caption 0", "caption 1"]


def test_a_pattern_gives_its_files(tmp_path: Path) -> None:
    files_of_rows(tmp_path)
    assert streamed(Path(f"{tmp_path}/train-0000[1-3]*.parquet")).captions() == [f"caption {i}" for i in range(4, 16)]
    with pytest.raises(FileNotFoundError, match="no file fits this pattern"):
        streamed(Path(f"{tmp_path}/test-*.parquet"))


@pytest.mark.slow
def test_files_on_the_hub_are_read_by_row_groups(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the hub, a file system in memory."""
    remote = fsspec.filesystem("memory")
    files = [remote.open(f"/stream/{path.name}", "wb") for path in sorted(many.iterdir())]
    for file, path in zip(files, sorted(many.iterdir()), strict=True):
        file.write(path.read_bytes())
        file.close()

    class Builder:
        class config:
            data_files = {"train": [f"memory://stream/{path.name}" for path in many.iterdir()]}  # noqa: RUF012

    monkeypatch.setattr("datasets.load_dataset_builder", lambda name: Builder)
    pairs: Any = load_pairs("somebody/pairs", streaming=True)
    assert (pairs.used, pairs.counts["rows"]) == (None, 4096)
    found = StreamLoader(pairs, PairTransform(16), 4, buffer=300)
    list(islice(found, 10))
    assert pairs.used is None  # later blocks were not asked for
    assert sorted(found.epoch(0)) == list(range(4096))
    assert pairs.used == 4096
    with pytest.raises(ValueError, match="no split 'test': found train"):
        load_pairs("somebody/pairs", "test", streaming=True)


def test_requests_are_repeated(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards([str(path) for path in sorted(many.iterdir())], "pairs", fsspec.filesystem("file"))
    plain, failures = Shards._open, [2]

    def flaky(self: Shards, file: int, **options: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise OSError("connection reset")
        return plain(self, file, **options)

    monkeypatch.setattr(Shards, "_open", flaky)
    monkeypatch.setattr(reading, "PAUSE", 0.0)
    assert shards.table([2], ["caption"]).num_rows == 700
    failures[0] = 99
    with pytest.raises(ValueError, match=r"train-00001.*row group 0 cannot be read: connection reset"):
        shards.table([2], ["caption"])


# -- what is wrong in it ---------------------------------------------------------------------------------------------


def test_rows_are_checked_before_the_first_is_used(tmp_path: Path) -> None:
    files_of_rows(tmp_path)
    written(tmp_path / "train-00006-of-00006.parquet", rows(3, label_0=[1.0, 0.3, 1.0]))
    with pytest.raises(ValueError, match=r"train-00006-of-00006\.parquet, row 1: label_0 = 0\.3 is wrong"):
        streamed(tmp_path)


def test_unreadable_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    table = rows(24)
    table["jpg_1"][5], table["jpg_0"][9] = None, b"no picture"
    path = written(tmp_path / "p.parquet", table)
    found = loader(path, buffer=24)
    seen = keys(islice(found, 6))
    assert len(seen) == 24
    assert set(seen) == {f"row {i}" for i in range(24) if i not in (5, 9)}
    assert set(found.corruption.messages) == {"row 5", "row 9"}
    assert "column jpg_1: there is no image" in found.corruption.messages["row 5"]
    with pytest.raises(ValueError, match=r"more than max_corrupt = 1 pairs cannot be decoded: .*row 5"):
        list(islice(loader(path, buffer=24, max_corrupt=1), 6))


def test_a_damaged_row_group_counts_as_unreadable(tmp_path: Path) -> None:
    source = files_of_rows(tmp_path)
    path = sorted(source.iterdir())[2]
    chunk = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(bytes(content))
    found = loader(source, buffer=24)
    assert set(keys(islice(found, 6))).isdisjoint({f"row {i}" for i in range(8, 12)})
    assert all("train-00002-of-00006.parquet" in text for text in found.corruption.messages.values())
    assert set(found.corruption.messages) == {f"row {i}" for i in range(8, 12)}


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    source = files_of_rows(tmp_path)
    path = sorted(source.iterdir())[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-00002-of-00006\.parquet cannot be read as a table"):
        streamed(source)


def test_buckets_are_refused_for_streams(parquet: Path) -> None:
    with pytest.raises(ValueError, match="aspect_ratio_buckets need a data set with random access"):
        StreamLoader(streamed(parquet), PairTransform(32, buckets=make_buckets(32, step=8)), 2)


def test_tables_of_paths_have_random_access_also_as_streams(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "metadata.csv").write_text("chosen,rejected,caption\na.png,a.png,x\n")
    assert isinstance(load_pairs(tmp_path, streaming=True), PairDataset)
