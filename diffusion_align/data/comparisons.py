"""Judged pairs for training and testing scorers: both images as stored, labels per aspect, who judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from diffusion_align.pictures import decoded_picture

from .reading.rows import image_bytes
from .tables import Selection, Source, open_source

#: Column that holds the verdict on an aspect: label_0_aesthetic, ...
ASPECT_PREFIX = "label_0_"

#: Columns that hold, for each word of the caption, the share of people who marked it as not shown by the image.
MARKS = ("wrong_words_0", "wrong_words_1")


@dataclass(frozen=True)
class Comparison:
    """One judged pair.

    Attributes:
        images: both encoded images, in stored order.
        prompt: what they were made for; for edits, the instruction.
        labels: P(image 0 is preferred), "overall" first; NaN where an aspect was not judged.
        user: who judged, "" if unknown.
        source: the encoded image before the edit, or None.
        weight: factor of the pair's loss.
        scales: guidance scales that the images were drawn with for this very prompt; NaN where unknown.
        wrong_words: for each image P(a word is marked as not shown), of every word of the prompt, NaN where people
            cannot tell; () where nobody was asked.
        key: names the pair in messages.
    """

    images: tuple[bytes, bytes]
    prompt: str
    labels: dict[str, float]
    user: str
    source: bytes | None
    weight: float
    scales: tuple[float, float]
    wrong_words: tuple[tuple[float, ...], tuple[float, ...]]
    key: str


class Comparisons:
    """Judged pairs with random access; ties are kept.

    Reads Pick-a-Pic's columns and, where present, ``label_0_ASPECT`` (P(image 0 is better in that aspect)),
    ``user_id``, ``source`` (the image before an edit), ``num_example_per_prompt`` (weight 1 / it), ``scale_0`` and
    ``scale_1`` (guidance scales that the images were drawn with for the caption), ``wrong_words_0`` and
    ``wrong_words_1`` (a number in [0, 1] for each word of the caption, split at spaces: the share of people who say
    that the image does not show it, as in RichHF, 2312.10240; null where they cannot tell). Rows without a label are
    left out.

    Args:
        limit, seed, together: which rows are taken, see :class:`~.tables.Selection`.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """

    unit = "judged pairs"

    def __init__(
        self,
        source: str | Path,
        split: str = "train",
        limit: int | None = None,
        *,
        seed: int | None = None,
        together: int = 1,
    ) -> None:
        self.source: Source = open_source(source, split, streaming=False)
        columns = self.source.columns
        if "label_0" not in columns:
            raise ValueError(
                f"{self.source.name}: column 'label_0' is missing: scorers are trained on Pick-a-Pic's layout"
            )
        self.aspects = [c.removeprefix(ASPECT_PREFIX) for c in columns if c.startswith(ASPECT_PREFIX)]
        self.marked = set(MARKS) <= set(columns)
        names = [c for c in ("has_label", "label_0") if c in columns]
        rows = self.source.table.select_columns(names).to_list()
        labelled = [i for i, row in enumerate(rows) if row.get("has_label", True) and row["label_0"] is not None]
        self.rows = Selection(limit, seed, together).of(labelled)
        if not self.rows:
            raise ValueError(f"{self.source.name}: no row of {len(rows)} has a label")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Comparison:
        """Pair ``index``.

        Raises:
            ValueError: a label that is no number in [0, 1]; row and column are named.
        """
        number = self.rows[index]
        row = self.source.table[number]
        where = f"{self.source.name}, row {number}"
        labels = {"overall": probability(row["label_0"], f"{where}: label_0")}
        for aspect in self.aspects:
            column = ASPECT_PREFIX + aspect
            value = row[column]
            labels[aspect] = math.nan if value is None else probability(value, f"{where}: {column}")
        source = row.get("source")
        return Comparison(
            (self._image(row, "jpg_0", where), self._image(row, "jpg_1", where)),
            str(row["caption"]),
            labels,
            str(row.get("user_id", "")),
            None if source is None else self._image(row, "source", where),
            1.0 / float(row.get("num_example_per_prompt") or 1),
            (scale(row.get("scale_0"), f"{where}: scale_0"), scale(row.get("scale_1"), f"{where}: scale_1")),
            (self._marks(row, MARKS[0], where), self._marks(row, MARKS[1], where)),
            f"row {number}",
        )

    def _image(self, row: dict[str, Any], column: str, where: str) -> bytes:
        return image_bytes(row[column], self.source.folder, f"{where}, column {column}")

    def _marks(self, row: dict[str, Any], column: str, where: str) -> tuple[float, ...]:
        marks = row.get(column)
        if marks is None:
            return ()
        words = str(row["caption"]).split()
        if len(marks) != len(words):
            raise ValueError(f"{where}: {column} has {len(marks)} numbers: expected one for each of {len(words)} words")
        return tuple(math.nan if mark is None else probability(mark, f"{where}: {column}") for mark in marks)

    def users(self) -> list[str]:
        """Everyone who judged, sorted; [] without a user_id column."""
        if "user_id" not in self.source.columns:
            return []
        column = self.source.table.select_columns(["user_id"]).to_dict()["user_id"]
        return sorted({str(column[row]) for row in self.rows})

    def rankings(self) -> list[tuple[int, list[int]]]:
        """Pairs that were judged together: same caption and ``ranking_id``; [] without that column.

        Each as the number of its distinct pictures and the positions of its pairs.
        """
        return self._rankings

    @cached_property
    def _rankings(self) -> list[tuple[int, list[int]]]:  # reads pictures, and is asked for at every validation
        if "ranking_id" not in self.source.columns:
            return []
        columns = self.source.table.select_columns(["caption", "ranking_id"]).to_dict()
        groups: dict[tuple[str, str], list[int]] = {}
        for position, row in enumerate(self.rows):
            groups.setdefault((columns["caption"][row], str(columns["ranking_id"][row])), []).append(position)
        return [(self._distinct(pairs), pairs) for pairs in groups.values()]

    def _distinct(self, pairs: list[int]) -> int:
        return 2 if len(pairs) == 1 else len({image for pair in pairs for image in self[pair].images})


def probability(value: Any, where: str) -> float:
    """A label in [0, 1]."""
    if isinstance(value, str | bool) or not math.isfinite(value) or not 0 <= value <= 1:
        raise ValueError(f"{where} = {value!r} is wrong: expected a number in [0, 1]")
    return float(value)


def scale(value: Any, where: str) -> float:
    """A guidance scale; NaN where there is none."""
    if value is None:
        return math.nan
    if isinstance(value, str | bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where} = {value!r} is wrong: expected a guidance scale, a number from 0 on")
    return float(value)


@dataclass(frozen=True)
class ComparisonExample:
    """A comparison with its images ready for the scorer."""

    images: Tensor
    source: Tensor | None
    record: Comparison


@dataclass(frozen=True)
class ComparisonBatch:
    """B judged pairs.

    Attributes:
        images: (2, B, ...) as the scorer's ``preprocess`` gives them.
        prompts: B.
        labels: (B, 1 + aspects) float32: P(image 0 is preferred), overall first; NaN where not judged.
        users: B.
        weight: (B,) float32.
        sources: (B, ...) preprocessed, or None.
        keys: B.
        pictures: (2, B) int64, equal numbers where the stored pictures are the same.
        scales: (2, B) float32 guidance scales; NaN where unknown.
        wrong_words: (2, B, W) float32: P(a word is marked as not shown); NaN where nobody was asked and beyond the
            last word.
    """

    images: Tensor
    prompts: list[str]
    labels: Tensor
    users: list[str]
    weight: Tensor
    sources: Tensor | None
    keys: list[str]
    pictures: Tensor
    scales: Tensor
    wrong_words: Tensor

    def to(self, device: torch.device | str) -> ComparisonBatch:
        """Move every tensor."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            pictures=self.pictures.to(device),
            scales=self.scales.to(device),
            wrong_words=self.wrong_words.to(device),
            weight=self.weight.to(device),
            sources=None if self.sources is None else self.sources.to(device),
        )


