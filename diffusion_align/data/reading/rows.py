"""What a row of a table of pairs means: its verdict, weight, caption and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffusion_align.pictures import CorruptImageError

from ..types import PairRecord

#: Optional column beside ``label_0``: P(image 0 is preferred), e.g. a scorer's.
SOFT_LABEL = "soft_label_0"
#: Columns that verdicts are made of.
VERDICT = ("label_0", "label_1", "has_label", "preference", SOFT_LABEL)
#: Columns that are read and checked before the first step: all that count, without the pictures.
CHEAP = (*VERDICT, "weight", "caption")
#: Kinds of rows, and what they are called in counts. Those of kind 0 are used.
USED, UNLABELLED, TIE, UNCAPTIONED, DISLIKED = range(5)
KINDS: Mapping[int, str] = MappingProxyType({UNLABELLED: "without label", TIE: "ties", UNCAPTIONED: "without caption"})
#: Of labelled pictures, for what learns from the liked ones alone.
KINDS_OF_PICTURES: Mapping[int, str] = MappingProxyType({**KINDS, DISLIKED: "disliked"})
#: Kinds that are rare, and are only told where there are some.
RARE = (UNCAPTIONED, DISLIKED)


def counted(rows: int, kinds: NDArray[np.uint8] | None = None) -> dict[str, int]:
    """How many rows there are, and how many are left out and why; what is rare is only told if found."""
    length = len(KINDS_OF_PICTURES) + 1
    found = np.zeros(length, dtype=int) if kinds is None else np.bincount(kinds, minlength=length)
    counts = {name: int(found[kind]) for kind, name in KINDS_OF_PICTURES.items() if found[kind] or kind not in RARE}
    return {"rows": rows, **counts}


def kinds_of_rows(table: pa.Table, where: Callable[[int], str], keep_ties: bool) -> NDArray[np.uint8]:
    """The kind of every row of ``table``, (rows,), which holds the columns of ``CHEAP`` that there are.

    Args:
        where: what messages call row i of the table.

    Raises:
        ValueError: as :func:`preference`, :func:`weight_of` and :func:`caption_of`, for the first such row.
    """
    verdicts, captioned = _verdicts(table, where), _captioned(table, where)
    check_weights(table, where)
    kinds = np.zeros(len(table), dtype=np.uint8)
    kinds[~captioned] = UNCAPTIONED
    if not keep_ties:
        kinds[verdicts == 0.5] = TIE
    kinds[np.isnan(verdicts)] = UNLABELLED
    return kinds


def preference(row: Mapping[str, Any], where: str) -> float | None:
    """P(the better image is preferred): 1 for a decisive row, or what its soft label says; 0.5 for a tie, None without
    a label.

    Raises:
        ValueError: a label that is text, or none of 0, 0.5 and 1 (Pick-a-Pic), or outside [0, 1] (soft ones).
    """
    if row.get("has_label") is False:
        return None
    column = "label_0" if "label_0" in row else "preference"
    value = row.get(column, 1.0)
    if value is None:
        return None if column == "label_0" else 1.0
    allowed = "0, 0.5 (tie) or 1" if column == "label_0" else "a number in [0, 1]"
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{where}: {column} = {value!r} is wrong: expected {allowed}")
    if column == "preference":
        if not 0 <= value <= 1:
            raise ValueError(f"{where}: {column} = {value!r} is wrong: expected {allowed}")
        return float(value)
    if value not in (0, 0.5, 1):
        raise ValueError(f"{where}: {column} = {value!r} is wrong: expected {allowed}")
    other = row.get("label_1")
    if other is not None and abs(value + other - 1) > 1e-6:
        raise ValueError(
            f"{where}: label_0 = {value!r} and label_1 = {other!r} contradict each other: their sum must be 1"
        )
    if value == 0.5:
        return 0.5
    soft = row.get(SOFT_LABEL)
    if soft is None:
        return 1.0
    if not _is_number(soft) or not 0 <= soft <= 1:
        raise ValueError(f"{where}: {SOFT_LABEL} = {soft!r} is wrong: expected a number in [0, 1]")
    return float(soft if value == 1 else 1 - soft)


def first_preferred(row: Mapping[str, Any], where: str) -> float | None:
    """P(the first picture of a row's ``pair_columns`` is preferred), without soft labels beside ``label_0``; None
    without a label.

    Raises:
        ValueError: as :func:`preference`.
    """
    sure = preference(row, where)
    return sure if sure is None or "label_0" not in row else float(row["label_0"])


def pair_columns(names: Container[str]) -> tuple[str, str]:
    """Those of ``names`` that hold the two pictures of a pair."""
    return ("jpg_0", "jpg_1") if "jpg_0" in names else ("chosen", "rejected")


def weight_of(row: Mapping[str, Any], where: str) -> float:
    """Factor of the pair's loss; 1 where there is none.

    Raises:
        ValueError: no number of at least 0.
    """
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if not _is_number(weight) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: weight = {weight!r} is wrong: expected a number of at least 0")
    return float(weight)


def caption_of(row: Mapping[str, Any], where: str) -> str:
    """The caption.

    Raises:
        ValueError: it is no text.
    """
    caption = row["caption"]
    if not isinstance(caption, str):
        raise ValueError(f"{where}: caption = {caption!r} is wrong: expected text")
    return caption


def to_record(
    row: Mapping[str, Any], where: str, key: str, folder: Path | None, chosen_only: bool = False
) -> PairRecord:
    """The pair of one row with a verdict, the preferred image as ``chosen``; the only image of a row is that, too.

    Args:
        where: what messages call the row.
        folder: where relative paths start.
        chosen_only: leave the rejected image out.

    Raises:
        ValueError, CorruptImageError, FileNotFoundError: as the functions of this module.
    """
    value = preference(row, where)
    assert value is not None
    names: tuple[str, ...] = ("chosen", "rejected") if "chosen" in row else ("image",)
    if "label_0" in row:
        names = ("jpg_1", "jpg_0") if row["label_0"] == 0 else ("jpg_0", "jpg_1")
    if chosen_only and value < 0.5:
        names = names[::-1]
    caption, weight = caption_of(row, where), weight_of(row, where)
    read = names[: 1 if chosen_only else 2]
    images = [image_bytes(row[name], folder, f"{where}, column {name}") for name in read]
    return PairRecord(images[0], images[1] if len(images) == 2 else None, caption, value, weight, key)


def row_key(row: int) -> str:
    """What messages and fixed draws call row ``row`` of a table."""
    return f"row {row}"


def image_bytes(value: Any, folder: Path | None, where: str) -> bytes:
    """The encoded picture in a cell: bytes, a path, or the hub's struct of both.

    Raises:
        CorruptImageError: there is none.
        FileNotFoundError: the file cannot be read.
        ValueError: a cell of another type.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if value is None:
        raise CorruptImageError(f"{where}: there is no image")
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected image bytes or a path, found {type(value).__name__}")
    path = (folder or Path()) / value
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{where}: image {path} cannot be read ({error.strerror})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | Decimal) and not isinstance(value, bool)


