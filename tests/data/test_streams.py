"""Streams of pairs: shuffled, resumed to the pair, and shared by processes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from diffusion_align.data import PairTransform, StreamLoader, make_buckets
from tests.data.test_data import keys, rows, streamed, written


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return written(tmp_path / "pairs.parquet", rows())


def test_streams_resume_exactly_and_shuffle(parquet: Path) -> None:
    def stream() -> StreamLoader:
        return StreamLoader(streamed(parquet), PairTransform(16), 3, buffer=6)

    straight = list(islice(stream(), 9))
    assert len(set(keys(straight[:4]))) == 12
    assert keys(straight[:4]) != [f"row {i}" for i in range(12)]
    for stop in (1, 3, 5):
        first, second = stream(), stream()
        list(islice(first, stop))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = list(islice(second, 9 - stop))
        assert keys(rest) == keys(straight[stop:])
        assert all(torch.equal(a.seeds, b.seeds) for a, b in zip(rest, straight[stop:], strict=True))


def test_a_stream_is_drawn_from_a_buffer(tmp_path: Path) -> None:
    """One random pair of those held is used, and the next of the stream takes its place; at the end all that is left,
    in random order."""
    path = written(tmp_path / "p.parquet", rows(40))
    found = keys(list(islice(StreamLoader(streamed(path), PairTransform(16), 4, seed=7, buffer=10), 10)))
    rng = np.random.default_rng([7, 0, 0])
    held, expected = list(range(10)), []
    for row in range(10, 40):
        place = int(rng.integers(10))
        expected.append(held[place])
        held[place] = row
    expected += [held[place] for place in rng.permutation(10)]
    assert found == [f"row {row}" for row in expected]


def files_of_rows(folder: Path) -> Path:
    """Six files of four pairs."""
    table = rows(24)
    for number in range(6):
        part = {name: column[4 * number : 4 * number + 4] for name, column in table.items()}
        Dataset.from_dict(part).to_parquet(folder / f"train-{number:05d}-of-00006.parquet")
    return folder


def test_the_files_of_a_stream_come_in_random_order_in_every_epoch(tmp_path: Path) -> None:
    loader = StreamLoader(streamed(files_of_rows(tmp_path)), PairTransform(16), 4, buffer=1)
    found = keys_of_images(islice(loader, 12))
    epochs, inorder = (found[:24], found[24:]), [f"caption {i}" for i in range(24)]
    assert all(sorted(epoch) == sorted(inorder) for epoch in epochs)
    files = [[int(caption.removeprefix("caption ")) // 4 for caption in epoch] for epoch in epochs]
    assert files[0] != files[1]
    assert all(order != sorted(order) for order in files)


@pytest.mark.parametrize("world_size", [2, 4])  # six files are divided by two processes, and read by all of four
def test_processes_share_a_stream_s_files_without_overlap(world_size: int, tmp_path: Path) -> None:
    source = streamed(files_of_rows(tmp_path))
    options: dict[str, Any] = {"world_size": world_size, "buffer": 5}
    loaders = [StreamLoader(source, PairTransform(16), 2, rank=rank, **options) for rank in range(world_size)]
    seen = [set(keys_of_images(islice(loader, 24 // world_size // 2))) for loader in loaders]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 24


def test_a_limited_stream_uses_its_first_pairs_in_every_epoch(tmp_path: Path) -> None:
    loader = StreamLoader(streamed(files_of_rows(tmp_path), limit=8), PairTransform(16), 4)
    batches = list(islice(loader, 4))
    for epoch in (batches[:2], batches[2:]):
        assert set(keys_of_images(epoch)) == {f"caption {i}" for i in range(8)}


def test_a_position_in_blocks_keeps_its_number_of_pairs(parquet: Path) -> None:
    loader = StreamLoader(streamed(parquet), PairTransform(16), 3, buffer=6)
    loader.load_state_dict({"epoch": 2, "block": 3, "offset": 6, "read": 30})
    assert loader.state_dict() == {"epoch": 2, "used": 3 * 256 + 6, "read": 30}


def test_streams_of_two_processes_do_not_overlap(parquet: Path) -> None:
    seen = [
        set(keys_of_images(islice(StreamLoader(streamed(parquet), PairTransform(16), 3, rank=r, world_size=2), 2)))
        for r in range(2)
    ]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 12


def keys_of_images(batches: Any) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def test_buckets_are_refused_for_streams(parquet: Path) -> None:
    with pytest.raises(ValueError, match="aspect_ratio_buckets need a data set with random access"):
        StreamLoader(streamed(parquet), PairTransform(32, buckets=make_buckets(32, step=8)), 2)
