"""Whether a tuned model's pictures leave what the base's own pictures vary by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.evaluation.stats import paired_difference

from .artefact_figures import RULES, Figures, Rule

#: How many of the base's own standard deviations a figure may move, if they were known exactly.
DEVIATIONS = 3.0
#: Pairs of sets of prompts that a spread is estimated from.
RESAMPLES = 400
#: Of the paired intervals.
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Spread:
    """By how much the figures of two sets of the base's own pictures differ.

    Attributes:
        deviations: standard deviation of that difference, by name of figure.
    """

    deviations: Mapping[str, float]

    @classmethod
    def of(cls, base: Figures, resamples: int = RESAMPLES, seed: int = 0) -> Spread:
        """From the base's pictures alone: twice as many sets of P prompts as ``resamples`` are drawn with replacement,
        each with its pictures, and every second is compared with the one before.

        Prompts and seeds vary together in it, so it is no smaller than the spread over seeds for the same prompts.

        Raises:
            ValueError: fewer than 2 prompts.
        """
        count = base.prompts
        if count < 2:
            raise ValueError(f"the base's spread needs pictures of at least 2 prompts, got {count}")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(count, (resamples, 2, count), generator=generator)
        # A resample of n values has only (n - 1) / n of their variance.
        whole = (count / (count - 1)) ** 0.5

        def deviation(values: Tensor) -> float:
            means = values.cpu()[rows].mean(dim=2)
            return float((means[:, 0] - means[:, 1]).square().mean().sqrt()) * whole

        return cls({name: deviation(values) for name, values in base.columns().items()})


@dataclass(frozen=True)
class Change:
    """One figure of a tuned model against its base.

    Attributes:
        name: of the figure.
        rule: what it is and what counts.
        base, tuned: means over the prompts.
        deviation: the base's own standard deviation.
        allowed: by how much it may move: 3 deviations (more where few prompts tell how large they are), or the
            smallest change that counts if that is more.
        interval: of the mean paired difference tuned - base; None where the base's spread alone is the judge.
    """

    name: str
    rule: Rule
    base: float
    tuned: float
    deviation: float
    allowed: float
    interval: tuple[float, float] | None = None

    @property
    def sure(self) -> float:
        """By how much it moved: of an interval the end nearest to no change, 0 where it holds that."""
        if self.interval is None:
            return self.tuned - self.base
        low, high = self.interval
        return max(low, 0.0) + min(high, 0.0)

    @property
    def moved(self) -> float:
        """How far it moved, in times of what it may: beyond 1 (for some figures: -1) is an alarm."""
        return self.sure / self.allowed if self.allowed else 0.0

    @property
    def alarmed(self) -> bool:
        """Whether that is worth an alarm."""
        up, down = self.sure > self.allowed, self.sure < -self.allowed
        return up if self.rule.side == "up" else down if self.rule.side == "down" else up or down

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.rule.says}): {self.base:.3g} of the base became {self.tuned:.3g}, "
            f"more than the {self.allowed:.2g} that it may move"
        )


def small_sample(deviations: float, count: int) -> float:
    """As rare as ``deviations`` are of a normal number, so many are of Student's t, whose deviation is estimated from
    ``count`` prompts (Cornish and Fisher's expansion to the second order): 3 become 3.8 of 12 prompts, 3.1 of 64."""
    z, free = deviations, count - 1
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


def changes(tuned: Figures, base: Figures, spread: Spread, deviations: float = DEVIATIONS) -> tuple[Change, ...]:
    """Every figure of ``tuned`` against ``base``; ``alarmed`` says which left the base's spread.

    Args:
        tuned, base: of the same prompts, and of equally many pictures of each.
        spread: of the base.
        deviations: how many of the base's standard deviations a figure may move; ``small_sample`` makes them more.

    Raises:
        ValueError: other prompts or figures on one side.
    """
    check_same(tuned, base)
    ours, theirs = tuned.means(), base.means()
    found, allowance = [], small_sample(deviations, base.prompts)
    for name, value in ours.items():
        rule, deviation = RULES[name], spread.deviations[name]
        least = rule.least * theirs[name] if rule.relative else rule.least
        found.append(Change(name, rule, theirs[name], value, deviation, max(allowance * deviation, least)))
    return tuple(found)


def paired_changes(tuned: Figures, base: Figures, confidence: float = CONFIDENCE) -> tuple[Change, ...]:
    """Every figure of ``tuned`` against ``base`` by its paired interval over prompts, mean ± t(P - 1) s / sqrt(P) of
    differences; ``alarmed`` where all of it lies beyond the smallest change that counts.

    Sharper than ``changes``: what prompts differ by does not count, only what a prompt's pictures changed by.

    Args:
        tuned, base: of the same prompts and seeds.

    Raises:
        ValueError: other prompts or figures on one side, or fewer than 2 prompts.
    """
    check_same(tuned, base)
    found = []
    for name, theirs in base.columns().items():
        ours, rule = tuned.columns()[name], RULES[name]
        moved = paired_difference(ours, theirs, confidence=confidence)
        before = float(theirs.mean())
        allowed = rule.least * before if rule.relative else rule.least
        found.append(Change(name, rule, before, float(ours.mean()), moved.standard_error, allowed, moved.interval))
    return tuple(found)


def check_same(tuned: Figures, base: Figures) -> None:
    """Raise ValueError if the figures are of other prompts, or others, on one side."""
    ours, theirs = tuned.columns(), base.columns()
    if ours.keys() != theirs.keys() or tuned.prompts != base.prompts:
        raise ValueError(
            f"tuned has {tuned.prompts} prompts and figures {', '.join(ours)}; "
            f"base has {base.prompts} prompts and figures {', '.join(theirs)}: expected the same"
        )


def alarms(tuned: Figures, base: Figures, spread: Spread, deviations: float = DEVIATIONS) -> tuple[Change, ...]:
    """The changes that are worth an alarm."""
    return tuple(change for change in changes(tuned, base, spread, deviations) if change.alarmed)
