"""Pairs of any format, written in Pick-a-Pic's columns, file by file, so that what died goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_align.files import begin_folder, write_parquet, write_whole

from ..reading.rows import SOFT_LABEL
from .imported import ImportedPair, Wanted
from .known_formats import FORMATS, find_format
from .places import Place, UnsafeArchiveError
from .published_votes import read_pickapic

#: Optional columns that a field of ``ImportedPair`` fills, and their types for ``datasets``.
OPTIONAL: Mapping[str, Mapping[str, str]] = {
    "models": {"model_0": "string", "model_1": "string"},
    "votes": {"votes_0": "int64", "votes_1": "int64"},
    "user_id": {"user_id": "string"},
    "ranking_id": {"ranking_id": "string"},
    "confidence": {"confidence": "float64"},
    "both_bad": {"both_bad": "bool"},
}


@dataclass(frozen=True)
class Import:
    """What is imported, and how.

    Attributes:
        source: folder of the set; of the format pickapic also a file or a hub name.
        format: a name of ``FORMATS``; "auto" looks at the folder.
        split: of the set, and of the files that are written.
        rank_best: as in ``Wanted``.
        soft_labels: add ``soft_label_0``, the share of votes for picture 0, which losses with soft labels learn from.
        limit: only so many pairs, the first.
        shard_size: pairs of a file.
        max_missing: pictures that may be missing; their pairs are left out and counted.
    """

    source: str
    format: str = "auto"
    split: str = "train"
    rank_best: str | None = None
    soft_labels: bool = False
    limit: int | None = None
    shard_size: int = 1000
    max_missing: int = 0


def import_pairs(task: Import, out: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Write the pairs of ``task`` to ``out``/SPLIT-00000.parquet and so on.

    Returns:
        "format" and counts; also in ``import.json``.

    Raises:
        FileNotFoundError: no such set, or more pictures than ``max_missing`` are not there.
        ValueError: a format that is not known, a row that is wrong, an archive that is not safe, soft labels of a
            format without votes, no pair at all, or ``out`` was made of something else.
    """
    source = Path(task.source)
    name = task.format
    if name == "auto":
        name = find_format(source) if source.is_dir() else "pickapic"
    known = FORMATS[name]
    if task.soft_labels and "votes" not in known.columns:
        raise ValueError(f"--soft-labels are shares of votes, which {name} does not have")
    record = out / "import.json"
    done: dict[str, Any] | None = begin_folder(record, asdict(task) | {"format": name}, "made").get("pairs")
    if done is not None:
        return done
    wanted = Wanted(task.split, task.rank_best)  # type: ignore[arg-type]
    counts: Counter[str] = Counter()
    if name == "pickapic" and not source.is_dir():
        pairs, place = read_pickapic(task.source, wanted), None
    else:
        place = Place(source, out / ".unpacked")
        pairs = known.read(place, wanted)
    try:
        rows = _rows(islice(pairs, task.limit), place, known.folders, known.columns, task, counts)
        for number in range(2**31):
            written = list(islice(rows, task.shard_size))
            if not written:
                break
            path = out / f"{task.split}-{number:05d}.parquet"
            _write(path, written, known.columns, task.soft_labels)
            progress(f"{path}: {len(written)} pairs")
    finally:
        if place is not None:
            place.close()
    if not counts["pairs"]:
        raise ValueError(f"{task.source}: no pair can be read of it")
    found = {"format": name, **counts}
    write_whole(record, json.dumps({"task": asdict(task) | {"format": name}, "pairs": found}, indent=1).encode())
    return found


def _rows(
    pairs: Iterable[ImportedPair],
    place: Place | None,
    folders: tuple[str, ...],
    columns: tuple[str, ...],
    task: Import,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        try:
            contents = [
                picture if isinstance(picture, bytes) else _read(place, picture, pair.where, folders)
                for picture in pair.pictures
            ]
        except FileNotFoundError as error:
            counts["without picture"] += 1
            if counts["without picture"] > task.max_missing:
                raise FileNotFoundError(f"{error}. --max-missing N leaves out up to N such pairs") from None
            continue
        counts["pairs"] += 1
        counts["ties"] += pair.label_0 == 0.5
        counts["without label"] += pair.label_0 is None
        yield row_of(pair, contents, columns, task.soft_labels)


def _read(place: Place | None, name: str, where: str, folders: tuple[str, ...]) -> bytes:
    if place is None:
        raise UnsafeArchiveError(f"{where}: a path, {name}: expected the picture itself, or the folder of the set")
    return place.read(name, where, folders)


def row_of(pair: ImportedPair, contents: list[bytes], columns: tuple[str, ...], soft_labels: bool) -> dict[str, Any]:
    """A row in Pick-a-Pic's columns, with the optional ones that are asked for."""
    uids = pair.uids or tuple(hashlib.sha256(content).hexdigest()[:32] for content in contents)
    label = pair.label_0
    row: dict[str, Any] = {
        "jpg_0": contents[0], "jpg_1": contents[1], "caption": pair.caption,
        "label_0": label, "label_1": None if label is None else 1 - label, "has_label": label is not None,
        "are_different": contents[0] != contents[1], "image_0_uid": uids[0], "image_1_uid": uids[1],
        "best_image_uid": {1.0: uids[0], 0.0: uids[1]}.get(math.nan if label is None else label, "none"),
        "num_example_per_prompt": pair.num_example_per_prompt,
    }  # fmt: skip
    values = {
        "models": pair.models or (None, None), "votes": pair.votes or (None, None), "user_id": (pair.user_id,),
        "ranking_id": (pair.ranking_id,), "confidence": (pair.confidence,), "both_bad": (pair.both_bad,),
    }  # fmt: skip
    for name in columns:
        if name in OPTIONAL:
            row |= dict(zip(OPTIONAL[name], values[name], strict=True))
        else:  # label_0_ASPECT
            row[name] = pair.aspects.get(name.removeprefix("label_0_"))
    if soft_labels:
        row[SOFT_LABEL] = None if pair.votes is None or not sum(pair.votes) else pair.votes[0] / sum(pair.votes)
    return row


def _write(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...], soft_labels: bool) -> None:
    """One file; types do not depend on what its rows happen to hold."""
    from datasets import Dataset, Features, Value

    kinds = {"jpg_0": "binary", "jpg_1": "binary", "caption": "string", "label_0": "float64", "label_1": "float64",
             "has_label": "bool", "are_different": "bool", "image_0_uid": "string", "image_1_uid": "string",
             "best_image_uid": "string", "num_example_per_prompt": "int64"}  # fmt: skip
    for name in columns:
        kinds |= OPTIONAL.get(name, {name: "float64"})
    if soft_labels:
        kinds[SOFT_LABEL] = "float64"
    features = Features({name: Value(kind) for name, kind in kinds.items()})
    write_parquet(path, Dataset.from_dict({name: [row[name] for row in rows] for name in kinds}, features=features))
