"""Preference pairs from tables: which rows count, and what a row means."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffusion_align.pictures import CorruptImageError

from .beyond_pairs.balance import Summary
from .beyond_pairs.liked_pictures import LabelledRows, LikedRows
from .beyond_pairs.ranked import ListRows, list_lengths
from .reading.meaning import Meaning, PairRows
from .reading.rows import UNCAPTIONED, USED, counted, image_bytes, preference, row_key, to_record
from .reading.stamps import Stamp, file_stamp, parquet_stamps
from .reading.streamed import CAPTION_SAMPLE, MOST_NAMED, StreamedPairs
from .tables import (
    PAIR_LAYOUTS,
    PICTURE_LAYOUTS,
    UNITS,
    Selection,
    Source,
    local_files,
    open_shards,
    open_source,
    unit_here,
    unit_of,
)
from .types import Record

#: Examples that a notebook shows of a data set.
SHOWN = 4

__all__ = ["PairDataset", "StreamedPairs", "image_bytes", "load_pairs", "load_pictures", "preference", "to_record"]


def load_pairs(
    source: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    keep_ties: bool = False,
    limit: int | None = None,
    seed: int | None = None,
) -> PairDataset | StreamedPairs:
    """Open preference pairs.

    Args:
        source: "scenes-pairs", a hub name ("yuvalkirstain/pickapic_v2"), a parquet file, folder or pattern
            ("data/train-*.parquet") with Pick-a-Pic's columns, or a folder (or file) metadata.jsonl / metadata.csv with
            columns chosen, rejected (paths), caption and, optionally, preference and weight.
        split: of a hub data set, or files named SPLIT-*.parquet in a folder.
        streaming: read parquet files as they are, without a copy; without random access. (Tables of paths, in CSV and
            JSON Lines, are small: they have random access either way.)
        keep_ties: keep pairs without a preferred image (preference 0.5); image 0 is then "chosen".
        limit: use only this many pairs, from the start.
        seed: draw them at random instead; of a stream whole row groups are drawn.

    Raises:
        FileNotFoundError, OSError: nothing readable is there.
        ValueError: missing columns, labels that are no numbers of the expected kind, or no pair left; file, row and
            column are named.
    """
    return _opened(source, split, streaming, PAIR_LAYOUTS, keep_ties, limit, seed)


def load_examples(
    source: str | Path,
    split: str = "train",
    units: Sequence[str] = tuple(UNITS),
    *,
    streaming: bool = False,
    limit: int | None = None,
    seed: int | None = None,
) -> PairDataset | StreamedPairs:
    """Open pairs, labelled pictures or ranked lists, whichever the columns of a table say.

    Args:
        source: as for ``load_pairs``; labelled pictures also as a folder with sub-folders ``liked`` and ``disliked``
            (or ``good`` and ``bad``, ``chosen`` and ``rejected``) of pictures with NAME.txt beside each.
        units: which of them will do: "pairs", "labelled pictures", "ranked lists".
        split, streaming, limit, seed: as for ``load_pairs``.

    Raises:
        FileNotFoundError, OSError: as ``load_pairs``.
        ValueError: it is none of them; or a label that is unknown, a labelled picture without caption, ranks or scores
            that are no numbers or not one for each picture: file and row are named.
    """
    layouts = _layouts(units)
    return _opened(source, split, streaming, layouts, False, limit, seed)


def load_pictures(
    source: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    keep_ties: bool = False,
    limit: int | None = None,
    seed: int | None = None,
) -> PairDataset | StreamedPairs:
    """Open pictures with captions: records without a rejected image.

    Args:
        source: as for ``load_pairs``, whose chosen images are taken, or a table or folder of any of these kinds with
            columns image, caption and, optionally, weight. Of labelled ones (column label) the liked are taken.
        keep_ties: take image 0 of a tie, and disliked pictures; else none.
        split, streaming, limit, seed: as for ``load_pairs``.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    return _opened(source, split, streaming, PICTURE_LAYOUTS, keep_ties, limit, seed, chosen_only=True)


