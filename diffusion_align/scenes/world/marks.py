"""Which words of a prompt a picture does not show, and the marks that people leave on them (RichHF, 2312.10240)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .grammar import BACKGROUNDS, COLORS, SHAPES, SIZES

#: Share of wrong words that a user overlooks, and of right ones that one marks all the same.
OVERLOOKED, SLIPPED = 0.1, 0.02


def wrong_words(prompt: str, facts: Mapping[str, bool]) -> list[bool | None]:
    """For each word of ``prompt`` whether a picture contradicts it; ``facts`` as in ``OracleScore``.

    A wrong number of objects is the first word's fault. Words that ask for nothing ("of", "background") are right.
    Where something is cannot be told (None) of an object that is not there as asked.
    """
    words = [word.rstrip(",") for word in prompt.split()]
    counted = words[0] not in ("a", "an")
    there = all(right for name, right in facts.items() if name.endswith((" shape", " color")))
    found: list[bool | None] = []
    thing = 1
    for i, word in enumerate(words):
        kind = kind_of(word)
        if i == 0:
            found.append(not facts["count"])
        elif kind == "background":
            found.append(not facts[kind])
        elif kind == "place":
            found.append(not facts.get("relation", facts.get("position")) if there else None)
        elif kind:
            # "two red rings": each of them has to be red; one that is missing is the number's fault alone.
            every = counted and facts["count"]
            names = [name for name in facts if name.endswith(f" {kind}")] if every else [f"object {thing} {kind}"]
            found.append(not all(facts[name] for name in names))
            thing += kind == "shape"
        else:
            found.append(False)
    return found


def kind_of(word: str) -> str:
    """What a word speaks of: "shape", "color", "size", "background", "place" or ""."""
    if word in COLORS:
        return "color"
    if word in SIZES:
        return "size"
    if word in BACKGROUNDS:
        return "background"
    if word in ("left", "right", "above", "below", "center", "top", "bottom"):
        return "place"
    singular = word.removesuffix("es" if word.startswith("cross") else "s")
    return "shape" if word in SHAPES or singular in SHAPES else ""


def marked_words(
    prompt: str, facts: Mapping[str, bool], rng: np.random.Generator, votes: int = 1
) -> list[float | None]:
    """Share of ``votes`` users who mark each word as not shown; None where nobody can tell."""
    wrong = wrong_words(prompt, facts)
    chance = [1 - OVERLOOKED if each else SLIPPED for each in wrong]
    shares = (rng.random((votes, len(chance))) < chance).mean(axis=0).tolist()
    return [None if each is None else share for each, share in zip(wrong, shares, strict=True)]
