"""Ways to guide that were learned, with what validation prompts choose of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from diffusion_align.evaluation.annealing_fit import fit_annealing, roll_out
from diffusion_align.evaluation.guidance import GuidanceComparison, sweep
from diffusion_align.evaluation.guidance_rows import Way
from diffusion_align.guidance.annealing import AnnealingGuidance, AnnealingSchedule
from diffusion_align.guidance.contrastive import ContrastiveGuidance

from ..console import note
from ..opening import contrasted, open_model
from .guidance_options import EvaluateGuidanceOptions

#: Seed of the first picture that a schedule is fitted on: none that the table is drawn with.
FIT_SEED = 70_000_000


class LearnedWays:
    """Contrastive guidance, the merge of both LoRAs, and annealing, as far as the options ask for them.

    Args:
        static: the best static scale, which the merged model is guided with.
        test, validation: the comparison that the rows belong to, and the one that settings are chosen on.

    Attributes:
        chosen: what validation said: mean rewards by way and setting, and how well a schedule's value was known.
    """

    def __init__(
        self, options: EvaluateGuidanceOptions, static: float, test: GuidanceComparison, validation: GuidanceComparison
    ) -> None:
        self.options, self.static, self.test, self.validation = options, static, test, validation
        self.chosen: dict[str, dict[str, float]] = {}

    def ways(self) -> Iterator[Way]:
        """The rows, each made ready when its turn comes.

        Raises:
            ValueError, FileNotFoundError: a file that cannot be used.
        """
        options = self.options
        if options.negative_lora:
            yield self.contrastive()
            if options.merge_weights:
                yield self.merged()
        schedule = options.annealing if options.fit is None else self.fitted(options.fit)
        if schedule is not None:
            yield Way("annealing", self.test.guided(AnnealingGuidance(str(schedule))))

    def contrastive(self) -> Way:
        """Away from the negative model, at the best scale of the sweep."""
        scales = [float(scale) for scale in self.options.sweep if scale > 1]
        draws = {scale: self.validation.guided(ContrastiveGuidance(scale)) for scale in scales}
        tried = sweep(self.validation, draws)
        best = max(tried, key=lambda scale: tried[scale])
        self.chosen["contrastive"] = {f"{scale:g}": reward for scale, reward in tried.items()}
        return Way(f"contrastive {best:g}", self.test.guided(ContrastiveGuidance(best)), best)

    def merged(self) -> Way:
        """base + w (positive - negative) under static guidance, at the best w; two calls share their batch again."""
        rewards = {}
        for weight in self.options.merge_weights:  # one model at a time
            of_validation = self.merged_with(weight, self.validation)
            rewards[weight] = float(of_validation.run(of_validation.guided(self.static)).reward.mean())
        best = max(rewards, key=lambda weight: rewards[weight])
        self.chosen["merged"] = {f"{weight:g}": reward for weight, reward in rewards.items()}
        of_test = self.merged_with(best, self.test)
        return Way(f"merged {best:g}, static {self.static:g}", of_test.guided(self.static), self.static)

    def merged_with(self, weight: float, comparison: GuidanceComparison) -> GuidanceComparison:
        options = self.options
        sources = contrasted(options.lora, options.negative_lora, weight)
        adapter = open_model(replace(options, lora=sources), torch.device(comparison.adapter.device))
        return comparison.of(adapter)

    def fitted(self, file: str) -> Path:
        """A schedule learned from rollouts of the validation prompts, written to ``file``."""
        options, validation = self.options, self.validation
        low, high = min(options.candidates), max(options.candidates)
        rollouts = roll_out(
            validation.adapter, validation.scorer, validation.prompts, low=low, high=high,
            per_prompt=options.fit_rollouts, steps=validation.steps, seed=FIT_SEED, batch_size=validation.batch_size,
            bf16=validation.bf16,
        )  # fmt: skip
        found = fit_annealing(rollouts, low, high)
        self.chosen["annealing"] = {"explained": found.explained, "rollouts": float(found.rollouts)}
        share = f"{found.explained:.1%}" if found.explained > 0 else "nothing"
        hint = "" if found.explained > 0 else ": they do not tell scales apart, more --fit-rollouts may"
        note(f"annealing: {found.rollouts} rollouts explain {share} of the reward{hint}")
        return found.schedule.save(file)


def check_schedule(options: EvaluateGuidanceOptions) -> None:
    """Read the schedule that is given, before anything is drawn.

    Raises:
        ValueError, FileNotFoundError: it cannot be used.
    """
    if options.annealing is not None:
        AnnealingSchedule.load(options.annealing)
