"""Labels as parquet in Pick-a-Pic's columns: what ``load_pairs`` and ``Comparisons`` read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.files import check_writable, naming
from diffusion_align.studio.sources.parquet_cells import ParquetCells

from .label_store import read_labels
from .label_tasks import Task, open_task
from .many_at_once import contradictions
from .merged_votes import Merge, PairAnswer, answers
from .verdicts import Verdict

#: Rows of a row group: few, as they hold pictures.
ROWS = 64
COLUMNS = pa.schema(
    [
        ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
        ("has_label", pa.bool_()), ("image_0_uid", pa.string()), ("image_1_uid", pa.string()),
        ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
        ("num_example_per_prompt", pa.int64()), ("ranking_id", pa.string()), ("user_id", pa.string()),
        ("model_0", pa.string()), ("model_1", pa.string()), ("scale_0", pa.float64()), ("scale_1", pa.float64()),
        ("both_bad", pa.bool_()), ("implied", pa.bool_()), ("votes_0", pa.float64()), ("votes_1", pa.float64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What became of the labels.

    Attributes:
        rows: by split.
        ties: rows of both splits without a better picture.
        skipped: verdicts that said nothing.
        lost: verdicts on pictures that the source has no longer.
        leaking: rows left out of train because one of their pictures is in test.
        circles: by annotator and prompt, pictures that beat each other in a circle.
    """

    files: tuple[Path, ...]
    rows: Mapping[str, int]
    ties: int
    skipped: int
    lost: int
    leaking: int
    circles: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{count} pairs in {split}" for split, count in self.rows.items()]
        parts += [f"{self.ties} ties", f"{self.skipped} skipped"]
        parts += [f"{self.lost} labels of pictures that are gone"] if self.lost else []
        parts += [f"{self.leaking} left out of train (a picture of theirs is in test)"] if self.leaking else []
        return "\n".join([", ".join(parts), *(f"contradiction: {circle}" for circle in self.circles)])


@dataclass(frozen=True)
class _Row:
    answer: PairAnswer
    hashes: tuple[str, str]


def export_labels(folder: Path, out: Path, merge: Merge = "majority") -> Exported:
    """Write ``OUT/train-*.parquet`` and, of held-out prompts, ``OUT/test-*.parquet`` from a folder of labels.

    Raises:
        FileNotFoundError: no labels, or their pictures are gone.
        ValueError: a damaged label file, or no pair has a label.
        OSError: it cannot be written.
    """
    return write_export(open_task(folder), read_labels(folder), out, merge)


def write_export(task: Task, labels: Mapping[str, Sequence[Verdict]], out: Path, merge: Merge = "majority") -> Exported:
    """As ``export_labels``, of an opened task."""
    found, lost = answers(task, labels, merge)
    if not found:
        raise ValueError(f"{task.folder}: no pair has a label yet")
    check_writable(out)
    cells = ParquetCells()
    rows = [_Row(answer, _hashes(task, answer, cells)) for answer in found]
    test = [row for row in rows if task.in_test(task.units[row.answer.place].prompt)]
    seen = {name for row in test for name in row.hashes}
    rest = [row for row in rows if not task.in_test(task.units[row.answer.place].prompt)]
    train = [row for row in rest if seen.isdisjoint(row.hashes)]
    splits = {"train": train} | ({"test": test} if test else {})
    files = []
    for split, there in splits.items():
        files.append(out / f"{split}-00000-of-00001.parquet")
        _write(files[-1], table_rows(task, there, cells), _schema(task, labels))
    return Exported(
        tuple(files),
        {split: len(there) for split, there in splits.items()},
        sum(row.answer.label == 0.5 for there in splits.values() for row in there),
        sum(verdict.choice == "skip" for verdicts in labels.values() for verdict in verdicts),
        lost,
        len(rest) - len(train),
        tuple(_circles(task, labels)),
    )


