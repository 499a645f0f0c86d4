"""Pairs from files to batches: what is read, what is refused, and whose randomness it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torchvision.transforms import v2

from diffusion_align.data import (
    CorruptImageError,
    PairDataset,
    PairLoader,
    PairTransform,
    PixelExamples,
    StreamedPairs,
    load_pairs,
    load_prompts,
    make_buckets,
)
from diffusion_align.data.tables import Selection
from diffusion_align.data.transforms import crop


def encoded(value: int, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(count: int = 12, **columns: Any) -> dict[str, Any]:
    """Image 0 has the even value 2 * row, image 1 the odd one; labels alternate 1, 0."""
    table: dict[str, Any] = {
        "jpg_0": [encoded(2 * i) for i in range(count)],
        "jpg_1": [encoded(2 * i + 1) for i in range(count)],
        "caption": [f"caption {i}" for i in range(count)],
        "label_0": [float(1 - i % 2) for i in range(count)],
        "label_1": [float(i % 2) for i in range(count)],
    }
    return table | columns


def written(path: Path, table: dict[str, Any]) -> Path:
    Dataset.from_dict(table).to_parquet(path)
    return path


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return written(tmp_path / "pairs.parquet", rows())


def indexed(source: Path, **options: Any) -> PairDataset:
    pairs = load_pairs(source, **options)
    assert isinstance(pairs, PairDataset)
    return pairs


def streamed(source: Path, **options: Any) -> StreamedPairs:
    pairs = load_pairs(source, streaming=True, **options)
    assert isinstance(pairs, StreamedPairs)
    return pairs


def value(content: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0])


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_labelled_image_is_chosen(parquet: Path) -> None:
    pairs = indexed(parquet)
    assert [(value(p.chosen), value(p.rejected)) for p in (pairs[0], pairs[1])] == [(0, 1), (3, 2)]


def test_ties_and_unlabelled_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    table = rows(4, label_0=[1.0, 0.5, 0.0, 1.0], label_1=[0.0, 0.5, 1.0, 0.0], has_label=[True, True, True, False])
    pairs = indexed(written(tmp_path / "p.parquet", table))
    assert pairs.captions() == ["caption 0", "caption 2"]
    assert pairs.counts == {"rows": 4, "without label": 1, "ties": 1}


def test_kept_ties_are_soft_labels_of_one_half(tmp_path: Path) -> None:
    table = rows(2, label_0=[1.0, 0.5], label_1=[0.0, 0.5])
    pairs = indexed(written(tmp_path / "p.parquet", table), keep_ties=True)
    assert [pairs[i].preference for i in range(2)] == [1.0, 0.5]


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    written(tmp_path / "train-00000-of-00001.parquet", rows(4))
    written(tmp_path / "test-00000-of-00001.parquet", rows(2))
    assert [len(indexed(tmp_path, split=split)) for split in ("train", "test")] == [4, 2]
    with pytest.raises(FileNotFoundError, match="no files of split 'validation': found test, train"):
        load_pairs(tmp_path, "validation")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folders_carry_preference_and_weight(kind: str, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    table = [
        {"chosen": "0.png", "rejected": "1.png", "caption": "first", "preference": 0.9, "weight": 2.0},
        {"chosen": "2.png", "rejected": "3.png", "caption": "second", "preference": 1.0, "weight": 1.0},
    ]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    else:
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    record = indexed(tmp_path)[0]
    assert (value(record.chosen), record.caption, record.preference, record.weight) == (0, "first", 0.9, 2.0)


def test_image_columns_of_the_hub_kind_are_read(tmp_path: Path) -> None:
    from datasets import Image as ImageFeature

    table = Dataset.from_dict(rows(2)).cast_column("jpg_0", ImageFeature()).cast_column("jpg_1", ImageFeature())
    table.to_parquet(tmp_path / "p.parquet")
    assert value(indexed(tmp_path / "p.parquet")[1].chosen) == 3


def test_the_shipped_pairs_are_found_by_name() -> None:
    pairs = load_pairs("scenes-pairs", "test", keep_ties=True)
    assert isinstance(pairs, PairDataset)
    assert len(set(pairs.captions())) == 250
    training = load_pairs("scenes-pairs")
    assert isinstance(training, PairDataset)
    assert not set(pairs.captions()) & set(training.captions())


def test_a_limit_counts_usable_pairs(parquet: Path) -> None:
    assert len(indexed(parquet, limit=5)) == 5
    assert len(list(streamed(parquet, limit=5))) == 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": None, "captoin": ["a"] * 12}, "column 'caption' is missing .is 'captoin' meant."),
        ({"label_0": ["yes"] * 12}, r"row 0: label_0 = 'yes' is wrong: expected 0, 0.5 \(tie\) or 1"),
        ({"label_0": [0.3] + [1.0] * 11}, "row 0: label_0 = 0.3 is wrong"),
        ({"label_1": [1.0] * 12}, "row 0: label_0 = 1.0 and label_1 = 1.0 contradict"),
        ({"label_0": [0.5] * 12, "label_1": [0.5] * 12}, "no pair is left to use .12 rows, 0 without label, 12 ties."),
    ],
)
def test_a_bad_table_is_one_error_that_names_file_row_and_column(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    table = {name: column for name, column in rows(**columns).items() if column is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(written(tmp_path / "bad.parquet", table))
    assert "bad.parquet" in str(caught.value)


def test_a_missing_image_file_is_named(tmp_path: Path) -> None:
    line = {"chosen": "a.png", "rejected": "b.png", "caption": "c"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(FileNotFoundError, match=r"row 0, column chosen: image .*a\.png cannot be read"):
        indexed(tmp_path)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "not found"),
        (lambda folder: folder, "holds no pairs"),
    ],
)
def test_a_missing_source_is_named(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_pairs(make(tmp_path))


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").write_bytes(b"PAR0 nonsense")
    with pytest.raises(ValueError, match=r"pairs\.parquet cannot be read as a table"):
        load_pairs(tmp_path / "pairs.parquet")


# -- augmentation ----------------------------------------------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


def test_both_images_of_a_pair_get_one_crop_and_one_flip() -> None:
    transform = PairTransform(32, random_crop=True)
    images = (gradient(64, 32), gradient(64, 32))
    results = [transform(images, seed) for seed in range(20)]
    assert all(torch.equal(pixels[0], pixels[1]) for pixels, _ in results)
    assert len({float(pixels[0, 0, 0, 0]) for pixels, _ in results}) > 10


def test_size_ids_say_where_the_crop_came_from() -> None:
    pixels, ids = crop(gradient(64, 32), (32, 32), 0.5, 0.25, flip=False)
    assert ids.tolist() == [32, 64, 0, 8, 32, 32]
    assert round((float(pixels[0, 0, 0]) + 1) * 127.5) == 8


def test_a_flip_mirrors_the_crop_offset() -> None:
    plain, _ = crop(gradient(64, 32), (32, 32), 0.5, 0.25, flip=False)
    flipped, ids = crop(gradient(64, 32), (32, 32), 0.5, 0.25, flip=True)
    assert torch.equal(flipped, plain.flip(-1))
    assert ids[3] == 64 - 32 - 8


def test_buckets_hold_the_area_and_the_ratio() -> None:
    buckets = make_buckets(1024)
    assert (1024, 1024) in buckets
    assert (832, 1216) in buckets
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024**2
        assert max(height / width, width / height) <= 2
    with pytest.raises(ValueError, match="resolution = 1000 must be divisible by 64"):
        make_buckets(1000)


# -- loading ---------------------------------------------------------------------------------------------------------


def loader(source: Path, batch_size: int = 4, **options: Any) -> PairLoader:
    return PairLoader(PixelExamples(indexed(source), PairTransform(16)), batch_size, **options)


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_an_epoch_shows_every_pair_once_in_a_new_order(parquet: Path) -> None:
    seen = keys(islice(loader(parquet), 6))
    assert sorted(seen[:12]) == sorted(seen[12:])
    assert len(set(seen[:12])) == 12
    assert seen[:12] != seen[12:]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_resumed_loader_goes_on_exactly(num_workers: int, parquet: Path) -> None:
    straight = list(islice(loader(parquet, batch_size=5), 7))
    first = loader(parquet, batch_size=5, num_workers=num_workers)
    list(islice(first, 4))
    second = loader(parquet, batch_size=5, num_workers=num_workers)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, batch in zip(straight[4:], islice(second, 3), strict=True):
        assert batch.keys == expected.keys
        assert torch.equal(batch.seeds, expected.seeds)
        assert torch.equal(batch.pixels, expected.pixels)  # type: ignore[arg-type]


def test_two_processes_see_what_one_sees(parquet: Path) -> None:
    options = {"caption_dropout": 0.5}
    one = list(islice(loader(parquet, batch_size=6, **options), 3))
    two = [list(islice(loader(parquet, batch_size=3, rank=r, world_size=2, **options), 3)) for r in range(2)]
    for whole, left, right in zip(one, *two, strict=True):
        assert whole.keys == left.keys + right.keys
        assert whole.captions == left.captions + right.captions
        assert torch.equal(whole.seeds, torch.cat([left.seeds, right.seeds]))


@pytest.mark.parametrize("size", [(96, 96), (96, 144), (200, 100)])
@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear"])
def test_images_are_resized_as_by_torchvision(size: tuple[int, int], interpolation: Any) -> None:
    """The official code: Resize with its filter, CenterCrop, [-1, 1]."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = v2.Compose(
        [
            v2.Resize(32, v2.InterpolationMode(interpolation)),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )(picture)
    pixels, _ = PairTransform(32, random_flip=False, interpolation=interpolation)((picture, picture), 0)
    torch.testing.assert_close(pixels, torch.stack([expected, expected]))


