"""What every command keeps to on a terminal: results on stdout, progress and warnings on stderr, --json, --quiet."""

from __future__ import annotations

from .results import conclude, talking
from .terminal_bar import Progress, note

__all__ = ["Progress", "conclude", "note", "talking"]
