"""Pairs that need not be there twice: repeated ones, those of one picture, those of nearly equal pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.pictures import CorruptImageError

from .duplicates import content_hash, difference_hash, groups_of, near_pairs
from .raw_pairs import RawPair, raw_pairs
from .rewritten import pickapic_row, write_rows

#: Cases of each kind that are named.
MOST_NAMED = 20


@dataclass
class Duplicates:
    """What was found.

    Attributes:
        counts: pairs, pictures, and how many pairs of each kind there are.
        named: the first cases of each kind.
        keep: places of the pairs that stay.
    """

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    keep: list[int] = field(default_factory=list)

    def note(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        cases = self.named.setdefault(kind, [])
        if len(cases) < MOST_NAMED:
            cases.append(text)

    def to_json(self) -> dict[str, Any]:
        """Counts and cases, JSON-able."""
        return {"counts": dict(self.counts), "cases": self.named, "kept": len(self.keep)}


def find_duplicates(source: str | Path, split: str, near: bool = True) -> Duplicates:
    """Which pairs of a split say something new.

    Left out are pairs of one picture with itself ("identical pictures"), pairs that were there with the same verdict
    ("repeated"), and both of two that contradict each other ("contradicting"), by prompt and pictures; and pairs with a
    torn picture ("corrupt").

    Args:
        near: pictures count as one, too, where their difference hashes differ in at most 4 of 64 bits.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    found = Duplicates()
    numbers: dict[str, int] = {}
    hashes: list[int] = []
    seen: list[tuple[RawPair | None, tuple[int, int]]] = []
    for pair in raw_pairs(source, split):
        found.counts["pairs"] += 1
        try:
            places = tuple(_number(pair, side, numbers, hashes, near) for side in range(2))
        except CorruptImageError as error:
            found.note("corrupt", str(error))
            seen.append((None, (0, 0)))
            continue
        light = RawPair(pair.split, pair.number, pair.where, {"caption": pair.caption}, pair.label_0, (b"", b""))
        seen.append((light, (places[0], places[1])))
    same = groups_of(len(numbers), near_pairs(hashes) if near else iter(()))
    found.counts["pictures"] = len(numbers)
    found.counts["nearly equal pictures"] = sum(root != place for place, root in enumerate(same))
    known: dict[tuple[str, int, int], tuple[int, RawPair]] = {}
    dropped: set[int] = set()
    for place, (light_pair, sides) in enumerate(seen):
        if light_pair is None:
            dropped.add(place)
            continue
        first, second = same[sides[0]], same[sides[1]]
        if first == second:
            found.note("identical pictures", light_pair.where)
            dropped.add(place)
            continue
        key = (light_pair.key, min(first, second), max(first, second))
        if key not in known:
            known[key] = (place, light_pair)
            continue
        before, other = known[key]
        theirs = [same[side] for side in seen[before][1]]
        labels = (other.label_of(int(theirs[0] > theirs[1])), light_pair.label_of(int(first > second)))
        if None not in labels and set(labels) == {0.0, 1.0}:
            found.note("contradicting", f"{light_pair.where}: against {other.where}")
            dropped |= {before, place}
        else:
            found.note("repeated", f"{light_pair.where}: as {other.where}")
            dropped.add(place)
    found.keep = [place for place in range(len(seen)) if place not in dropped]
    return found


def write_without(source: str | Path, split: str, found: Duplicates, out: Path) -> int:
    """Write the pairs that stay; returns how many."""
    keep = set(found.keep)
    rows = (pickapic_row(pair) for place, pair in enumerate(raw_pairs(source, split)) if place in keep)
    return write_rows(rows, out, split)


def _number(pair: RawPair, side: int, numbers: dict[str, int], hashes: list[int], near: bool) -> int:
    """The number of a picture among all distinct ones."""
    content = pair.pictures[side]
    if isinstance(content, CorruptImageError):
        raise content
    digest = content_hash(content)
    if digest not in numbers:
        value = difference_hash(content, f"{pair.where}, picture {side}") if near else 0
        numbers[digest] = len(hashes)
        hashes.append(value)
    return numbers[digest]
