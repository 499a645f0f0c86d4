"""People's verdicts on pairs of pictures, to the same figures that scores give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..stats import MeanInterval, WinRate, clustered_mean
from .many_tests import detectable_gap, holm_within, paired_p, spread_of
from .standings import Contest, Verdict

PEOPLE = "people"


@dataclass(frozen=True)
class Vote:
    """What was said of one pair.

    Attributes:
        first, second: sides.
        share: 1 where the first was preferred, 0 the second, 1/2 a tie.
    """

    prompt: str
    first: str
    second: str
    share: float


def vote_verdicts(votes: Sequence[Vote], contests: Sequence[Contest], categories: Mapping[str, str]) -> list[Verdict]:
    """People's verdict on every contest that they have voted on; Holm's correction is over all of one label.

    The unit is the prompt: votes on one prompt are averaged, and intervals resample prompts.
    """
    asked = [(contest, found) for contest in contests if (found := by_prompt(votes, contest))]
    p_values = [paired_p(values(found) - 0.5) for _, found in asked]
    labels = [contest.label for contest, _ in asked]
    adjusted = holm_within(p_values, labels)
    verdicts = []
    for (contest, found), p, p_holm in zip(asked, p_values, adjusted, strict=True):
        groups: dict[str, dict[str, list[float]]] = {}
        for prompt, shares in found.items():
            if prompt in categories:
                groups.setdefault(categories[prompt], {})[prompt] = shares
        verdicts.append(
            Verdict(
                contest,
                PEOPLE,
                rate(found),
                None,
                p,
                p_holm,
                detectable_gap(spread_of(values(found)), len(found), labels.count(contest.label)),
                {name: rate(groups[name]) for name in sorted(groups) if len(groups[name]) > 1},
            )
        )
    return verdicts


def by_prompt(votes: Sequence[Vote], contest: Contest) -> dict[str, list[float]]:
    """Shares of ``contest.side`` against its baseline, by prompt, prompts sorted."""
    found: dict[str, list[float]] = {}
    for vote in sorted(votes, key=lambda vote: (vote.prompt, vote.first, vote.second, vote.share)):
        if (vote.first, vote.second) == (contest.side, contest.baseline):
            found.setdefault(vote.prompt, []).append(vote.share)
        elif (vote.second, vote.first) == (contest.side, contest.baseline):
            found.setdefault(vote.prompt, []).append(1 - vote.share)
    return found


def values(found: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Mean share of each prompt."""
    return np.array([float(np.mean(shares)) for shares in found.values()])


def rate(found: Mapping[str, Sequence[float]]) -> WinRate:
    """Win rate over prompts; wins, losses and ties are counted in votes."""
    mean: MeanInterval = clustered_mean(values(found))
    shares = [share for each in found.values() for share in each]
    wins, losses = sum(share > 0.5 for share in shares), sum(share < 0.5 for share in shares)
    return WinRate(wins, losses, len(shares) - wins - losses, mean.mean, mean.interval, len(shares))


def vote_wins(votes: Sequence[Vote], sides: Sequence[str]) -> NDArray[np.float64]:
    """For Bradley and Terry: (prompts, sides, sides), how often one was preferred to the other, ties 1/2 on both."""
    place = {side: index for index, side in enumerate(sides)}
    prompts = {prompt: index for index, prompt in enumerate(sorted({vote.prompt for vote in votes}))}
    wins = np.zeros((len(prompts), len(sides), len(sides)))
    for vote in votes:
        if vote.first in place and vote.second in place:
            wins[prompts[vote.prompt], place[vote.first], place[vote.second]] += vote.share
            wins[prompts[vote.prompt], place[vote.second], place[vote.first]] += 1 - vote.share
    return wins
