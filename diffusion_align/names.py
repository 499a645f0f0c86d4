"""Names that were meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that ``given`` was probably meant for; None: none is near."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1)), None)


def hint(given: str, known: Iterable[str]) -> str:
    """`` (did you mean 'NAME'?)`` with the nearest known name; "" where none is near."""
    near = nearest(given, known)
    return "" if near is None else f" (did you mean {near!r}?)"
