"""Parquet files in Pick-a-Pic's columns (what ``annotate`` writes) as units to judge, without their pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .keyed import opaque
from .units import Picture, Unit

#: Columns a table of pairs must have.
NEEDED = ("jpg_0", "jpg_1", "caption")
KNOWN = (
    "caption", "ranking_id", "image_0_uid", "image_1_uid", "model_0", "model_1", "scale_0", "scale_1", "label_0",
    "has_label", "user_id", "both_bad", "votes_0", "votes_1",
)  # fmt: skip
SCORE = "score_0_"


@dataclass(frozen=True)
class PairTable:
    """All of some parquet files but for the pictures.

    Attributes:
        rows: each row's file, its number there, and the cheap columns.
        scorers: names X of columns ``score_0_X``, ``score_1_X``.
    """

    rows: list[tuple[Path, int, Mapping[str, Any]]] = field(default_factory=list)
    scorers: tuple[str, ...] = ()


def is_pair_table(file: Path) -> bool:
    """Whether a file is parquet with the columns of pairs; one that cannot be read is none."""
    try:
        return set(NEEDED) <= set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException):
        return False


def parquet_files(place: Path) -> list[Path]:
    """``place`` itself, or the parquet files in the folder, sorted."""
    return [place] if place.is_file() else sorted(place.glob("*.parquet"))


def read_table(files: Sequence[Path]) -> PairTable:
    """The rows of ``files``.

    Raises:
        ValueError: a file cannot be read, or a column is missing; it is named.
    """
    rows: list[tuple[Path, int, Mapping[str, Any]]] = []
    scorers: list[str] = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            missing = [name for name in NEEDED if name not in names]
            if missing:
                raise ValueError(f"{file}: column {missing[0]!r} is missing: expected Pick-a-Pic's columns")
            here = [name.removeprefix(SCORE) for name in names if name.startswith(SCORE)]
            here = [name for name in here if f"score_1_{name}" in names]
            columns = [name for name in KNOWN if name in names]
            columns += [f"score_{side}_{name}" for name in here for side in (0, 1)]
            # read_table loads pyarrow.dataset, for 30 MB of memory.
            table = pq.ParquetFile(file).read(columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read as a table: {error}") from None
        scorers += [name for name in here if name not in scorers]
        rows += [(file, number, row) for number, row in enumerate(table.to_pylist())]
    return PairTable(rows, tuple(scorers))


def sides(file: Path, number: int, row: Mapping[str, Any]) -> tuple[Picture, Picture]:
    """Both pictures of a row."""
    first, second = (
        Picture(
            file,
            number,
            f"jpg_{side}",
            str(row.get(f"image_{side}_uid") or f"{file.name}:{number}:{side}"),
            row.get(f"image_{side}_uid"),
            row.get(f"model_{side}"),
            row.get(f"scale_{side}"),
        )
        for side in (0, 1)
    )
    return first, second


def scores_of(row: Mapping[str, Any], scorers: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Both scores of a row, by scorer; NaN where there is none."""
    return {name: (_number(row.get(f"score_0_{name}")), _number(row.get(f"score_1_{name}"))) for name in scorers}


def pairs_of_table(table: PairTable) -> list[Unit]:
    """One unit for each row; of rows with the same prompt and pictures the first one."""
    found: dict[str, Unit] = {}
    for file, number, row in table.rows:
        pictures = sides(file, number, row)
        prompt = str(row["caption"])
        key = opaque(prompt, *sorted(picture.name for picture in pictures))
        unit = Unit(key, prompt, pictures, str(row.get("ranking_id") or ""), scores_of(row, table.scorers))
        found.setdefault(key, unit)
    return list(found.values())


def groups_of_table(table: PairTable) -> list[Unit]:
    """One unit for the pictures of each prompt and ``ranking_id``; those of one picture are left out by nobody: a pair
    has two."""
    groups: dict[tuple[str, str], dict[str, tuple[Picture, dict[str, float]]]] = {}
    for file, number, row in table.rows:
        group = groups.setdefault((str(row["caption"]), str(row.get("ranking_id") or "")), {})
        scores = scores_of(row, table.scorers)
        for side, picture in enumerate(sides(file, number, row)):
            group.setdefault(picture.name, (picture, {name: both[side] for name, both in scores.items()}))
    return [
        Unit(
            opaque("group", prompt, ranking, *sorted(group)),
            prompt,
            tuple(picture for picture, _ in group.values()),
            ranking,
            {name: tuple(scores[name] for _, scores in group.values()) for name in table.scorers},
        )
        for (prompt, ranking), group in groups.items()
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
