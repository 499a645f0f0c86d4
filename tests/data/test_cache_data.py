"""A cache is used for the data set that it was made of, whatever changed at the same paths, and brought up to date."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_align.adapters import ENCODERS, Adapter, load_adapter
from diffusion_align.data import CachedPairs, CacheError, PairTransform, build_cache, load_in_file_order, load_pairs
from diffusion_align.data.cache import collect_garbage, compare, damage, garbage, identity, require_same_data
from diffusion_align.data.cache.progress import Progress
from diffusion_align.pictures import CorruptImageError, decoded_picture, upright_size

TRANSFORM = PairTransform(64, random_flip=False)
ROWS = 5


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder, parts=ENCODERS)


def png(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)  # equal sizes have equal numbers of bytes
    return buffer.getvalue()


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {"chosen": f"{i}.png", "rejected": f"{i}-b.png", "caption": f"caption {i}", "preference": 1.0, "weight": 1.0}
        for i in range(ROWS)
    ]


@pytest.fixture
def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    for i in range(ROWS):
        (place / f"{i}.png").write_bytes(png(i))
        (place / f"{i}-b.png").write_bytes(png(100 + i))
    write_table(place, rows)
    return place


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    place = tmp_path / "shards"
    place.mkdir()
    write_parquet(place)
    return place


def write_parquet(place: Path, **changes: Any) -> None:
    """Two files of four rows in row groups of two."""
    columns: dict[str, Any] = {
        "jpg_0": [png(i) for i in range(8)],
        "jpg_1": [png(100 + i) for i in range(8)],
        "caption": [f"caption {i}" for i in range(8)],
        "label_0": [1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0],
    } | changes
    table = pa.table(columns)
    for number in range(2):
        file = place / f"train-0000{number}-of-00002.parquet"
        pq.write_table(table.slice(4 * number, 4), file, row_group_size=2, compression="none")


def build(adapter: Adapter, data: Path, cache: Path, **options: Any) -> CachedPairs:
    return build_cache(adapter, load_in_file_order(data), TRANSFORM, cache, **{"shard_size": 3, **options})


def check(cache: Path, data: Path) -> None:
    require_same_data(CachedPairs(cache), load_in_file_order(data))


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


@pytest.fixture
def encoded(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the VAE was given."""
    found: list[int] = []
    encode = adapter.encode_posterior

    def counted(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(adapter, "encode_posterior", counted)
    return found


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[2].update(caption="another"), r"captions: 1 differ, first .*row 2, then 'caption 2', now "),
        (lambda rows: rows[1].update(preference=0.75), r"preferences: 1 differ, first .*row 1, then 1\.0, now 0\.75"),
        (lambda rows: rows[1].update(weight=2.0), r"weights: 1 differ, first .*row 1, then 1\.0, now 2\.0"),
        (lambda rows: rows.pop(), "rows: 5 then, 4 now, 4 in both"),
        (lambda rows: rows.append(rows[0]), "rows: 5 then, 6 now, 5 in both"),
        (lambda rows: rows[0].update(chosen="1.png"), "pictures: 1 pairs differ, first .*row 0: the chosen image is"),
        (lambda rows: rows[3].update(chosen="3-b.png", rejected="3.png"), "row 3: the chosen and rejected image is an"),
    ],
)  # fmt: skip
def test_a_changed_table_is_refused(
    change: Callable[[Any], Any], said: str, adapter: Adapter, folder: Path, rows: Any, tmp_path: Path
) -> None:
    build(adapter, folder, tmp_path / "cache")
    check(tmp_path / "cache", folder)
    change(rows)
    write_table(folder, rows)
    with pytest.raises(CacheError, match=said + "(.|\n)*Run 'diffusion-align cache' again"):
        check(tmp_path / "cache", folder)


