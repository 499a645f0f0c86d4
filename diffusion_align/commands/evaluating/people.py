"""A blind task for people, and the labels that came back.

The task is a table in Pick-a-Pic's columns without verdicts: sides exchanged at random, pictures without a record of
how they were made, names that tell nothing. What they stand for is in ``key.json``, which labellers need not see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_align.evaluation.arena.votes import Vote
from diffusion_align.files import read_object, write_parquet, write_whole
from diffusion_align.pictures import bare_png, decoded_picture

from .picture_drawing import Drawn
from .picture_jobs import Jobs

#: In the comparison's folder: the task, its key, and where labels are looked for (as tables or lines of JSON).
FOLDER, TASK, KEY, LABELS = "people", "pairs.parquet", "key.json", "labels*"


def write_task(out: Path, drawn: dict[str, Drawn], sides: Sequence[str], jobs: Jobs, seed: int) -> Path:
    """Every pair of sides on every prompt and seed, in random order; returns the task's file.

    One that is there already stays: labels may have been given to it.
    """
    folder = out / FOLDER
    if (folder / TASK).is_file() and (folder / KEY).is_file():
        return folder / TASK
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    salt = hashlib.sha256(json.dumps([list(sides), jobs.pairs(), seed]).encode()).hexdigest()
    key: dict[str, dict[str, Any]] = {}
    rows = []
    rng = np.random.default_rng(seed)
    for index, (prompt, noise) in enumerate(jobs.pairs()):
        for pair in combinations(sides, 2):
            shown = pair if rng.random() < 0.5 else pair[::-1]
            uids = []
            for side in shown:
                uid = hashlib.sha256(f"{salt} {side} {index} {pair}".encode()).hexdigest()[:24]
                key[uid] = {"side": side, "prompt": prompt, "seed": noise}
                uids.append(uid)
            files = {side: drawn[side].files[index] for side in pair}
            pictures = [bare_png(decoded_picture(files[side], f"side {side}: {files[side]}")) for side in shown]
            row: dict[str, Any] = {
                "caption": prompt, "jpg_0": pictures[0], "jpg_1": pictures[1], "image_0_uid": uids[0],
                "image_1_uid": uids[1], "ranking_id": hashlib.sha256(f"{salt} {index}".encode()).hexdigest()[:12],
                "has_label": False, "are_different": pictures[0] != pictures[1],
            }  # fmt: skip
            rows.append(row)
    order = rng.permutation(len(rows))
    write_whole(folder / KEY, json.dumps(key, indent=1).encode())
    write_parquet(folder / TASK, Dataset.from_list([rows[i] for i in order]))
    return folder / TASK


def read_votes(out: Path) -> list[Vote]:
    """Verdicts in ``people/labels*``: tables with image_0_uid, image_1_uid and label_0 (1, 0 or 1/2), or lines of JSON
    with the same names. Rows without a verdict are left out.

    Raises:
        FileNotFoundError: there is no task or no label yet.
        ValueError: a label of another task, or none in [0, 1].
    """
    folder = out / FOLDER
    if not (folder / KEY).is_file():
        raise FileNotFoundError(f"{folder / KEY}: no such file; evaluate --judge people writes the task first")
    key = read_object(folder / KEY)
    found = []
    for where, row in label_rows(folder):
        share = row.get("label_0")
        if share is None or not row.get("has_label", True):
            continue
        if not 0 <= float(share) <= 1:
            raise ValueError(f"{where}: label_0 = {share!r} is wrong: expected a number in [0, 1]")
        try:
            first, second = key[row["image_0_uid"]], key[row["image_1_uid"]]
        except KeyError as error:
            raise ValueError(f"{where}: {error} is not of this task: expected image uids of {folder / TASK}") from None
        found.append(Vote(first["prompt"], first["side"], second["side"], float(share)))
    if not found:
        raise FileNotFoundError(
            f"{folder}: no labels yet; label {TASK} and put the result there as labels.parquet or labels.jsonl"
        )
    return found


def label_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of all files of labels, each with where it stands."""
    files = [
        file for path in sorted(folder.glob(LABELS)) for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            names = pyarrow.parquet.read_schema(file).names
            wanted = [name for name in ("image_0_uid", "image_1_uid", "label_0", "has_label") if name in names]
            rows = pyarrow.parquet.read_table(file, columns=wanted).to_pylist()
        elif file.suffix == ".jsonl":
            rows = [row for line in file.read_text().splitlines() if "image_0_uid" in (row := json.loads(line))]
        else:
            continue
        for number, row in enumerate(rows):
            yield f"{file}, row {number}", row