def table_rows(task: Task, rows: Sequence[_Row], cells: ParquetCells) -> Iterator[dict[str, Any]]:
    """Rows as they are written; which picture is 0 is by content, so that it says nothing."""
    many = task.settings.kind != "pairs"
    counts = Counter((row.answer.user, task.units[row.answer.place].prompt) for row in rows)
    for row in rows:
        answer, unit = row.answer, task.units[row.answer.place]
        order = sorted((0, 1), key=lambda side: row.hashes[side])
        flip = order[0] == 1
        numbers = (answer.first, answer.second)
        pictures = [unit.pictures[numbers[side]] for side in order]
        uids = [picture.uid or row.hashes[side][:32] for picture, side in zip(pictures, order, strict=True)]
        label = 1 - answer.label if flip else answer.label
        votes = answer.votes[::-1] if flip else answer.votes
        wrong = (None, None) if answer.wrong is None else (answer.wrong[::-1] if flip else answer.wrong)
        yield {
            "are_different": row.hashes[0] != row.hashes[1],
            "best_image_uid": "none" if label == 0.5 else uids[0 if label == 1 else 1],
            "caption": unit.prompt, "has_label": True, "image_0_uid": uids[0], "image_1_uid": uids[1],
            "jpg_0": pictures[0].read(cells), "jpg_1": pictures[1].read(cells),
            "label_0": label, "label_1": 1 - label,
            "num_example_per_prompt": counts[answer.user, unit.prompt] if many else 1,
            "ranking_id": unit.key if many else unit.ranking or unit.key,
            "user_id": answer.user or "majority",
            "model_0": pictures[0].model, "model_1": pictures[1].model,
            "scale_0": pictures[0].scale, "scale_1": pictures[1].scale,
            "both_bad": answer.bad, "implied": answer.implied, "votes_0": votes[0], "votes_1": votes[1],
            "wrong_words_0": wrong[0], "wrong_words_1": wrong[1],
        } | {
            f"label_0_{name}": None if (value := answer.aspects.get(name)) is None else 1 - value if flip else value
            for name in task.settings.aspects
        }  # fmt: skip


def _hashes(task: Task, answer: PairAnswer, cells: ParquetCells) -> tuple[str, str]:
    pictures = task.units[answer.place].pictures
    first, second = (hashlib.sha256(pictures[i].read(cells)).hexdigest() for i in (answer.first, answer.second))
    return first, second


def _schema(task: Task, labels: Mapping[str, Sequence[Verdict]]) -> pa.Schema:
    """Pick-a-Pic's columns, the aspects, and marked words only if somebody was asked: readers take the column for an
    answer."""
    schema = COLUMNS
    for name in task.settings.aspects:
        schema = schema.append(pa.field(f"label_0_{name}", pa.float64()))
    if any(verdict.wrong_words is not None for verdicts in labels.values() for verdict in verdicts):
        for side in (0, 1):
            schema = schema.append(pa.field(f"wrong_words_{side}", pa.list_(pa.float64())))
    return schema


def _write(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Whole or not at all, a few rows in memory."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            with pq.ParquetWriter(partial, schema, write_page_checksum=True) as writer:
                batch: list[Mapping[str, Any]] = []
                for row in rows:
                    batch.append({name: row.get(name) for name in schema.names})
                    if len(batch) == ROWS:
                        writer.write_table(pa.Table.from_pylist(batch, schema))
                        batch = []
                if batch:
                    writer.write_table(pa.Table.from_pylist(batch, schema))
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _circles(task: Task, labels: Mapping[str, Sequence[Verdict]]) -> Iterator[str]:
    for user in sorted(labels):
        for key, circles in sorted(contradictions(labels[user]).items()):
            unit = task.unit(key)
            for circle in circles if unit is not None else ():
                yield f"{user}, {unit.prompt!r}: pictures {', '.join(map(str, circle))}"  # type: ignore[union-attr]
