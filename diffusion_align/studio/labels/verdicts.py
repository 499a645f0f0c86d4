"""What a person said of some pictures, and what that means for pairs of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

#: better: ``best`` beats ``worst`` (and, of more than two, all others lie between); tie; bad: all of them are; skip.
Choice = Literal["better", "tie", "bad", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)
#: Verdicts that were given faster than this, in milliseconds, are flagged.
HASTY = 300


@dataclass(frozen=True)
class Verdict:
    """One look at the pictures of a unit.

    Attributes:
        id: of the visit; a verdict that is sent twice has the same.
        unit: key of what was judged: a pair, or all pictures of a prompt.
        visit: 0, or 1 where a pair came back with its sides exchanged.
        shown: numbers of the pictures within the unit, from left to right.
        choice: see ``Choice``.
        best, worst: numbers of the pictures, where the choice is "better".
        ms: milliseconds from the pictures to the verdict.
        time: when, ISO 8601 in UTC.
        p_selected: probability with which the unit was drawn at its turn.
        aspects: P(``shown[0]`` is better) by aspect, of those that were answered.
        wrong_words: for each picture of ``shown`` the places of the words of the prompt that it does not show; None
            where nobody was asked.
        round: of a tournament.
    """

    id: str
    unit: str
    visit: int
    shown: tuple[int, ...]
    choice: Choice
    best: int | None = None
    worst: int | None = None
    ms: int | None = None
    time: str = ""
    p_selected: float | None = None
    aspects: Mapping[str, float] = field(default_factory=dict)
    wrong_words: tuple[tuple[int, ...], ...] | None = None
    round: int = 0

    @property
    def hasty(self) -> bool:
        return self.ms is not None and self.ms < HASTY

    def to_row(self) -> dict[str, Any]:
        """As a line of a label file."""
        return {"event": "verdict", **asdict(self)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Verdict:
        """Undo ``to_row``.

        Raises:
            ValueError: it is none; starts with ``where``.
        """
        known = {name.name for name in fields(cls)}
        try:
            values = {name: value for name, value in row.items() if name in known}
            marks = values.get("wrong_words")
            found = cls(
                **values
                | {
                    "shown": tuple(int(number) for number in values["shown"]),
                    "wrong_words": None if marks is None else tuple(tuple(map(int, words)) for words in marks),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected a verdict ({error})") from None
        found.check(where)
        return found

    def check(self, where: str) -> None:
        """Raise ValueError, starting with ``where``, if the verdict contradicts itself."""
        if self.choice not in CHOICES:
            raise ValueError(f"{where}: choice {self.choice!r}: expected one of {', '.join(CHOICES)}")
        if len(self.shown) < 2 or len(set(self.shown)) != len(self.shown):
            raise ValueError(f"{where}: shown {list(self.shown)}: expected two or more different pictures")
        if self.choice == "better" and (
            self.best not in self.shown or self.worst not in self.shown or self.best == self.worst
        ):
            raise ValueError(f"{where}: best {self.best}, worst {self.worst}: expected two of {list(self.shown)}")


@dataclass(frozen=True)
class Outcome:
    """What a verdict says of two pictures of a unit, ``first`` < ``second``.

    Attributes:
        label: P(first is better): 1, 0 or 0.5.
        implied: it follows from a best and a worst of more than two, and was not looked at by itself.
    """

    first: int
    second: int
    label: float
    bad: bool = False
    implied: bool = False


def outcomes(verdict: Verdict) -> Iterator[Outcome]:
    """Pairs that a verdict decides; a skip decides none.

    Best and worst of K pictures say 2K - 3 pairs: the best beats all others, and all others beat the worst.
    """
    shown = sorted(verdict.shown)
    if verdict.choice == "skip":
        return
    if verdict.choice in ("tie", "bad"):
        for place, first in enumerate(shown):
            for second in shown[place + 1 :]:
                yield Outcome(first, second, 0.5, verdict.choice == "bad", len(shown) > 2)
        return
    best, worst = verdict.best, verdict.worst
    assert best is not None
    assert worst is not None
    beaten = [(best, other) for other in shown if other != best]
    beaten += [(other, worst) for other in shown if other not in (best, worst)]
    for winner, loser in beaten:
        first, second = sorted((winner, loser))
        yield Outcome(
            first, second, float(winner == first), implied=len(shown) > 2 and (winner, loser) != (best, worst)
        )


def live(events: Sequence[Verdict | str]) -> list[Verdict]:
    """Verdicts that were not taken back; an event that is a text takes back the visit of that id."""
    kept: dict[str, Verdict] = {}
    for event in events:
        if isinstance(event, str):
            kept.pop(event, None)
        else:
            kept[event.id] = event
    return list(kept.values())
