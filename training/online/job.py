"""Online methods, from settings to something the loop can run."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.policy.model import load_policy_model, prepare_policy
from diffusion_align.training.policy.validation import build_validator

from .config import OnlineConfig
from .method import online_method


def online_job(
    config: RunConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """A method that learns from its own pictures."""
    assert isinstance(config, OnlineConfig)
    if adapter is None:
        adapter = load_policy_model(config, accelerator.device)
    prepare_policy(config, adapter)
    method = online_method(config, adapter, accelerator, scorer)
    validate = build_validator(config, adapter, Path(config.output_dir)) if config.eval_steps else None
    return Job(adapter, method, validate)
