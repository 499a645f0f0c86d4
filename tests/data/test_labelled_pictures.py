"""Pictures that are liked or not: what is read, what is refused, and what is warned of."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.data import (
    PairDataset,
    PairLoader,
    PairTransform,
    PixelExamples,
    StreamLoader,
    build_cache,
    load_examples,
    load_pairs,
    load_pictures,
    require_same_data,
)
from diffusion_align.data.cache import CacheError
from diffusion_align.data.types import UNJUDGED, PairRecord

from .test_data import encoded, value

TRANSFORM = PairTransform(16, random_flip=False)


@pytest.fixture(scope="module")
def adapter(sd_folder: Path) -> Adapter:
    return load_adapter(str(sd_folder))


def folders(root: Path, liked: str = "liked", disliked: str = "disliked", captions: str = "a red star") -> Path:
    """Three liked pictures of values 0 to 2, two disliked ones of 10 and 11."""
    for name, values in ((liked, range(3)), (disliked, (10, 11))):
        (root / name).mkdir(parents=True)
        for number in values:
            (root / name / f"{number:02d}.png").write_bytes(encoded(number))
            (root / name / f"{number:02d}.txt").write_text(f"{captions}\n")
    return root


def table(count: int = 6, **columns: Any) -> dict[str, Any]:
    """Pictures of values 0, 1, ..., liked ones even."""
    return {
        "image": [encoded(i) for i in range(count)],
        "caption": [f"caption {i // 2}" for i in range(count)],
        "label": [i % 2 == 0 for i in range(count)],
    } | columns


def parquet(path: Path, **columns: Any) -> Path:
    Dataset.from_dict(table(**columns)).to_parquet(path)
    return path


def found(source: Path, **options: Any) -> list[tuple[int, str, float]]:
    """Value, caption and label of every picture."""
    pairs = load_examples(source, units=("labelled pictures",), **options)
    records = (record for _, record in pairs.records(pairs.numbers()))
    return [(value(each.chosen), each.caption, each.judgement.label) for each in records]  # type: ignore[union-attr]


@pytest.mark.parametrize("names", [("liked", "disliked"), ("Good", "bad"), ("chosen", "rejected")])
def test_folders_say_what_their_pictures_are(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = folders(tmp_path, *names)
    labels = {0: 1.0, 1: 1.0, 2: 1.0, 10: -1.0, 11: -1.0}
    assert {number: label for number, _, label in found(folder)} == labels
    assert {caption for _, caption, _ in found(folder)} == {"a red star"}


def test_a_folder_of_the_split_comes_first(tmp_path: Path) -> None:
    folders(tmp_path / "validation")
    assert len(found(tmp_path, split="validation")) == 5
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        load_examples(tmp_path, "train")


def test_lines_of_a_caption_become_one(tmp_path: Path) -> None:
    folder = folders(tmp_path)
    (folder / "liked/00.txt").write_text("a red star\n\n  on grey ground\n")
    assert (0, "a red star on grey ground", 1.0) in found(folder)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, False], [1, -1]),
        ([1, 0], [1, -1]),
        ([1, -1], [1, -1]),
        ([1.0, 0.0], [1, -1]),
        (["Good", "bad"], [1, -1]),
        (["liked", " disliked"], [1, -1]),
        (["+1", "-1"], [1, -1]),
    ],
)
def test_labels_are_understood_as_people_write_them(tmp_path: Path, labels: list[Any], expected: list[int]) -> None:
    file = parquet(tmp_path / "a.parquet", count=2, label=labels)
    for streaming in (False, True):
        assert [label for *_, label in found(file, streaming=streaming)] == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_of_paths_are_read(tmp_path: Path, kind: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    rows = [(f"{i}.png", "a star, red", i != 1, 0.5 * i) for i in range(3)]
    if kind == "csv":
        lines = ["file_name,caption,label,weight", *(f'{a},"{b}",{c},{d}' for a, b, c, d in rows)]
    else:
        names = ("file_name", "caption", "label", "weight")
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    assert found(tmp_path) == [(0, "a star, red", 1), (1, "a star, red", -1), (2, "a star, red", 1)]
    pairs = load_examples(tmp_path)
    assert isinstance(pairs, PairDataset)
    assert [pairs[i].weight for i in range(3)] == [0, 0.5, 1]


# -- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [1, 0, 2, 1, 0, 1]}, r"row 2: label = 2 is wrong: expected true or false, 1 or 0, \+1 or -1"),
        ({"label": ["good", "bad", "meh", "bad", "bad", "bad"]}, r"row 2: label = 'meh' is wrong"),
        ({"label": [True, None, True, True, True, True]}, r"row 1: label = None is wrong"),
        ({"caption": ["a", "b", "c", " ", "e", "f"]}, r"row 3: caption is empty"),
        ({"caption": ["a", "b", "c", None, "e", "f"]}, r"row 3: caption = None is wrong: expected text"),
        ({"preference": [1.0, 1.5, 1, 1, 1, 1]}, r"row 1: preference = 1.5 is wrong: expected a number in \[0, 1\]"),
        ({"weight": [1.0, -1, 1, 1, 1, 1]}, r"row 1: weight = -1.0 is wrong"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], message: str, streaming: bool) -> None:
    file = parquet(tmp_path / "a.parquet", **change)
    with pytest.raises(ValueError, match=rf"a\.parquet, {message}"):
        load_examples(file, streaming=streaming)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "liked/01.txt").unlink(), r"liked/01\.png has no caption: expected it in 01\.txt"),
        (lambda root: (root / "liked/01.txt").write_text(" \n"), r"liked/01\.txt is empty"),
        (lambda root: (root / "bad").mkdir() or (root / "bad/7.txt").write_text("x"), r"7\.txt is the caption of no"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    change(folders(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path)


def test_empty_folders_and_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "liked").mkdir()
    with pytest.raises(ValueError, match=r"liked: no pictures, expected \.png"):
        load_examples(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "lost.png", "caption": "a", "label": 1}\n')
    with pytest.raises(FileNotFoundError, match=r"row 0, column file_name: image .*lost\.png cannot be read"):
        load_examples(tmp_path)


def test_who_wants_pairs_is_told_what_these_are(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'jpg_0' is missing.*These are labelled pictures, for train kto"):
        load_pairs(file)


# -- what would mislead ----------------------------------------------------------------------------------------------


def test_counts_tell_pictures_and_captions(tmp_path: Path) -> None:
    said = load_examples(parquet(tmp_path / "a.parquet")).summary()
    assert said.lines() == ["3 liked, 3 disliked, 3 captions with both"]
    assert not load_examples(folders(tmp_path / "b")).summary().warnings


def test_one_label_alone_is_warned_of(tmp_path: Path) -> None:
    (text,) = load_examples(parquet(tmp_path / "a.parquet", label=[0] * 6)).summary().warnings
    assert "all 6 pictures are disliked, none is liked" in text


def test_captions_that_go_with_one_label_are_warned_of(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", caption=["my camera", "the web"] * 3)
    (text,) = load_examples(file, streaming=True).summary().warnings
    assert "no caption has both liked and disliked pictures (1 have liked ones only, 1 disliked ones only)" in text


@pytest.mark.parametrize("kind", ["parquet", "streamed", "folders"])
def test_the_same_picture_twice_is_counted(tmp_path: Path, kind: str) -> None:
    if kind == "folders":
        folders(tmp_path)
        for name in ("disliked/11.png", "liked/01.png"):
            (tmp_path / name).write_bytes(encoded(0))
        said = load_examples(tmp_path).summary()
    else:
        images = [encoded(i) for i in (0, 1, 0, 0, 4, 5)]
        file = parquet(tmp_path / "a.parquet", image=images)
        said = load_examples(file, streaming=kind == "streamed").summary()
    assert (said.counts["the same as another"], said.counts["liked and disliked at once"]) == (2, 1)
    assert "1 pictures are liked in one place and disliked in another" in said.warnings[-1]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_pictures_with_their_labels(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", preference=[1, 0.75, 1, 1, 1, 1.0])
    indexed = load_examples(file)
    assert isinstance(indexed, PairDataset)
    loaders = [
        PairLoader(PixelExamples(indexed, TRANSFORM), 6),
        StreamLoader(load_examples(file, streaming=True), TRANSFORM, 6),  # type: ignore[arg-type]
    ]
    for loader in loaders:
        batch = next(iter(loader))
        assert batch.pixels is not None
        assert batch.label is not None
        assert batch.pixels.shape == (1, 6, 3, 16, 16)
        shade = ((batch.pixels[0, :, 0, 0, 0] + 1) / 2 * 255).round().int()
        assert torch.equal(batch.label, torch.where(shade % 2 == 0, 1.0, -1.0))
        assert torch.equal(batch.preference, torch.where(shade == 1, 0.75, 1.0))
        assert (batch.rank, batch.score, batch.mask) == (None, None, None)


def test_a_cache_gives_the_same_pictures_and_labels(tmp_path: Path, adapter: Adapter) -> None:
    images = [encoded(i, (32, 32)) for i in (0, 1, 0, 3, 4, 0)]
    file = parquet(tmp_path / "a.parquet", image=images)
    data = load_examples(file)
    assert isinstance(data, PairDataset)
    cached = build_cache(adapter, data, TRANSFORM, tmp_path / "cache", workers=0)
    require_same_data(cached, load_examples(file, streaming=True))
    assert (cached.unit, cached.summary()) == ("labelled pictures", data.summary())
    batches = [next(iter(PairLoader(each, 6))) for each in (cached, PixelExamples(data, TRANSFORM))]
    assert batches[0].keys == batches[1].keys
    assert batches[0].label is not None
    assert torch.equal(batches[0].label, batches[1].label)  # type: ignore[arg-type]
    assert batches[0].posterior is not None
    assert batches[0].posterior[0].shape[:2] == (1, 6)
    relabelled = parquet(tmp_path / "b.parquet", image=images, label=[True] * 6)
    with pytest.raises(CacheError, match=r"labels: 3 differ, first .*row 1, then -1.0, now 1.0"):
        require_same_data(cached, load_examples(relabelled))


def test_a_limit_draws_some_by_the_seed(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet")
    numbers = [load_examples(file, limit=3, seed=seed).numbers().tolist() for seed in range(4)]
    assert all(len(each) == 3 for each in numbers)
    assert len({tuple(each) for each in numbers}) > 1
    loader = PairLoader(PixelExamples(load_examples(file), TRANSFORM), 2)  # type: ignore[arg-type]
    keys = [key for batch in islice(iter(loader), 3) for key in batch.keys]
    assert sorted(keys) == [f"row {i}" for i in range(6)]
    assert np.unique(numbers).max() <= 5


@pytest.mark.parametrize("streaming", [False, True])
def test_what_learns_from_good_pictures_leaves_the_disliked_out(tmp_path: Path, streaming: bool) -> None:
    """The third is liked, but that is doubted; the fourth is disliked by mistake."""
    path = parquet(tmp_path / "a.parquet", label=[1, -1, 1, 0, -1, 1], preference=[1.0, 1.0, 0.2, 0.4, 0.9, 0.5])
    liked = load_pictures(path, streaming=streaming)
    assert liked.unit == "pictures"
    assert [row for row, _ in liked.records(liked.numbers())] == [0, 3, 5]
    counts = {"rows": 6, "without label": 0, "ties": 0, "disliked": 3}
    assert liked.counts == counts
    for _, record in liked.records(liked.numbers()):
        assert isinstance(record, PairRecord)
        assert (record.preference, record.judgement) == (1.0, UNJUDGED)
    assert load_pictures(path, streaming=streaming, keep_ties=True).numbers().tolist() == list(range(6))


def test_a_folder_without_a_liked_picture_leaves_nothing_to_learn_from(tmp_path: Path) -> None:
    folders(tmp_path)
    for path in (tmp_path / "liked").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no picture is left to use \(.* disliked\)"):
        load_pictures(tmp_path)
