"""Policy against base: the same prompts, the same seeds, one scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.holes import Holes
from diffusion_align.devices import fast_autocast
from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.rewards.context import score_with_context
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.named import named_scheduler
from diffusion_align.sampling.sampler import sample

from .stats import WinRate, win_rate


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn for a comparison; image i has seed ``seed + i``."""

    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 1234
    batch_size: int = 32
    bf16: bool = True
    """Autocast to bfloat16 where the device computes it: half the time, and the same for both sides of a comparison."""
    scheduler: str = "default"
    """A name of ``sampling.named.SCHEDULERS``; default is the pipeline's own."""

    def to_json(self) -> dict[str, Any]:
        """All settings; without a scheduler where it is the pipeline's own."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("scheduler", "default")}


@dataclass(frozen=True)
class Sampled:
    """Images (N, 3, H, W) in [0, 1] and, if there was a scorer, their rewards (N,)."""

    images: Tensor
    reward: RewardOutput | None


@torch.no_grad()
def sample_and_score(
    adapter: Adapter,
    prompts: Sequence[str],
    scorer: RewardScorer | None,
    settings: SamplingSettings,
    holes: Holes | None = None,
) -> Sampled:
    """Draw one image per prompt with the adapter's current policy and score it.

    Wrap the call in ``with adapter.reference()`` for the base model.

    Args:
        holes: for inpainting models, as many as prompts; outside the holes images are the given pictures, to the bit.
    """
    with fast_autocast(adapter.device, settings.bf16):
        images = sample(
            adapter,
            list(prompts),
            num_inference_steps=settings.num_inference_steps,
            guidance=settings.guidance_scale,
            seeds=[settings.seed + i for i in range(len(prompts))],
            scheduler=named_scheduler(adapter, settings.scheduler),
            inpaint=None if holes is None else holes.encode(adapter, settings.batch_size).cpu(),
            options=SamplingOptions(batch_size=settings.batch_size),
        ).images
    if holes is not None:
        images = holes.composite(images)
    return Sampled(images, None if scorer is None else score_with_context(scorer, images, prompts, holes))


def compare(policy: Sampled, base: Sampled) -> WinRate:
    """Win rate of ``policy`` over ``base`` by their rewards, ties counted half.

    Raises:
        ValueError: one of them was not scored.
    """
    if policy.reward is None or base.reward is None:
        raise ValueError("both sides need rewards: give sample_and_score a scorer")
    return win_rate(policy.reward.reward.tolist(), base.reward.reward.tolist())
