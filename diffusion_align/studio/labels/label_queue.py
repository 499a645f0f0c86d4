"""What an annotator sees next, and what becomes of an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from diffusion_align.studio.sources.keyed import opaque, share

from .label_store import LabelFile
from .label_tasks import Task
from .many_at_once import swiss_matches
from .verdicts import Choice, Verdict

#: A pair comes back after at least so many other verdicts.
BETWEEN = 20
#: Answers in keys of the page.
SIDES = ("left", "right")
#: What 1, 2 and 3 say of an aspect.
ASPECT_ANSWERS: Mapping[int, float] = {1: 1.0, 2: 0.5, 3: 0.0}


@dataclass(frozen=True)
class Visit:
    """Pictures of a unit on the screen.

    Attributes:
        id: opaque; the same after a restart.
        place: of the unit in the task.
        shown: numbers of its pictures, from left to right.
    """

    id: str
    unit: str
    place: int
    visit: int
    shown: tuple[int, ...]
    round: int = 0
    p_selected: float | None = None


@dataclass
class LabelQueue:
    """One annotator's way through a task."""

    task: Task
    file: LabelFile
    annotator: str
    _order: list[tuple[int, float | None]] = field(init=False)

    def __post_init__(self) -> None:
        self._order = self.task.order(self.annotator)

    def upcoming(self, count: int, taken: Set[str] = frozenset()) -> list[Visit]:
        """The next visits, at most ``count``.

        Args:
            taken: units that others have judged or look at.
        """
        found = []
        for visit in self._wanted(taken):
            found.append(visit)
            if len(found) == count:
                break
        return found

    def left(self, taken: Set[str] = frozenset()) -> int:
        """How many units are not judged, by what is known now."""
        done = {verdict.unit for verdict in self.file.verdicts}
        return sum(1 for unit in self.task.units if unit.key not in done and not self._others(unit.key, taken))

    def answer(self, visit: Visit, given: Mapping[str, Any]) -> Verdict:
        """Keep an answer to ``visit``.

        Args:
            given: ``choice`` ("left", "right", "tie", "bad", "skip"), or ``best`` and ``worst`` as places on the
                screen; optionally ``ms``, ``aspects`` (1, 2 or 3 by name) and ``wrong_words``.

        Raises:
            ValueError: it is none.
            OSError: it cannot be written, and does not count.
        """
        verdict = self._verdict(visit, given)
        verdict.check("verdict")
        self.file.add(verdict)
        return verdict

    def _verdict(self, visit: Visit, given: Mapping[str, Any]) -> Verdict:
        choice, best, worst = given.get("choice"), given.get("best"), given.get("worst")
        if choice in SIDES and len(visit.shown) == 2:
            best, worst = (0, 1) if choice == "left" else (1, 0)
        if best is not None or worst is not None:
            if not all(isinstance(place, int) and 0 <= place < len(visit.shown) for place in (best, worst)):
                raise ValueError(f"best {best!r}, worst {worst!r}: expected places from 0 to {len(visit.shown) - 1}")
            best, worst = visit.shown[int(best or 0)], visit.shown[int(worst or 0)]
        elif choice not in ("tie", "bad", "skip"):
            raise ValueError(f"choice {choice!r}: expected left, right, tie, bad or skip")
        ms = given.get("ms")
        if ms is not None and (not isinstance(ms, int | float) or not 0 <= ms < 1e9):
            raise ValueError(f"ms {ms!r}: expected milliseconds")
        return Verdict(
            visit.id, visit.unit, visit.visit, visit.shown, cast(Choice, "better" if best is not None else choice),
            best, worst,
            None if ms is None else round(ms),
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            visit.p_selected,
            self._aspects(given.get("aspects") or {}),
            self._words(visit, given.get("wrong_words")),
            visit.round,
        )  # fmt: skip

    def _aspects(self, given: Any) -> dict[str, float]:
        if not isinstance(given, Mapping) or set(given) - set(self.task.settings.aspects):
            raise ValueError(f"aspects: expected some of {', '.join(self.task.settings.aspects) or 'none'}")
        if any(value not in ASPECT_ANSWERS for value in given.values()):
            raise ValueError("aspects: expected 1 (left), 2 (equal) or 3 (right)")
        return {name: ASPECT_ANSWERS[value] for name, value in given.items()}

    def _words(self, visit: Visit, given: Any) -> tuple[tuple[int, ...], ...] | None:
        if given is None or not self.task.settings.words:
            return None
        words = len(self.task.units[visit.place].prompt.split())
        if not isinstance(given, Sequence) or len(given) != len(visit.shown):
            raise ValueError(f"wrong_words: expected a list for each of {len(visit.shown)} pictures")
        marks = tuple(tuple(sorted({int(place) for place in there})) for there in given)
        if any(not 0 <= place < words for there in marks for place in there):
            raise ValueError(f"wrong_words: expected places from 0 to {words - 1}")
        return marks

    def _others(self, unit: str, taken: Set[str]) -> bool:
        """Whether a unit belongs to somebody else."""
        return unit in taken and not self._overlaps(unit)

    def _overlaps(self, unit: str) -> bool:
        return share(self.task.settings.seed, "overlap", unit) < self.task.settings.overlap

    def _wanted(self, taken: Set[str]) -> Iterator[Visit]:
        """Taken back, due again, and new ones."""
        verdicts = self.file.verdicts
        by_unit: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            by_unit.setdefault(verdict.unit, []).append(verdict)
        attempts = Counter(_seat(event) for event in self.file.events if isinstance(event, Verdict))
        chances = dict(self._order)
        if self.task.settings.kind == "swiss":
            yield from self._matches(by_unit, attempts, chances, taken)
            return
        again = dict.fromkeys(event.unit for event in self.file.events if isinstance(event, Verdict))
        places = self.task.places
        first = [places[key] for key in again if key in places and key not in by_unit]
        for place in first:
            yield self._visit(place, 0, attempts, chances[place])
        yield from self._repeats(verdicts, by_unit, attempts)
        for place, chance in self._order:
            key = self.task.units[place].key
            if key not in by_unit and key not in again and not self._others(key, taken):
                yield self._visit(place, 0, attempts, chance)

    def _repeats(
        self, verdicts: Sequence[Verdict], by_unit: Mapping[str, Sequence[Verdict]], attempts: Counter[Any]
    ) -> Iterator[Visit]:
        """Pairs that are due a second time."""
        settings = self.task.settings
        if settings.kind != "pairs":
            return
        for verdict in verdicts[: max(len(verdicts) - BETWEEN, 0)]:
            place = self.task.places.get(verdict.unit)
            due = share(settings.seed, "repeat", self.annotator, verdict.unit) < settings.repeats
            if place is not None and due and len(by_unit[verdict.unit]) == 1 and verdict.choice != "skip":
                yield self._visit(place, 1, attempts, verdict.p_selected)

    def _matches(
        self,
        by_unit: Mapping[str, Sequence[Verdict]],
        attempts: Counter[Any],
        chances: Mapping[int, Any],
        taken: Set[str],
    ) -> Iterator[Visit]:
        """Tournaments, all of them round by round."""
        waiting = []
        for turn, (place, _) in enumerate(self._order):
            unit = self.task.units[place]
            if unit.key in by_unit or not self._others(unit.key, taken):
                seed = self.task.settings.seed
                number, left = swiss_matches(unit.key, by_unit.get(unit.key, ()), len(unit.pictures), seed)
                waiting += [(number, turn, place, match) for match in left]
        for number, _, place, match in sorted(waiting):
            yield self._visit(place, 0, attempts, chances[place], number, match)

    def _visit(
        self,
        place: int,
        visit: int,
        attempts: Counter[Any],
        chance: float | None,
        number: int = 0,
        match: tuple[int, int] | None = None,
    ) -> Visit:
        """The visit with its sides, which are a hash's."""
        unit, seed = self.task.units[place], self.task.settings.seed
        pictures: tuple[int, ...] = tuple(range(len(unit.pictures))) if match is None else match
        if len(pictures) == 2:
            exchanged = share(seed, "side", unit.key, self.annotator, 0, *pictures) < 0.5
            shown: tuple[int, ...] = pictures[::-1] if exchanged != (visit == 1) else pictures
        else:
            shown = tuple(sorted(pictures, key=lambda i: share(seed, "side", unit.key, self.annotator, visit, i)))
        attempt = attempts[(unit.key, visit, tuple(sorted(pictures)), number)]
        found = opaque(seed, "visit", unit.key, self.annotator, visit, *sorted(pictures), number, attempt)
        return Visit(found, unit.key, place, visit, shown, number, chance)


def _seat(verdict: Verdict) -> tuple[str, int, tuple[int, ...], int]:
    """What a visit is about, without its sides."""
    return verdict.unit, verdict.visit, tuple(sorted(verdict.shown)), verdict.round