def test_pictures_at_the_same_path_are_told_by_their_bytes(adapter: Adapter, folder: Path, tmp_path: Path) -> None:
    build(adapter, folder, tmp_path / "cache")
    os.utime(folder / "3.png")
    found = compare(CachedPairs(tmp_path / "cache"), load_in_file_order(folder))
    assert (found.differences, found.read) == ((), 1)
    before = (folder / "3.png").stat()
    (folder / "3.png").write_bytes(png(33))
    assert (folder / "3.png").stat().st_size == before.st_size
    with pytest.raises(CacheError, match=r"pictures: 1 pairs differ, first .*row 3: the chosen image is another one"):
        check(tmp_path / "cache", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_0": [0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0]}, "labels: other verdicts"),
        ({"label_0": [1.0, 0.0, 1.0, 0.5, 1.0, 0.5, 0.0, 1.0]}, "rows: 7 then, 6 now"),
        ({"caption": ["x", *(f"caption {i}" for i in range(1, 8))]}, "captions: 1 differ"),
        ({"jpg_1": [png(100 + i + (i == 6)) for i in range(8)]}, r"00001-of-00002\.parquet, row 2: the chosen image"),
    ],
)
def test_rewritten_parquet_files_are_refused(
    changes: dict[str, Any], said: str, adapter: Adapter, parquet: Path, tmp_path: Path
) -> None:
    build(adapter, parquet, tmp_path / "cache")
    write_parquet(parquet)  # the same bytes, later
    found = compare(CachedPairs(tmp_path / "cache"), load_in_file_order(parquet))
    assert (found.differences, found.read) == ((), 7)
    shutil.copytree(parquet, tmp_path / "elsewhere")  # with its times
    check(tmp_path / "cache", tmp_path / "elsewhere")
    write_parquet(parquet, **changes)
    with pytest.raises(CacheError, match=said):
        check(tmp_path / "cache", parquet)


