"""What is wrong with a data set of pairs: torn pictures, leaks between splits, pairs that repeat or contradict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.pictures import CorruptImageError, decoded_picture

from ..reading.rows import pair_columns
from .duplicates import content_hash
from .raw_pairs import RawPair, raw_pairs

#: Cases of each kind that are named.
MOST_NAMED = 20


@dataclass
class Findings:
    """What a check found.

    Attributes:
        splits: pairs of each split.
        counts: of rows by kind, beside those that are listed.
        corrupt: pictures that cannot be decoded, by row and column.
        leaked_prompts, leaked_pictures: what two splits share.
        repeated: pairs that stand there twice.
        contradicting: pairs of pictures with verdicts for either.
        identical: pairs of a picture with itself.
        totals: how many there are of each of these lists, which name the first ones only.
    """

    splits: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    corrupt: list[str] = field(default_factory=list)
    leaked_prompts: list[str] = field(default_factory=list)
    leaked_pictures: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    contradicting: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> bool:
        """Whether something must be mended before a run: torn pictures, or a split that leaks into another."""
        return any(self.totals[name] for name in ("corrupt", "leaked_prompts", "leaked_pictures"))

    def note(self, kind: str, text: str) -> None:
        """One more case of a kind."""
        self.totals[kind] += 1
        if self.totals[kind] <= MOST_NAMED:
            getattr(self, kind).append(text)

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        lists = ("corrupt", "leaked_prompts", "leaked_pictures", "repeated", "contradicting", "identical")
        cases = {name: {"count": self.totals[name], "first": getattr(self, name)} for name in lists}
        return {"splits": self.splits, **dict(self.counts), **cases, "failed": self.failed}


def check_pairs(source: str | Path, splits: Sequence[str], decode: bool = True) -> Findings:
    """Look at every pair of some splits.

    Args:
        decode: decode each picture; else only that there is one is checked.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``load_pairs``.
    """
    found = Findings()
    prompts: dict[str, set[str]] = {}
    pictures: dict[str, tuple[str, str]] = {}
    decoded: dict[str, str | None] = {}
    verdicts: dict[tuple[str, str, str], tuple[str, float | None]] = {}
    for split in splits:
        for pair in raw_pairs(source, split):
            found.splits[split] = found.splits.get(split, 0) + 1
            _count(pair, found)
            prompts.setdefault(pair.key, set()).add(split)
            hashes = [_looked_at(pair, side, found, decoded, decode) for side in range(2)]
            if None in hashes:
                continue
            first, second = str(hashes[0]), str(hashes[1])
            for digest in {first, second}:
                before = pictures.setdefault(digest, (split, pair.where))
                if before[0] != split:
                    found.note("leaked_pictures", f"{pair.where}: a picture of {before[1]} ({before[0]})")
            _compare(pair, first, second, verdicts, found)
    for prompt, places in prompts.items():
        if len(places) > 1 and prompt:
            found.note("leaked_prompts", f"{prompt[:80]!r} is in {' and '.join(sorted(places))}")
    return found


def _count(pair: RawPair, found: Findings) -> None:
    found.counts["pairs"] += 1
    found.counts["ties"] += pair.label_0 == 0.5
    found.counts["without label"] += pair.label_0 is None
    found.counts["without caption"] += not pair.key


def _looked_at(pair: RawPair, side: int, found: Findings, decoded: dict[str, str | None], decode: bool) -> str | None:
    """The hash of a picture; None of one that cannot be decoded, which is noted."""
    content = pair.pictures[side]
    if isinstance(content, CorruptImageError):
        found.note("corrupt", str(content))
        return None
    digest = content_hash(content)
    if decode and digest not in decoded:
        try:
            decoded_picture(content, "")
            decoded[digest] = None
        except CorruptImageError as error:
            decoded[digest] = str(error)
    if decoded.get(digest) is not None:
        found.note("corrupt", f"{pair.where}, column {pair_columns(pair.row)[side]}{decoded[digest]}")
        return None
    return digest


def _compare(
    pair: RawPair,
    first: str,
    second: str,
    verdicts: dict[tuple[str, str, str], tuple[str, float | None]],
    found: Findings,
) -> None:
    """Whether the pair was there before, with the same verdict or the other one."""
    if first == second:
        found.note("identical", pair.where)
        return
    turned = first > second
    key = (pair.key, second, first) if turned else (pair.key, first, second)
    label = pair.label_of(int(turned))
    if key not in verdicts:
        verdicts[key] = (pair.where, label)
        return
    where, before = verdicts[key]
    opposed = None not in (before, label) and {before, label} == {0.0, 1.0}
    found.note("contradicting" if opposed else "repeated", f"{pair.where}: {'against' if opposed else 'as'} {where}")
