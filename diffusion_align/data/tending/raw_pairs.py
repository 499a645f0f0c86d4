"""The pairs of a data set one by one, as they are stored: also ties, rows without label, and torn pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.pictures import CorruptImageError

from ..reading.rows import first_preferred, image_bytes, pair_columns
from ..tables import Source, local_files, open_source


@dataclass(frozen=True)
class RawPair:
    """One row.

    Attributes:
        split, number: where it stands.
        where: what messages call it.
        row: all its columns.
        label_0: P(picture 0 is preferred): 1, 0.5, 0, or for tables of chosen and rejected pictures anything between;
            None without a label.
        pictures: encoded, sides 0 and 1, or why there is none.
    """

    split: str
    number: int
    where: str
    row: Mapping[str, Any]
    label_0: float | None
    pictures: tuple[bytes | CorruptImageError, bytes | CorruptImageError]

    @property
    def caption(self) -> str:
        """The prompt; "" where there is none."""
        caption = self.row.get("caption")
        return caption if isinstance(caption, str) else ""

    @property
    def key(self) -> str:
        """The prompt as it is compared with others: without case and spaces."""
        return normalised(self.caption)

    def label_of(self, side: int) -> float | None:
        """P(the picture of a side is preferred); None without a label."""
        return self.label_0 if self.label_0 is None or side == 0 else 1 - self.label_0


def normalised(prompt: str) -> str:
    """A prompt without case, and with single spaces."""
    return " ".join(prompt.casefold().split())


def open_raw(source: str | Path, split: str) -> Source:
    """A data set of pairs, read as it is.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``open_source``.
    """
    return open_source(source, split, streaming=True)


def raw_pairs(source: str | Path, split: str) -> Iterator[RawPair]:
    """The rows of a data set.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    table = open_raw(source, split)
    columns = pair_columns(table.columns)
    for number, row in enumerate(table.table):
        where = table.where(number)
        label = first_preferred(row, where)
        first, second = (_content(row[name], table.folder, f"{where}, column {name}") for name in columns)
        yield RawPair(split, number, where, row, label, (first, second))


def splits_of(source: str | Path, asked: Sequence[str]) -> list[str]:
    """Those of ``asked`` that a data set on this disk has; all of a single file are one split.

    Raises:
        FileNotFoundError: it has none of them.
    """
    found, last = [], None
    for split in asked:
        try:
            files = local_files(source, split)
        except FileNotFoundError as error:
            last = error
            continue
        found.append((split, tuple(files)))
    if not found and last is not None:
        raise last
    distinct: dict[tuple[Path, ...], str] = {}
    for split, names in found:
        distinct.setdefault(names, split)  # a file without splits is the same for all
    return list(distinct.values())


def _content(cell: Any, folder: Path | None, where: str) -> bytes | CorruptImageError:
    try:
        return image_bytes(cell, folder, where)
    except (CorruptImageError, FileNotFoundError) as error:
        return error if isinstance(error, CorruptImageError) else CorruptImageError(str(error))
