"""Tables as lines of text, columns by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def filled(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows with the columns of all of them, empty where a row has none."""
    names = {name: None for row in rows for name in row}
    return [{name: row.get(name, "") for name in names} for row in rows]


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A line with the names and one for each row, each column as wide as its widest cell; none without rows."""
    if not rows:
        return []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return ["  ".join(line[name].ljust(width) for name, width in widths.items()).rstrip() for line in lines]
