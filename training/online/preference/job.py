"""Online preference learning, from settings to something the loop can run."""

from __future__ import annotations

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.rewards.watched import load_reward
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.online.job import rollout_job

from .config import OnlineDPOConfig
from .method import OnlineDPOMethod


def online_dpo_job(
    config: OnlineDPOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """A run of ``OnlineDPOMethod``."""
    if scorer is None:
        scorer = load_reward(config.scorers, config.ensemble, accelerator.device, config.standardise)
    return rollout_job(config, accelerator, adapter, scorer, OnlineDPOMethod)
