"""Whether a cache was made of the data set that a run asks for: rows, captions, labels, weights and pictures.

What is cheap is compared whole: which rows there are, and their captions, verdicts and weights. Pictures are compared
by their files' names and stamps (size, time of the last change, footers of parquet). Where these differ, the pictures
are read and their bytes compared with the hashes that the cache knows them by.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..reading.meaning import Meaning
from ..reading.rows import row_key
from ..reading.stamps import Stamp
from ..types import CorruptImageError, Record
from .opened import CachedPairs
from .shard_files import CacheError

#: A cache that says nothing of its data is compared by the pictures' bytes if it has at most so many pairs.
SMALL = 2_000
#: More pictures than this are not read without a word.
QUIET = 2_000


class Cacheable(Protocol):
    """Pairs that can be cached: of a table with random access, or of parquet files as they are."""

    @property
    def name(self) -> str: ...
    @property
    def chosen_only(self) -> bool: ...
    @property
    def meaning(self) -> Meaning: ...
    def numbers(self) -> NDArray[np.int64]: ...
    def where(self, row: int) -> str: ...
    def cheap_columns(self) -> pa.Table: ...
    def stamps(self) -> dict[str, Stamp]: ...
    def paths(self) -> dict[str, list[str | None]]: ...
    def rows_in(self, files: Set[str]) -> NDArray[np.int64]: ...
    def records(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Record | CorruptImageError]]: ...


@dataclass(frozen=True)
class Comparison:
    """What a data set is beside a cache.

    Attributes:
        differences: in words, empty if they are the same.
        read: pairs whose pictures' bytes were compared.
        unsure: what could not be compared, in words.
    """

    differences: tuple[str, ...]
    read: int = 0
    unsure: str | None = None


def image_name(content: bytes, target: tuple[int, int]) -> str:
    """What a cache calls an encoded picture that is resized to ``target`` (h, w)."""
    return hashlib.sha256(content + repr(target).encode()).hexdigest()[:32]


def data_key(pairs: Cacheable, *settings: Any) -> str:
    """Hash of all that is cheap to know of a data set, and of settings."""
    cheap = [column.to_pylist() for column in pairs.cheap_columns().columns]
    return _hash([pairs.numbers().tolist(), cheap, pairs.paths(), pairs.stamps(), settings])


def describe(pairs: Cacheable, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a cache keeps of its data set; JSON-able.

    Args:
        settings: of the run, by which the data set can be opened again.
    """
    return {
        "name": pairs.name,
        "settings": None if settings is None else dict(settings),
        "labels": _hash(_verdicts(pairs.cheap_columns(), pairs.meaning)),
        "paths": _hashes(pairs.paths()),
        "files": pairs.stamps(),
    }


def require_same_data(cached: CachedPairs, pairs: Cacheable) -> None:
    """Refuse to take ``cached`` for ``pairs``; what cannot be compared is warned of.

    Raises:
        CacheError: they differ; the message says in what, and what to do.
    """
    found = compare(cached, pairs)
    if found.differences:
        made = "" if cached.data is None else f" (made of {cached.data['name']})"
        raise CacheError(
            f"cache {cached.folder}{made} holds other data than {pairs.name}: {'; '.join(found.differences)}. Run "
            "'diffusion-align cache' again with this run's settings, which encodes only what changed, or give another "
            "cache_dir"
        )
    if found.unsure:
        warnings.warn(f"cache {cached.folder}: {found.unsure}", stacklevel=2)


def compare(cached: CachedPairs, pairs: Cacheable, thorough: bool = False) -> Comparison:
    """Compare a cache with a data set.

    Args:
        thorough: compare every picture's bytes, whatever the stamps say.
    """
    numbers = pairs.numbers()
    keys = [row_key(row) for row in numbers.tolist()]
    held = {pair["key"]: pair for pair in cached.pairs}
    table = pairs.cheap_columns()
    cheap = [*_rows(cached, held, keys), *_values(held, keys, table, pairs, numbers)]
    if not cheap and cached.data is not None and cached.data["labels"] != _hash(_verdicts(table, pairs.meaning)):
        cheap.append("labels: other verdicts or scores than then")
    if cheap:
        return Comparison(tuple(cheap))
    if cached.data is None:
        if not thorough and len(numbers) > SMALL:
            unsure = (
                "it says nothing of its data (an earlier version made it). Captions and weights are those of "
                f"{pairs.name}; pictures and the order of each pair were not compared. Run 'diffusion-align cache' "
                "once: it compares them, and encodes only what changed"
            )
            return Comparison((), unsure=unsure)
        return _pictures(cached, held, pairs, numbers)
    if thorough or _hashes(pairs.paths()).items() - cached.data["paths"].items():
        return _pictures(cached, held, pairs, numbers)
    then, now = cached.data["files"], pairs.stamps()
    changed = {name for name, stamp in now.items() if then.get(name) != stamp}
    return _pictures(cached, held, pairs, pairs.rows_in(changed) if changed else numbers[:0])


