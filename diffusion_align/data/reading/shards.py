"""Parquet files by their row groups, on this disk or on the hub: nothing is copied, nothing is read twice in vain."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .stamps import Stamp, parquet_stamps, remote_stamps, short_names

N = TypeVar("N")
T = TypeVar("T")

#: Threads that read footers and cheap columns.
LOCAL_THREADS, REMOTE_THREADS = 4, 32
#: Rows of an Arrow batch while a row group is read: pictures of a few hundred KB give batches of tens of MB.
BATCH = 64
#: A row group on this disk is read again for each part of it, as long as that costs at most so many bytes a row: large
#: row groups of small pictures are mixed well. On the hub and with real pictures, parts are whole row groups.
BYTES_PER_ROW, LEAST_ROWS = 256 * 1024, 16
#: Times that a row group on the hub is asked for, and the first pause in seconds.
TRIES, PAUSE = 4, 1.0


@dataclass(frozen=True)
class RowGroup:
    """One row group.

    Attributes:
        file: number of its file.
        group: its number in the file.
        first: number of its first row in the whole data set.
        rows: how many.
    """

    file: int
    group: int
    first: int
    rows: int


@dataclass(frozen=True)
class Part:
    """Rows that are read together: a row group, or some neighbouring rows of a large one.

    Attributes:
        group: number of the row group.
        first: number of the first row in the whole data set.
        rows: how many.
    """

    group: int
    first: int
    rows: int


class Shards:
    """The parquet files of one data set, in the order of their names.

    Args:
        files: paths, of ``filesystem`` if there is one.
        name: for messages.
        filesystem: of fsspec; None is this disk.

    Attributes:
        columns: those that all files have.
        groups: the row groups of all files, in order.
        first_rows: number of the first row of each group, (groups,) int64.

    Raises:
        ValueError: a file that is no parquet file; it is named.
    """

    def __init__(self, files: Sequence[str], name: str, filesystem: Any = None) -> None:
        self.files, self.name, self.filesystem = list(files), name, filesystem
        self.threads = LOCAL_THREADS if filesystem is None else REMOTE_THREADS
        self._footers: list[pq.FileMetaData] = self.in_threads(self._footer, range(len(self.files)))
        names = [tuple(footer.schema.to_arrow_schema().names) for footer in self._footers]
        self.columns = tuple(name for name in names[0] if all(name in other for other in names))
        sizes = [
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        starts = accumulate((rows for *_, rows in sizes), initial=0)
        self.groups = [
            RowGroup(file, group, first, rows) for (file, group, rows), first in zip(sizes, starts, strict=False)
        ]
        self.first_rows = np.array([group.first for group in self.groups], dtype=np.int64)
        rows_of_files = [footer.num_rows for footer in self._footers]
        self._starts = list(accumulate(rows_of_files, initial=0))

    def __len__(self) -> int:
        """Rows of all files."""
        return self._starts[-1]

    @property
    def is_local(self) -> bool:
        return self.filesystem is None

    def facts(self) -> dict[str, Any]:
        """What tells this data set from another one, without reading it: JSON-able."""
        layout = [[PurePosixPath(self.files[g.file]).name, g.group, g.rows] for g in self.groups]
        return {
            "files": len(self.files),
            "rows": len(self),
            "layout": hashlib.sha256(repr(layout).encode()).hexdigest(),
        }

    def stamps(self) -> dict[str, Stamp]:
        """What tells each file from another one, by its name, without reading it whole."""
        if self.filesystem is None:
            return parquet_stamps(self.files, self._footers)
        return remote_stamps(self.files, self.filesystem)

    def in_files(self, rows: NDArray[np.int64], names: Set[str]) -> NDArray[np.bool_]:
        """Which rows are in files of some names, as ``stamps`` has them."""
        wanted = np.array([name in names for name in short_names(self.files)], dtype=bool)
        return wanted[np.searchsorted(self._starts, rows, side="right") - 1]

    def parts(self, columns: Sequence[str]) -> list[Part]:
        """The data set cut into what is read together, in order, when ``columns`` are read."""
        found = []
        for number, group in enumerate(self.groups):
            count = 1
            if self.is_local:
                least = max(LEAST_ROWS, self._size(group, columns) // BYTES_PER_ROW)
                count = max(1, group.rows // least)
            cuts = [group.first + group.rows * i // count for i in range(count + 1)]
            found += [Part(number, start, end - start) for start, end in pairwise(cuts)]
        return found

    def group_of(self, row: int) -> int:
        """Number of the row group that holds row ``row`` of the data set."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def where(self, row: int) -> str:
        """What messages call row ``row``: its file, and its number there."""
        file = self.groups[self.group_of(row)].file
        return f"{self.files[file]}, row {row - self._starts[file]}"

    def table(self, numbers: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """``columns`` of row groups ``numbers`` of one file.

        Raises:
            ValueError: they cannot be read; the file is named.
        """
        groups, names = [self.groups[number].group for number in numbers], list(columns)
        first = self.groups[numbers[0]]
        return self._reading(first, lambda file: file.read_row_groups(groups, columns=names, use_threads=False))

    def rows(self, number: int, rows: NDArray[np.int64], columns: Sequence[str]) -> list[dict[str, Any]]:
        """``columns`` of some rows, ascending numbers in the data set, of row group ``number``.

        Raises:
            ValueError: they cannot be read; the file is named.
        """
        group = self.groups[number]
        return self._reading(group, lambda file: list(_some_rows(file, group.group, rows - group.first, columns)))

    def in_threads(self, work: Callable[[N], T], items: Sequence[N]) -> list[T]:
        """``work`` of every item, in their order, by several threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, items))

    def _footer(self, file: int) -> pq.FileMetaData:
        try:
            with self._open(file) as parquet:
                return parquet.metadata
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.files[file]} cannot be read as a table: {error}") from error

    def _open(self, file: int, **options: Any) -> pq.ParquetFile:
        path = self.files[file]
        options["page_checksum_verification"] = True  # of files that have checksums
        if self.filesystem is None:
            return pq.ParquetFile(path, buffer_size=2**20, **options)  # pages come as they are needed
        return pq.ParquetFile(path, filesystem=self.filesystem, pre_buffer=True, **options)  # few large requests

    def _reading(self, group: RowGroup, work: Callable[[pq.ParquetFile], T]) -> T:
        for attempt in range(1 if self.is_local else TRIES):
            try:
                with self._open(group.file, metadata=self._footers[group.file]) as file:
                    return work(file)
            except (OSError, pa.ArrowException) as error:
                failed = error
            if not self.is_local and attempt + 1 < TRIES:
                time.sleep(PAUSE * 2**attempt)
        raise ValueError(f"{self.files[group.file]}, row group {group.group} cannot be read: {failed}") from failed

    def _size(self, group: RowGroup, columns: Sequence[str]) -> int:
        """Bytes of ``columns`` in the file."""
        footer = self._footers[group.file].row_group(group.group)
        chunks = (footer.column(i) for i in range(footer.num_columns))
        return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _some_rows(
    file: pq.ParquetFile, group: int, rows: NDArray[np.int64], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    start = 0
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=list(columns), use_threads=False):
        wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
        for row in wanted.tolist():
            yield {name: batch.column(name)[row].as_py() for name in batch.schema.names}
        start += len(batch)
        if not len(rows) or start > rows[-1]:
            return


def hub_shards(name: str, split: str) -> Shards:
    """The parquet files of a data set on the hub.

    Raises:
        OSError: it cannot be reached; the message says how to use a local copy.
        ValueError: no such split, or files of another kind.
    """
    import datasets
    from fsspec.core import url_to_fs

    try:
        found = datasets.load_dataset_builder(name).config.data_files or {}
    except (OSError, ValueError) as error:
        raise OSError(
            f"data set {name!r} could not be loaded ({error}). Offline, download it once with "
            f"'hf download {name} --repo-type dataset' and give the folder instead"
        ) from error
    files = sorted(str(file) for file in found.get(split, []))
    if not files:
        raise ValueError(f"data set {name!r} has no split {split!r}: found {', '.join(map(str, found)) or 'none'}")
    other = next((file for file in files if Path(file).suffix != ".parquet"), None)
    if other is not None:
        raise ValueError(f"data set {name!r}: {other} is no parquet file: set streaming to false, or download it")
    filesystem, _ = url_to_fs(files[0])
    return Shards([filesystem._strip_protocol(file) for file in files], f"{name} ({split})", filesystem)
