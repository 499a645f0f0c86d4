"""What is judged: the pictures of a prompt, two or more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .parquet_cells import ParquetCells


@dataclass(frozen=True)
class Picture:
    """Where one picture is, and what is known of it. Only the bytes ever leave before a verdict.

    Attributes:
        file: picture, or parquet file.
        row, column: in a parquet file.
        name: tells it from other pictures of its unit: its uid, or its file.
        uid: what the source calls it; None where it has no name.
        model: what drew it; None where nobody said.
        scale: guidance scale it was drawn with.
    """

    file: Path
    row: int | None = None
    column: str = ""
    name: str = ""
    uid: str | None = None
    model: str | None = None
    scale: float | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        return str(self.file) if self.row is None else f"{self.file}, row {self.row}, column {self.column}"

    def read(self, cells: ParquetCells) -> bytes:
        """The stored bytes.

        Raises:
            OSError, ValueError: they cannot be read; the picture is named.
        """
        if self.row is not None:
            return cells.read(self.file, self.row, self.column)
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise type(error)(f"{self.where} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class Unit:
    """Pictures of one prompt that are judged together.

    Attributes:
        key: stays the same over restarts.
        ranking: what the source calls them.
        scores: score of each picture by scorer; made before anybody judges, never shown.
    """

    key: str
    prompt: str
    pictures: tuple[Picture, ...]
    ranking: str = ""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """All units of a task, and how they were put together, in words."""

    units: tuple[Unit, ...]
    rule: str
