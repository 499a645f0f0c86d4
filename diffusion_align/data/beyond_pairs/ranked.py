"""Ranked lists: K pictures of one prompt, with ranks or scores."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..reading.meaning import Readable
from ..reading.rows import TIE, UNCAPTIONED, UNLABELLED, caption_of, check_weights, image_bytes, weight_of
from ..types import Example, Judgement, ListRecord, Record
from .balance import Summary, list_summary

#: Columns that hold all pictures of a row, and those that hold one each.
WHOLE, SINGLE = ("images", "file_names"), re.compile(r"jpg_(\d+)")


def order_of(row: Mapping[str, Any], where: str) -> Judgement | None:
    """Ranks from 0 on, without gaps, and scores if there are any; None where the row has neither.

    ``ranks`` may be any numbers, of which smaller is better; without them the order is that of ``scores``, of which
    larger is better. Equal ones are ties.

    Raises:
        ValueError: no lists of finite numbers, or lists of different lengths, or of fewer than two.
    """
    given = {name: row[name] for name in ("ranks", "scores") if row.get(name) is not None}
    if not given:
        return None
    for name, values in given.items():
        numbers = isinstance(values, Sequence) and not isinstance(values, str) and all(map(_is_finite, values))
        if not numbers or len(values) < 2:
            raise ValueError(
                f"{where}: {name} = {values!r} is wrong: expected a list of numbers, one for each of two or more "
                "pictures"
            )
    if len({len(values) for values in given.values()}) > 1:
        raise ValueError(f"{where}: {len(row['ranks'])} ranks and {len(row['scores'])} scores: expected as many")
    scores = None if "scores" not in given else tuple(float(value) for value in given["scores"])
    order = given.get("ranks", scores)
    assert order is not None
    better = [float(value) if "ranks" in given else -float(value) for value in order]
    places = {value: place for place, value in enumerate(sorted(set(better)))}
    return Judgement(None, tuple(places[value] for value in better), scores)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ListRows:
    """Rows of ranked lists: ``images`` or ``file_names`` (lists), or ``jpg_0`` to ``jpg_N``; ``caption``; ``ranks`` or
    ``scores`` or both; ``weight`` where it is."""

    unit: str = "ranked lists"
    cheap: tuple[str, ...] = ("ranks", "scores", "weight", "caption")
    verdict: tuple[str, ...] = ("ranks", "scores")
    chosen_only: bool = False

    def pictures(self, columns: Sequence[str]) -> list[str]:
        whole = [name for name in WHOLE if name in columns][:1]
        numbered = {int(found[1]): name for name in columns if (found := SINGLE.fullmatch(name))}
        return whole or [numbered[place] for place in sorted(numbered)]

    def path_columns(self, columns: Sequence[str]) -> list[str]:
        return self.pictures(columns)

    def kinds(self, table: pa.Table, where: Callable[[int], str]) -> NDArray[Any]:
        """Lists without order, of ties alone, and without caption are left out.

        Raises:
            ValueError: as :func:`order_of`; also a table some of whose lists have scores and some none.
        """
        check_weights(table, where)
        columns = {name: table[name].to_pylist() for name in ("ranks", "scores") if name in table.column_names}
        captions = table["caption"].to_pylist()
        kinds, scored = np.zeros(len(table), dtype=np.uint8), None
        for number, caption in enumerate(captions):
            found = order_of({name: values[number] for name, values in columns.items()}, where(number))
            if found is None or found.ranks is None:
                kinds[number] = UNLABELLED
                continue
            if scored is not None and scored != (found.scores is not None):
                raise ValueError(f"{where(number)}: expected scores in all lists that are ranked, or in none")
            scored = found.scores is not None
            if caption is None or not caption_of({"caption": caption}, where(number)).strip():
                kinds[number] = UNCAPTIONED
            elif max(found.ranks) == 0:
                kinds[number] = TIE
        return kinds

    def record(self, row: Mapping[str, Any], where: str, key: str, folder: Path | None) -> Record:
        order = order_of(row, where)
        assert order is not None
        assert order.ranks is not None
        names = self.pictures(list(row))
        cells: dict[str, Any] = {name: row[name] for name in names}
        if len(names) == 1 and names[0] in WHOLE:
            cells = {f"{names[0]}[{place}]": cell for place, cell in enumerate(row[names[0]] or ())}
        else:  # rows with fewer pictures leave the last columns empty
            while cells and cells[names[len(cells) - 1]] is None and len(cells) > len(order.ranks):
                del cells[names[len(cells) - 1]]
        if len(cells) != len(order.ranks):
            name = "ranks" if row.get("ranks") is not None else "scores"
            raise ValueError(f"{where}: {len(cells)} pictures and {len(order.ranks)} {name}: expected as many")
        pictures = tuple(image_bytes(cell, folder, f"{where}, column {name}") for name, cell in cells.items())
        return ListRecord(pictures, order, caption_of(row, where), weight_of(row, where), key)

    def known(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        order = order_of(row, where)
        assert order is not None
        scores = {"scores": None} if "scores" in row and order.scores is None else {}
        return {"preference": 1.0, "weight": weight_of(row, where), **scores, **order.kept()}

    def facts(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def summary(self, examples: Readable) -> Summary:
        return list_summary(list_lengths(examples.cheap_columns()))


@dataclass(frozen=True)
class ListSize:
    """How many pictures a list has in a batch.

    Attributes:
        pictures: K. Of longer lists some K are shown, drawn anew at each visit; shorter ones are filled up.
        ragged: whether any are shorter, so that all have a mask.
    """

    pictures: int
    ragged: bool

    def places(self, count: int, seed: int) -> list[int]:
        """Which of ``count`` pictures are shown at the visit with ``seed``, ascending."""
        if count <= self.pictures:
            return list(range(count))
        drawn = np.random.default_rng([seed % 2**64, 5]).permutation(count)[: self.pictures]
        return sorted(drawn.tolist())

    def filled(self, example: Example, judgement: Judgement) -> Example:
        """An example of shown pictures with their ranks and, where it is to have one, a mask."""
        ranks, count = judgement.ranks, len(example.size_ids)
        assert ranks is not None
        scores = None if judgement.scores is None else torch.tensor(judgement.scores, dtype=torch.float32)
        example = replace(example, rank=torch.tensor(ranks, dtype=torch.int64), score=scores)
        if not self.ragged:
            return example
        more = self.pictures - count
        # Ranks and scores of what is filled up are those of no picture that is there: they count nowhere.
        return replace(
            example,
            size_ids=torch.cat([example.size_ids, example.size_ids[:1].expand(more, -1)]),
            rank=_padded(example.rank, more),
            score=_padded(example.score, more),
            mask=torch.arange(self.pictures) < count,
            pixels=_padded(example.pixels, more),
            posterior=None
            if example.posterior is None
            else (_zeros_after(example.posterior[0], more), _zeros_after(example.posterior[1], more)),
        )


def _padded(part: Tensor | None, more: int) -> Tensor | None:
    return None if part is None else _zeros_after(part, more)


def _zeros_after(part: Tensor, more: int) -> Tensor:
    return torch.cat([part, part.new_zeros(more, *part.shape[1:])])


def list_lengths(table: pa.Table) -> Counter[int]:
    """How many lists there are of each number of pictures, by their cheap columns."""
    names = [name for name in ("ranks", "scores") if name in table.column_names]
    columns = [table[name].to_pylist() for name in names]
    return Counter(len(next(cell for cell in cells if cell is not None)) for cells in zip(*columns, strict=True))


def sized_lists(lengths: Mapping[int, int] | None, most: int | None, name: str) -> ListSize:
    """The K of a data set.

    Args:
        lengths: lists of each length; None where that is not known before they are read.
        most: no more than so many.

    Raises:
        ValueError: nothing is known.
    """
    if lengths is None:
        if most is None:
            raise ValueError(f"{name}: how long its lists are is not known before they are read: set list_size")
        return ListSize(most, ragged=True)
    longest = max(lengths) if most is None else min(most, max(lengths))
    return ListSize(longest, ragged=min(lengths) < longest)