def test_the_filter_changes_a_cache_s_mark_but_not_that_of_older_caches() -> None:
    marks = [PairTransform(32, interpolation=kind).settings() for kind in ("lanczos", "bilinear")]  # type: ignore[arg-type]
    assert [mark.get("interpolation") for mark in marks] == [None, "bilinear"]


def test_captions_are_dropped_at_the_asked_rate(tmp_path: Path) -> None:
    path = written(tmp_path / "p.parquet", rows(100))
    batch = loader(path, batch_size=400, caption_dropout=0.2).load(0)
    assert 0.12 < np.mean([caption is None for caption in batch.captions]) < 0.28


def test_corrupt_images_are_replaced_up_to_a_limit(tmp_path: Path) -> None:
    table = rows(8)
    table["jpg_0"][2] = table["jpg_0"][2][:40]
    table["jpg_1"][5] = b""
    path = written(tmp_path / "p.parquet", table)
    with pytest.raises(CorruptImageError, match="row 2: the chosen image cannot be decoded"):
        indexed(path)[2].images()
    seen = keys(islice(loader(path, max_corrupt=2), 2))
    assert len(seen) == 8
    assert not {"row 2", "row 5"} & set(seen)
    with pytest.raises(ValueError, match="more than max_corrupt = 1 pairs cannot be decoded: row"):
        list(islice(loader(path, max_corrupt=1), 2))


