"""A data set in parts that share neither a prompt nor a picture."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from diffusion_align.pictures import CorruptImageError

from .duplicates import content_hash, groups_of
from .raw_pairs import raw_pairs
from .rewritten import pickapic_row, write_rows


def divide(source: str | Path, split: str, shares: Mapping[str, float], seed: int, out: Path) -> dict[str, int]:
    """Write a split of ``source`` as several, each pair to one of them.

    Pairs that share a prompt (without case and spaces) or a picture (to the byte) stay together. Where they go is
    decided by a hash of their first prompt, so that it does not depend on what else is there.

    Args:
        shares: of the prompts, by the name of the new split; what is left of 1 is "train".

    Returns:
        Pairs of each, and "corrupt" ones, which are left out.

    Raises:
        ValueError: shares that come to 1 or more, or a split that gets no pair.
        FileNotFoundError, OSError: as ``load_pairs``.
    """
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares {dict(shares)}: expected numbers above 0 that come to less than 1")
    names: dict[str, int] = {}
    links: list[tuple[int, int]] = []
    keys: list[str] = []
    rows: list[int | None] = []
    corrupt = 0
    for pair in raw_pairs(source, split):
        contents = [content for content in pair.pictures if not isinstance(content, CorruptImageError)]
        if len(contents) < 2:
            corrupt += 1
            rows.append(None)
            continue
        prompt = _place(f"prompt {pair.key}", pair.key, names, keys)
        rows.append(prompt)
        links += [(prompt, _place(content_hash(content), pair.key, names, keys)) for content in contents]
    together = groups_of(len(names), iter(links))
    homes = {root: home(keys[root], shares, seed) for root in set(together)}
    counts: Counter[str] = Counter()
    for name in ("train", *shares):
        chosen = {number for number, place in enumerate(rows) if place is not None and homes[together[place]] == name}
        if not chosen:
            raise ValueError(
                f"{source}: the part {name} gets none of {len(rows)} pairs: they are too few, or share too much"
            )
        counts[name] = write_rows(
            (pickapic_row(pair) for pair in raw_pairs(source, split) if pair.number in chosen), out, name
        )
    return {**counts, "corrupt": corrupt}


def home(prompt: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a prompt."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if drawn < share:
            return name
        drawn -= share
    return "train"


def _place(name: str, key: str, names: dict[str, int], keys: list[str]) -> int:
    if name not in names:
        names[name] = len(keys)
        keys.append(key)
    return names[name]
