"""Preference pairs from tables: which rows count, and what a row means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from .tables import PICTURE_LAYOUTS, Selection, Source, open_source
from .types import PairRecord

#: Optional column beside ``label_0``: P(image 0 is preferred), e.g. a scorer's.
SOFT_LABEL = "soft_label_0"


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
        source: "scenes-pairs", a hub name ("yuvalkirstain/pickapic_v2"), a parquet file or folder with Pick-a-Pic's
            columns, or a folder (or file) metadata.jsonl / metadata.csv with columns chosen, rejected (paths), caption
            and, optionally, preference and weight.
        split: of a hub data set, or files named SPLIT-*.parquet in a folder.
        streaming: do not download or index; rows come in order, ties are skipped as they come.
        keep_ties: keep pairs without a preferred image (preference 0.5); image 0 is then "chosen".
        limit: use only this many pairs, from the start.
        seed: draw them at random instead; of a stream the first ones are taken, which alone are known without reading
            it all.

    Raises:
        FileNotFoundError, OSError: nothing readable is there.
        ValueError: missing columns, labels that are no numbers of the expected kind, or no pair left; file, row and
            column are named.
    """
    table = open_source(source, split, streaming)
    return StreamedPairs(table, keep_ties, limit) if streaming else PairDataset(table, keep_ties, limit, seed)


def load_pictures(
    source: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    limit: int | None = None,
    seed: int | None = None,
) -> PairDataset | StreamedPairs:
    """Open pictures with captions: records without a rejected image.

    Args:
        source: as for ``load_pairs``, whose chosen images are taken (of a tie none is), or a table or folder of any of
            these kinds with columns image, caption and, optionally, weight.
        split, streaming, limit, seed: as for ``load_pairs``.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    table = open_source(source, split, streaming, PICTURE_LAYOUTS)
    if streaming:
        return StreamedPairs(table, limit=limit, chosen_only=True)
    return PairDataset(table, limit=limit, seed=seed, chosen_only=True)


class PairDataset:
    """Pairs with random access; decisive rows only unless ties are kept.

    Args:
        limit, seed: as for ``load_pairs``.
        chosen_only: rejected images are not read.

    Attributes:
        counts: rows of the table, and how many were left out and why.
    """

    def __init__(
        self,
        source: Source,
        keep_ties: bool = False,
        limit: int | None = None,
        seed: int | None = None,
        chosen_only: bool = False,
    ) -> None:
        self.source, self.chosen_only = source, chosen_only
        names = [c for c in ("label_0", "label_1", "has_label", "preference", SOFT_LABEL) if c in source.columns]
        rows: list[dict[str, Any]] = source.table.select_columns(names).to_list() if names else []
        total = len(source.table)
        self.counts = {"rows": total, "without label": 0, "ties": 0}
        self.rows: list[int] = []
        self.preferences: list[float] = []
        for index in range(total):
            value = preference(rows[index] if rows else {}, f"{source.name}, row {index}")
            if value is None:
                self.counts["without label"] += 1
            elif value == 0.5 and not keep_ties:
                self.counts["ties"] += 1
            else:
                self.rows.append(index)
        self.rows = Selection(limit, seed).of(self.rows)
        if not self.rows:
            dropped = ", ".join(f"{count} {name}" for name, count in self.counts.items())
            raise ValueError(f"{source.name}: no pair is left to use ({dropped})")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairRecord:
        """Pair ``index`` in [0, len).

        Raises:
            FileNotFoundError: an image file of an image folder is missing.
        """
        row = self.rows[index]
        return to_record(self.source.table[row], self.source, row, self.chosen_only)

    def key(self, index: int) -> str:
        """What messages call pair ``index``; its record's ``key``, without reading it."""
        return row_key(self.rows[index])

    def captions(self) -> list[str]:
        """Every pair's caption, without reading images."""
        column = self.source.table.select_columns(["caption"]).to_dict()["caption"]
        return [str(column[row]) for row in self.rows]


