"""What a stage is made of: rows that are measured one by one, each with figures and, where one is named, a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .workshop import Workshop


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Attributes:
        text: the goal in words, with its number.
        value: what was found; None where it could not be measured.
        met: None where it could not be judged.
        reason: why it could not.
    """

    text: str
    value: float | None
    met: bool | None
    reason: str | None = None

    @classmethod
    def at_least(cls, text: str, value: float | None, bound: float, reason: str = "needs a GPU") -> Goal:
        return cls(text, value, None if value is None else value >= bound, reason if value is None else None)

    @classmethod
    def at_most(cls, text: str, value: float | None, bound: float, reason: str = "needs a GPU") -> Goal:
        return cls(text, value, None if value is None else value <= bound, reason if value is None else None)


@dataclass(frozen=True)
class Finding:
    """What a row found: figures by name (None: not measured here, the note says why), goals, and what to know."""

    figures: dict[str, Any]
    goals: tuple[Goal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: unique within its stage.
        seconds: what it is expected to take on an H100 at true size; it is skipped when less is left.
        measure: does it.
        needs: a package that it needs, if any.
    """

    name: str
    seconds: float
    measure: Callable[[Workshop], Finding]
    needs: str | None = None


@dataclass(frozen=True)
class Stage:
    """Rows that answer one question.

    Attributes:
        key: in the JSON.
        title: on the page.
        rows: for the size that the run has.
    """

    key: str
    title: str
    rows: Callable[[Workshop], list[Row]]


@dataclass
class RowRecord:
    """A row in the JSON: measured, skipped (and why), or failed (and how)."""

    row: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, row: Row, seconds: float, finding: Finding) -> RowRecord:
        goals = [asdict(goal) for goal in finding.goals]
        return cls(row.name, round(seconds, 2), finding.figures, goals, list(finding.notes))
