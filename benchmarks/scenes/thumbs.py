"""Thumbs of the embedded world: the shipped pairs' pictures, each by itself, liked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from diffusion_align.data import PairDataset, load_pairs
from diffusion_align.files import write_parquet


def make_thumbs(folder: Path) -> Path:
    """Write the pictures of the training pairs with a label each, unless they are there; ties are left out.

    The same verdicts as in the pairs: a chosen picture is liked, a rejected one is not. What was beside it is not said.
    """
    path = folder / "train.parquet"
    if path.is_file():
        return path
    pairs = load_pairs("scenes-pairs", "train")
    assert isinstance(pairs, PairDataset)
    columns: dict[str, list[Any]] = {"image": [], "caption": [], "label": []}
    for pair in (pairs[index] for index in range(len(pairs))):
        columns["image"] += [pair.chosen, pair.rejected]
        columns["caption"] += [pair.caption] * 2
        columns["label"] += [True, False]
    write_parquet(path, Dataset.from_dict(columns))
    return path
