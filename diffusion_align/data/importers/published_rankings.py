"""Readers of HPDv2, HPDv3 and HPDv3++, and of ImageRewardDB: who is better is said by place, rank or list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from .imported import ImportedPair, Wanted, label_of_ranks, text_of, truth_of, two_of
from .places import Place

#: Aspects of HPDv3++, by how their files end.
AXES: Mapping[str, str] = {"_aes": "aesthetic", "_tf": "text_following"}
#: Rows shown where the direction of ranks must be confirmed.
SHOWN = 3


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file that is a list of objects, or of JSON Lines.

    Raises:
        ValueError: it is neither; the file is named.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"{path}, row {wrong}: expected an object, found {type(rows[wrong]).__name__}")
    return list(rows)


def set_files(place: Place, split: str, endings: Sequence[str] = ("",)) -> list[Path]:
    """The JSON files of a split, in the folder itself.

    Raises:
        FileNotFoundError: there is none; those that are there are named.
    """
    found = [path for ending in endings if (path := place.root / f"{split}{ending}.json").is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in place.root.glob("*.json"))) or "no .json files"
        raise FileNotFoundError(f"{place.root}: no {split}.json; found {there}")
    return found


def read_hpdv2(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """HPDv2: ``human_preference`` of two pictures in train.json; ranks of many, by several people, in test.json."""
    (path,) = set_files(place, wanted.split)
    rows = json_rows(path)
    if rows and "rank" in rows[0]:
        if wanted.rank_best is None:
            raise ValueError(f"{path} holds ranks, and does not say whether 1 is the best:\n{shown_ranks(rows)}\n"
                             "Look at these pictures and say --rank-best lowest or --rank-best highest")  # fmt: skip
        yield from _ranked_hpdv2(path, rows, wanted)
        return
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        first, second = two_of(row.get("file_path"), where, "file_path")
        chosen = [truth_of(value, where, "human_preference") for value in
                  two_of(row.get("human_preference"), where, "human_preference")]  # fmt: skip
        yield ImportedPair(
            (text_of(first, where, "file_path"), text_of(second, where, "file_path")),
            text_of(row.get("prompt"), where, "prompt"),
            0.5 if chosen[0] == chosen[1] else float(chosen[0]),
            where,
            user_id=None if row.get("user_hash") is None else str(row["user_hash"]),
        )


def shown_ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first rankings, for people."""
    lines = []
    for row in rows[:SHOWN]:
        pictures = ", ".join(f"{name} is {rank}" for name, rank in zip(row["image_path"], row["rank"], strict=False))
        lines.append(f"  {str(row.get('prompt'))[:60]!r}: {pictures}")
    return "\n".join(lines)


def _ranked_hpdv2(path: Path, rows: Sequence[Mapping[str, Any]], wanted: Wanted) -> Iterator[ImportedPair]:
    """All pairs of all rankings; where single people's are there, theirs, each with a ``user_id``."""
    assert wanted.rank_best is not None
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        names, prompt = row.get("image_path"), text_of(row.get("prompt"), where, "prompt")
        if not isinstance(names, list) or len(names) < 2:
            raise ValueError(f"{where}: image_path = {names!r} is wrong: expected a list of two or more")
        judged = row.get("raw_annotations") or [{"rank": row["rank"]}]
        pairs = len(names) * (len(names) - 1) // 2
        for judgement in judged:
            ranks, user = judgement.get("rank"), judgement.get("user_hash")
            if not isinstance(ranks, list) or len(ranks) != len(names):
                raise ValueError(f"{where}: rank = {ranks!r} is wrong: expected one for each of {len(names)} pictures")
            for a, b in combinations(range(len(names)), 2):
                yield ImportedPair(
                    (str(names[a]), str(names[b])),
                    prompt,
                    label_of_ranks(ranks[a], ranks[b], wanted.rank_best),
                    where,
                    user_id=None if user is None else str(user),
                    ranking_id=f"{number}" if user is None else f"{number}-{user}",
                    num_example_per_prompt=pairs * len(judged),
                )


def read_hpdv3(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """HPDv3 and HPDv3++: ``path1`` is preferred to ``path2``; the latter's files are one for each aspect."""
    for path in set_files(place, wanted.split, ("", *AXES)):
        axis = next((name for ending, name in AXES.items() if path.stem.endswith(ending)), None)
        for number, row in enumerate(json_rows(path)):
            where = f"{path}, row {number}"
            models = (row.get("model1"), row.get("model2"))
            tie = bool(row.get("tie_case", False))
            confidence = row.get("confidence")
            yield ImportedPair(
                (text_of(row.get("path1"), where, "path1"), text_of(row.get("path2"), where, "path2")),
                text_of(row.get("prompt"), where, "prompt"),
                0.5 if tie else 1.0,
                where,
                models=None if None in models else (str(models[0]), str(models[1])),
                confidence=None if confidence is None else float(confidence),
                aspects={} if axis is None else {axis: 0.5 if tie else 1.0},
            )


def read_imagerewarddb(place: Place, wanted: Wanted) -> Iterator[ImportedPair]:
    """ImageRewardDB: a row for each picture, with its rank among those of its prompt (1 is the best); all pairs of a
    prompt, equal ranks are ties. From metadata-SPLIT.parquet, or the JSON files beside the pictures."""
    rows = list(_rated_pictures(place, wanted.split))
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for where, row in rows:
        groups.setdefault(str(row.get("prompt_id")), []).append((where, row))
    for prompt_id, members in groups.items():
        pairs = len(members) * (len(members) - 1) // 2
        for (where, first), (_, second) in combinations(members, 2):
            ranks = [_rank(row, where) for row in (first, second)]
            yield ImportedPair(
                (text_of(first.get("image_path"), where, "image_path"), str(second.get("image_path"))),
                text_of(first.get("prompt"), where, "prompt"),
                label_of_ranks(ranks[0], ranks[1], wanted.rank_best or "lowest"),
                where,
                ranking_id=prompt_id,
                num_example_per_prompt=pairs,
            )


def _rank(row: Mapping[str, Any], where: str) -> float:
    rank = row.get("rank")
    if not isinstance(rank, int | float) or isinstance(rank, bool):
        raise ValueError(f"{where}: rank = {rank!r} is wrong: expected a number")
    return float(rank)


def _rated_pictures(place: Place, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    table = place.root / f"metadata-{split}.parquet"
    if table.is_file():
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(table).to_pylist()):
            yield f"{table}, row {number}", row
        return
    files = sorted((place.root / "images" / split).rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"{place.root}: neither {table.name} nor .json files in images/{split}")
    for path in files:
        for number, row in enumerate(json_rows(path)):
            yield f"{path}, row {number}", row
