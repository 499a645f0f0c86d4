"""Data sets written anew from some of the rows of another one: in Pick-a-Pic's columns, file by file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

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
    hard = label if label in (None, 0.5) else float(label > 0.5)
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
    from datasets import Dataset
    from datasets.table import InMemoryTable

    own = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "caption": pa.string(), "label_0": pa.float64(),
           "label_1": pa.float64(), "has_label": pa.bool_(), SOFT_LABEL: pa.float64()}  # fmt: skip
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = pa.array([row.get(name) for row in rows], own.get(name))
        if not pa.types.is_null(column.type):
            columns[name] = column
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, Dataset(InMemoryTable(pa.table(columns))))


def readable(pairs: Iterable[RawPair], left_out: list[str]) -> Iterator[RawPair]:
    """Pairs whose pictures are there; what is left out is named."""
    for pair in pairs:
        lacking = [content for content in pair.pictures if isinstance(content, CorruptImageError)]
        if lacking:
            left_out.append(str(lacking[0]))
        else:
            yield pair
