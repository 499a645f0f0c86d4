"""Ways to guide, compared at equal denoiser calls: the same prompts, the same seeds, one scorer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import fast_autocast
from diffusion_align.rewards import RewardOutput, RewardScorer, score_in_batches
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample, to_uint8
from diffusion_align.sampling.steering import best_of_n

from .artefacts.picture_measures import BRIGHT, DARK, layout_features, saturation, seed_distance
from .effective_scale import MeanScale, ScaleMeter
from .stats import clustered_win_rate

#: Added to the seeds of a repetition where something is chosen for the very prompts that are tested: other pictures.
OTHER_SEEDS = 500_000


@dataclass(frozen=True)
class GuidanceTrial:
    """What one way to guide gave on prompts x seeds.

    Attributes:
        reward: (seeds, prompts).
        aspects: by name, (seeds, prompts): the scorer's, and "saturation", "clipped" (share of values below 0.05 or
            above 0.95) and, of two seeds or more, "diversity" (distance between a prompt's pictures, (1, prompts)),
            which larger scales change and scorers may love.
        nfe: denoiser evaluations per image.
        scales: (seeds, steps, prompts); of other than our guiders empty.
        seconds: per image, drawing only.
        effective: which scale it amounts to; None if that was not measured.
        shown: uint8 (K, H, W, 3), the first prompts' pictures with the first seed; None if none were asked for.
    """

    reward: Tensor
    aspects: dict[str, Tensor]
    nfe: float
    scales: Tensor
    seconds: float
    effective: MeanScale | None = None
    shown: NDArray[np.uint8] | None = None

    def values(self) -> dict[str, Tensor]:
        """The reward and every aspect, each (seeds, prompts)."""
        return {"reward": self.reward, **self.aspects}

    def over(self, base: GuidanceTrial) -> dict[str, dict[str, float]]:
        """Mean differences from ``base`` with standard errors over prompts, by name."""
        reference = base.values()
        gaps = {name: table - reference[name] for name, table in self.values().items()}
        return {name: mean_over_prompts(gap) for name, gap in gaps.items()}

    def win_rate(self, base: GuidanceTrial) -> dict[str, Any]:
        """How often the reward is above that of ``base``, clustered by prompt."""
        return clustered_win_rate((self.reward - base.reward).tolist()).to_json()

    def table_row(self, base: GuidanceTrial) -> dict[str, Any]:
        """Means with standard errors over prompts, and the win rate over ``base``, clustered by prompt."""
        row: dict[str, Any] = {"nfe": self.nfe, "seconds_ratio": self.seconds / base.seconds}
        row |= {name: mean_over_prompts(table) for name, table in self.values().items()}
        row["over_static"] = self.over(base)
        row["win_rate"] = self.win_rate(base)
        if self.scales.numel():
            row["mean_scale_by_step"] = self.scales.mean(dim=(0, 2)).tolist()
        if self.effective is not None:
            row["effective_scale"] = self.effective.scale
            row["orthogonal_share"] = self.effective.orthogonal
            row["effective_scale_by_step"] = self.effective.by_step
        return row


def mean_over_prompts(table: Tensor) -> dict[str, float]:
    """Mean of (seeds, prompts), and its standard error over prompts."""
    per_prompt = table.mean(dim=0)
    return {"mean": float(per_prompt.mean()), "standard_error": float(per_prompt.std() / len(per_prompt) ** 0.5)}


#: Draws (prompts, seeds, number of steps, options); returns images (N, 3, H, W), their scales and the denoiser calls.
Draw = Callable[[Sequence[str], Sequence[int], int, SamplingOptions], tuple[Tensor, Tensor, float]]
Setting = TypeVar("Setting", bound=Hashable)


class GuidanceComparison:
    """The setting that all ways to guide share.

    Args:
        scorer: the judge, which no way to guide may use.
        steps: sampling steps; a way that draws n images for one gets 1/n of them.
        seeds: image i of a repetition has seed ``seed + i``.
        measured: how many of the prompts are drawn a second time to measure the effective scale; 0: none.
        shown: how many of the prompts' pictures are kept to be looked at.
    """

    def __init__(
        self,
        adapter: Adapter,
        scorer: RewardScorer,
        prompts: Sequence[str],
        *,
        steps: int = 20,
        seeds: Sequence[int] = (0,),
        batch_size: int = 32,
        bf16: bool = True,
        measured: int = 0,
        shown: int = 0,
    ) -> None:
        self.adapter, self.scorer, self.prompts = adapter, scorer, list(prompts)
        self.steps, self.seeds, self.batch_size, self.bf16 = steps, list(seeds), batch_size, bf16
        self.measured, self.shown = min(measured, len(self.prompts)), shown

    def of(self, adapter: Adapter) -> GuidanceComparison:
        """The same setting for another model."""
        other = copy.copy(self)
        other.adapter = adapter
        return other

    def guided(self, guider: Any, steps: int | None = None) -> Draw:
        """Drawing with a guider, a scale or a table, in ``steps`` steps or as many as all."""

        def draw(
            prompts: Sequence[str], seeds: Sequence[int], usual: int, options: SamplingOptions
        ) -> tuple[Tensor, Tensor, float]:
            drawn = sample(
                self.adapter, prompts, num_inference_steps=steps or usual, guidance=guider, seeds=seeds, options=options
            )
            return drawn.images, drawn.scales, drawn.nfe

        return draw

    def best_of(self, n: int, scorer: RewardScorer, scale: float) -> Draw:
        """The best of n images of steps / n steps each, by ``scorer``."""

        def draw(
            prompts: Sequence[str], seeds: Sequence[int], usual: int, options: SamplingOptions
        ) -> tuple[Tensor, Tensor, float]:
            found = best_of_n(
                self.adapter, prompts, scorer, n, seeds=seeds, num_inference_steps=usual // n, guidance=scale,
                options=options,
            )  # fmt: skip
            return found.images, torch.empty(usual // n, 0), found.nfe

        return draw

    def run(self, draw: Draw, seeds: Sequence[int] | None = None) -> GuidanceTrial:
        """Draw every prompt with every seed (or with ``seeds`` instead of the comparison's), and score."""
        outputs: list[RewardOutput] = []
        scales, drawn, nfe, seconds = [], [], 0.0, 0.0
        options = SamplingOptions(batch_size=self.batch_size)
        for seed in self.seeds if seeds is None else seeds:
            begun = time.perf_counter()
            with fast_autocast(self.adapter.device, self.bf16):
                images, chosen, nfe = draw(self.prompts, self._seeds(seed, len(self.prompts)), self.steps, options)
            seconds += time.perf_counter() - begun
            outputs.append(score_in_batches(self.scorer, images, self.prompts))
            scales.append(chosen)
            drawn.append(images)
        aspects = {name: torch.stack([o.aspects[name] for o in outputs]) for name in outputs[0].aspects}
        reward = torch.stack([o.reward for o in outputs])
        aspects |= looks(torch.stack(drawn))
        shown = to_uint8(drawn[0][: self.shown]) if self.shown else None
        return GuidanceTrial(reward, aspects, nfe, torch.stack(scales), seconds / reward.numel(), shown=shown)

    def measured_run(self, draw: Draw) -> GuidanceTrial:
        """``run``, and which scale the way amounts to, over ``measured`` prompts and all seeds."""
        trial = self.run(draw)
        return replace(trial, effective=self.effective(draw)) if self.measured else trial

    def effective(self, draw: Draw) -> MeanScale:
        """Which scale of this model's classifier-free guidance a way amounts to."""
        meter, prompts = ScaleMeter(self.adapter), self.prompts[: self.measured]
        options = SamplingOptions(batch_size=self.batch_size, on_guided=meter)
        for seed in self.seeds:
            with fast_autocast(self.adapter.device, self.bf16):
                draw(prompts, self._seeds(seed, len(prompts)), self.steps, options)
        return meter.mean()

    def _seeds(self, seed: int, count: int) -> list[int]:
        return [seed + i for i in range(count)]


def looks(images: Tensor) -> dict[str, Tensor]:
    """Of images (seeds, prompts, 3, H, W): saturation, clipped share and, of two seeds or more, diversity."""
    seeds, prompts = images.shape[:2]
    flat = images.flatten(0, 1)
    clipped = ((flat < DARK) | (flat > BRIGHT)).float().mean(dim=(1, 2, 3))
    found = {"saturation": saturation(flat).view(seeds, prompts), "clipped": clipped.view(seeds, prompts)}
    if seeds > 1:
        features = layout_features(images.transpose(0, 1).flatten(0, 1))  # a prompt's pictures side by side
        found["diversity"] = seed_distance(features, seeds)[None].float()
    return found


def sweep(comparison: GuidanceComparison, settings: Mapping[Setting, Draw]) -> dict[Setting, float]:
    """Mean reward of each setting of one way to guide, to choose by."""
    return {setting: float(comparison.run(draw).reward.mean()) for setting, draw in settings.items()}
