"""Data sets written anew from some of the rows of another one: in Pick-a-Pic's columns, file by file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_align.files import write_parquet
from diffusion_align.pictures import CorruptImageError

from ..reading.rows import SOFT_LABEL
from .raw_pairs import RawPair

#: Columns of verdicts and pictures, which are written anew; all others stay.
OWN = ("jpg_0", "jpg_1", "chosen", "rejected", "label_0", "label_1", "has_label", "preference")
SHARD = 1000


def pickapic_row(pair: RawPair) -> dict[str, Any]:
    """The row in Pick-a-Pic's columns; soft verdicts become ``soft_label_0``.

    Raises:
        CorruptImageError: it has no picture.
    """
    for content in pair.pictures:
        if isinstance(content, CorruptImageError):
            raise content
    label = pair.label_0
    hard = label if label in (None, 0.5) else float(label > 0.5)  # type: ignore[operator]
    row = {"jpg_0": pair.pictures[0], "jpg_1": pair.pictures[1], "caption": pair.caption, "label_0": hard}
    row |= {"label_1": None if hard is None else 1 - hard, "has_label": hard is not None}
    if label != hard:
        row[SOFT_LABEL] = label
    return row | {name: value for name, value in pair.row.items() if name not in OWN and name != "caption"}


def write_rows(rows: Iterable[Mapping[str, Any]], out: Path, split: str, shard_size: int = SHARD) -> int:
    """Write rows to ``out``/SPLIT-00000.parquet and so on; returns how many.

    Columns that rows have and others lack are null there.
    """
    total, number, waiting = 0, 0, iter(rows)
    while part := list(islice(waiting, shard_size)):
        _write(part, out / f"{split}-{number:05d}.parquet")
        total, number = total + len(part), number + 1
    return total


def _write(rows: list[Mapping[str, Any]], path: Path) -> None:
    from datasets import Dataset, Features, Value

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    empty = {name for name, values in columns.items() if all(value is None for value in values)}
    table = Dataset.from_dict({name: values for name, values in columns.items() if name not in empty})
    own = {"jpg_0": "binary", "jpg_1": "binary", "caption": "string", "label_0": "float64", "label_1": "float64",
           "has_label": "bool", SOFT_LABEL: "float64"}  # fmt: skip
    kinds = {name: Value(own[name]) if name in own else kind for name, kind in table.features.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, table.cast(Features(kinds)))


def readable(pairs: Iterable[RawPair], left_out: list[str]) -> Iterator[RawPair]:
    """Pairs whose pictures are there; what is left out is named."""
    for pair in pairs:
        lacking = [content for content in pair.pictures if isinstance(content, CorruptImageError)]
        if lacking:
            left_out.append(str(lacking[0]))
        else:
            yield pair
