"""Pictures that are liked or not: tables with a label for each, and folders of liked and of disliked ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffusion_align.pictures import SUFFIXES, CorruptImageError

from ..reading.meaning import Readable
from ..reading.rows import DISLIKED, USED, caption_of, check_weights, image_bytes, weight_of
from ..reading.text_files import text_lines
from ..types import UNJUDGED, Judgement, PairRecord
from .balance import Summary, labelled_summary

#: Names of folders, which are labels, too.
FOLDERS: Mapping[str, float] = MappingProxyType(
    {"liked": 1.0, "good": 1.0, "chosen": 1.0, "disliked": -1.0, "bad": -1.0, "rejected": -1.0}
)
#: Labels as text; numbers are text in CSV files.
WORDS: Mapping[str, float] = MappingProxyType(
    {**FOLDERS, "desirable": 1.0, "undesirable": -1.0, "true": 1.0, "false": -1.0,
     "1": 1.0, "+1": 1.0, "1.0": 1.0, "0": -1.0, "-1": -1.0, "0.0": -1.0, "-1.0": -1.0}
)  # fmt: skip
EXPECTED = 'true or false, 1 or 0, +1 or -1, "good" or "bad", "liked" or "disliked", "chosen" or "rejected"'
#: The same picture is looked for among so many at most, before a run; a cache knows all of them.
MOST_COMPARED = 2_000
#: Columns that may hold the picture.
PICTURES = ("image", "file_name")


def label_of(row: Mapping[str, Any], where: str) -> float:
    """+1 (liked) or -1 (disliked).

    Raises:
        ValueError: anything else, or nothing.
    """
    value = row.get("label")
    found = None
    if isinstance(value, str):
        found = WORDS.get(value.strip().lower())
    elif isinstance(value, bool):
        found = 1.0 if value else -1.0
    elif isinstance(value, Real) and value in (1, 0, -1):
        found = 1.0 if value == 1 else -1.0
    if found is None:
        raise ValueError(f"{where}: label = {value!r} is wrong: expected {EXPECTED}")
    return found


def surety_of(row: Mapping[str, Any], where: str) -> float:
    """P(the label is right): 1 where nothing is said.

    Raises:
        ValueError: no number in [0, 1].
    """
    value = row.get("preference")
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{where}: preference = {value!r} is wrong: expected a number in [0, 1]")
    return float(value)


@dataclass(frozen=True)
class LabelledRows:
    """Rows of labelled pictures: ``image`` (or ``file_name``), ``caption``, ``label``; ``preference`` and ``weight``
    where they are."""

    unit: str = "labelled pictures"
    cheap: tuple[str, ...] = ("label", "preference", "weight", "caption")
    verdict: tuple[str, ...] = ("label", "preference")
    chosen_only: bool = True

    def pictures(self, columns: Sequence[str]) -> list[str]:
        return [next(name for name in PICTURES if name in columns)]

    def path_columns(self, columns: Sequence[str]) -> list[str]:
        return self.pictures(columns)

    def kinds(self, table: pa.Table, where: Callable[[int], str]) -> NDArray[Any]:
        """What ``kind_of`` says; a lack of a label or caption is an error."""
        check_weights(table, where)
        kinds = np.full(len(table), USED, dtype=np.uint8)
        columns = {name: table[name].to_pylist() for name in self.cheap if name in table.column_names}
        for number in range(len(table)):
            row = {name: values[number] for name, values in columns.items()}
            try:
                kinds[number] = self.kind_of(label_of(row, ""), surety_of(row, ""))
                captioned = bool(caption_of(row, "").strip())
            except ValueError as error:
                raise ValueError(f"{where(number)}{error}") from None
            if not captioned:
                raise ValueError(f"{where(number)}: caption is empty: expected what the picture should show")
        return kinds

    def kind_of(self, label: float, surety: float) -> int:
        """Of a row with this label, which is right with probability ``surety``: all are used."""
        return USED

    def record(self, row: Mapping[str, Any], where: str, key: str, folder: Path | None) -> PairRecord:
        (name,) = self.pictures(list(row))
        content = image_bytes(row[name], folder, f"{where}, column {name}")
        judgement = Judgement(label_of(row, where))
        return PairRecord(
            content, None, caption_of(row, where), surety_of(row, where), weight_of(row, where), key, judgement
        )

    def known(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"preference": surety_of(row, where), "weight": weight_of(row, where), "label": label_of(row, where)}

    def facts(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def summary(self, examples: Readable) -> Summary:
        table = examples.cheap_columns()
        labels = [label_of({"label": value}, "") for value in table["label"].to_pylist()]
        return labelled_summary(table["caption"].to_pylist(), labels, _picture_names(examples))


@dataclass(frozen=True)
class LikedRows(LabelledRows):
    """The same rows for what learns from good pictures alone: the disliked ones are left out.

    A label that is rather wrong than right (``preference`` below 0.5) counts as the other one.
    """

    unit: str = "pictures"

    def kind_of(self, label: float, surety: float) -> int:
        return USED if (label > 0) == (surety >= 0.5) else DISLIKED

    def record(self, row: Mapping[str, Any], where: str, key: str, folder: Path | None) -> PairRecord:
        return replace(super().record(row, where, key, folder), preference=1.0, judgement=UNJUDGED)

    def known(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"preference": 1.0, "weight": weight_of(row, where)}

    def summary(self, examples: Readable) -> Summary:
        return Summary()


def _picture_names(examples: Readable) -> list[str] | None:
    """Equal texts for equal pictures, in the order of the examples; None where too many would have to be read.

    Files of different sizes are different pictures, and need not be read.
    """
    rows = examples.numbers()
    names = [f"row {row}" for row in rows.tolist()]
    stamps, (paths, *_) = examples.stamps(), (*examples.paths().values(), None)
    doubtful = list(range(len(rows)))
    if paths is not None:
        sizes = [stamps[path][:1] if path in stamps else [] for path in paths]
        counts = Counter(map(str, sizes))
        doubtful = [place for place in doubtful if counts[str(sizes[place])] > 1]
    if len(doubtful) > MOST_COMPARED:
        return None
    places = {int(rows[place]): place for place in doubtful}
    for row, record in examples.records(rows[doubtful]):
        if not isinstance(record, CorruptImageError):  # it is told when its turn comes
            (content,) = record.contents().values()
            names[places[row]] = hashlib.sha256(content).hexdigest()
    return names


def label_folders(folder: Path, split: str) -> dict[Path, float]:
    """Sub-folders of ``folder``, or of ``folder``/SPLIT, whose names say what their pictures are; {} of any other."""
    for place in (folder / split, folder):
        found = {
            path: FOLDERS[path.name.lower()]
            for path in sorted(place.iterdir() if place.is_dir() else ())
            if path.is_dir() and path.name.lower() in FOLDERS
        }
        if found:
            return found
    return {}


def folder_table(folders: Mapping[Path, float], root: Path) -> pa.Table:
    """The pictures of some folders and of what is in them, in the order of their names: image (a path below ``root``),
    caption, label.

    The caption of ``NAME.png`` is the text of ``NAME.txt`` beside it; several lines become one.

    Raises:
        ValueError: a picture without caption, a text without picture, or no picture at all; the file is named.
    """
    rows: list[tuple[str, str, float]] = []
    for folder, label in folders.items():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
        texts = {path for path in files if path.suffix.lower() == ".txt"}
        for path in pictures:
            text = path.with_suffix(".txt")
            if text not in texts:
                raise ValueError(f"{path} has no caption: expected it in {text.name} beside it")
            caption = " ".join(line.strip() for _, line in text_lines(text))
            if not caption:
                raise ValueError(f"{text} is empty: expected the caption of {path.name}")
            rows.append((path.relative_to(root).as_posix(), caption, label))
        alone = sorted(texts - {path.with_suffix(".txt") for path in pictures})
        if alone:
            raise ValueError(f"{alone[0]} is the caption of no picture: there is no {alone[0].stem}.png, .jpg or other")
    if not rows:
        named = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"{named}: no pictures, expected {', '.join(SUFFIXES)}, each with NAME.txt beside it")
    names = ("image", "caption", "label")
    return pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)})
