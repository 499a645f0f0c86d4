"""New labels for existing pairs: a scorer's verdicts in place of the old ones, written as a data set.

The official Diffusion-DPO code asks its choice model at every visit of a pair (``--choice_model``); here it is asked
once. Rows are scored and written shard by shard, so that a run that died goes on with the shard it was at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_align.data.loader import Corruption
from diffusion_align.data.reading.rows import SOFT_LABEL, caption_of, image_bytes, preference, row_key
from diffusion_align.data.tables import Selection, Source, open_source
from diffusion_align.files import append_rows, begin_folder, read_journal, write_parquet, write_whole
from diffusion_align.pictures import CorruptImageError, decoded_picture

from .protocol import RewardScorer

#: Columns that say who is better, or what is: they are written anew.
VERDICTS = (
    "jpg_0", "jpg_1", "chosen", "rejected", "caption", "label_0", "label_1", "has_label", "preference",
    "original_label_0", "score_0", "score_1", SOFT_LABEL,
)  # fmt: skip


@dataclass(frozen=True)
class Relabelling:
    """What is to be labelled, and how.

    Attributes:
        source, split, streaming: as for ``load_pairs``.
        scorer: name of the judge, for the record.
        tie_margin: scores this near or nearer are a tie, in the scorer's own unit.
        temperature: add soft labels, sig((score_0 - score_1) / temperature), the probability of Bradley and Terry that
            image 0 is preferred (of a scorer whose low scores are good, with the other sign); None adds none.
        limit, seed: label this many pairs only, drawn at random (of a stream, and without a seed, the first).
        shard_size: rows of a file.
    """

    source: str
    split: str
    scorer: str
    tie_margin: float = 0.0
    temperature: float | None = None
    streaming: bool = False
    limit: int | None = None
    seed: int | None = 0
    shard_size: int = 1000


def relabel(
    task: Relabelling,
    scorer: RewardScorer,
    out: str | Path,
    *,
    batch_size: int = 32,
    max_corrupt: int = 100,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write the pairs of ``task.source`` with ``scorer``'s labels to ``out``/SPLIT-00000.parquet and so on.

    The columns are Pick-a-Pic's; ``score_0`` and ``score_1`` are what the scorer said, ``original_label_0`` is what the
    label was (none where there was none), other columns stay. Ties and rows without a label get one, too. A pair with a
    picture that cannot be decoded is left out and named in ``unreadable.jsonl``.

    Args:
        batch_size: pairs scored at once.
        max_corrupt: pairs left out before it is too many.

    Returns:
        What ``summary`` says of all shards, and "unreadable" pairs.

    Raises:
        ValueError: the scorer needs more than a picture and its prompt or says what is not a number, more than
            ``max_corrupt`` pairs cannot be decoded, or ``out`` was begun with other settings.
        FileNotFoundError, OSError: as ``load_pairs``.
    """
    if scorer.needs:
        needs = ", ".join(sorted(scorer.needs))
        raise ValueError(f"scorer {task.scorer} needs {needs}: it cannot label pairs of pictures with a prompt")
    out, table = Path(out), open_source(task.source, task.split, task.streaming)
    begin_folder(out / "labels.json", asdict(task))
    corruption = Corruption(max_corrupt)
    for line in read_journal(out / "unreadable.jsonl"):
        corruption.messages[line["row"]] = line["error"]
    for number, rows in _shards(table, task):
        path = out / f"{task.split}-{number:05d}.parquet"
        if not path.is_file():
            written = [*_labelled(rows, table, scorer, task, batch_size, corruption, out / "unreadable.jsonl")]
            if written:
                _write(written, table, path)
            progress(f"{path}: {len(written)} pairs")
    found = summary(sorted(out.glob(f"{task.split}-*.parquet"))) | {"unreadable": len(corruption.messages)}
    if not found["pairs"]:
        raise ValueError(
            f"{table.name}: no pair of it can be decoded, e.g. {next(iter(corruption.messages.values()), '')}"
        )
    write_whole(out / "labels.json", json.dumps({"task": asdict(task), "labels": found}, indent=1).encode())
    return found


def scores_of(scorer: RewardScorer) -> Callable[[Sequence[bytes], str], list[float]]:
    """A function from encoded pictures and their prompt to their scores, of which larger is better.

    Raises:
        ValueError: the scorer needs more than a picture and its prompt; the function: a picture cannot be decoded.
    """
    if scorer.needs:
        raise ValueError(f"scorer needs {', '.join(sorted(scorer.needs))}: it cannot order pictures of a prompt")

    def scored(pictures: Sequence[bytes], prompt: str) -> list[float]:
        shown = [decoded_picture(content, f"a picture of {prompt!r}") for content in pictures]
        with torch.no_grad():
            reward = scorer.score(shown, [prompt] * len(shown)).reward
        return [float(value) * (1 if scorer.higher_is_better else -1) for value in reward.double().cpu()]

    return scored


def label(gap: float, margin: float) -> float:
    """1 if the first is better, 0 if the second, 0.5 within ``margin``."""
    if abs(gap) <= margin:
        return 0.5
    return float(gap > 0)


