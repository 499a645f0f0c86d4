"""What is read off validation pictures: artefacts, held-out means, and how far an ensemble disagrees."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

from diffusion_align.evaluation.artefacts import Figures, Spread, changes, measure

from .watch_rules import ARTEFACT, MOVED

#: Scores of policy and base, each (P,), of one scorer, and whether higher ones are better.
Scored = tuple[tuple[Sequence[float], Sequence[float]], bool]


class PictureWatch:
    """Figures of the policy's pictures against the base's own spread, which is measured once."""

    def __init__(self, seeds_per_prompt: int = 1) -> None:
        self.seeds_per_prompt = seeds_per_prompt
        self.base: Figures | None = None
        self.spread: Spread | None = None

    def __call__(self, policy: Tensor, base: Tensor) -> dict[str, float]:
        """Of each figure ``eval/picture_NAME``, how far it moved in times of what it may (``eval/picture_NAME_moved``),
        and ``alarm/picture_NAME``.

        Args:
            policy, base: pictures (P K, 3, H, W) of the same prompts and seeds; ``base`` is read at the first call.
        """
        if self.base is None or self.spread is None:
            self.base = measure(base, self.seeds_per_prompt)
            self.spread = Spread.of(self.base)
        found = {}
        for change in changes(measure(policy, self.seeds_per_prompt), self.base, self.spread):
            found[f"eval/picture_{change.name}"] = change.tuned
            found[f"eval/picture_{change.name}{MOVED}"] = change.moved
            found[f"{ARTEFACT}{change.name}"] = float(change.alarmed)
        return found


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
