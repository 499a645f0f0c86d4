"""Opening a table: hub and parquet, through ``datasets`` or as they are, or image folder with JSONL or CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.names import hint, nearest
from diffusion_align.quiet import no_table_bars
from diffusion_align.shipped import SHIPPED_PAIRS, shipped_path

from .beyond_pairs.liked_pictures import folder_table, label_folders
from .reading.shards import Shards, hub_shards
from .reading.text_files import csv_table, jsonl_table

#: Columns every source of a layout must have.
PICKAPIC_COLUMNS = ("jpg_0", "jpg_1", "caption", "label_0")
FOLDER_COLUMNS = ("chosen", "rejected", "caption")
PICTURE_COLUMNS = ("image", "caption")
PAIR_LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"Pick-a-Pic's ": PICKAPIC_COLUMNS, "": FOLDER_COLUMNS})
#: What single pictures are read from: the chosen ones of pairs, or pictures with captions.
PICTURE_LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"single pictures' ": PICTURE_COLUMNS, **PAIR_LAYOUTS}
)
LABELLED_LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"labelled pictures' ": ("image", "caption", "label"), "their paths' ": ("file_name", "caption", "label")}
)
LIST_LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "ranked lists' ": ("images", "caption", "ranks"), "scored lists' ": ("images", "caption", "scores"),
    "ranked paths' ": ("file_names", "caption", "ranks"), "scored paths' ": ("file_names", "caption", "scores"),
    "ranked columns' ": ("jpg_0", "jpg_1", "caption", "ranks"),
    "scored columns' ": ("jpg_0", "jpg_1", "caption", "scores"),
})  # fmt: skip
#: Layouts of what examples are called. A table that fits several is what comes first.
UNITS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"pairs": PAIR_LAYOUTS, "labelled pictures": LABELLED_LAYOUTS, "ranked lists": LIST_LAYOUTS}
)
#: Who learns from them.
LEARNERS: Mapping[str, str] = MappingProxyType({
    "pairs": "train dpo, inpo and kto", "labelled pictures": "train kto",
    "ranked lists": "train dpo with a loss on lists, e.g. --loss-type lair",
})  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An opened table.

    Attributes:
        table: ``datasets.Dataset`` or ``IterableDataset``, images undecoded.
        name: for messages.
        columns: its column names.
        folder: where relative image paths start; None for tables that hold the images themselves.
        files: on this disk; none of a data set on the hub.
    """

    table: Any
    name: str
    columns: tuple[str, ...]
    folder: Path | None
    files: tuple[Path, ...] = ()

    def where(self, row: int) -> str:
        """What messages call row ``row``."""
        return f"{self.name}, row {row}"