def _verdicts(table: pa.Table, where: Callable[[int], str]) -> NDArray[np.float64]:
    """``preference`` of every row, (rows,) float64, NaN without a label."""
    names = [name for name in VERDICT if name in table.column_names]
    if not names:
        return np.ones(len(table))
    quick = _quick_verdicts(table)
    if quick is not None:
        return quick
    rows = table.select(names).to_pylist()
    found = [preference(row, where(number)) for number, row in enumerate(rows)]
    return np.array([math.nan if value is None else value for value in found], dtype=np.float64)


def _quick_verdicts(table: pa.Table) -> NDArray[np.float64] | None:
    """All verdicts at once; None where there are soft labels, or a row is wrong or of another type, which is to be
    named."""
    if SOFT_LABEL in table.column_names:
        return None
    labelled = np.ones(len(table), dtype=bool)
    if "has_label" in table.column_names:
        if not pa.types.is_boolean(table.schema.field("has_label").type):
            return None
        labelled = table["has_label"].fill_null(True).to_numpy()
    column = "label_0" if "label_0" in table.column_names else "preference"
    if column not in table.column_names:
        return np.where(labelled, 1.0, math.nan)
    values, missing = _numbers(table, column)
    if values is None:
        return None
    given = labelled & ~missing
    if column == "preference":
        wrong = given & ~((values >= 0) & (values <= 1))
        found = np.where(missing, 1.0, values)
    else:
        wrong = given & ~np.isin(values, (0, 0.5, 1))
        if "label_1" in table.column_names:
            others, unknown = _numbers(table, "label_1")
            if others is None:
                return None
            wrong |= given & ~unknown & ~(np.abs(values + others - 1) <= 1e-6)
        found = np.where(missing, math.nan, np.where(values == 0.5, 0.5, 1.0))
    return None if wrong.any() else np.where(labelled, found, math.nan)


def _numbers(table: pa.Table, name: str) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_]]:
    """Values, and which are null; no values where the column is of another type."""
    column, kind = table[name], table.schema.field(name).type
    missing = column.is_null().to_numpy()
    if pa.types.is_null(kind):
        return np.full(len(table), math.nan), missing
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        return None, missing
    return column.cast(pa.float64()).fill_null(0.0).to_numpy(), missing


def check_weights(table: pa.Table, where: Callable[[int], str]) -> None:
    """Raises ValueError as :func:`weight_of`, for the first such row."""
    if "weight" not in table.column_names:
        return
    values, missing = _numbers(table, "weight")
    if values is not None and (missing | ((values >= 0) & (values < math.inf))).all():
        return
    for number, row in enumerate(table.select(["weight"]).to_pylist()):
        weight_of(row, where(number))


def _captioned(table: pa.Table, where: Callable[[int], str]) -> NDArray[np.bool_]:
    """Which rows have a caption, that is more than blanks."""
    if "caption" not in table.column_names:
        return np.ones(len(table), dtype=bool)
    column, kind = table["caption"], table.schema.field("caption").type
    if pa.types.is_null(kind):
        return np.zeros(len(table), dtype=bool)
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        for number, value in enumerate(column.to_pylist()):
            if value is not None:
                caption_of({"caption": value}, where(number))
        return np.zeros(len(table), dtype=bool)
    filled: NDArray[np.bool_] = (
        pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0).fill_null(False).to_numpy()
    )
    return filled
