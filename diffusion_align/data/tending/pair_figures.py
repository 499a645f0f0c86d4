"""Figures of a data set of pairs, from its cheap columns: no picture is decoded, and of parquet none is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.pictures import CorruptImageError, upright_size

from ..reading.rows import CHEAP, KINDS, SOFT_LABEL, kinds_of_rows
from ..tables import local_files, open_source
from .raw_pairs import normalised, raw_pairs

#: Columns that are read, where they are there.
COLUMNS = (*CHEAP, "user_id", "model_0", "model_1", "ranking_id", "votes_0", "votes_1")
#: Prompts and models that are named.
NAMED = 10


def pair_figures(source: str | Path, split: str, sizes: int = 0) -> dict[str, Any]:
    """Counts, labels, prompts, people and models of a split.

    Args:
        sizes: look at the headers of the pictures of so many pairs, the first.

    Returns:
        JSON-able: "pairs", what is left out by kind, "first preferred", "prompts" with their most frequent and the
        quantiles of their lengths, "users", "models" with their win rates, "aspects", "sizes".

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    table, where = cheap_table(source, split)
    kinds = np.bincount(kinds_of_rows(table, lambda row: f"{where}, row {row}", False), minlength=len(KINDS) + 1)
    found: dict[str, Any] = {"pairs": len(table), "used": int(kinds[0])}
    found |= {name: int(kinds[kind]) for kind, name in KINDS.items()}
    labels = np.array([])
    if "label_0" in table.column_names:
        labels = table["label_0"].cast(pa.float64()).fill_null(np.nan).to_numpy()
        decided = labels[(labels == 0) | (labels == 1)]
        found["first preferred"] = None if not len(decided) else float(decided.mean())
    found["soft labels"] = SOFT_LABEL in table.column_names
    found["prompts"] = _prompts(table)
    if "user_id" in table.column_names:
        found["users"] = len({user for user in table["user_id"].to_pylist() if user is not None})
    if {"model_0", "model_1"} <= set(table.column_names) and len(labels):
        found["models"] = _models(table, labels)
    found["aspects"] = [name.removeprefix("label_0_") for name in table.column_names if name.startswith("label_0_")]
    if sizes:
        found["sizes"] = picture_sizes(source, split, sizes)
    return found


def cheap_table(source: str | Path, split: str) -> tuple[pa.Table, str]:
    """The columns of a data set that are no pictures, and its name."""
    files = local_files(source, split)
    if files and files[0].suffix == ".parquet":
        names = pq.read_schema(files[0]).names
        wanted = [name for name in names if name in COLUMNS or name.startswith("label_0_")]
        if not {"label_0", "caption"} <= set(names):
            open_source(source, split, True)  # says what is missing
        parts = [pq.read_table(file, columns=wanted) for file in files]
        return pa.concat_tables(parts, promote_options="permissive"), str(source)
    opened = open_source(source, split, streaming=False)
    wanted = [name for name in opened.columns if name in COLUMNS or name.startswith("label_0_")]
    return opened.table.select_columns(wanted).with_format("arrow")[:], opened.name


def picture_sizes(source: str | Path, split: str, pairs: int) -> dict[str, int]:
    """How often each size WxH occurs among the pictures of the first pairs, by their headers."""
    counts: Counter[str] = Counter()
    for number, pair in enumerate(raw_pairs(source, split)):
        if number >= pairs:
            break
        for content in pair.pictures:
            try:
                if isinstance(content, CorruptImageError):
                    raise content
                width, height = upright_size(content, pair.where)
                counts[f"{width}x{height}"] += 1
            except CorruptImageError:
                counts["unreadable"] += 1
    return dict(counts.most_common())


def _prompts(table: pa.Table) -> dict[str, Any]:
    captions = [caption for caption in table["caption"].to_pylist() if caption and caption.strip()]
    if not captions:
        return {"distinct": 0}
    counts = Counter(normalised(caption) for caption in captions)
    words = np.array([len(caption.split()) for caption in captions])
    low, middle, high = np.quantile(words, [0.05, 0.5, 0.95]).tolist()
    return {
        "distinct": len(counts),
        "words": {"5%": low, "50%": middle, "95%": high, "most": int(words.max())},
        "most frequent": dict(counts.most_common(NAMED)),
    }


def _models(table: pa.Table, labels: Any) -> dict[str, dict[str, float]]:
    """Of each model, comparisons with others and the share that it won (ties half)."""
    won: Counter[str] = Counter()
    played: Counter[str] = Counter()
    rows = zip(table["model_0"].to_pylist(), table["model_1"].to_pylist(), labels.tolist(), strict=True)
    for first, second, label in rows:
        if first is None or second is None or first == second or label != label:
            continue
        played.update((first, second))
        won[first] += label
        won[second] += 1 - label
    return {name: {"comparisons": count, "won": won[name] / count} for name, count in played.most_common()}
