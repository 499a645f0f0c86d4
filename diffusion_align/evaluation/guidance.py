"""Ways to guide, compared at equal denoiser calls: the same prompts, the same seeds, one scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import fast_autocast
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.rewards import RewardOutput, RewardScorer, score_in_batches
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.sampling.steering import best_of_n

from .stats import clustered_win_rate


@dataclass(frozen=True)
class GuidanceTrial:
    """What one way to guide gave on prompts x seeds.

    Attributes:
        reward: (seeds, prompts).
        aspects: by name, (seeds, prompts).
        nfe: denoiser evaluations per image.
        scales: (seeds, steps, prompts); of other than our guiders empty.
    """

    reward: Tensor
    aspects: dict[str, Tensor]
    nfe: float
    scales: Tensor

    def values(self) -> dict[str, Tensor]:
        """The reward and every aspect, each (seeds, prompts)."""
        return {"reward": self.reward, **self.aspects}

    def table_row(self, base: GuidanceTrial) -> dict[str, Any]:
        """Means with standard errors over prompts, and the win rate over ``base``, clustered by prompt."""
        values, reference = self.values(), base.values()
        row: dict[str, Any] = {"nfe": self.nfe}
        for name, table in values.items():
            per_prompt = table.mean(dim=0)
            row[name] = {
                "mean": float(per_prompt.mean()),
                "standard_error": float(per_prompt.std() / len(per_prompt) ** 0.5),
            }
        difference = {name: table - reference[name] for name, table in values.items()}
        row["over_static"] = {
            name: {
                "mean": float(gap.mean()),
                "standard_error": float(gap.mean(dim=0).std() / gap.shape[1] ** 0.5),
            }
            for name, gap in difference.items()
        }
        row["win_rate"] = clustered_win_rate((self.reward - base.reward).tolist()).to_json()
        if self.scales.numel():
            row["mean_scale_by_step"] = self.scales.mean(dim=(0, 2)).tolist()
        return row


#: Draws (prompts, seeds, number of steps) and returns images (N, 3, H, W), their scales and the denoiser calls.
Draw = Callable[[Sequence[str], Sequence[int], int], tuple[Tensor, Tensor, float]]


class GuidanceComparison:
    """The setting that all ways to guide share.

    Args:
        scorer: the judge, which no way to guide may use.
        steps: sampling steps; a way that draws n images for one gets 1/n of them.
        seeds: image i of a repetition has seed ``seed + i``.
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
    ) -> None:
        self.adapter, self.scorer, self.prompts = adapter, scorer, list(prompts)
        self.steps, self.seeds, self.batch_size, self.bf16 = steps, list(seeds), batch_size, bf16

    def guided(self, guider: Any) -> Draw:
        """Drawing with a guider, a scale or a table."""

        def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[Tensor, Tensor, float]:
            drawn = sample(
                self.adapter, prompts, num_inference_steps=steps, guidance=guider, seeds=seeds,
                options=SamplingOptions(batch_size=self.batch_size),
            )  # fmt: skip
            return drawn.images, drawn.scales, drawn.nfe

        return draw

    def best_of(self, n: int, scorer: RewardScorer, scale: float) -> Draw:
        """The best of n images of steps / n steps each, by ``scorer``."""

        def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[Tensor, Tensor, float]:
            found = best_of_n(
                self.adapter, prompts, scorer, n, seeds=seeds, num_inference_steps=steps // n, guidance=scale,
                options=SamplingOptions(batch_size=self.batch_size),
            )  # fmt: skip
            return found.images, torch.empty(steps // n, 0), found.nfe

        return draw

    def run(self, draw: Draw) -> GuidanceTrial:
        """Draw every prompt with every seed, and score."""
        outputs: list[RewardOutput] = []
        scales, nfe = [], 0.0
        for seed in self.seeds:
            seeds = [seed + i for i in range(len(self.prompts))]
            with fast_autocast(self.adapter.device, self.bf16):
                images, chosen, nfe = draw(self.prompts, seeds, self.steps)
            outputs.append(score_in_batches(self.scorer, images, self.prompts))
            scales.append(chosen)
        aspects = {name: torch.stack([o.aspects[name] for o in outputs]) for name in outputs[0].aspects}
        return GuidanceTrial(torch.stack([o.reward for o in outputs]), aspects, nfe, torch.stack(scales))


def sweep(comparison: GuidanceComparison, scales: Sequence[float]) -> dict[float, float]:
    """Mean reward of each static scale."""
    return {scale: float(comparison.run(comparison.guided(float(scale))).reward.mean()) for scale in scales}


def usual_ways(static: float) -> dict[str, Any]:
    """What a user would try first, with the best static scale as their (mean) scale."""
    return {
        "interval": ScheduleGuidance(static, sigma_low=0.28, sigma_high=5.42),  # 2404.07724's, for ImageNet
        "linear": ScheduleGuidance(static, "linear"),
        "cosine": ScheduleGuidance(static, "cosine"),
        "APG": AdaptiveProjectedGuidance(guidance_scale=static, eta=0.0),
        "CFG-Zero*": ClassifierFreeZeroStarGuidance(guidance_scale=static),
    }


def compare_guidance(
    comparison: GuidanceComparison,
    static: float,
    dynamic: Mapping[str, DynamicGuidance],
    selector: RewardScorer | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The table, row by row: a way's name, its means, errors, and win rate over static guidance at ``static``.

    Args:
        dynamic: named settings of dynamic guidance; the first one's mean schedule is tried as a fixed one too.
        selector: scorer of the best-of-2 row; None leaves it out.
        usual: named guiders to try besides, e.g. ``usual_ways(static)``.
    """
    base = comparison.run(comparison.guided(static))
    yield f"static {static:g}", base.table_row(base)
    for i, (name, guider) in enumerate(dynamic.items()):
        trial = comparison.run(comparison.guided(guider))
        yield f"dynamic, {name}", trial.table_row(base)
        if i == 0:
            mean = TableGuidance(trial.scales.mean(dim=(0, 2)).tolist())
            yield "mean of the dynamic schedules", comparison.run(comparison.guided(mean)).table_row(base)
    if selector is not None:
        name = f"best of 2, half the steps, by {selector.name}"
        yield name, comparison.run(comparison.best_of(2, selector, static)).table_row(base)
    for name, guider in (usual or {}).items():
        yield name, comparison.run(comparison.guided(guider)).table_row(base)