def summary(files: Sequence[Path]) -> dict[str, float]:
    """What became of the labels: pairs, ties, agreeing, flipped (both decisive), decided (no verdict before), undecided
    (a tie now), and the 10%, 50% and 90% quantiles of the margins |score_0 - score_1|."""
    import pyarrow.parquet

    columns = ["label_0", "original_label_0", "score_0", "score_1"]
    read = [pyarrow.parquet.read_table(file, columns=columns).to_pydict() for file in files]
    now, before, first, second = (
        np.array([value for part in read for value in part[name]], dtype=np.float64) for name in columns
    )
    had, has = ~np.isnan(before) & (before != 0.5), now != 0.5
    same = (before > 0.5) == (now > 0.5)
    found: dict[str, float] = {
        "pairs": len(now),
        "ties": int((~has).sum()),
        "agreeing": int((had & has & same).sum()),
        "flipped": int((had & has & ~same).sum()),
        "decided": int((~had & has).sum()),
        "undecided": int((had & ~has).sum()),
    }
    if len(now):
        low, middle, high = np.quantile(np.abs(first - second), [0.1, 0.5, 0.9]).tolist()
        found |= {"margin_10": low, "margin_50": middle, "margin_90": high}
    return found


def told(found: dict[str, float]) -> str:
    """What became of the labels, in two lines of text."""
    counts = ("agreeing", "flipped", "decided", "undecided", "ties", "unreadable")
    numbers = ", ".join(f"{int(found[name])} {name}" for name in counts)
    margins = ", ".join(f"{share}% {found[f'margin_{share}']:.4g}" for share in (10, 50, 90))
    return f"{int(found['pairs'])} pairs: {numbers}\nmargins between the two scores, up to: {margins}"


def _shards(table: Source, task: Relabelling) -> Iterator[tuple[int, Iterable[tuple[int, Mapping[str, Any]]]]]:
    """Files to be, each with the rows in it and their numbers in the table; of a table, rows are read when used."""
    size = task.shard_size
    if task.streaming:
        rows, number = enumerate(islice(table.table, task.limit)), 0
        while chunk := list(islice(rows, size)):
            yield number, chunk
            number += 1
        return
    taken = Selection(task.limit, task.seed).of(range(len(table.table)))
    for number, start in enumerate(range(0, len(taken), size)):
        yield number, ((row, table.table[row]) for row in taken[start : start + size])


def _labelled(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    table: Source,
    scorer: RewardScorer,
    task: Relabelling,
    batch_size: int,
    corruption: Corruption,
    unreadable: Path,
) -> Iterator[dict[str, Any]]:
    """New rows, scored ``batch_size`` pairs at a time."""
    readable = _readable(rows, table, corruption, unreadable)
    while batch := list(islice(readable, batch_size)):
        pictures = [pair[side] for side in range(2) for _, _, pair in batch]
        with torch.no_grad():
            reward = scorer.score(pictures, [row["caption"] for row, _, _ in batch] * 2).reward
        scores = reward.double().cpu().view(2, -1).T.tolist()
        for (row, where, _), pair in zip(batch, scores, strict=True):
            if not all(np.isfinite(pair)):
                raise ValueError(f"{where}: scorer {task.scorer} gives {pair}: expected finite numbers")
            gap = (pair[0] - pair[1]) * (1 if scorer.higher_is_better else -1)
            verdict = label(gap, task.tie_margin)
            new = {
                "label_0": verdict,
                "label_1": 1 - verdict,
                "has_label": True,
                "score_0": pair[0],
                "score_1": pair[1],
            }
            if task.temperature is not None:
                new[SOFT_LABEL] = float(0.5 * (1 + np.tanh(gap / task.temperature / 2)))  # a sigmoid without overflow
            if {"image_0_uid", "image_1_uid", "best_image_uid"} <= row.keys():
                new["best_image_uid"] = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"]}.get(verdict, "none")
            yield row | new


def _readable(
    rows: Iterable[tuple[int, Mapping[str, Any]]], table: Source, corruption: Corruption, unreadable: Path
) -> Iterator[tuple[dict[str, Any], str, list[Any]]]:
    """Rows in Pick-a-Pic's columns, what messages call them, and their pictures; others are noted and left out."""
    for index, row in rows:
        where = table.where(index)
        caption, value = caption_of(row, where), preference(row, where)
        if value is not None and "label_0" in row:
            value = float(row["label_0"])
        names = ("jpg_0", "jpg_1") if "jpg_0" in row else ("chosen", "rejected")
        try:
            contents = [image_bytes(row[name], table.folder, f"{where}, column {name}") for name in names]
            pictures = [decoded_picture(content, where) for content in contents]
        except CorruptImageError as error:
            if row_key(index) not in corruption.messages:
                append_rows(unreadable, [{"row": row_key(index), "error": str(error)}])
            corruption.note(row_key(index), error)
            continue
        kept = {name: value for name, value in row.items() if name not in VERDICTS}
        original = row.get("original_label_0", value)
        new = {"jpg_0": contents[0], "jpg_1": contents[1], "caption": caption, "original_label_0": original}
        yield kept | new, where, pictures


def _write(rows: Sequence[Mapping[str, Any]], table: Source, path: Path) -> None:
    """One file, at once. Types are those of the table, so that all shards have the same."""
    from datasets import Dataset, Features, Value

    own = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "caption": Value("string"), "has_label": Value("bool")}
    own |= {
        name: Value("float64") for name in ("label_0", "label_1", "original_label_0", "score_0", "score_1", SOFT_LABEL)
    }
    known, features = table.table.features, None
    if known is not None:
        features = Features({name: own.get(name) or known[name] for name in rows[0]})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    write_parquet(path, Dataset.from_dict(columns, features=features))
