"""What tells a file from another one without reading it whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

#: A file's size in bytes, the time of its last change in nanoseconds and, of parquet, the hash of its footer: layout,
#: offsets and statistics. Of a file on the hub its size and what the hub says of its content.
Stamp = list[Any]


def file_stamp(path: Path) -> Stamp:
    """Size and time of a file; nothing of one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def parquet_stamps(files: Sequence[str], footers: Iterable[pq.FileMetaData]) -> dict[str, Stamp]:
    """Stamps of parquet files on this disk."""
    return {
        name: [*file_stamp(Path(file)), hashlib.sha256(repr(footer.to_dict()).encode()).hexdigest()]
        for name, file, footer in zip(short_names(files), files, footers, strict=True)
    }


def remote_stamps(files: Sequence[str], filesystem: Any) -> dict[str, Stamp]:
    """Stamps of files of an fsspec file system."""
    found = {}
    for name, file in zip(short_names(files), files, strict=True):
        info = filesystem.info(file)
        found[name] = [info.get("size"), *(str(info[key]) for key in ("blob_id", "etag", "ETag") if info.get(key))]
    return found


def short_names(files: Sequence[str]) -> list[str]:
    """Names of files below the folder that holds all of them, so that this folder may move."""
    parent = os.path.commonpath([os.path.dirname(file) for file in files])
    return [str(PurePosixPath(os.path.relpath(file, parent or "."))) for file in files]
