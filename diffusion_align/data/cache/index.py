"""What the pairs of a cache are, before anything is encoded: their sizes, and which pictures are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.pictures import upright_size

from ..reading.rows import row_key
from ..transforms import PairTransform
from ..types import CorruptImageError, Record
from .identity import Cacheable, image_name
from .progress import Progress
from .shard_files import read_json, write_json

#: Pairs whose index is kept together.
PART = 2048


@dataclass
class Index:
    """The pairs of a data set.

    Attributes:
        pairs: what the manifest says of each.
        rows: number of each one's row.
        images: row and side of every distinct picture, by its name.
        corrupt: messages of rows that cannot be read, by row.
    """

    pairs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    images: dict[str, tuple[int, int, tuple[int, int]]] = field(default_factory=dict)
    corrupt: dict[int, str] = field(default_factory=dict)


def index_parts(
    pairs: Cacheable,
    transform: PairTransform,
    folder: Path,
    key: str,
    rank: int,
    world_size: int,
    say: Callable[[str], None],
) -> None:
    """Write this process's parts of the index to ``folder``, but those that are there.

    Args:
        key: of the data set: parts of another one are made again.
    """
    rows = pairs.numbers()
    own = [number for number in range(-(-len(rows) // PART)) if number % world_size == rank]
    progress = Progress(sum(len(_part(rows, number)) for number in own), "pairs", say)
    for number in own:
        part = _part(rows, number)
        mark = _mark(key, number, part)
        found = read_json(folder / _name(number))
        if found is not None and found["key"] == mark:
            progress.skip(len(part))
            continue
        if progress.done:
            progress.tell("reading pairs")
        entries: list[dict[str, Any]] = []
        corrupt: dict[str, str] = {}
        for row, record in pairs.records(part):
            try:
                entries.append(_entry(row, record, transform))
            except CorruptImageError as error:
                corrupt[str(row)] = str(error)
        write_json(folder / _name(number), {"key": mark, "pairs": entries, "corrupt": corrupt})
        progress.add(len(part))


def read_index(pairs: Cacheable, folder: Path, key: str) -> Index:
    """All processes' parts together.

    Raises:
        RuntimeError: a part is missing: a process ended before its time.
    """
    rows, found = pairs.numbers(), Index()
    for number in range(-(-len(rows) // PART)):
        part = read_json(folder / _name(number))
        if part is None or part["key"] != _mark(key, number, _part(rows, number)):
            raise RuntimeError(f"{folder / _name(number)} is missing: a process of the cache command ended early")
        found.corrupt |= {int(row): text for row, text in part["corrupt"].items()}
        for entry in part["pairs"]:
            row = entry.pop("row")
            found.pairs.append(entry)
            found.rows.append(row)
            for side, name in enumerate(entry["images"]):
                found.images.setdefault(name, (row, side, (entry["target"][0], entry["target"][1])))
    return found


def _entry(row: int, record: Record | CorruptImageError, transform: PairTransform) -> dict[str, Any]:
    if isinstance(record, CorruptImageError):
        raise record
    sizes = [upright_size(content, f"{record.key}: the {side} image") for side, content in record.contents().items()]
    target = transform.target(sizes[0])
    return {
        "row": row,
        "key": row_key(row),
        "caption": record.caption,
        "preference": record.preference,
        "weight": record.weight,
        **record.judgement.kept(),
        "target": list(target),
        "images": [image_name(content, target) for content in record.contents().values()],
        "size_ids": [transform.centred_ids(size, target, flip=False) for size in sizes],
        "size_ids_flipped": [transform.centred_ids(size, target, flip=True) for size in sizes],
    }


def _part(rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    return rows[number * PART : (number + 1) * PART]


def _name(number: int) -> str:
    return f"index-{number:05d}.json"


def _mark(key: str, number: int, rows: NDArray[np.int64]) -> str:
    return hashlib.sha256(json.dumps([key, number, rows.tolist()]).encode()).hexdigest()