def test_a_cache_that_says_nothing_of_its_data(
    adapter: Adapter, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one of an earlier version is compared by all bytes, a large one by what is cheap, with a warning."""
    cache = tmp_path / "cache"
    build(adapter, folder, cache)
    record = json.loads((cache / "manifest.json").read_text())
    for name in ("data", "corrupt_rows", "prompt_shards", "checksum"):
        del record[name]
    (cache / "manifest.json").write_text(json.dumps(record))
    check(cache, folder)
    (folder / "0.png").write_bytes(png(50))
    with pytest.raises(CacheError, match="row 0: the chosen image"):
        check(cache, folder)
    monkeypatch.setattr(identity, "SMALL", ROWS - 1)
    with pytest.warns(UserWarning, match="pictures and the order of each pair were not compared"):
        check(cache, folder)


# -- bringing it up to date, resuming --------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_what_changed_is_encoded_again(
    adapter: Adapter, folder: Path, rows: Any, tmp_path: Path, encoded: list[int]
) -> None:
    cache = tmp_path / "cache"
    build(adapter, folder, cache)
    assert sum(encoded) == 2 * ROWS
    encoded.clear()
    (folder / "2.png").write_bytes(png(22))
    rows[4]["caption"] = "another"
    write_table(folder, rows[1:])
    updated = build(adapter, folder, cache)
    check(cache, folder)
    assert encoded == [1]
    fresh = build(adapter, folder, tmp_path / "fresh")
    for i in range(ROWS - 1):
        ours, theirs = updated.example(i, 0, False), fresh.example(i, 0, False)
        assert ours.caption == theirs.caption
        assert ours.posterior is not None
        assert theirs.posterior is not None
        torch.testing.assert_close(ours.posterior[0], theirs.posterior[0], atol=2e-3, rtol=2e-3)
    assert list(damage(cache)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 2, 3])
def test_a_build_that_is_cut_off_goes_on(
    kills: int, adapter: Adapter, folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(adapter, folder, tmp_path / "whole")
    whole = sum(encoded)
    encode, calls = adapter.encode_posterior, iter(range(100))

    def cut(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if next(calls) == kills:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(adapter, "encode_posterior", cut)
    with pytest.raises(KeyboardInterrupt):
        build(adapter, folder, tmp_path / "cache")
    encoded.clear()
    build(adapter, folder, tmp_path / "cache")
    assert sum(encoded) == whole - 3 * kills
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "seed"), [(None, None), (3, None), (3, 0), (3, 1)])
def test_parquet_read_as_it_is_gives_the_pairs_of_random_access(
    limit: int | None, seed: int | None, parquet: Path
) -> None:
    as_it_is, copied = load_in_file_order(parquet, limit=limit, seed=seed), load_pairs(parquet, limit=limit, seed=seed)
    assert as_it_is.numbers().tolist() == copied.numbers().tolist()
    assert list(as_it_is.records(as_it_is.numbers())) == list(copied.records(copied.numbers()))
    assert as_it_is.cheap_columns().to_pylist() == copied.cheap_columns().to_pylist()
    assert as_it_is.stamps() == copied.stamps()


def test_unreadable_pictures_are_counted_named_and_listed(adapter: Adapter, folder: Path, tmp_path: Path) -> None:
    (folder / "1.png").write_bytes(png(1)[:-3000])  # its header is right
    (folder / "3-b.png").write_bytes(b"nothing")
    cached = build(adapter, folder, tmp_path / "cache")
    assert cached.counts == {"rows": ROWS, "unreadable": 2}
    assert [pair["key"] for pair in cached.pairs] == ["row 0", "row 2", "row 4"]
    listed = [json.loads(line) for line in (cached.folder / "corrupt_pairs.jsonl").read_text().splitlines()]
    assert [(line["row"], line["error"][:24]) for line in listed] == [
        (1, "row 1: the chosen image "),
        (3, "row 3: the rejected imag"),
    ]
    check(tmp_path / "cache", folder)
    with pytest.raises(ValueError, match="more than max_corrupt = 1 pairs cannot be decoded: row 1"):
        build(adapter, folder, tmp_path / "other", max_corrupt=1)
    (folder / "1.png").write_bytes(png(1))
    with pytest.raises(CacheError, match="row 1: could not be read then, and can be now"):
        check(tmp_path / "cache", folder)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_from_headers_are_those_of_decoded_pictures(kind: str, orientation: int) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (90, 64)).save(buffer, format=kind, exif=exif)
    image = decoded_picture(buffer.getvalue(), "it")
    assert upright_size(buffer.getvalue(), "it") == image.size
    with pytest.raises(CorruptImageError, match="it cannot be decoded"):
        upright_size(buffer.getvalue()[:7], "it")
    for flip in (False, True):
        target, transform = (64, 48), PairTransform(64)
        ids = transform.crop(image, target, 0.5, 0.5, flip)[1].tolist()
        assert transform.centred_ids(image.size, target, flip) == ids


# -- upkeep ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_damage_is_named(adapter: Adapter, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(adapter, folder, cache)
    assert list(damage(cache)) == []
    flipped = cache / "images-00001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(bytes(content))
    (cache / "prompts-00000.safetensors").unlink()
    assert list(damage(cache)) == [
        f"{flipped} does not match its checksum",
        f"{cache / 'prompts-00000.safetensors'} has 0 bytes, expected "
        f"{json.loads((cache / 'manifest.json').read_text())['shards']['prompts-00000.safetensors']['bytes']}",
    ]
    build(adapter, folder, cache)
    assert list(damage(cache)) == []


def test_garbage_is_what_no_manifest_names(adapter: Adapter, folder: Path, rows: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(CacheError, match=r"manifest\.json is missing"):
        garbage(cache)
    build(adapter, folder, cache)
    before = files_of(cache)
    (cache / "notes.txt").write_text("mine")
    (cache / ".images-00009.safetensors.partial").write_bytes(b"torn")
    (cache / ".building").mkdir()
    (cache / ".building" / "index-00000.json").write_text("{}")
    assert sum(garbage(cache).values()) == 6
    collect_garbage(cache)
    assert files_of(cache) == before | {"notes.txt": b"mine"}
    write_table(folder, rows[:2])
    build(adapter, folder, cache)
    removed = {path.name for path in collect_garbage(cache)}
    assert removed == {
        *(f"images-0000{i}.safetensors" for i in (1, 2, 3)),
        *(f"prompts-0000{i}.safetensors" for i in (1, 2)),
    }
    assert list(damage(cache)) == []
    check(cache, folder)


def test_progress_tells_rate_and_remaining_time() -> None:
    said: list[str] = []
    seconds = iter([0.0, 10.0, *[20.0] * 4])
    progress = Progress(1000, "pictures", said.append, lambda: next(seconds))
    progress.add(10)  # slow, not counted
    progress.add(10)
    progress.add(10)
    progress.tell("encoding it")
    assert said == [
        "about 8 min for 970 more pictures, by the first",
        "encoding it (30 of 1,000 pictures, 2 a second, 8 min left)",
    ]
