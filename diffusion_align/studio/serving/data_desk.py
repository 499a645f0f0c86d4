"""What the Data page asks for: tables, their rows by page, filters and counts, and the exclusion list."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from diffusion_align.files import write_whole
from diffusion_align.pictures import SUFFIXES, CorruptImageError
from diffusion_align.studio.sources.keyed import normalised
from diffusion_align.studio.sources.pair_tables import PairTable, is_pair_table, read_table, scores_of, sides
from diffusion_align.studio.sources.served_pictures import checked_size

from .picture_catalogue import Catalogue, Entry

#: Rows of a page.
PAGE = 60
#: Folders below the roots that are looked into.
DEPTH = 3
#: Most files that a search for sources looks at.
MOST_FILES = 20_000
#: Beside a table: rows that were excluded, by file and number.
EXCLUSIONS = "excluded.json"


@dataclass
class _Opened:
    """A table without its pictures, and what was found out about them."""

    table: PairTable
    folder: Path
    excluded: set[tuple[str, int]]
    sizes: dict[int, tuple[tuple[int, int] | None, tuple[int, int] | None]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


@dataclass
class DataDesk:
    """Tables of pairs below the roots."""

    home: Path
    catalogue: Catalogue
    _open: dict[str, _Opened] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def sources(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Tables of pairs and folders of pictures, as paths from the studio's folder where they lie in it."""
        tables: dict[str, None] = {}
        folders: dict[str, None] = {}
        for path in self._files():
            if path.suffix == ".parquet" and str(self._name(path.parent)) not in tables and is_pair_table(path):
                tables[self._name(path.parent)] = None
            elif path.suffix.lower() in SUFFIXES and path.parent != self.home:
                folders[self._name(path.parent)] = None
        return {"tables": sorted(tables), "folders": sorted(folders)}

    def page(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Rows ``offset`` to ``offset`` + 60 of those that fit the filters, with thumbnails."""
        opened = self._opened(given)
        rows = self._fitting(opened, given)
        offset = max(0, int(given.get("offset", 0)))
        return {
            "count": len(rows),
            "total": len(opened.table.rows),
            "offset": offset,
            "rows": [self._row(opened, number) for number in rows[offset : offset + PAGE]],
        }

    def counts(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is in a table: labels, prompts that come often, annotators, sizes of the first pictures."""
        opened = self._opened(given)
        rows = [row for _, _, row in opened.table.rows]
        labels = Counter(kind_of(row) for row in rows)
        prompts = Counter(normalised(str(row["caption"])) for row in rows)
        sizes: Counter[str] = Counter()
        sample = range(0, len(rows), max(1, len(rows) // 200))
        for number in sample:
            for size in self._sizes(opened, number):
                sizes["corrupt" if size is None else f"{size[0]}×{size[1]}"] += 1
        return {
            "rows": len(rows),
            "labels": dict(labels),
            "excluded": len(opened.excluded),
            "duplicates": len(rows) - len({_pictures(row, number) for number, row in enumerate(rows)}),
            "prompts": len(prompts),
            "repeated": [[text, count] for text, count in prompts.most_common(8) if count > 1],
            "annotators": sorted({str(row["user_id"]) for row in rows if row.get("user_id")}),
            "scorers": list(opened.table.scorers),
            "sizes": sizes.most_common(8),
            "measured": len(sample),
        }

    def exclude(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Put a row on the exclusion list beside the table, or take it off; the table stays as it is.

        Raises:
            LookupError: no such row. OSError: the list cannot be written.
        """
        opened = self._opened(given)
        number = int(given["row"])
        if not 0 <= number < len(opened.table.rows):
            raise LookupError(f"row {number}: expected one of {len(opened.table.rows)}")
        file, place, _ = opened.table.rows[number]
        with self._lock:
            rows = opened.excluded ^ {(file.name, place)}
            listed = [{"file": name, "row": row} for name, row in sorted(rows)]
            write_whole(opened.folder / EXCLUSIONS, json.dumps({"excluded": listed}, indent=1).encode() + b"\n")
            opened.excluded = rows
        return {"row": number, "excluded": (file.name, place) in rows, "count": len(rows)}

    def _files(self) -> Iterator[Path]:
        """Files below the roots, not too deep, hidden ones left out."""
        todo = [(root, 0) for root in self.catalogue.roots]
        seen = 0
        while todo:
            place, depth = todo.pop(0)
            if place.is_file():
                yield place
                continue
            for path in sorted(place.iterdir()):
                seen += 1
                if seen > MOST_FILES:
                    return
                if path.name.startswith(".") or not self.catalogue.holds(path):
                    continue
                if path.is_dir():
                    todo += [(path, depth + 1)] if depth < DEPTH else []
                else:
                    yield path

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.home)) if folder.is_relative_to(self.home) else str(folder)

    def _opened(self, given: Mapping[str, Any]) -> _Opened:
        """The table that is asked for.

        Raises:
            LookupError: it lies outside the roots, or is none.
        """
        name = str(given.get("table", ""))
        with self._lock:
            if name not in self._open:
                folder = self.home / name
                if not self.catalogue.holds(folder):
                    raise LookupError("this table lies outside the folders that the studio was started with")
                files = [file for file in sorted(folder.glob("*.parquet")) if is_pair_table(file)]
                files = [file for file in files if self.catalogue.holds(file)]
                if not files:
                    raise LookupError(f"{name}: no table of pairs is there")
                table = read_table(files)
                texts = [str(row["caption"]).lower() for _, _, row in table.rows]
                self._open = {name: _Opened(table, folder, read_exclusions(folder), texts=texts)}
            return self._open[name]

    def _fitting(self, opened: _Opened, given: Mapping[str, Any]) -> list[int]:
        """Numbers of the rows that all filters leave."""
        tests = list(filters(opened.table, opened.texts, given))
        rows = [number for number in range(len(opened.table.rows)) if all(test(number) for test in tests)]
        if given.get("excluded"):
            rows = [number for number in rows if self._is_excluded(opened, number)]
        if given.get("duplicates"):
            counts = Counter(_pictures(row, number) for number, (_, _, row) in enumerate(opened.table.rows))
            rows = [n for n in rows if counts[_pictures(opened.table.rows[n][2], n)] > 1]
        if given.get("corrupt"):
            rows = [number for number in rows if None in self._sizes(opened, number)]
        return rows

    def _is_excluded(self, opened: _Opened, number: int) -> bool:
        file, place, _ = opened.table.rows[number]
        return (file.name, place) in opened.excluded

    def _sizes(self, opened: _Opened, number: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Width and height of both pictures; None of one that cannot be read."""
        if number not in opened.sizes:
            file, place, row = opened.table.rows[number]
            found: list[tuple[int, int] | None] = []
            for picture in sides(file, place, row):
                try:
                    found.append(checked_size(picture.read(self.catalogue.cells), picture.where))
                except (CorruptImageError, ValueError, OSError):
                    found.append(None)
            opened.sizes[number] = found[0], found[1]
        return opened.sizes[number]

    def _row(self, opened: _Opened, number: int) -> dict[str, Any]:
        file, place, row = opened.table.rows[number]
        pictures = sides(file, place, row)
        scores = {name: [None if math.isnan(value) else value for value in both]
                  for name, both in scores_of(row, opened.table.scorers).items()}  # fmt: skip
        return {
            "row": number,
            "prompt": str(row["caption"]),
            "label": row.get("label_0") if row.get("has_label", True) else None,
            "bad": bool(row.get("both_bad")),
            "small": [self.catalogue.add(Entry((picture,), 0, small=True)) for picture in pictures],
            "large": [self.catalogue.add(Entry((picture,), 0, lossless=True)) for picture in pictures],
            "models": [picture.model for picture in pictures],
            "annotator": row.get("user_id"),
            "votes": [row.get("votes_0"), row.get("votes_1")],
            "scores": scores,
            "excluded": self._is_excluded(opened, number),
            "where": f"{file.name}, row {place}",
        }


def kind_of(row: Mapping[str, Any]) -> str:
    """first, second, tie, bad, or unlabelled."""
    label = row.get("label_0")
    if label is None or not row.get("has_label", True):
        return "unlabelled"
    if row.get("both_bad"):
        return "bad"
    return "tie" if label == 0.5 else "first" if label > 0.5 else "second"


def filters(table: PairTable, texts: Sequence[str], given: Mapping[str, Any]) -> Iterator[Callable[[int], bool]]:
    """Tests of a row's number, for the cheap filters that are set.

    Raises:
        ValueError: a bound that is no number, or an unknown scorer.
    """
    rows = table.rows
    if text := str(given.get("text") or "").lower():
        yield lambda number: text in texts[number]
    if label := given.get("label"):
        yield lambda number: kind_of(rows[number][2]) == label
    if annotator := given.get("annotator"):
        yield lambda number: rows[number][2].get("user_id") == annotator
    if (agreement := given.get("agreement")) not in (None, ""):
        least = float(agreement)
        yield lambda number: _agreed(rows[number][2]) >= least
    if (gap := given.get("gap")) not in (None, ""):
        most, scorer = float(gap), str(given.get("scorer") or next(iter(table.scorers), ""))
        if scorer not in table.scorers:
            raise ValueError(f"scorer {scorer!r}: expected one of {', '.join(table.scorers) or 'none: no scores'}")

        def near(number: int) -> bool:
            first, second = scores_of(rows[number][2], [scorer])[scorer]
            return abs(first - second) <= most

        yield near


def read_exclusions(folder: Path) -> set[tuple[str, int]]:
    """Rows that were excluded, as (file, number).

    Raises:
        ValueError: the list is damaged.
    """
    path = folder / EXCLUSIONS
    if not path.is_file():
        return set()
    try:
        return {(str(row["file"]), int(row["row"])) for row in json.loads(path.read_bytes())["excluded"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a list of file and row in 'excluded' ({error})") from None


def _agreed(row: Mapping[str, Any]) -> float:
    """Share of the votes for what the label says; 1 where nobody counted."""
    first, second = row.get("votes_0"), row.get("votes_1")
    if first is None or second is None or first + second == 0:
        return 1.0
    return max(first, second) / (first + second)


def _pictures(row: Mapping[str, Any], number: int) -> tuple[str, ...]:
    """The pictures of a row, in no order; of rows without uids each is its own."""
    names = [str(row.get(f"image_{side}_uid") or f"{number}.{side}") for side in (0, 1)]
    return tuple(sorted(names))
