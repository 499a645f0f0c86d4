"""Thumbnails on the disk: made when they are first asked for, the oldest are deleted when there are too many."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from diffusion_align.studio.sources.keyed import opaque
from diffusion_align.studio.sources.parquet_cells import ParquetCells
from diffusion_align.studio.sources.served_pictures import Served, thumbnail
from diffusion_align.studio.sources.units import Picture

#: Bytes that thumbnails may take.
MOST_BYTES = 128 * 2**20


@dataclass
class Thumbnails:
    """A folder of thumbnails, named by a hash of where their picture is and when its file was written."""

    folder: Path
    cells: ParquetCells
    most_bytes: int = MOST_BYTES
    _sizes: dict[str, int] | None = None
    _lock: Lock = field(default_factory=Lock)

    def read(self, picture: Picture) -> Served:
        """The thumbnail of a picture.

        Raises:
            OSError, ValueError: the picture cannot be read; it is named.
        """
        path = self.folder / f"{self._key(picture)}.jpg"
        try:
            return Served(path.read_bytes(), "image/jpeg")
        except OSError:
            made = thumbnail(picture.read(self.cells), picture.where)
        with self._lock:
            self._keep(path, made.content)
        return made

    def _key(self, picture: Picture) -> str:
        try:
            found = picture.file.stat()
        except OSError as error:
            raise type(error)(f"{picture.where} cannot be read: {error.strerror or error}") from None
        return opaque(picture.file, picture.row, picture.column, found.st_mtime_ns, found.st_size)

    def _keep(self, path: Path, content: bytes) -> None:
        """Write it if that is possible; a disk that is full only makes the page slower."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._sizes is None:
                there = sorted(self.folder.glob("*.jpg"), key=lambda file: file.stat().st_mtime_ns)
                self._sizes = {file.name: file.stat().st_size for file in there}
            path.write_bytes(content)
        except OSError:
            return
        self._sizes[path.name] = len(content)
        held = sum(self._sizes.values())
        while held > self.most_bytes and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            held -= self._sizes.pop(oldest)
            try:
                os.unlink(self.folder / oldest)
            except OSError:
                continue
