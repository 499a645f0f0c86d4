"""Ranked lists with a scorer's scores in the place of their own order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.files import begin_folder, write_parquet, write_whole
from diffusion_align.pictures import CorruptImageError

from ..pairs import load_examples
from ..types import ListRecord

#: From encoded pictures and their prompt to scores, larger is better.
Scores = Callable[[Sequence[bytes], str], Sequence[float]]


@dataclass(frozen=True)
class Rescoring:
    """What lists are scored anew.

    Attributes:
        source, split, limit, seed: as for ``load_examples``.
        scorer: name of the judge, for the record.
        shard_size: lists of a file.
    """

    source: str
    split: str
    scorer: str
    limit: int | None = None
    seed: int | None = 0
    shard_size: int = 1000


def rescore(
    task: Rescoring,
    scores: Scores,
    out: str | Path,
    *,
    max_corrupt: int = 100,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write the lists of ``task`` to ``out``/SPLIT-00000.parquet and so on: ``images``, ``caption``, ``scores`` and,
    as they were, ``original_ranks``.

    Lists with a picture that cannot be decoded are left out and counted.

    Returns:
        Lists, pairs of their pictures that were ordered before, the share of these that the scorer orders alike, and
        lists that are "unreadable"; also in ``labels.json``.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_examples``; also scores that are not finite, more than
            ``max_corrupt`` lists that cannot be decoded, or ``out`` was begun with other settings.
    """
    out = Path(out)
    lists = load_examples(task.source, task.split, ("ranked lists",), limit=task.limit, seed=task.seed)
    begin_folder(out / "labels.json", asdict(task))
    rows = lists.numbers()
    found = np.zeros(4)
    for number, start in enumerate(range(0, len(rows), task.shard_size)):
        path = out / f"{task.split}-{number:05d}.parquet"
        written: list[dict[str, Any]] = []
        for row, record in lists.records(rows[start : start + task.shard_size]):
            try:
                if isinstance(record, CorruptImageError):
                    raise record
                assert isinstance(record, ListRecord)
                given = [float(score) for score in scores(record.pictures, record.caption)]
            except CorruptImageError as error:
                found[3] += 1
                progress(f"left out: {lists.where(row)}: {error}")
                if found[3] > max_corrupt:
                    raise ValueError(
                        f"more than max_corrupt = {max_corrupt} lists cannot be decoded: {error}"
                    ) from None
                continue
            if not np.isfinite(given).all():
                raise ValueError(f"{lists.where(row)}: scorer {task.scorer} gives {given}: expected finite numbers")
            ranks = record.judgement.ranks
            assert ranks is not None
            found[:3] += (1, *_alike(ranks, given))
            written.append({
                "images": list(record.pictures), "caption": record.caption, "scores": given,
                "original_ranks": list(ranks), "weight": record.weight,
            })  # fmt: skip
        if written:
            _write(path, written)
        progress(f"{path}: {len(written)} lists")
    if not found[0]:
        raise ValueError(f"{lists.name}: no list of it can be decoded")
    counts = {
        "lists": found[0], "ordered pairs": found[1], "agreeing": found[2] / max(found[1], 1.0), "unreadable": found[3],
    }  # fmt: skip
    write_whole(out / "labels.json", json.dumps({"task": asdict(task), "labels": counts}, indent=1).encode())
    return counts


def _alike(ranks: Sequence[int], scores: Sequence[float]) -> tuple[int, int]:
    """Pairs of pictures that the ranks order, and those of them that the scores order alike."""
    before, now = np.array(ranks), np.array(scores)
    better = before[:, None] < before
    return int(better.sum()), int((better & (now[:, None] > now)).sum())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Sequence as List

    kinds = {
        "images": List(Value("binary")), "caption": Value("string"), "scores": List(Value("float64")),
        "original_ranks": List(Value("int64")), "weight": Value("float64"),
    }  # fmt: skip
    write_parquet(path, Dataset.from_list(list(rows), features=Features(kinds)))
