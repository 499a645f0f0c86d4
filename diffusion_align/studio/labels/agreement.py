"""How far people agree, with each other and with themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diffusion_align.evaluation.stats import WinRate, win_rate

from .verdicts import Outcome, Verdict, outcomes

#: One annotator's answers by item.
Ratings = Mapping[Hashable, Hashable]
RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A statistic with its 95% interval over prompts; NaN where it is not defined."""

    value: float
    interval: tuple[float, float]
    count: int


@dataclass(frozen=True)
class SelfAgreement:
    """What pairs that came back, and sides, say of one annotator.

    Attributes:
        repeats: pairs that were seen twice; agreed: those with the same verdict.
        left: how often the left picture won, of verdicts that are no ties; 50% without a bias.
    """

    repeats: int
    agreed: int
    left: WinRate | None


def self_agreement(verdicts: Sequence[Verdict]) -> SelfAgreement:
    """Of one annotator's verdicts; skips say nothing."""
    answers: dict[str, dict[int, tuple[Outcome, ...]]] = {}
    left = []
    for verdict in verdicts:
        if len(verdict.shown) != 2 or verdict.choice == "skip":
            continue
        answers.setdefault(verdict.unit, {})[verdict.visit] = tuple(outcomes(verdict))
        if verdict.choice == "better":
            left.append(float(verdict.best == verdict.shown[0]))
    twice = [found for found in answers.values() if {0, 1} <= found.keys()]
    rate = win_rate(left, [1 - side for side in left]) if left else None
    return SelfAgreement(len(twice), sum(found[0] == found[1] for found in twice), rate)


def percent_agreement(raters: Sequence[Ratings]) -> float:
    """Share of equal answers among all pairs of answers to the same item; NaN if no item has two."""
    equal = total = 0
    for first, second in combinations(raters, 2):
        common = first.keys() & second.keys()
        total += len(common)
        equal += sum(first[item] == second[item] for item in common)
    return equal / total if total else float("nan")


def cohen_kappa(first: Ratings, second: Ratings) -> float:
    """(p_o - p_e) / (1 - p_e) over the items that both answered (Cohen, 1960); NaN if there is none, or p_e is 1."""
    items = sorted(first.keys() & second.keys(), key=str)
    if not items:
        return float("nan")
    observed = sum(first[item] == second[item] for item in items) / len(items)
    counts = [Counter(rater[item] for item in items) for rater in (first, second)]
    expected = sum(count * counts[1][answer] for answer, count in counts[0].items()) / len(items) ** 2
    return float("nan") if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(raters: Sequence[Ratings]) -> float:
    """1 - D_o / D_e for nominal answers (Krippendorff, 2011), two raters or more, who may miss items; NaN if no item
    has two answers, or all answers are equal."""
    items = sorted({item for rater in raters for item in rater}, key=str)
    answers = [[rater[item] for rater in raters if item in rater] for item in items]
    answers = [found for found in answers if len(found) > 1]
    totals = Counter(answer for found in answers for answer in found)
    count = sum(totals.values())
    if len(totals) < 2:
        return float("nan")
    disagreement = 0.0
    for found in answers:
        equal = sum(n * (n - 1) for n in Counter(found).values())
        disagreement += (len(found) * (len(found) - 1) - equal) / (len(found) - 1)
    expected = sum(n * (count - n) for n in totals.values()) / (count - 1)
    return 1 - disagreement / expected


def over_prompts(
    raters: Sequence[Ratings],
    prompt_of: Mapping[Hashable, str],
    statistic: Callable[[Sequence[Ratings]], float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """A statistic with its percentile interval by a bootstrap over prompts; items of one prompt stay together.

    Resamples in which the statistic is not defined are left out; without any the interval is NaN.
    """
    items = {item for rater in raters for item in rater}
    shared = sorted((item for item in items if sum(item in rater for rater in raters) > 1), key=str)
    value = statistic(raters)
    by_prompt: dict[str, list[Hashable]] = {}
    for item in shared:
        by_prompt.setdefault(prompt_of[item], []).append(item)
    groups = list(by_prompt.values())
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples if groups else 0):
        drawn = [
            (copy, item)
            for copy, group in enumerate(rng.integers(len(groups), size=len(groups)))
            for item in groups[group]
        ]
        again: list[Ratings] = [
            {(copy, item): rater[item] for copy, item in drawn if item in rater} for rater in raters
        ]
        found.append(statistic(again))
    defined = [number for number in found if not np.isnan(number)]
    low, high = np.quantile(defined, [0.025, 0.975]) if defined else (float("nan"), float("nan"))
    return Figure(value, (float(low), float(high)), len(shared))


def ratings(verdicts: Sequence[Verdict]) -> dict[Hashable, Hashable]:
    """First answers of one annotator by pair of pictures: 1, 0 or 0.5 for the first of both; skips are missing."""
    found: dict[Hashable, Hashable] = {}
    for verdict in verdicts:
        if verdict.visit == 0:
            for outcome in outcomes(verdict):
                found.setdefault((verdict.unit, outcome.first, outcome.second), outcome.label)
    return found
