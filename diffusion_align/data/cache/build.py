"""Making a cache: an index of all pairs, then shards of encoded pictures and prompts, then the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_align.adapters import Adapter
from diffusion_align.files import check_writable, write_whole

from ..transforms import PairTransform
from .encoding import encode_images, encode_prompts, image_bytes_of, prompt_bytes_of
from .identity import Cacheable, data_key, describe
from .index import Index, index_parts, read_index
from .known_shards import KnownShards
from .opened import CachedPairs
from .progress import Progress, size
from .shard_files import BUILDING, CORRUPT, MANIFEST, SHARDS, Facts, fingerprint, write_json


def build_cache(
    adapter: Adapter,
    dataset: Cacheable,
    transform: PairTransform,
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard_size: int = 512,
    max_corrupt: int = 100,
    progress: Callable[[str], None] = lambda text: None,
    dropped: str | None = None,
    settings: Mapping[str, Any] | None = None,
    workers: int = 2,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
    list_size: int | None = None,
) -> CachedPairs:
    """Encode every distinct image and caption of ``dataset``.

    Images get one crop (the centre) and, with ``random_flip``, are encoded a second time mirrored; the VAE's mean and
    deviation are kept, so that training still samples them. Values are float16.

    Whatever an earlier or interrupted build with the same model left is used: whole shards as they are, and single
    pictures of shards that changed. An earlier cache stays valid until the new manifest takes its place; shards that
    it alone needs are left (:func:`~.upkeep.collect_garbage`).

    Args:
        shard_size: pictures, or captions, of a shard.
        dropped, list_size: as for :class:`CachedPairs`.
        settings: by which the data set was opened, to be kept.
        workers: threads that decode pictures.
        rank, world_size: this process and how many build together, each its own shards; the first writes the manifest.
        wait: returns when all of them call it.

    Raises:
        ValueError: ``random_crop``, or more than ``max_corrupt`` pairs with unreadable images.
        OSError: the disk has less room than the cache needs; the message names both.
    """
    if transform.random_crop:
        raise ValueError("random_crop cannot be cached: cached latents hold one crop per image")
    folder, is_main = Path(folder), rank == 0
    parts = folder / BUILDING
    check_writable(folder)
    parts.mkdir(exist_ok=True)
    mark = fingerprint(adapter, transform)
    say = progress if is_main else lambda text: None
    key = data_key(dataset, transform.settings(), dataset.chosen_only)
    index_parts(dataset, transform, parts, key, rank, world_size, say)
    wait()
    index = read_index(dataset, parts, key)
    _check_corrupt(list(index.corrupt.values()), max_corrupt)
    captions: list[str | None] = list(dict.fromkeys([None, "", *(pair["caption"] for pair in index.pairs)]))
    hashes = list(index.images)
    chunks = [hashes[start : start + shard_size] for start in range(0, len(hashes), shard_size)]
    texts = [captions[start : start + shard_size] for start in range(0, len(captions), shard_size)]
    # What is known of shards is read before any process adds to it, so that all of them choose the same names.
    known = KnownShards(folder, mark)
    images = [known.place("images", i, "".join(chunk)) for i, chunk in enumerate(chunks)]
    prompts = [known.place("prompts", i, json.dumps(text)) for i, text in enumerate(texts)]
    wait()

    own = [i for i in range(len(chunks)) if i % world_size == rank and not known.has(images[i])]
    own_texts = [i for i in range(len(texts)) if i % world_size == rank and not known.has(prompts[i])]
    left = sum(not known.holds(name) for i in own for name in chunks[i])
    each = image_bytes_of(adapter, transform, index.images[hashes[0]][2]) if hashes else 0
    needed = sum(len(chunks[i]) for i in own) * each + sum(len(texts[i]) for i in own_texts) * prompt_bytes_of(adapter)
    if own or own_texts:
        of_all = "" if world_size == 1 else f" (one of {world_size} processes)"
        say(f"to encode{of_all}: {left:,} pictures of {len(index.pairs):,} {_unit(dataset)}, about {size(needed)}")
    _check_room(folder, needed)
    count = Progress(left, "pictures", say)
    errors: dict[str, str] = {}
    for i in own:
        count.tell(f"encoding {images[i].name}")
        tensors, corrupt = encode_images(
            adapter, dataset, transform, index, chunks[i], batch_size, workers, count.add, known.tensors
        )
        errors |= corrupt
        _check_corrupt(list(errors.values()), max_corrupt)
        known.write(images[i], tensors, {"corrupt": corrupt} if corrupt else {})
    for i in own_texts:
        say(f"encoding {prompts[i].name}")
        known.write(prompts[i], encode_prompts(adapter, texts[i], i * shard_size), {})
    wait()
    if is_main:
        shards = {place.name: known.facts(place) for place in (*images, *prompts)}
        where = {name: images[i].name for i, chunk in enumerate(chunks) for name in chunk}
        record = _manifest(dataset, settings, index, shards, where, max_corrupt)
        if _unit(dataset) != "pairs":
            record["unit"] = _unit(dataset)
        record |= {
            "fingerprint": mark,
            "transform": transform.settings(),
            "captions": captions,
            "shard_size": shard_size,
            "prompt_shards": [place.name for place in prompts],
        }
        _list_corrupt(folder / CORRUPT, record["corrupt"], record["corrupt_rows"])
        write_json(folder / SHARDS, {"fingerprint": mark, "shards": shards})
        write_json(folder / MANIFEST, record)
        shutil.rmtree(parts, ignore_errors=True)
    wait()
    return CachedPairs(folder, mark, dropped, pictures=1 if dataset.chosen_only else 2, list_size=list_size)


def _unit(dataset: Cacheable) -> str:
    """What the examples of a cache are called; single pictures of pairs are as good as pairs."""
    return "pairs" if dataset.meaning.unit == "pictures" else dataset.meaning.unit


def _manifest(
    dataset: Cacheable,
    settings: Mapping[str, Any] | None,
    index: Index,
    shards: Mapping[str, Facts],
    where: Mapping[str, str],
    max_corrupt: int,
) -> dict[str, Any]:
    """Pairs that can be read, those that cannot, and the shards."""
    torn: dict[str, str] = {}
    for facts in shards.values():
        torn |= facts.get("corrupt", {})
    corrupt = dict(index.corrupt)
    pairs = []
    for row, pair in zip(index.rows, index.pairs, strict=True):
        bad = next((name for name in pair["images"] if name in torn), None)
        if bad is None:
            pairs.append(pair)
        else:
            text = torn[bad]  # of the first row that has this picture
            corrupt[row] = text if text.startswith(f"{pair['key']}:") else f"{pair['key']}: like {text}"
    messages = [corrupt[row] for row in sorted(corrupt)]
    _check_corrupt(messages, max_corrupt)
    return {
        "data": describe(dataset, settings),
        "pairs": pairs,
        "image_shards": {name: shard for name, shard in where.items() if name not in torn},
        "shards": dict(shards),
        "corrupt": messages,
        "corrupt_rows": sorted(corrupt),
    }


def _check_corrupt(messages: list[str], most: int) -> None:
    if len(messages) > most:
        raise ValueError(f"more than max_corrupt = {most} pairs cannot be decoded: {'; '.join(messages[:5])}")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"cache {folder} needs about {size(needed)} more, and its disk has {size(free)} free")


def _list_corrupt(file: Path, messages: list[str], rows: list[int]) -> None:
    """One line for each pair that cannot be read."""
    if not messages:
        file.unlink(missing_ok=True)
        return
    lines = [json.dumps({"row": row, "error": text}) for row, text in zip(rows, messages, strict=True)]
    write_whole(file, "".join(line + "\n" for line in lines).encode())