def load_in_file_order(
    source: str | Path,
    split: str = "train",
    *,
    pictures: int = 2,
    streaming: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    units: Sequence[str] = tuple(UNITS),
) -> PairDataset | StreamedPairs:
    """The examples of :func:`load_examples` (or with ``pictures`` 1, :func:`load_pictures`) for reading once from start
    to end: parquet files on this disk are read as they are, also without ``streaming``, which then says only how
    ``seed`` draws."""
    if streaming or not any(file.suffix == ".parquet" for file in local_files(source, split)):
        if pictures == 1:
            return load_pictures(source, split, streaming=streaming, limit=limit, seed=seed)
        return load_examples(source, split, units, streaming=streaming, limit=limit, seed=seed)
    layouts = _layouts(units)
    shards = open_shards(source, split, layouts if pictures == 2 else PICTURE_LAYOUTS)
    assert shards is not None
    pairs = StreamedPairs(shards, _meaning(shards.columns, False, pictures == 1))
    if limit is not None:
        pairs.keep(Selection(limit, seed).of(pairs.numbers().tolist()))
    return pairs


def local_unit(source: str | Path, split: str) -> tuple[str | None, int]:
    """What a data set on this disk holds ("pairs", "labelled pictures", "ranked lists"), and the pictures of its
    longest example; (None, 2) where it is not here, or cannot be read."""
    try:
        unit = unit_here(source, split)
        if unit == "ranked lists":
            return unit, max(list_lengths(load_in_file_order(source, split).cheap_columns()))
    except (OSError, ValueError):
        return None, 2
    return unit, 1 if unit == "labelled pictures" else 2


def _opened(
    source: str | Path,
    split: str,
    streaming: bool,
    layouts: Mapping[str, tuple[str, ...]],
    keep_ties: bool,
    limit: int | None,
    seed: int | None,
    chosen_only: bool = False,
) -> PairDataset | StreamedPairs:
    shards = open_shards(source, split, layouts) if streaming else None
    if shards is None:
        table = open_source(source, split, False, layouts)
        return PairDataset(table, _meaning(table.columns, keep_ties, chosen_only), limit, seed)
    return StreamedPairs(shards, _meaning(shards.columns, keep_ties, chosen_only), limit, seed)