@dataclass(frozen=True)
class Selection:
    """Which of a table's usable rows are taken.

    Attributes:
        limit: how many; None takes all.
        seed: they are drawn at random; None takes the first ones. The order of the table stays.
        together: neighbours that are drawn together, e.g. pairs of one prompt.
    """

    limit: int | None = None
    seed: int | None = None
    together: int = 1

    def of(self, rows: Sequence[int]) -> list[int]:
        """The rows that are taken of ``rows``."""
        if self.limit is None or self.seed is None or self.limit >= len(rows):
            return list(rows[: self.limit])
        runs = -(-len(rows) // self.together)
        drawn = np.random.default_rng([self.seed, 3]).permutation(runs)[: -(-self.limit // self.together)]
        starts = sorted(int(run) * self.together for run in drawn)
        return [row for start in starts for row in rows[start : start + self.together]][: self.limit]


def open_source(
    source: str | Path, split: str, streaming: bool, layouts: Mapping[str, tuple[str, ...]] = PAIR_LAYOUTS
) -> Source:
    """Open ``source`` and check that it has the columns of one of ``layouts`` (by what messages put before them).

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a file of ``split``.
        OSError: a hub name that cannot be read; the message says how to use a local copy.
        ValueError: a file that is no table, or one without the columns of a known layout.
    """
    files, folder, labels = local_files(source, split), None, label_folders(Path(source), split)
    if labels and not files:
        folder, name = Path(source), str(source)
        table = _in_memory(folder_table(labels, folder))
    elif files:
        name = _name(files, source, split)
        if files[0].suffix == ".parquet":
            _check_footers(files)
            table = _load("parquet", f"{files[0]}", streaming, data_files=[str(f) for f in files], split="train")
        else:
            table, folder = _text_table(files[0]), files[0].parent
    else:
        name = _hub_name(source)
        table = _load(name, name, streaming, split=split)
    columns = table.column_names
    if columns is None:  # a stream of files without a schema
        columns = list(next(iter(table)))
    _check_columns(columns, name, layouts)
    return Source(_undecoded(table), name, tuple(columns), folder, tuple(files))


def open_shards(source: str | Path, split: str, layouts: Mapping[str, tuple[str, ...]] = PAIR_LAYOUTS) -> Shards | None:
    """Parquet files as they are, on this disk or on the hub, checked like :func:`open_source`; None where the files
    are text.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`open_source`.
    """
    files = local_files(source, split)
    if (files and files[0].suffix != ".parquet") or (not files and label_folders(Path(source), split)):
        return None
    if files:
        shards = Shards([str(file) for file in files], _name(files, source, split))
    else:
        shards = hub_shards(_hub_name(source), split)
    _check_columns(list(shards.columns), shards.name, layouts)
    return shards


def _check_footers(files: Sequence[Path]) -> None:
    """Raise ValueError for the first parquet file that is torn: ``datasets`` does not say which one it is."""
    for file in files:
        try:
            pq.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} cannot be read as a table: {error}") from error


def local_files(source: str | Path, split: str) -> list[Path]:
    """The files of a data set on this disk, or of one that is shipped; empty where it can only be on the hub, and of
    folders of liked and disliked pictures, which have no table.

    Raises:
        FileNotFoundError: a folder without files of ``split``, or a pattern that no file fits.
        ValueError: a file of another kind.
    """
    path = shipped_path(str(source)) if str(source) in SHIPPED_PAIRS else Path(source)
    if path.exists():
        return _files(path, split)
    if not has_magic(str(source)):
        return []
    found = sorted(Path(file) for file in glob(str(source), recursive=True))
    if not found:
        raise FileNotFoundError(f"data set {str(source)!r}: no file fits this pattern")
    if len(found) > 1 and any(file.suffix != ".parquet" for file in found):
        raise ValueError(f"data set {str(source)!r}: expected parquet files, found {found[0].name}")
    return _files(found[0], split) if len(found) == 1 else found


def _name(files: Sequence[Path], source: str | Path, split: str) -> str:
    return str(files[0]) if len(files) == 1 else f"{source} ({split}, {len(files)} files)"


def _hub_name(source: str | Path) -> str:
    name = str(source)
    if name.count("/") != 1 or Path(source).suffix or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"data set {name!r} not found{hint(name, SHIPPED_PAIRS)}: "
            "expected a .parquet, .jsonl or .csv file, a folder, or a hub name "
            "such as 'yuvalkirstain/pickapic_v2'"
        )
    return name


def _text_table(path: Path) -> Any:
    """A CSV or JSON Lines file as a table in memory."""
    try:
        table = csv_table(path) if path.suffix == ".csv" else jsonl_table(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    return _in_memory(table)


def _in_memory(table: pa.Table) -> Any:
    import datasets
    from datasets.table import InMemoryTable

    return datasets.Dataset(InMemoryTable(table))


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl", ".csv"):
            raise ValueError(f"{path}: expected a .parquet, .jsonl or .csv file")
        return [path]
    tables = sorted(path.glob("*.parquet")) + sorted(path.glob("data/*.parquet"))
    of_split = [file for file in tables if file.name.startswith(f"{split}-") or file.stem == split]
    if of_split:
        return of_split
    splits = sorted({file.name.partition("-")[0] for file in tables if "-of-" in file.name})
    if splits:
        raise FileNotFoundError(f"{path} has no files of split {split!r}: found {', '.join(splits)}")
    if tables:
        return tables
    for name in (f"{split}.jsonl", f"{split}.csv", "metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            return [path / name]
    if label_folders(path, split):
        return []
    raise FileNotFoundError(f"{path} holds no pairs: expected parquet files, metadata.jsonl or metadata.csv")


def _load(kind: str, name: str, streaming: bool, **options: Any) -> Any:
    import datasets

    try:
        with no_table_bars() if kind == "parquet" else nullcontext():  # what is fetched from the hub takes long
            return datasets.load_dataset(kind, streaming=streaming, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{name} cannot be read as a table: {error.__cause__ or error}") from error
    except (OSError, ValueError) as error:
        if kind == "parquet":
            raise ValueError(f"{name} cannot be read as a table: {error}") from error
        raise OSError(
            f"data set {name!r} could not be loaded ({error}). Offline, download it once with "
            f"'hf download {name} --repo-type dataset' and give the folder instead"
        ) from error


def _check_columns(columns: list[str], name: str, layouts: Mapping[str, tuple[str, ...]]) -> None:
    best = max(layouts.values(), key=lambda layout: len(set(layout) & set(columns)))
    for column in best:
        if column not in columns:
            near = nearest(column, columns)
            hint = f" (is {near!r} meant?)" if near else ""
            expected = ", or ".join(title + ", ".join(layout) for title, layout in layouts.items())
            unit = unit_of(columns)
            fits = "" if unit is None else f". These are {unit}, for {LEARNERS[unit]}"
            raise ValueError(
                f"{name}: column {column!r} is missing{hint}; found {', '.join(columns)}. Expected {expected}{fits}"
            )


def unit_of(columns: Sequence[str]) -> str | None:
    """What a table's rows are called, by its columns; None of other tables."""
    fits = (unit for unit, layouts in UNITS.items() for layout in layouts.values() if set(layout) <= set(columns))
    return next(fits, None)


def unit_here(source: str | Path, split: str) -> str | None:
    """What a data set on this disk holds, by its columns; None where it is not here, or is something else.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`open_source`.
    """
    files = local_files(source, split)
    if not files:
        return "labelled pictures" if label_folders(Path(source), split) else None
    if files[0].suffix == ".parquet":
        _check_footers(files[:1])
        return unit_of(pq.read_schema(files[0]).names)
    return unit_of(_text_table(files[0]).column_names)


def _undecoded(table: Any) -> Any:
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of pictures
            table = table.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return table
