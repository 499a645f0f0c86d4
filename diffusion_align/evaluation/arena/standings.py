"""From scores of pictures to verdicts: who wins over the baseline, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stats import MeanInterval, WinRate, clustered_mean, clustered_win_rate
from .many_tests import detectable_gap, holm_within, paired_p, spread_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Board:
    """Scores of all sides on the same prompts and seeds. The unit of every figure is the prompt.

    Prompts are kept sorted, so that no figure depends on the order of a file.

    Attributes:
        prompts: P distinct ones, sorted.
        sides: names.
        scores: by scorer, (sides, P, K), more is better.
        categories: of prompts, where they have one.
    """

    prompts: Sequence[str]
    sides: Sequence[str]
    scores: Mapping[str, Array]
    categories: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if list(self.prompts) != sorted(set(self.prompts)):
            raise ValueError("prompts: expected distinct ones, sorted")
        for scorer, table in self.scores.items():
            if table.ndim != 3 or table.shape[:2] != (len(self.sides), len(self.prompts)):
                shape = f"({len(self.sides)}, {len(self.prompts)}, seeds)"
                raise ValueError(f"scores of {scorer}: expected {shape}, got {table.shape}")

    def of(self, scorer: str, side: str) -> Array:
        """A side's scores, (P, K)."""
        found: Array = self.scores[scorer][list(self.sides).index(side)]
        return found

    def gap(self, scorer: str, side: str, baseline: str) -> Array:
        """Score of ``side`` minus that of ``baseline``, (P, K)."""
        return self.of(scorer, side) - self.of(scorer, baseline)

    def wins(self, scorer: str, sides: Sequence[str]) -> Array:
        """For Bradley and Terry: (P, sides, sides), how often one beat the other over the seeds, ties 1/2 on both."""
        table = np.stack([self.of(scorer, side) for side in sides])
        won = outcomes(table[:, None] - table[None]).sum(axis=3).transpose(2, 0, 1)
        found: Array = won * (1 - np.eye(len(sides)))
        return found

    def rows(self, category: str) -> NDArray[np.intp]:
        """Which prompts are of a category."""
        return np.flatnonzero([self.categories.get(prompt) == category for prompt in self.prompts])


@dataclass(frozen=True)
class Contest:
    """Which side is put beside which.

    Attributes:
        label: "" of an ordinary contest; "matched" at matched guidance, "unmatched" beside those.
    """

    side: str
    baseline: str
    label: str = ""


@dataclass(frozen=True)
class Verdict:
    """What one scorer says of one contest.

    Attributes:
        win_rate: over the baseline, ties half, interval clustered by prompt.
        difference: of mean scores in the scorer's unit, likewise; people give none.
        p: of the win rate's difference from 1/2, over prompts; p_holm: corrected for all verdicts of the same label.
        detectable: the difference from 1/2 that a test like this one, as noisy as it turned out, would see (80% power).
        categories: win rates by category of prompts that has at least two of them.
    """

    contest: Contest
    scorer: str
    win_rate: WinRate
    difference: MeanInterval | None
    p: float
    p_holm: float
    detectable: float
    categories: Mapping[str, WinRate] = field(default_factory=dict)

    @property
    def winner(self) -> str | None:
        """Who won, as far as Holm's correction leaves it sure at 5%; None: nobody knows."""
        if self.p_holm >= 0.05:
            return None
        return self.contest.side if self.win_rate.rate > 0.5 else self.contest.baseline

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "side": self.contest.side,
            "baseline": self.contest.baseline,
            "label": self.contest.label,
            "scorer": self.scorer,
            "win_rate": self.win_rate.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
            "p": self.p,
            "p_holm": self.p_holm,
            "detectable": self.detectable,
            "winner": self.winner,
            "categories": {name: rate.to_json() for name, rate in self.categories.items()},
        }


def verdicts(board: Board, contests: Sequence[Contest]) -> list[Verdict]:
    """Every scorer's verdict on every contest; Holm's correction is over all those of one label.

    Raises:
        ValueError: scores that are not finite.
    """
    names = sorted(set(board.categories.values()))
    groups = {name: rows for name in names if len(rows := board.rows(name)) > 1}
    asked = [(contest, scorer) for contest in contests for scorer in board.scores]
    p_values = [paired_p(outcomes(board.gap(scorer, c.side, c.baseline)).mean(axis=1) - 0.5) for c, scorer in asked]
    labels = [contest.label for contest, _ in asked]
    adjusted = holm_within(p_values, labels)
    found = []
    for (contest, scorer), p, p_holm in zip(asked, p_values, adjusted, strict=True):
        gap = board.gap(scorer, contest.side, contest.baseline)
        by_prompt = outcomes(gap).mean(axis=1)
        found.append(
            Verdict(
                contest,
                scorer,
                clustered_win_rate(list(gap.T)),
                clustered_mean(gap.mean(axis=1)),
                p,
                p_holm,
                detectable_gap(spread_of(by_prompt), len(by_prompt), labels.count(contest.label)),
                {name: clustered_win_rate(list(gap[rows].T)) for name, rows in groups.items()},
            )
        )
    return found


def outcomes(gap: Array) -> Array:
    """1 where the gap is above 0, 0 below, 1/2 at 0."""
    found: Array = np.where(gap > 0, 1.0, np.where(gap < 0, 0.0, 0.5))
    return found