def _layouts(units: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns by what they are called of all kinds of examples that will do."""
    return {title: layout for unit in units for title, layout in UNITS[unit].items()}


def _meaning(columns: Sequence[str], keep_ties: bool, chosen_only: bool) -> Meaning:
    """What the rows of a table are that fits the layouts which were asked for."""
    pairs, unit = PairRows(keep_ties, chosen_only), unit_of(columns)
    if chosen_only:
        return LikedRows() if unit == "labelled pictures" and not keep_ties else pairs
    found: dict[str | None, Meaning] = {"labelled pictures": LabelledRows(), "ranked lists": ListRows()}
    return found.get(unit, pairs)


class PairDataset:
    """Examples with random access.

    Args:
        meaning: what rows are, and which of them are used.
        limit, seed: as for ``load_pairs``.

    Attributes:
        counts: rows of the table, and how many were left out and why.
    """

    def __init__(self, source: Source, meaning: Meaning, limit: int | None = None, seed: int | None = None) -> None:
        self.source, self.meaning = source, meaning
        self.chosen_only = meaning.chosen_only
        self._cheap = [name for name in self.meaning.cheap if name in source.columns]
        kinds = self.meaning.kinds(source.table.select_columns(self._cheap).with_format("arrow")[:], source.where)
        self.counts = counted(len(source.table), kinds)
        #: The first rows without caption.
        self.uncaptioned = [source.where(row) for row in np.flatnonzero(kinds == UNCAPTIONED)[:MOST_NAMED].tolist()]
        self.rows = Selection(limit, seed).of(np.flatnonzero(kinds == USED).tolist())
        if not self.rows:
            dropped = ", ".join(f"{count} {name}" for name, count in self.counts.items())
            raise ValueError(f"{source.name}: no {self.meaning.unit[:-1]} is left to use ({dropped})")
        if source.folder is not None:
            self._check_files(source.folder)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def used(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    @property
    def caption_sample(self) -> list[str]:
        """All captions, or about ``CAPTION_SAMPLE`` of them, evenly spread."""
        return self.captions()[:: -(-len(self) // CAPTION_SAMPLE)]

    def _check_files(self, folder: Path) -> None:
        """Every picture of a table of paths is there, which is cheaper to ask now than after hours."""
        listed: dict[Path, set[str]] = {}
        columns = self.paths()
        for place, row in enumerate(self.rows):
            for column, values in columns.items():
                value = values[place]
                if not isinstance(value, str):  # null counts as unreadable when its turn comes
                    continue
                path = folder / value
                if path.parent not in listed:
                    listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
                if path.name not in listed[path.parent] and not path.is_file():
                    image_bytes(value, folder, f"{self.source.where(row)}, column {column}")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        left = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count and name != "rows")
        return f"PairDataset({self.name}: {self.used:,} {self.unit}{f'; left out: {left}' if left else ''})"

    def _repr_html_(self) -> str:
        shown = [self[place]._repr_html_() for place in range(min(SHOWN, len(self)))]
        return f"<p>{escape(repr(self))}</p>" + "".join(shown)

    def __getitem__(self, index: int) -> Record:
        """Pair ``index`` in [0, len).

        Raises:
            CorruptImageError: the row has no image.
            FileNotFoundError: an image file of an image folder is missing.
        """
        return self._record(self.rows[index])

    def _record(self, row: int) -> Record:
        values, where = self.source.table[row], self.source.where(row)
        return self.meaning.record(values, where, row_key(row), self.source.folder)

    def numbers(self) -> NDArray[np.int64]:
        """Rows of the table that are used, ascending."""
        return np.array(self.rows, dtype=np.int64)

    def where(self, row: int) -> str:
        """What messages call row ``row``."""
        return self.source.where(row)

    def records(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Record | CorruptImageError]]:
        """Some rows with their numbers; what cannot be read as its error."""
        for row in rows.tolist():
            try:
                yield row, self._record(row)
            except CorruptImageError as error:
                yield row, error

    def cheap_columns(self) -> pa.Table:
        """Verdicts, weights and captions of the rows that are used, in their order."""
        return self.source.table.select_columns(self._cheap).with_format("arrow")[:].take(self.rows)

    def stamps(self) -> dict[str, Stamp]:
        """What tells the files that pictures come from from others, by their names."""
        if self.source.folder is not None:
            return {name: file_stamp(self.source.folder / name) for name in self._files()}
        files = [str(file) for file in self.source.files]
        if files:
            return parquet_stamps(files, [pq.read_metadata(file) for file in files])
        downloaded = self.source.table.info.download_checksums or {}
        return {url: [facts.get("num_bytes"), facts.get("checksum")] for url, facts in downloaded.items()}

    def paths(self) -> dict[str, list[str | None]]:
        """Columns of paths to pictures, of the rows that are used; none of a table that holds the pictures."""
        if self.source.folder is None:
            return {}
        names = self.meaning.path_columns(self.source.columns)
        columns = self.source.table.select_columns(names).to_dict()
        found: dict[str, list[str | None]] = {}
        for name, values in columns.items():
            cells = [values[row] for row in self.rows]
            longest = max((len(cell) for cell in cells if isinstance(cell, list)), default=None)
            if longest is None:
                found[name] = cells
                continue
            for place in range(longest):
                found[f"{name}[{place}]"] = [cell[place] if cell and place < len(cell) else None for cell in cells]
        return found

    def rows_in(self, files: Set[str]) -> NDArray[np.int64]:
        """Rows, of those that are used, with a picture in one of some files."""
        if self.source.folder is None:
            return self.numbers()
        of_files = self._files()
        return np.array(sorted({row for name in files for row in of_files.get(name, ())}), dtype=np.int64)

    def _files(self) -> dict[str, list[int]]:
        """The rows that use each file, of a table of paths."""
        found: dict[str, list[int]] = {}
        for values in self.paths().values():
            for row, value in zip(self.rows, values, strict=True):
                if isinstance(value, str):
                    found.setdefault(value, []).append(row)
        return found

    def key(self, index: int) -> str:
        """What messages call pair ``index``; its record's ``key``, without reading it."""
        return row_key(self.rows[index])

    @property
    def unit(self) -> str:
        """What the examples are called."""
        return self.meaning.unit

    def summary(self) -> Summary:
        """What is worth knowing beside what is left out."""
        return self.meaning.summary(self)

    def captions(self) -> list[str]:
        """Every pair's caption, without reading images."""
        column = self.source.table.select_columns(["caption"]).to_dict()["caption"]
        return [str(column[row]) for row in self.rows]
