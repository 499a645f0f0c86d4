"""What the rows of a table are: pairs, or what else a run can learn from. Readers ask this and know no columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffusion_align.pictures import CorruptImageError

from ..beyond_pairs.balance import Summary
from ..types import Record
from .rows import CHEAP, VERDICT, kinds_of_rows, preference, to_record, weight_of
from .stamps import Stamp

#: Columns of pictures beside Pick-a-Pic's.
FOLDER_PICTURES = ("chosen", "rejected", "image")


class Meaning(Protocol):
    """What a row means.

    Attributes:
        unit: what messages call the examples: "pairs", "pictures", "labelled pictures", "ranked lists".
        cheap: columns that are read and checked before the first step: all that count, without the pictures.
        verdict: those of them that say what is better.
        chosen_only: whether of pairs the rejected images are left out.
    """

    @property
    def unit(self) -> str: ...
    @property
    def cheap(self) -> tuple[str, ...]: ...
    @property
    def verdict(self) -> tuple[str, ...]: ...
    @property
    def chosen_only(self) -> bool: ...

    def pictures(self, columns: Sequence[str]) -> list[str]:
        """Which columns hold pictures."""

    def path_columns(self, columns: Sequence[str]) -> list[str]:
        """Which columns of a table of paths hold them; cells may be lists."""

    def kinds(self, table: pa.Table, where: Callable[[int], str]) -> NDArray[Any]:
        """The kind (``rows.KINDS``) of every row of ``table``, (rows,) uint8, which holds the cheap columns.

        Raises:
            ValueError: a row that is wrong; it is named by ``where``, with the column and what was expected.
        """

    def record(self, row: Mapping[str, Any], where: str, key: str, folder: Path | None) -> Record:
        """The example of one row that is used.

        Raises:
            ValueError, CorruptImageError, FileNotFoundError: it is wrong, or a picture cannot be read.
        """

    def known(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What a cache keeps of a row beside its caption and pictures, from its cheap columns; JSON-able."""

    def facts(self) -> dict[str, Any]:
        """What a position in a stream depends on beside the files; JSON-able."""

    def summary(self, examples: Readable) -> Summary:
        """What is worth knowing of all examples beside what is left out."""


class Readable(Protocol):
    """Examples of a table or of parquet files, by what is cheap and one by one."""

    @property
    def used(self) -> int | None: ...
    def cheap_columns(self) -> pa.Table: ...
    def paths(self) -> dict[str, list[str | None]]: ...
    def stamps(self) -> dict[str, Stamp]: ...
    def numbers(self) -> NDArray[np.int64]: ...
    def records(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, Record | CorruptImageError]]: ...


@dataclass(frozen=True)
class PairRows:
    """Rows of preference pairs, or (``chosen_only``) of single pictures.

    Attributes:
        keep_ties: use rows without a preferred image.
    """

    keep_ties: bool = False
    chosen_only: bool = False
    cheap: tuple[str, ...] = CHEAP
    verdict: tuple[str, ...] = VERDICT

    @property
    def unit(self) -> str:
        return "pictures" if self.chosen_only else "pairs"

    def pictures(self, columns: Sequence[str]) -> list[str]:
        names = ("jpg_0", "jpg_1") if "label_0" in columns else FOLDER_PICTURES
        return [name for name in names if name in columns]

    def path_columns(self, columns: Sequence[str]) -> list[str]:
        return [name for name in FOLDER_PICTURES if name in columns]

    def kinds(self, table: pa.Table, where: Callable[[int], str]) -> NDArray[Any]:
        return kinds_of_rows(table, where, self.keep_ties)

    def record(self, row: Mapping[str, Any], where: str, key: str, folder: Path | None) -> Record:
        return to_record(row, where, key, folder, self.chosen_only)

    def known(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"preference": preference(row, where), "weight": weight_of(row, where)}

    def facts(self) -> dict[str, Any]:
        return {"ties": self.keep_ties}

    def summary(self, examples: Readable) -> Summary:
        return Summary()
