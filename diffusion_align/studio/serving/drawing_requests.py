"""What a page asks to be drawn, checked before the drawing process hears of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_align.evaluation.arena.side_grammar import parse_side
from diffusion_align.studio.drawing.orders import Order

from .picture_catalogue import Catalogue

MOST_COLUMNS = 6
MOST_STEPS = 1000


def read_order(
    given: Mapping[str, Any], home: Path, catalogue: Catalogue, most_rows: int, number: int, folder: Path
) -> Order:
    """An order from a page's JSON: columns, prompts, first seed, pictures of each prompt, and how they are drawn.

    Args:
        home: paths are seen from it.
        most_rows: pictures of a column.

    Raises:
        ValueError: a side or a number that is wrong. LookupError: a side outside the roots.
    """
    columns, prompts = texts(given.get("columns"), "columns"), texts(given.get("prompts"), "prompts")
    for text in columns:
        place = home / parse_side(text).what
        if place.exists() and not catalogue.holds(place):
            raise LookupError(f"{text} lies outside the folders that the studio was started with")
    if not 1 <= len(columns) <= MOST_COLUMNS:
        raise ValueError(f"expected 1 to {MOST_COLUMNS} columns, found {len(columns)}")
    seed, count = int(given.get("seed", 0)), int(given.get("count", 2))
    if not prompts or count < 1 or len(prompts) * count > most_rows:
        raise ValueError(f"expected 1 to {most_rows} pictures a column, found {len(prompts)} prompts x {count} seeds")
    steps, scale = int(given.get("steps", 25)), float(given.get("guidance_scale", 5.0))
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps {steps}: expected 1 to {MOST_STEPS}")
    return Order(
        number, str(folder), dict(enumerate(columns)), {}, tuple(dict.fromkeys(prompts)),
        tuple(range(seed, seed + count)), tuple(texts(given.get("scorers") or [], "scorers")), steps, scale,
        str(given.get("model") or ""),
    )  # fmt: skip


def texts(given: Any, name: str) -> list[str]:
    """A list of texts without empty ones.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name}: expected a list of texts")
    return [text.strip() for text in given if text.strip()]
