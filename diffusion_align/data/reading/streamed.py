"""Pairs that are read straight from parquet files, in whatever order, without an index or a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import groupby

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffusion_align.pictures import CorruptImageError

from ..beyond_pairs.balance import Summary
from ..types import Record
from .meaning import Meaning
from .row_order import spread_order
from .rows import UNCAPTIONED, USED, counted, row_key
from .shards import Shards
from .stamps import Stamp

#: About so many captions, evenly spread over the data set, are kept as a sample.
CAPTION_SAMPLE = 10_000
#: Rows without caption that are named.
MOST_NAMED = 5


class StreamedPairs:
    """Pairs of parquet files, read by row groups.

    On this disk, verdicts, weights and captions of all rows are read and checked at once; on the hub when the rows'
    turn comes.

    Args:
        meaning: what rows are.
        limit: how many pairs are used; None uses all.
        seed: they are drawn at random, by whole parts of files that are spread evenly over the data set; None takes the
            first ones.

    Attributes:
        parts: what is read together; ``selected`` are the numbers of those that are used, ascending.
        counts: rows of the data set, and how many were left out and why, of those that were looked at.
        uncaptioned: the first rows without caption.
        caption_sample: captions evenly spread over what was looked at; all of them in small data sets.

    Raises:
        ValueError: a row that is wrong, or no pair left; file, row and column are named.
    """

    def __init__(
        self,
        shards: Shards,
        meaning: Meaning,
        limit: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.meaning, self.shards, self.limit = meaning, shards, limit
        self.chosen_only = meaning.chosen_only
        self.seed = None if limit is None else seed
        self.cheap = [name for name in self.meaning.cheap if name in shards.columns]
        self.columns = [*self.meaning.pictures(shards.columns), *self.cheap]
        self.parts = shards.parts(self.columns)
        self.sizes = np.array([part.rows for part in self.parts], dtype=np.int64)
        self.counts = counted(len(shards))
        self.uncaptioned: list[str] = []
        self.caption_sample: list[str] = []
        self._used, self._known = np.zeros(len(shards), dtype=bool), np.zeros(len(shards.groups), dtype=bool)
        self._first_rows = np.array([part.first for part in self.parts], dtype=np.int64)
        if shards.is_local:
            self._look_at(range(len(shards.groups)))
        self.selected = np.arange(len(self.parts)) if limit is None else self._select(limit)
        if (shards.is_local or limit is not None) and not self._used.any():
            dropped = ", ".join(f"{count} {name}" for name, count in self.counts.items())
            raise ValueError(f"{shards.name}: no {self.meaning.unit[:-1]} is left to use ({dropped})")

    @property
    def name(self) -> str:
        return self.shards.name

    @property
    def used(self) -> int | None:
        """Number of pairs; None where not all rows were looked at."""
        return int(self._used.sum()) if self.limit is not None or self._known.all() else None

    def facts(self) -> dict[str, object]:
        """What a position in these pairs depends on; JSON-able."""
        return {**self.shards.facts(), "max_pairs": self.limit, "drawn with": self.seed, **self.meaning.facts()}

    def rows_of(self, parts: Iterable[int]) -> NDArray[np.int64]:
        """Numbers of the rows that are used of some parts, part by part."""
        chosen = [self.parts[number] for number in parts]
        self._look_at(sorted({part.group for part in chosen}))
        ranges = [part.first + np.flatnonzero(self._used[part.first : part.first + part.rows]) for part in chosen]
        return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

    def captions(self) -> list[str]:
        """The caption of every pair, in the order of the files; no pictures are read."""
        found: list[str] = []
        groups = sorted({self.parts[number].group for number in self.selected.tolist()})
        self._look_at(groups)
        for number, table in zip(groups, self.shards.in_threads(self._captions, groups), strict=True):
            first = self.shards.groups[number].first
            found += table.filter(self._used[first : first + len(table)]).to_pylist()
        return found

    def _captions(self, number: int) -> pa.ChunkedArray:
        return self.shards.table([number], ["caption"])["caption"]

    def numbers(self) -> NDArray[np.int64]:
        """Rows of the data set that are used, ascending."""
        return self.rows_of(self.selected.tolist())

    def keep(self, rows: Sequence[int]) -> None:
        """Use these rows only."""
        kept = np.zeros_like(self._used)
        kept[list(rows)] = True
        self._used &= kept
        self.selected = np.unique(self.part_of(np.flatnonzero(self._used)))

    def where(self, row: int) -> str:
        """What messages call row ``row``."""
        return self.shards.where(row)

    def records(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Record | CorruptImageError]]:
        """Some rows (ascending) with their numbers; what cannot be read as its error."""
        parts = self.part_of(rows)
        for part in np.unique(parts).tolist():
            yield from self.read(part, rows[parts == part]).items()

    def cheap_columns(self) -> pa.Table:
        """Verdicts, weights and captions of the rows that are used, in their order."""
        groups = sorted({self.parts[number].group for number in self.selected.tolist()})
        tables = self.shards.in_threads(lambda number: self.shards.table([number], self.cheap), groups)
        kept = []
        for number, table in zip(groups, tables, strict=True):
            first = self.shards.groups[number].first
            kept.append(table.filter(pa.array(self._used[first : first + len(table)])))
        return pa.concat_tables(kept, promote_options="permissive")

    def stamps(self) -> dict[str, Stamp]:
        """What tells the data set's files from others, by their names."""
        return self.shards.stamps()

    def paths(self) -> dict[str, list[str | None]]:
        """No columns of paths: the files hold the pictures."""
        return {}

    def rows_in(self, files: Set[str]) -> NDArray[np.int64]:
        """Rows, of those that are used, in some files."""
        rows = self.numbers()
        return rows[self.shards.in_files(rows, files)]

    @property
    def unit(self) -> str:
        """What the examples are called."""
        return self.meaning.unit

    def summary(self) -> Summary:
        """What is worth knowing beside what is left out; nothing of rows on the hub, which are looked at later."""
        return Summary() if self.used is None else self.meaning.summary(self)

    def part_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the part that holds each row."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def read(self, part: int, rows: NDArray[np.int64]) -> dict[int, Record | CorruptImageError]:
        """Some rows (ascending) of one part, by their number in the data set; what cannot be read as its error."""
        number = self.parts[part].group
        try:
            values = self.shards.rows(number, rows, self.columns)
        except ValueError as error:
            return {int(row): CorruptImageError(f"{row_key(int(row))}: {error}") for row in rows}
        return {int(row): self._record(value, int(row)) for row, value in zip(rows, values, strict=True)}

    def __iter__(self) -> Iterator[Record]:
        """The pairs in the order of the files.

        Raises:
            CorruptImageError: there is no image in one.
        """
        for number in self.selected.tolist():
            for record in self.read(number, self.rows_of([number])).values():
                if isinstance(record, CorruptImageError):
                    raise record
                yield record

    def _record(self, values: dict[str, object], row: int) -> Record | CorruptImageError:
        try:
            return self.meaning.record(values, self.shards.where(row), row_key(row), None)
        except CorruptImageError as error:
            return error

    def _look_at(self, numbers: Iterable[int]) -> None:
        """Check the cheap columns of row groups that were not looked at yet."""
        unknown = [number for number in numbers if not self._known[number]]
        files = [list(groups) for _, groups in groupby(unknown, lambda number: self.shards.groups[number].file)]
        if not self.shards.is_local:  # each row group is a request of its own
            files = [[number] for number in unknown]
        for groups, (rows, kinds, captions) in zip(files, self.shards.in_threads(self._kinds, files), strict=True):
            self._used[rows] = kinds == USED
            self._known[groups] = True
            found = counted(0, kinds)
            self.counts |= {name: self.counts.get(name, 0) + count for name, count in found.items()}
            bare = rows[kinds == UNCAPTIONED][: MOST_NAMED - len(self.uncaptioned)]
            self.uncaptioned += [self.shards.where(row) for row in bare.tolist()]
            self.caption_sample += captions

    def _kinds(self, numbers: list[int]) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[str]]:
        """Rows of some row groups of one file, their kinds, and a sample of the used ones' captions."""
        groups = [self.shards.groups[number] for number in numbers]
        rows = np.concatenate([np.arange(group.first, group.first + group.rows) for group in groups])
        table = self.shards.table(numbers, self.cheap)
        kinds = self.meaning.kinds(table, lambda row: self.shards.where(int(rows[row])))
        stride = -(-len(self.shards) // CAPTION_SAMPLE)
        return rows, kinds, table["caption"].take(np.flatnonzero((kinds == USED) & (rows % stride == 0))).to_pylist()

    def _select(self, limit: int) -> NDArray[np.int64]:
        """The parts that hold the first ``limit`` pairs in random or in the given order; others are unused."""
        count = len(self.parts)
        order = np.arange(count) if self.seed is None else spread_order(count, np.random.default_rng([self.seed, 3]))
        taken: list[int] = []
        for start in range(0, count, self.shards.threads):
            together = order[start : start + self.shards.threads].tolist()
            self._look_at(sorted({self.parts[number].group for number in together}))
            for number in together:
                taken.append(number)
                rows = self.rows_of([number])
                limit -= len(rows)
                if limit <= 0:
                    self._used[rows[len(rows) + limit :]] = False
                    chosen = np.array(sorted(taken))
                    self._only(chosen)
                    return chosen
        return np.arange(count)

    def _only(self, chosen: NDArray[np.int64]) -> None:
        """Of the rows that were looked at, use those of some parts only."""
        kept = np.zeros_like(self._used)
        for number in chosen.tolist():
            part = self.parts[number]
            kept[part.first : part.first + part.rows] = True
        self._used &= kept