def test_a_batch_holds_one_aspect_ratio(tmp_path: Path) -> None:
    sizes = [(32, 16), (16, 32), (16, 16)] * 8
    table = rows(
        24, jpg_0=[encoded(i, s) for i, s in enumerate(sizes)], jpg_1=[encoded(i, s) for i, s in enumerate(sizes)]
    )
    transform = PairTransform(32, buckets=make_buckets(32, step=8))
    examples = PixelExamples(indexed(written(tmp_path / "p.parquet", table)), transform)
    batches = list(islice(PairLoader(examples, 4), 6))
    shapes = {tuple(batch.pixels.shape[-2:]) for batch in batches if batch.pixels is not None}
    assert len(shapes) == 3
    assert len(set(keys(batches))) == 24


@pytest.mark.parametrize("seed", [None, 4])
def test_some_pairs_are_the_first_or_drawn_by_the_seed(seed: int | None, tmp_path: Path) -> None:
    labels = [0.5 if i % 5 == 0 else 1.0 for i in range(40)]
    table = rows(40) | {"label_0": labels, "label_1": [1 - label for label in labels]}
    pairs = load_pairs(written(tmp_path / "p.parquet", table), limit=7, seed=seed)
    decisive = [i for i in range(40) if i % 5]
    drawn = np.sort(np.random.default_rng([4, 3]).permutation(32)[:7])
    assert isinstance(pairs, PairDataset)
    assert pairs.rows == (decisive[:7] if seed is None else [decisive[i] for i in drawn])


def test_rows_that_belong_together_are_drawn_together() -> None:
    rows = Selection(6, seed=1, together=3).of(range(100, 130))
    assert len(rows) == 6
    assert all(row[1] - row[0] == row[2] - row[1] == 1 and row[0] % 3 == 1 for row in (rows[:3], rows[3:]))
    assert rows != list(range(100, 106))
    assert Selection(50, seed=1).of(range(9)) == Selection().of(range(9)) == list(range(9))


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "p.csv").write_text("id,caption\n1,one\n2,two\n")
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "p.parquet")
    for name in ("p.txt", "p.jsonl", "p.csv", "p.parquet"):
        assert load_prompts(tmp_path / name) == ["one", "two"]
    assert load_prompts(["one", "two"]) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "no prompt in it"),
        ("p.csv", "id\n1\n", "expected a column prompt or caption or text, found id"),
        ("p.jsonl", "{", "line 1: not valid JSON"),
        ("p.md", "one", "expected a file of type .txt, .jsonl, .csv, .parquet"),
    ],
)
def test_a_bad_prompt_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)
