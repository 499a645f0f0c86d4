"""Readers of Pick-a-Pic itself, of Rapidata's votes, and of Argilla's responses on open-image-preferences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reading.rows import first_preferred, pair_columns
from ..tables import local_files, open_source
from .imported import ImportedPair, Picture, Wanted, text_of
from .places import Place

#: What people answered on open-image-preferences: P(image 1 is preferred).
ANSWERS: Mapping[str, float] = {"image_1": 1.0, "image_2": 0.0, "both_good": 0.5, "both_bad": 0.5, "tie": 0.5}
#: Pictures of an Argilla record that shows them as HTML.
SOURCE = re.compile(r"""<img[^>]+src=["']([^"']+)["']""")
PROMPT = re.compile(r"<strong>Prompt:</strong>\s*(.*?)\s*</div>", re.DOTALL)
#: Folders of that set's pictures.
FOLDER = re.compile(r"image_(?:quality|simplified)_(?:dev|sd)/[^/?#]+$")


def table_rows(place: Place, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a set's parquet files, batch by batch, each with what messages call it.

    Raises:
        FileNotFoundError: there are none of that split.
        ValueError: a file that is no table.
    """
    import pyarrow
    import pyarrow.parquet

    for path in local_files(place.root, split):
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} cannot be read as a table: {error}") from error


def read_pickapic(source: Path | str, wanted: Wanted) -> Iterator[ImportedPair]:
    """Pick-a-Pic v1 and v2, and whatever has its columns: on this disk, or streamed from the hub."""
    table = open_source(source, wanted.split, streaming=True)
    columns = pair_columns(table.columns)
    for number, row in enumerate(table.table):
        where = table.where(number)
        label = first_preferred(row, where)
        votes = (row.get("votes_0"), row.get("votes_1"))
        yield ImportedPair(
            (_picture(row[columns[0]], where), _picture(row[columns[1]], where)),
            text_of(row.get("caption"), where, "caption"),
            label,
            where,
            _both(row, "image_0_uid", "image_1_uid"),
            _both(row, "model_0", "model_1"),
            None if None in votes else (int(row["votes_0"]), int(row["votes_1"])),
            None if row.get("user_id") is None else str(row["user_id"]),
            None if row.get("ranking_id") is None else str(row["ranking_id"]),
            int(row.get("num_example_per_prompt") or 1),
        )


def read_rapidata(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """Rapidata's text-to-image sets: ``image1``, ``image2`` and how many people chose each; the majority's label."""
    for where, row in table_rows(place, wanted.split):
        votes = [row.get("votes_image1"), row.get("votes_image2")]
        if not all(isinstance(count, int) and count >= 0 for count in votes):
            raise ValueError(f"{where}: votes_image1, votes_image2 = {votes} are wrong: expected counts")
        first, second = int(votes[0] or 0), int(votes[1] or 0)
        yield ImportedPair(
            (_picture(row.get("image1"), where), _picture(row.get("image2"), where)),
            text_of(row.get("prompt"), where, "prompt"),
            None if first + second == 0 else 0.5 if first == second else float(first > second),
            where,
            models=_both(row, "model1", "model2"),
            votes=(first, second),
        )


def read_image_preferences(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """open-image-preferences: one pair for each answer that was submitted; ties stay."""
    for where, row in table_rows(place, wanted.split):
        pictures, prompt = _argilla_pictures(row, where), _argilla_prompt(row, where)
        answers = row.get("preference.responses") or []
        users = row.get("preference.responses.users") or [None] * len(answers)
        states = row.get("preference.responses.status") or ["submitted"] * len(answers)
        given = [(answer, user) for answer, user, state in zip(answers, users, states, strict=True)
                 if state == "submitted"]  # fmt: skip
        for answer, user in given:
            if answer not in ANSWERS:
                raise ValueError(f"{where}: the answer {answer!r} is unknown: expected one of {', '.join(ANSWERS)}")
            yield ImportedPair(
                pictures,
                prompt,
                ANSWERS[answer],
                where,
                models=_both(row, "model_1", "model_2"),
                user_id=None if user is None else str(user),
                num_example_per_prompt=len(given),
                both_bad=answer == "both_bad",
            )


def _argilla_pictures(row: Mapping[str, Any], where: str) -> tuple[Picture, Picture]:
    found = [row.get("image_1"), row.get("image_2")]
    if None in found:
        found = list(SOURCE.findall(str(row.get("images") or "")))
    if len(found) != 2:
        raise ValueError(f"{where}: {len(found)} pictures in column images: expected two, or image_1 and image_2")
    return _picture(found[0], where), _picture(found[1], where)


def _argilla_prompt(row: Mapping[str, Any], where: str) -> str:
    if isinstance(row.get("prompt"), str):
        return text_of(row["prompt"], where, "prompt")
    shown = PROMPT.search(str(row.get("images") or ""))
    return text_of(None if shown is None else shown[1], where, "prompt")


def _picture(cell: Any, where: str) -> Picture:
    """Bytes, or a name below the set's folder; addresses on the hub become the name that a download has."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"{where}: expected a picture or its path, found {type(cell).__name__}")
    known = FOLDER.search(cell)
    if known is not None:
        return known[0]
    return cell.partition("/resolve/main/")[2] if "://" in cell else cell


def _both(row: Mapping[str, Any], first: str, second: str) -> tuple[str, str] | None:
    values: Sequence[Any] = (row.get(first), row.get(second))
    return None if None in values else (str(values[0]), str(values[1]))