class StreamedPairs:
    """Pairs in the order of the stream; iterate, shard and save the position.

    The number in a pair's key is its place in this process's stream.
    """

    def __init__(
        self, source: Source, keep_ties: bool = False, limit: int | None = None, chosen_only: bool = False
    ) -> None:
        self.source, self.keep_ties, self.limit, self.chosen_only = source, keep_ties, limit, chosen_only

    def shard(self, rank: int, world_size: int) -> StreamedPairs:
        """This process's rows: no two processes get the same row."""
        from datasets.distributed import split_dataset_by_node

        if world_size == 1:
            return self
        table = split_dataset_by_node(self.source.table, rank, world_size)
        source = replace(self.source, table=table)
        limit = None if self.limit is None else -(-self.limit // world_size)
        return StreamedPairs(source, self.keep_ties, limit, self.chosen_only)

    def in_random_files(self, seed: int) -> StreamedPairs:
        """The same pairs with the files of the stream in random order, one at a time, and others in each epoch.

        With a ``limit`` the order stays: it is the first pairs that are used.
        """
        if self.limit is not None:
            return self
        shuffle = self.source.table.shuffle
        # Newer versions of datasets read ten files at once, and then wait five seconds at the end of each epoch.
        single = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in signature(shuffle).parameters else {}
        table = shuffle(seed=seed, buffer_size=1, **single)  # a buffer of one row moves files only
        return StreamedPairs(replace(self.source, table=table), self.keep_ties, chosen_only=self.chosen_only)

    def epoch(self, number: int) -> Iterator[PairRecord]:
        """The pairs in the order of epoch ``number``."""
        if self.limit is None:  # an epoch's number moves files, also of tables that were not shuffled
            self.source.table.set_epoch(number)
        return iter(self)

    def __iter__(self) -> Iterator[PairRecord]:
        used = 0
        for index, row in enumerate(self.source.table):
            if self.limit is not None and used >= self.limit:
                return
            value = preference(row, f"{self.source.name}, row {index}")
            if value is None or (value == 0.5 and not self.keep_ties):
                continue
            used += 1
            yield to_record(row, self.source, index, self.chosen_only)


def preference(row: dict[str, Any], where: str) -> float | None:
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
    if isinstance(value, str | bool) or not math.isfinite(value):
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
    if isinstance(soft, str | bool) or not 0 <= soft <= 1:
        raise ValueError(f"{where}: {SOFT_LABEL} = {soft!r} is wrong: expected a number in [0, 1]")
    return float(soft if value == 1 else 1 - soft)


def to_record(row: dict[str, Any], source: Source, index: int, chosen_only: bool = False) -> PairRecord:
    """The pair of one row, the preferred image as ``chosen``; the only image of a row is that, too."""
    where = f"{source.name}, row {index}"
    value = preference(row, where)
    assert value is not None
    names: tuple[str, ...] = ("chosen", "rejected") if "chosen" in row else ("image",)
    if "label_0" in row:
        names = ("jpg_1", "jpg_0") if row["label_0"] == 0 else ("jpg_0", "jpg_1")
    if chosen_only and value < 0.5:
        names = names[::-1]
    if not isinstance(row["caption"], str):
        raise ValueError(f"{where}: caption = {row['caption']!r} is wrong: expected text")
    weight = row.get("weight")
    if weight is not None and (isinstance(weight, str) or not weight >= 0):
        raise ValueError(f"{where}: weight = {weight!r} is wrong: expected a number of at least 0")
    images = [image_bytes(row[name], source, f"{where}, column {name}") for name in names[: 1 if chosen_only else 2]]
    chosen, rejected = images[0], images[1] if len(images) == 2 else None
    return PairRecord(chosen, rejected, row["caption"], value, 1.0 if weight is None else float(weight), row_key(index))


def row_key(row: int) -> str:
    return f"row {row}"


def image_bytes(value: Any, source: Source, where: str) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected image bytes or a path, found {type(value).__name__}")
    path = (source.folder or Path()) / value
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"{where}: image {path} cannot be read ({error.strerror})") from None