class ComparisonExamples:
    """Comparisons decoded and preprocessed for one scorer, for ``ExampleLoader``."""

    def __init__(self, comparisons: Comparisons, preprocess: Callable[[Tensor], Tensor]) -> None:
        self.comparisons, self.preprocess = comparisons, preprocess

    def __len__(self) -> int:
        return len(self.comparisons)

    def example(self, index: int, seed: int, drop_caption: bool) -> ComparisonExample:
        record = self.comparisons[index]
        images = [self._prepared(content, f"{record.key}, image {i}") for i, content in enumerate(record.images)]
        source = None if record.source is None else self._prepared(record.source, f"{record.key}, source")
        return ComparisonExample(torch.stack(images), source, record)

    def _prepared(self, content: bytes, where: str) -> Tensor:
        return self.preprocess(pil_to_tensor(decoded_picture(content, where))[None].float() / 255)[0]

    def sizes(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self)  # the scorer's preprocessing makes one size of all


def collate_comparisons(examples: Sequence[ComparisonExample], seeds: Sequence[int]) -> ComparisonBatch:
    """Stack examples, half of the pairs (by their seeds) exchanged, so that a scorer cannot learn their order."""
    images, labels, pictures, scales, marks = [], [], [], [], []
    width = max(len(example.record.prompt.split()) for example in examples)
    numbers: dict[bytes, int] = {}
    for example, seed in zip(examples, seeds, strict=True):
        label = torch.tensor(list(example.record.labels.values()), dtype=torch.float32)
        exchange = seed % 2 == 1
        images.append(example.images.flip(0) if exchange else example.images)
        labels.append(1 - label if exchange else label)
        pair = [numbers.setdefault(content, len(numbers)) for content in example.record.images]
        pictures.append(pair[::-1] if exchange else pair)
        scales.append(example.record.scales[::-1] if exchange else example.record.scales)
        rows = [[*row, *[math.nan] * (width - len(row))] for row in example.record.wrong_words]
        marks.append(rows[::-1] if exchange else rows)
    records = [example.record for example in examples]
    sources = [example.source for example in examples if example.source is not None]
    return ComparisonBatch(
        torch.stack(images, dim=1),
        [record.prompt for record in records],
        torch.stack(labels),
        [record.user for record in records],
        torch.tensor([record.weight for record in records], dtype=torch.float32),
        torch.stack(sources) if len(sources) == len(examples) else None,
        [record.key for record in records],
        torch.tensor(pictures).T,
        torch.tensor(scales).T,
        torch.tensor(marks).transpose(0, 1),
    )
