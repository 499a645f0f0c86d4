"""What is read off validation pictures: artefacts, held-out means, and how far an ensemble disagrees."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

from diffusion_align.evaluation.artefacts import Change, Figures, Further, Spread, changes, measure, paired_changes

from .watch_rules import ARTEFACT, MONITORED, MOVED, PICTURE, ArtefactRule

#: Scores of policy and base, each (P,), of one scorer, and whether higher ones are better.
Scored = tuple[tuple[Sequence[float], Sequence[float]], bool]


class PictureWatch:
    """Figures of the policy's pictures against the base's, which are measured once.

    Args:
        seeds_per_prompt: pictures of each prompt, side by side.
        rule: counts the validations at which a figure was out of bounds.
        further: figures of the artefact monitor, which judges by paired intervals instead of the base's own spread.
    """

    def __init__(
        self, seeds_per_prompt: int = 1, rule: ArtefactRule | None = None, further: Further | None = None
    ) -> None:
        self.seeds_per_prompt, self.further = seeds_per_prompt, further
        self.rule = ArtefactRule() if rule is None else rule
        self.base: Figures | None = None
        self.spread: Spread | None = None

    def __call__(self, policy: Tensor, base: Tensor) -> dict[str, float]:
        """Of each figure ``eval/picture_NAME``, how far it moved in times of what it may (``eval/picture_NAME_moved``),
        and ``alarm/picture_NAME``.

        The artefact monitor's are ``artefact/NAME``, ``artefact/NAME_low`` and ``_high`` (99% interval of the change),
        ``artefact/NAME_moved`` (by the nearer end of the interval) and the same alarms.

        Args:
            policy, base: pictures (P K, 3, H, W) of the same prompts and seeds; ``base`` is read at the first call.
        """
        if self.base is None:
            self.base = self._measured(base)
        ours = self._measured(policy)
        if self.further is not None:
            return self._told(MONITORED, paired_changes(ours, self.base))
        if self.spread is None:
            self.spread = Spread.of(self.base)
        return self._told(PICTURE, changes(ours, self.base, self.spread))

    def _measured(self, pictures: Tensor) -> Figures:
        return measure(pictures, self.seeds_per_prompt, further=self.further)

    def _told(self, beginning: str, found: Sequence[Change]) -> dict[str, float]:
        alarms = self.rule.count({change.name: change.alarmed for change in found})
        told: dict[str, float] = {}
        for change in found:
            told[f"{beginning}{change.name}"] = change.tuned
            if change.interval is not None:
                told[f"{beginning}{change.name}_low"], told[f"{beginning}{change.name}_high"] = change.interval
            told[f"{beginning}{change.name}{MOVED}"] = change.moved
            told[f"{ARTEFACT}{change.name}"] = alarms[f"{ARTEFACT}{change.name}"]
        return told


def standardised(scorers: Sequence[Scored]) -> list[float]:
    """Of each prompt the mean over the scorers of (policy - base's mean) / base's standard deviation, (P,), with the
    sign turned where lower scores are better.

    A scorer that gives all of the base's pictures one score counts in its own unit.
    """
    columns = []
    for (policy, base), higher_is_better in scorers:
        mean, deviation = statistics.fmean(base), statistics.pstdev(base)
        unit = (deviation or 1.0) * (1 if higher_is_better else -1)
        columns.append([(score - mean) / unit for score in policy])
    return [statistics.fmean(row) for row in zip(*columns, strict=True)]


def ensemble_spread(members: Sequence[Scored]) -> dict[str, float]:
    """How far the members of an ensemble disagree on own pictures.

    Returns:
        ``eval/ensemble_spread``: standard deviation over the members, in the base's units, averaged over the pictures;
        ``eval/spread_ratio``: in times of that on the base's pictures; ``eval/spread_errors``: how many paired standard
        errors it is above that. The last two are absent where the base has none.
    """

    def spreads(side: int) -> list[float]:
        columns = [standardised([((scores[side], scores[1]), higher)]) for scores, higher in members]
        return [statistics.pstdev(row) for row in zip(*columns, strict=True)]

    own, base = spreads(0), spreads(1)
    found = {"eval/ensemble_spread": statistics.fmean(own)}
    if not any(base) or len(base) < 2:
        return found
    differences = [ours - theirs for ours, theirs in zip(own, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    moved = statistics.fmean(differences)
    return found | {
        "eval/spread_ratio": statistics.fmean(own) / statistics.fmean(base),
        "eval/spread_errors": moved / error if error else 0.0,
    }
