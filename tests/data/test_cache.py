"""The latent cache: the same numbers as without it, resumable, and never silently wrong."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusion_align.adapters import Adapter, encode_in_chunks, load_adapter
from diffusion_align.data import (
    CachedPairs,
    CacheError,
    PairDataset,
    PairLoader,
    PairTransform,
    PixelExamples,
    build_cache,
    fingerprint,
    load_pairs,
)

TRANSFORM = PairTransform(64)


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    rng = np.random.default_rng(0)

    def image() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (72, 64, 3), dtype=np.uint8)).save(buffer, format="PNG")
        return buffer.getvalue()

    shared = image()
    table = {
        "jpg_0": [shared, shared, image(), image()],
        "jpg_1": [image() for _ in range(4)],
        "caption": ["a red star", "a red star", "a blue ring", "two moons"],
        "label_0": [1.0, 0.0, 1.0, 1.0],
    }
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    Dataset.from_dict(table).to_parquet(path)
    found = load_pairs(path)
    assert isinstance(found, PairDataset)
    return found


@pytest.fixture
def cache(adapter: Adapter, pairs: PairDataset, tmp_path: Path) -> CachedPairs:
    return build_cache(adapter, pairs, TRANSFORM, tmp_path / "cache", batch_size=3, shard_size=3)


def test_cached_batches_equal_encoded_ones(adapter: Adapter, pairs: PairDataset, cache: CachedPairs) -> None:
    options: dict[str, Any] = {"seed": 1, "caption_dropout": 0.4}
    plain = PairLoader(PixelExamples(pairs, TRANSFORM), 4, **options)
    flips = set()
    for expected, batch in islice(zip(plain, PairLoader(cache, 4, **options), strict=False), 3):
        assert expected.pixels is not None
        assert batch.posterior is not None
        assert batch.cond is not None
        mean, std = adapter.encode_posterior(expected.pixels.flatten(0, 1))
        torch.testing.assert_close(batch.posterior[0].flatten(0, 1).float(), mean, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch.posterior[1].flatten(0, 1).float(), std, atol=2e-3, rtol=2e-3)
        assert torch.equal(batch.cond.embeds, encode_in_chunks(adapter, expected.captions).embeds.half())
        assert batch.captions == expected.captions
        assert torch.equal(batch.size_ids, expected.size_ids)
        assert torch.equal(batch.seeds, expected.seeds)
        flips |= {TRANSFORM.draw(int(seed))[2] for seed in batch.seeds}
    assert flips == {False, True}


def test_equal_images_and_captions_are_encoded_once(cache: CachedPairs) -> None:
    record = json.loads((cache.folder / "manifest.json").read_text())
    assert len(record["image_shards"]) == 7
    assert record["captions"] == [None, "", "a red star", "a blue ring", "two moons"]


@pytest.mark.parametrize("dropped", [None, ""])
def test_a_dropped_caption_is_the_null_prompt_or_the_empty_one(
    dropped: str | None, adapter: Adapter, cache: CachedPairs
) -> None:
    example = CachedPairs(cache.folder, dropped=dropped).example(0, 1, drop_caption=True)
    assert example.cond is not None
    assert example.caption == dropped
    assert torch.equal(example.cond.embeds, encode_in_chunks(adapter, [dropped]).embeds.half())


def test_an_older_cache_has_the_null_prompt_alone(cache: CachedPairs) -> None:
    manifest = cache.folder / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["checksum"]
    record["captions"][:2] = ["", "nobody's"]
    manifest.write_text(json.dumps(record))
    example = CachedPairs(cache.folder).example(0, 1, drop_caption=True)
    assert example.cond is not None
    assert not example.cond.embeds.any()
    with pytest.raises(CacheError, match="no embedding of the empty prompt, which null_prompt encoded asks for"):
        CachedPairs(cache.folder, dropped="")


def test_an_interrupted_build_keeps_its_whole_shards(adapter: Adapter, pairs: PairDataset, cache: CachedPairs) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in cache.folder.glob("*.safetensors")}
    (cache.folder / "manifest.json").unlink()
    torn = cache.folder / "images-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    made: list[str] = []
    build_cache(adapter, pairs, TRANSFORM, cache.folder, batch_size=3, shard_size=3, progress=made.append)
    assert [text.split()[1] for text in made if text.startswith("encoding")] == [torn.name]
    after = {path.name: path.stat().st_mtime_ns for path in cache.folder.glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {torn.name}


def test_a_torn_shard_is_an_error_when_opened(cache: CachedPairs) -> None:
    torn = cache.folder / "images-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    with pytest.raises(CacheError, match=r"images-00000\.safetensors has \d+ bytes, expected \d+"):
        CachedPairs(cache.folder)


def test_a_changed_shard_is_an_error_when_read(cache: CachedPairs) -> None:
    shard = cache.folder / "images-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    opened = CachedPairs(cache.folder)
    with pytest.raises(CacheError, match=r"images-00000\.safetensors does not match its checksum"):
        [opened.example(i, 0, False) for i in range(4)]


def test_another_models_cache_is_refused(adapter: Adapter, cache: CachedPairs) -> None:
    mark = fingerprint(adapter, TRANSFORM)
    assert len(CachedPairs(cache.folder, mark)) == 4
    with torch.no_grad():
        parameter = next(adapter.vae.parameters())
        parameter += 1e-3
        other = fingerprint(adapter, TRANSFORM)
        parameter -= 1e-3
    for foreign in (other, fingerprint(adapter, PairTransform(32))):
        with pytest.raises(CacheError, match="was made with another model or other resolution"):
            CachedPairs(cache.folder, foreign)


def test_a_folder_without_a_finished_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"manifest\.json is missing or unreadable: run 'diffusion-align cache'"):
        CachedPairs(tmp_path)


def test_random_crops_cannot_be_cached(adapter: Adapter, pairs: PairDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="random_crop cannot be cached"):
        build_cache(adapter, pairs, PairTransform(64, random_crop=True), tmp_path)
