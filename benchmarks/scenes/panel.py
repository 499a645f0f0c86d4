"""What a tuned policy's pictures say beside the base's: one record for each training seed, and what several say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from diffusion_align.adapters import Adapter
from diffusion_align.evaluation import clustered_win_rate
from diffusion_align.evaluation.artefacts import Change, Figures, Spread, changes, measure
from diffusion_align.evaluation.compare import Sampled, SamplingSettings
from diffusion_align.sampling.sampler import to_uint8
from diffusion_align.scenes.world.oracle import score_images

from .online_methods import Exam

#: Pictures of a prompt, where their diversity is measured.
SEEDS_PER_PROMPT = 4
ASPECTS = ("prompt_following", "aesthetic", "fidelity", "correct")


@dataclass(frozen=True)
class Outcome:
    """What one policy did on the held-out prompts.

    Attributes:
        verdicts: of each prompt w, l or t: whether the oracle finds its picture better than the base's.
        aspects: mean of each of the oracle's aspects.
        facts: by kind of fact the share that holds.
        diversity_ratio: mean distance between pictures of one prompt, in times of the base's.
        artefacts: of each figure how far it moved, in times of what the base's own spread allows.
        alarms: the figures that moved too far.
    """

    verdicts: str
    aspects: dict[str, float]
    facts: dict[str, float]
    diversity_ratio: float
    artefacts: dict[str, float]
    alarms: list[str]

    def to_json(self) -> dict[str, Any]:
        """The fields as ``json.dumps`` accepts them."""
        return asdict(self)


@dataclass(frozen=True)
class Panel:
    """The base's pictures of held-out prompts, one each, and several each of the first ones, for their diversity."""

    exam: Exam
    repeated: Exam
    base_facts: dict[str, float]
    counted_facts: dict[str, int]
    looks: Looks
    repeated_looks: Looks

    @classmethod
    def prepare(cls, adapter: Adapter, prompts: list[str], diverse: int, settings: SamplingSettings) -> Panel:
        """Draw the base's pictures, ``diverse`` of the prompts ``SEEDS_PER_PROMPT`` times more."""
        exam = Exam.prepare(adapter, prompts, None, settings)
        several = [prompt for prompt in prompts[:diverse] for _ in range(SEEDS_PER_PROMPT)]
        found = facts_by_kind(exam.base, prompts)
        shares, counts = {k: fmean(v) for k, v in found.items()}, {k: len(v) for k, v in found.items()}
        repeated = Exam.prepare(adapter, several, None, settings)
        looks, repeated_looks = Looks.of(exam.base, 1), Looks.of(repeated.base, SEEDS_PER_PROMPT)
        return cls(exam, repeated, shares, counts, looks, repeated_looks)

    @property
    def base(self) -> dict[str, Any]:
        """What there is to say about the base's own pictures."""
        return {
            "aspects": mean_aspects(self.exam.base),
            "facts": {kind: {"share": s, "count": self.counted_facts[kind]} for kind, s in self.base_facts.items()},
        }

    def take(self, adapter: Adapter) -> Outcome:
        """The same prompts and noise with the present policy."""
        tuned, several = self.exam.take(adapter), self.repeated.take(adapter)
        moved = self.looks.compared(tuned)
        diversity = {change.name: change for change in self.repeated_looks.compared(several)}["diversity"]
        found = [*moved, diversity]
        return Outcome(
            verdicts=verdicts(self.exam.gains(tuned)),
            aspects=mean_aspects(tuned),
            facts={kind: fmean(each) for kind, each in facts_by_kind(tuned, self.exam.prompts).items()},
            diversity_ratio=diversity.tuned / diversity.base,
            artefacts={change.name: change.moved for change in found},
            alarms=[change.name for change in found if change.alarmed],
        )


@dataclass(frozen=True)
class Looks:
    """Figures of the base's pictures and their own spread."""

    figures: Figures
    spread: Spread
    seeds_per_prompt: int

    @classmethod
    def of(cls, base: Sampled, seeds_per_prompt: int) -> Looks:
        figures = measure(base.images, seeds_per_prompt)
        return cls(figures, Spread.of(figures), seeds_per_prompt)

    def compared(self, tuned: Sampled) -> Sequence[Change]:
        """Figures of other pictures of the same prompts against that spread."""
        return changes(measure(tuned.images, self.seeds_per_prompt), self.figures, self.spread)


def mean_aspects(sampled: Sampled) -> dict[str, float]:
    """Mean of each of the oracle's aspects."""
    assert sampled.reward is not None
    return {name: float(sampled.reward.aspects[name].mean()) for name in ASPECTS}


def facts_by_kind(sampled: Sampled, prompts: Sequence[str]) -> Mapping[str, list[bool]]:
    """Whether each fact that is asked for holds, by kind: "object 2 color" is one of color."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for score in score_images(to_uint8(sampled.images), prompts):
        for name, holds in score.facts.items():
            found[name.split()[-1]].append(holds)
    return dict(sorted(found.items()))


def verdicts(gains: np.ndarray) -> str:
    """A letter for each prompt: won, lost or tied."""
    return "".join("w" if gain > 0 else "l" if gain < 0 else "t" for gain in gains)


def as_gains(letters: str) -> np.ndarray:
    """Undo ``verdicts``: 1, -1 or 0 for each prompt."""
    return np.array([{"w": 1.0, "l": -1.0, "t": 0.0}[letter] for letter in letters])


def over_seeds(by_seed: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, Any]:
    """What the outcomes of several training seeds (``Outcome.to_json``) say together.

    Intervals of win rates resample whole prompts.
    """
    taken = list(by_seed.values())
    gains = [as_gains(each["verdicts"]) for each in taken]
    return {
        "seeds": [int(seed) for seed in by_seed],
        "win_rate": clustered_win_rate(gains).to_json(),
        "win_rate_by_seed": [float((0.5 * (gain + 1)).mean()) for gain in gains],
        **{
            name: {"base": base["aspects"][name], "tuned": fmean(each["aspects"][name] for each in taken)}
            for name in ASPECTS
        },
        "diversity_ratio": fmean(each["diversity_ratio"] for each in taken),
        "artefacts": {name: fmean(each["artefacts"][name] for each in taken) for name in taken[0]["artefacts"]},
        "alarms": {seed: each["alarms"] for seed, each in by_seed.items() if each["alarms"]},
        "facts": {
            kind: {"base": found["share"], "tuned": fmean(each["facts"][kind] for each in taken), "n": found["count"]}
            for kind, found in base["facts"].items()
        },
    }
