"""Whether a cache is whole, and which of its files nothing needs any more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffusion_align.files import sha256_of

from .shard_files import (
    BUILDING,
    MANIFEST,
    SHARDS,
    Facts,
    read_json,
    read_manifest,
    shard_problem,
    write_json,
)


def damage(folder: str | Path) -> Iterator[str]:
    """What is wrong with a finished cache's files: sizes, checksums, and pictures and captions that no shard has.

    Raises:
        CacheError: there is no finished cache.
    """
    place, record = Path(folder), read_manifest(Path(folder))
    held: dict[str, set[str]] = {}
    for name, facts in record["shards"].items():
        problem = _shard_damage(place / name, facts)
        if problem is not None:
            yield problem
            continue
        with safe_open(str(place / name), framework="pt") as file:
            held[name] = set(file.keys())
    flips = ("", ".flipped") if record["transform"]["random_flip"] else ("",)
    for pair in record["pairs"]:
        for image in pair["images"]:
            shard = record["image_shards"].get(image)
            if shard is None or (shard in held and any(image + flip not in held[shard] for flip in flips)):
                yield f"{place / (shard or MANIFEST)}: an image of {pair['key']} is missing"
    prompts = {key for name, keys in held.items() if name.startswith("prompts-") for key in keys}
    if len(held) == len(record["shards"]):
        missing = [i for i in range(len(record["captions"])) if f"{i}.embeds" not in prompts]
        if missing:
            yield f"{place}: {len(missing)} captions are missing, first {record['captions'][missing[0]]!r}"


def garbage(folder: str | Path) -> dict[Path, int]:
    """Files of builds that the manifest does not name, torn ones and what an unfinished build left, with their bytes.
    Files that no cache writes are not among them.

    Raises:
        CacheError: there is no finished cache: an unfinished one's files are needed to finish it.
    """
    place = Path(folder)
    needed = read_manifest(place)["shards"].keys()
    found = [path for kind in ("images", "prompts") for path in place.glob(f"{kind}-*.safetensors")]
    unneeded = [path for path in found if path.name not in needed] + [
        path for form in (".*.partial", ".manifest.json-*", ".shards.json-*") for path in place.glob(form)
    ]
    unneeded += [path for path in (place / BUILDING).rglob("*") if path.is_file()]
    return {path: path.stat().st_size for path in sorted(unneeded)}


def collect_garbage(folder: str | Path) -> dict[Path, int]:
    """Remove what :func:`garbage` finds, and return it.

    Raises:
        CacheError: there is no finished cache.
    """
    place, found = Path(folder), garbage(folder)
    record: dict[str, Any] = read_manifest(place)
    if read_json(place / SHARDS) is not None:
        write_json(place / SHARDS, {"fingerprint": record["fingerprint"], "shards": record["shards"]})
    for path in found:
        path.unlink()
    shutil.rmtree(place / BUILDING, ignore_errors=True)
    return found


def _shard_damage(path: Path, facts: Facts) -> str | None:
    problem = shard_problem(path, facts)
    if problem is not None:
        return problem
    if sha256_of(path) != facts["sha256"]:
        return f"{path} does not match its checksum"
    try:
        with safe_open(str(path), framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{path} cannot be read ({error})"
