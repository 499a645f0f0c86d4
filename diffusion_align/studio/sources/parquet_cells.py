"""Single cells of parquet files, without holding a row group of pictures in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Rows that are read together; whoever asks for one asks for its neighbours next.
ROWS = 16
#: Bytes of pictures that are kept.
MOST_BYTES = 8 * 2**20


@dataclass
class _Reader:
    """One column of one file, read forward."""

    file: pq.ParquetFile
    column: str
    group: int = -1
    next_batch: int = 0
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))

    def batch(self, group: int, number: int) -> list[Any]:
        """Batch ``number`` of a row group; going forward is cheap, going back starts the group again."""
        if group != self.group or number < self.next_batch:
            self.group, self.next_batch = group, 0
            self.batches = self.file.iter_batches(ROWS, [group], columns=[self.column], use_threads=False)
        while True:
            found = next(self.batches)
            self.next_batch += 1
            if self.next_batch > number:
                return [_content(cell) for cell in found.column(0).to_pylist()]


class ParquetCells:
    """Pictures in parquet files by file, row and column."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.held = most_bytes, 0
        self._readers: dict[tuple[Path, str], _Reader] = {}
        self._starts: dict[Path, list[int]] = {}
        self._batches: OrderedDict[tuple[Path, str, int, int], list[Any]] = OrderedDict()
        self._lock = Lock()

    def read(self, file: Path, row: int, column: str) -> bytes:
        """The picture in a cell.

        Raises:
            OSError, ValueError: it cannot be read; file, row and column are named.
        """
        try:
            with self._lock:
                value = self._cell(file, row, column)
        except (OSError, pa.ArrowException, StopIteration, KeyError) as error:
            raise ValueError(f"{file}, row {row}, column {column} cannot be read: {error}") from None
        if not isinstance(value, bytes):
            raise ValueError(f"{file}, row {row}, column {column}: expected a picture, found {type(value).__name__}")
        return value

    def _cell(self, file: Path, row: int, column: str) -> Any:
        reader = self._reader(file, column)
        starts = self._starts[file]
        group = max(place for place, start in enumerate(starts[:-1]) if start <= row)
        number, offset = divmod(row - starts[group], ROWS)
        key = (file, column, group, number)
        if key not in self._batches:
            self._keep(key, reader.batch(group, number))
        self._batches.move_to_end(key)
        return self._batches[key][offset]

    def _reader(self, file: Path, column: str) -> _Reader:
        if (file, column) not in self._readers:
            opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)  # a mapped file counts as memory
            self._readers[file, column] = _Reader(opened, column)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            self._starts[file] = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
        return self._readers[file, column]

    def _keep(self, key: tuple[Path, str, int, int], batch: list[Any]) -> None:
        self._batches[key] = batch
        self.held += _size(batch)
        while self.held > self.most_bytes and len(self._batches) > 1:
            _, dropped = self._batches.popitem(last=False)
            self.held -= _size(dropped)


def _content(cell: Any) -> Any:
    """What a cell holds; Pick-a-Pic's own files hold {"bytes", "path"} in some versions."""
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _size(batch: list[Any]) -> int:
    return sum(len(value) for value in batch if isinstance(value, bytes))
