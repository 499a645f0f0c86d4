"""Rated repaintings for training inpainting scorers (PrefPaint, 2410.21966): picture, original, hole, points."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from diffusion_align.pictures import decoded_mask, decoded_picture

from .reading.rows import image_bytes
from .tables import Selection, Source, open_source

#: Column of the points in a criterion: score_structure, score_texture, score_overall.
SCORE_PREFIX = "score_"
#: Points that people gave (PrefPaint).
LOWEST, HIGHEST = 0.0, 7.0

RATING_COLUMNS = ("image", "source", "mask")
LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"rated repaintings' ": RATING_COLUMNS})


@dataclass(frozen=True)
class Rating:
    """One rated repainting.

    Attributes:
        image: the encoded picture, repainted.
        source: the encoded original.
        mask: an encoded picture as large as both, white where it was repainted.
        scores: points in [0, 7] by criterion.
        group: the same for all repaintings of one hole in one original.
        key: names the row in messages.
    """

    image: bytes
    source: bytes
    mask: bytes
    scores: dict[str, float]
    group: str
    key: str


class Ratings:
    """Rated repaintings with random access.

    Reads the columns ``image``, ``source``, ``mask`` (bytes, or paths beside a JSONL or CSV file) and
    ``score_CRITERION`` (points in [0, 7]), of which at least one is needed; all others are ignored.

    Args:
        limit, seed, together: which rows are taken, see :class:`~.tables.Selection`.

    Raises:
        FileNotFoundError, OSError: as ``load_pairs``.
        ValueError: a column is missing, or a score is no number in [0, 7]; file, row and column are named.
    """

    unit = "rated repaintings"

    def __init__(
        self,
        source: str | Path,
        split: str = "train",
        limit: int | None = None,
        *,
        seed: int | None = None,
        together: int = 1,
    ) -> None:
        self.source: Source = open_source(source, split, streaming=False, layouts=LAYOUTS)
        scored = [column for column in self.source.columns if column.startswith(SCORE_PREFIX)]
        if not scored:
            raise ValueError(
                f"{self.source.name}: no column {SCORE_PREFIX}CRITERION; found {', '.join(self.source.columns)}. "
                f"Expected e.g. {SCORE_PREFIX}structure, {SCORE_PREFIX}texture, {SCORE_PREFIX}overall"
            )
        self.criteria = [column.removeprefix(SCORE_PREFIX) for column in scored]
        every = self.source.table.select_columns(scored).to_list()
        self.rows = Selection(limit, seed, together).of(range(len(every)))
        if not self.rows:
            raise ValueError(f"{self.source.name}: it has no rows; expected {self.unit}")
        points = [
            [points_of(every[number][column], f"{self.source.name}, row {number}: {column}") for column in scored]
            for number in self.rows
        ]
        #: (N, C) points of all rows.
        self.points = np.array(points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Rating:
        number = self.rows[index]
        row = self.source.table[number]
        image, source, mask = (
            image_bytes(row[column], self.source.folder, f"{self.source.name}, row {number}, column {column}")
            for column in RATING_COLUMNS
        )
        scores = dict(zip(self.criteria, self.points[index].tolist(), strict=True))
        group = hashlib.sha256(source + mask).hexdigest()
        return Rating(image, source, mask, scores, group, f"row {number}")

    def statistics(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each criterion's points; a deviation of 0 becomes 1."""
        means, stds = self.points.mean(axis=0), self.points.std(axis=0)
        return {
            name: (float(mean), float(std) or 1.0) for name, mean, std in zip(self.criteria, means, stds, strict=True)
        }


def points_of(value: Any, where: str) -> float:
    """Points in [0, 7].

    Raises:
        ValueError: anything else; starts with ``where``.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not LOWEST <= value <= HIGHEST:
        raise ValueError(f"{where} = {value!r} is wrong: expected points in [{LOWEST:g}, {HIGHEST:g}]")
    return float(value)


@dataclass(frozen=True)
class RatingExample:
    """A rating with its pictures ready for the scorer."""

    image: Tensor
    left: Tensor
    record: Rating


@dataclass(frozen=True)
class RatingBatch:
    """B rated repaintings.

    Attributes:
        images: (B, 3, S, S) in [0, 1], repainted.
        left: (B, 3, S, S) in [0, 1], the originals with their holes cut out (black).
        points: (B, C) float32.
        groups: B, equal for repaintings of one hole.
        keys: B.
    """

    images: Tensor
    left: Tensor
    points: Tensor
    groups: list[str]
    keys: list[str]

    def to(self, device: torch.device | str) -> RatingBatch:
        """Move every tensor."""
        return replace(self, images=self.images.to(device), left=self.left.to(device), points=self.points.to(device))


class RatingExamples:
    """Ratings decoded and made one size, for ``ExampleLoader``.

    Args:
        resize: (1, 3, H, W) in [0, 1] to the scorer's own size (1, 3, S, S).
    """

    def __init__(self, ratings: Ratings, resize: Callable[[Tensor], Tensor]) -> None:
        self.ratings, self.resize = ratings, resize

    def __len__(self) -> int:
        return len(self.ratings)

    def example(self, index: int, seed: int, drop_caption: bool) -> RatingExample:
        """Row ``index``; the hole is cut at full size, before anything is resized."""
        record = self.ratings[index]
        where = f"{self.ratings.source.name}, {record.key}"
        image, source = (decoded(getattr(record, name), f"{where}, {name}") for name in ("image", "source"))
        mask = torch.from_numpy(decoded_mask(record.mask, f"{where}, mask"))[None]
        sizes = [tuple(picture.shape[1:]) for picture in (image, source, mask)]
        if len(set(sizes)) > 1:
            raise ValueError(f"{where}: expected image, source and mask of one size, found (height, width) {sizes}")
        pictures = torch.stack([image, source * ~mask])
        image, left = self.resize(pictures).clamp(0, 1)
        return RatingExample(image, left, record)

    def sizes(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self)  # all are resized to one


def decoded(content: bytes, where: str) -> Tensor:
    """An encoded picture as (3, H, W) float32 in [0, 1].

    Raises:
        CorruptImageError: it cannot be decoded.
    """
    return pil_to_tensor(decoded_picture(content, where)).float() / 255


def collate_ratings(examples: Sequence[RatingExample], seeds: Sequence[int]) -> RatingBatch:
    """Stack examples."""
    records = [example.record for example in examples]
    return RatingBatch(
        torch.stack([example.image for example in examples]),
        torch.stack([example.left for example in examples]),
        torch.tensor([list(record.scores.values()) for record in records], dtype=torch.float32),
        [record.group for record in records],
        [record.key for record in records],
    )
