"""Ranked lists that are made of preference pairs: those of one prompt that share pictures become one list."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_align.files import begin_folder, write_parquet, write_whole
from diffusion_align.pictures import CorruptImageError

from ..reading.rows import CHEAP, KINDS, USED, image_bytes, kinds_of_rows, preference
from ..tables import Source, open_source
from .aggregation import Order, Verdict, connected, contradicted, numbered, order_by, votes

#: Columns that name pictures; where they lack, pictures are known by their bytes.
NAMES = ("image_0_uid", "image_1_uid")
#: From encoded pictures and their prompt to scores, larger is better.
Breaker = Callable[[Sequence[bytes], str], Sequence[float]]


@dataclass(frozen=True)
class MadeOf:
    """What lists are made of.

    Attributes:
        source, split: of pairs, as for ``load_pairs``.
        judge: name of what breaks circles that wins do not, for the record; None leaves such lists out.
        shard_size: lists of a file.
    """

    source: str
    split: str = "train"
    judge: str | None = None
    shard_size: int = 1000


@dataclass(frozen=True)
class ListPlan:
    """One list to be.

    Attributes:
        pictures: where each is: row and column.
        rows: the rows whose verdicts it is made of.
    """

    caption: str
    pictures: tuple[tuple[int, str], ...]
    wins: NDArray[np.float64]
    rows: tuple[int, ...]


def make_lists(
    task: MadeOf, out: str | Path, breaker: Breaker | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, int]:
    """Write the lists of ``task`` to ``out``/SPLIT-00000.parquet and so on: ``images``, ``caption``, ``ranks``, and
    ``rows`` of the pairs that they are made of.

    The majority of its verdicts says which picture of a pair is better, a tie is half a verdict for each. The order
    agrees with every majority where these make no circle. Circles are ordered by wins minus losses, and where these are
    equal by ``breaker``; without one, such a list is left out.

    Returns:
        Counts, by name; also in ``lists.json``.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``; also no list at all, or ``out`` was made of something
            else.
    """
    out = Path(out)
    done: dict[str, int] | None = begin_folder(out / "lists.json", asdict(task), "made").get("lists")
    if done is not None:
        return done
    table = open_source(task.source, task.split, streaming=False)
    counts: Counter[str] = Counter()
    plans = list(planned(table, counts))
    written: list[dict[str, Any]] = []
    number = 0

    def write() -> None:
        nonlocal number
        path = out / f"{task.split}-{number:05d}.parquet"
        _write(path, written)
        progress(f"{path}: {len(written)} lists")
        number += 1
        written.clear()

    for plan in plans:
        row = _row(plan, table, breaker, counts)
        if row is not None:
            written.append(row)
        if len(written) >= task.shard_size:
            write()
    if written:
        write()
    if not number:
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{table.name}: no list can be made of its pairs ({told})")
    found = dict(counts)
    write_whole(out / "lists.json", json.dumps({"task": asdict(task), "lists": found}, indent=1).encode())
    return found


def planned(table: Source, counts: Counter[str]) -> Iterator[ListPlan]:
    """The lists of a table of pairs, in the order of their first rows; what is left out is counted."""
    names = [name for name in (*CHEAP, *NAMES) if name in table.columns]
    cheap = table.table.select_columns(names).with_format("arrow")[:]
    kinds = kinds_of_rows(cheap, table.where, keep_ties=True)
    rows = cheap.to_pylist()
    counts["pairs"] = len(rows)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if kinds[number] == USED:
            groups.setdefault(row["caption"], []).append(number)
        else:
            counts[f"pairs {KINDS[int(kinds[number])]}"] += 1
    columns = ("jpg_0", "jpg_1") if "label_0" in table.columns else ("chosen", "rejected")
    plans: list[ListPlan] = []
    for caption, members in groups.items():
        verdicts: list[tuple[int, str, str, float]] = []
        for number in members:
            try:
                first, second = _names(rows[number], number, table, columns)
            except CorruptImageError:
                counts["pairs without image"] += 1
                continue
            if first == second:
                counts["pairs of a picture with itself"] += 1
                continue
            verdicts.append((number, first, second, _first_preferred(rows[number], table.where(number))))
        plans += _of_prompt(caption, verdicts, columns)
    yield from sorted(plans, key=lambda plan: plan.rows[0])


def _of_prompt(
    caption: str, verdicts: Sequence[tuple[int, str, str, float]], columns: tuple[str, str]
) -> Iterator[ListPlan]:
    """The lists of one prompt: pictures that verdicts connect."""
    numbers = numbered([name for _, *pair, _ in verdicts for name in pair])
    places: dict[int, tuple[int, str]] = {}
    for row, first, second, _ in verdicts:
        places.setdefault(numbers[first], (row, columns[0]))
        places.setdefault(numbers[second], (row, columns[1]))
    ends = [(numbers[first], numbers[second]) for _, first, second, _ in verdicts]
    for members in connected(len(numbers), ends):
        own = {number: place for place, number in enumerate(members)}
        used = [i for i, (first, _) in enumerate(ends) if first in own]
        judged = [Verdict(own[ends[i][0]], own[ends[i][1]], verdicts[i][3]) for i in used]
        yield ListPlan(
            caption,
            tuple(places[number] for number in members),
            votes(len(members), judged),
            tuple(verdicts[i][0] for i in used),
        )


def _row(plan: ListPlan, table: Source, breaker: Breaker | None, counts: Counter[str]) -> dict[str, Any] | None:
    """The row of a list; None of one that is left out."""
    rows = {row: table.table[row] for row in {row for row, _ in plan.pictures}}
    try:
        pictures = [
            image_bytes(rows[row][column], table.folder, f"{table.where(row)}, column {column}")
            for row, column in plan.pictures
        ]
    except CorruptImageError:  # columns of names told of a picture that no cell has
        counts["lists left out, of which a picture is missing"] += 1
        return None
    order = order_by(plan.wins)
    judged = bool(order.open) and breaker is not None
    if judged and breaker is not None:
        order = _judged(order, plan, pictures, breaker, table)
    counts["pairs with verdicts for either picture"] += contradicted(plan.wins)
    if order.cycles:
        counts["lists with circles"] += 1
    if order.open:
        counts["lists left out, whose circles nothing breaks"] += 1
        return None
    if max(order.ranks) == 0:
        counts["lists left out, of ties alone"] += 1
        return None
    if judged:
        counts["lists with circles broken by the judge"] += 1
    counts["pairs against the order of their list"] += order.against
    counts["lists"] += 1
    counts[f"lists of {len(pictures)}"] += 1
    return {"images": pictures, "caption": plan.caption, "ranks": list(order.ranks), "rows": list(plan.rows)}


def _judged(order: Order, plan: ListPlan, pictures: Sequence[bytes], breaker: Breaker, table: Source) -> Order:
    scores = np.zeros(len(pictures))
    for together in order.open:
        found = np.asarray(breaker([pictures[place] for place in together], plan.caption), dtype=np.float64)
        if not np.isfinite(found).all():
            raise ValueError(f"{table.where(plan.rows[0])}: the judge gives {found.tolist()}: expected finite numbers")
        scores[list(together)] = found
    return order_by(plan.wins, scores)


def _names(row: dict[str, Any], number: int, table: Source, columns: tuple[str, str]) -> tuple[str, str]:
    """What tells the two pictures of a row from others."""
    if row.get(NAMES[0]) and row.get(NAMES[1]):
        return str(row[NAMES[0]]), str(row[NAMES[1]])
    cells = table.table[number]
    contents = [image_bytes(cells[name], table.folder, f"{table.where(number)}, column {name}") for name in columns]
    first, second = (hashlib.sha256(content).hexdigest() for content in contents)
    return first, second


def _first_preferred(row: dict[str, Any], where: str) -> float:
    """P(the picture of the first column is better)."""
    value = preference(row, where)
    assert value is not None
    return 1 - value if row.get("label_0") == 0 else value


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Sequence as List

    kinds = {
        "images": List(Value("binary")), "caption": Value("string"), "ranks": List(Value("int64")),
        "rows": List(Value("int64")),
    }  # fmt: skip
    write_parquet(path, Dataset.from_list(list(rows), features=Features(kinds)))