def _rows(cached: CachedPairs, held: Mapping[str, Any], keys: list[str]) -> Iterator[str]:
    """Whether both have the same rows."""
    if cached.data is None:  # which rows were unreadable is not known
        same = held.keys() <= set(keys) and len(keys) == len(held) + cached.counts["unreadable"]
    else:
        same = held.keys() | {row_key(row) for row in cached.corrupt_rows} == set(keys)
    if not same:
        then = len(held) + cached.counts["unreadable"]
        shared = len(held.keys() & set(keys))
        yield (
            f"rows: {then:,} then, {len(keys):,} now, {shared:,} in both (data set, split, max_pairs, seed, streaming)"
        )


def _values(
    held: Mapping[str, Any], keys: list[str], table: pa.Table, pairs: Cacheable, numbers: NDArray[np.int64]
) -> Iterator[str]:
    """Captions, preferences and weights of the rows that both have."""
    captions = table["caption"].to_pylist()
    others = table.drop_columns(["caption"])
    rows = others.to_pylist() if others.num_columns else [{}] * len(keys)
    known = [
        {"caption": caption, **pairs.meaning.known(row, key)}
        for caption, row, key in zip(captions, rows, keys, strict=True)
    ]
    for name in known[0] if known else ():
        wrong = [i for i, key in enumerate(keys) if key in held and held[key].get(name) != known[i][name]]
        if wrong:
            i = wrong[0]
            several = name if name.endswith("s") else f"{name}s"
            yield (
                f"{several}: {len(wrong):,} differ, first {pairs.where(int(numbers[i]))}, then "
                f"{held[keys[i]].get(name)!r}, now {known[i][name]!r}"
            )


def _pictures(cached: CachedPairs, held: Mapping[str, Any], pairs: Cacheable, rows: NDArray[np.int64]) -> Comparison:
    """Compare the bytes of some rows' pictures."""
    if len(rows) > QUIET:
        text = (
            f"cache {cached.folder}: comparing the pictures of {len(rows):,} pairs, whose files changed, byte by byte"
        )
        print(text, file=sys.stderr, flush=True)
    wrong: list[str] = []
    for row, record in pairs.records(rows):
        problem = _picture_problem(held.get(row_key(row)), record, cached.pictures)
        if problem is not None:
            wrong.append(f"{pairs.where(row)}: {problem}")
    if not wrong:
        return Comparison((), len(rows))
    return Comparison((f"pictures: {len(wrong):,} pairs differ, first {wrong[0]}",), len(rows))


def _picture_problem(pair: Mapping[str, Any] | None, record: Record | CorruptImageError, pictures: int) -> str | None:
    if isinstance(record, CorruptImageError):
        return None if pair is None else f"cannot be read now ({record})"
    if pair is None:
        try:
            record.images()
        except CorruptImageError:
            return None
        return "could not be read then, and can be now"
    target = (pair["target"][0], pair["target"][1])
    contents = list(record.contents().items())[:pictures]
    now = {side: image_name(content, target) for side, content in contents}
    differing = [side for (side, name), then in zip(now.items(), pair["images"], strict=False) if name != then]
    return f"the {' and '.join(differing)} image is another one" if differing else None


def _verdicts(table: pa.Table, meaning: Meaning) -> list[Any]:
    names = [name for name in meaning.verdict if name in table.column_names]
    return [names, *(table[name].to_pylist() for name in names)]


def _hashes(columns: Mapping[str, Any]) -> dict[str, str]:
    return {name: _hash(values) for name, values in columns.items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
