"""Reward gradients, from settings to something the loop can run."""

from __future__ import annotations

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.protocols import Job

from ..job import online_job
from .config import DRaFTConfig
from .direct_align import DirectAlignMethod
from .draft import DRaFTMethod


def draft_job(
    config: DRaFTConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """A run of ``DRaFTMethod``, or with ``direct_align`` of its sister."""
    method = DirectAlignMethod if config.direct_align else DRaFTMethod

    def build(policy: Adapter, reward: RewardScorer) -> DRaFTMethod:
        return method(config, policy, accelerator, reward)

    return online_job(config, accelerator, adapter, scorer, build)
