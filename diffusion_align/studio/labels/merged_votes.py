"""From the verdicts of one or several people to one answer for each pair of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .label_tasks import Task
from .verdicts import Outcome, Verdict, outcomes

#: majority: one row a pair, with the votes; annotators: one row for everybody who judged it.
Merge = Literal["majority", "annotators"]


@dataclass(frozen=True)
class PairAnswer:
    """What is exported of two pictures of a unit, ``first`` < ``second``.

    Attributes:
        label: P(first is better): 1, 0 or 0.5.
        bad: most say that both are bad.
        votes: for the first, for the second; a tie is half a vote for each.
        user: who judged; "" where several are merged.
        aspects: P(first is better) by aspect.
        wrong: for each of the two, the share of people who marked each word; None where nobody was asked.
    """

    place: int
    first: int
    second: int
    label: float
    bad: bool
    implied: bool
    votes: tuple[float, float]
    user: str
    aspects: Mapping[str, float] = field(default_factory=dict)
    wrong: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class _Said:
    user: str
    outcome: Outcome
    verdict: Verdict


def answers(task: Task, labels: Mapping[str, Sequence[Verdict]], merge: Merge) -> tuple[list[PairAnswer], int]:
    """Answers in the order of the task, and how many verdicts belong to no unit of it any more.

    Of a pair that came back the first verdict counts; the second is for agreement.
    """
    said: dict[tuple[int, int, int], list[_Said]] = {}
    lost = 0
    for user in sorted(labels):
        for verdict in labels[user]:
            place = task.places.get(verdict.unit)
            if place is None:
                lost += 1
            elif verdict.visit == 0:
                for outcome in outcomes(verdict):
                    key = (place, outcome.first, outcome.second)
                    said.setdefault(key, []).append(_Said(user, outcome, verdict))
    found = []
    for key in sorted(said):
        groups = [said[key]] if merge == "majority" else [[one] for one in said[key]]
        found += [_merged(task, key, group, merge == "annotators") for group in groups]
    return found, lost


def _merged(task: Task, key: tuple[int, int, int], group: Sequence[_Said], named: bool) -> PairAnswer:
    place, first, second = key
    votes = sum(one.outcome.label for one in group), sum(1 - one.outcome.label for one in group)
    aspects: dict[str, list[float]] = {}
    for one in group:
        exchanged = one.verdict.shown[0] != first
        for name, value in one.verdict.aspects.items():
            aspects.setdefault(name, []).append(1 - value if exchanged else value)
    return PairAnswer(
        place,
        first,
        second,
        _majority(votes),
        sum(one.outcome.bad for one in group) * 2 > len(group),
        all(one.outcome.implied for one in group),
        votes,
        group[0].user if named else "",
        {name: _majority((sum(found), sum(1 - value for value in found))) for name, found in sorted(aspects.items())},
        _words(task.units[place].prompt, first, second, [one.verdict for one in group]),
    )


def _majority(votes: tuple[float, float]) -> float:
    return 0.5 if votes[0] == votes[1] else float(votes[0] > votes[1])


def _words(
    prompt: str, first: int, second: int, verdicts: Sequence[Verdict]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Share of people who marked each word, of both pictures."""
    asked = [verdict for verdict in verdicts if verdict.wrong_words is not None]
    if not asked:
        return None
    words = range(len(prompt.split()))
    marks = [dict(zip(verdict.shown, verdict.wrong_words or (), strict=True)) for verdict in asked]
    shares = [
        tuple(sum(word in there.get(picture, ()) for there in marks) / len(marks) for word in words)
        for picture in (first, second)
    ]
    return shares[0], shares[1]
