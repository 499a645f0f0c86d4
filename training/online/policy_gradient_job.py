"""Policy gradients, from settings to something the loop can run: which update, and which trust in the reward."""

from __future__ import annotations

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.policy.model import load_policy_model

from .config import GRPOConfig, InpaintRLConfig
from .fused_grpo import FusedGRPOMethod
from .grpo import GRPOMethod
from .job import online_job
from .rollout import RolloutEngine
from .trust_statistics import fit_trust


def grpo_job(config: GRPOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None) -> Job:
    """Policy gradient on the sampler's steps."""

    def build(policy: Adapter, reward: RewardScorer) -> GRPOMethod:
        trust = None if config.trust == "none" else fit_trust(config, reward)
        method = FusedGRPOMethod if config.fused_rollouts else GRPOMethod
        return method(config, policy, RolloutEngine(config, policy, accelerator, reward, trust), accelerator)

    return online_job(config, accelerator, adapter, scorer, build)


def inpaint_rl_job(
    config: InpaintRLConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """Policy gradient on an inpainting model.

    Raises:
        ValueError: the model is of another kind.
    """
    if adapter is None:
        adapter = load_policy_model(config, accelerator.device)
    if not adapter.is_inpainting:
        raise ValueError(f"inpaint-rl needs an inpainting model, {config.model} is not: use grpo")
    return grpo_job(config, accelerator, adapter, scorer)
