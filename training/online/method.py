"""Which online method settings ask for, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.rewards.watched import load_reward
from diffusion_align.training.engine.protocols import Method

from .config import DRaFTConfig, GRPOConfig, InpaintRLConfig, NFTConfig, OnlineConfig, RAFTConfig, RolloutConfig
from .draft import DRaFTMethod
from .fused_grpo import FusedGRPOMethod, check_fused
from .grpo import GRPOMethod
from .nft import NFTMethod
from .raft import RAFTMethod
from .rollout import RolloutEngine
from .trust_statistics import fit_trust


def online_method(
    config: OnlineConfig, adapter: Adapter, accelerator: Accelerator, scorer: RewardScorer | None = None
) -> Method:
    """The method that ``config`` describes.

    Args:
        scorer: the reward; None loads ``config.scorers``.

    Raises:
        ValueError: settings that do not fit the model, the scorer or each other.
    """
    if isinstance(config, InpaintRLConfig) and not adapter.is_inpainting:
        raise ValueError(f"inpaint-rl needs an inpainting model, {config.model} is not: use grpo")
    if isinstance(config, RolloutConfig):
        check_rollout(config)
    if scorer is None:
        scorer = load_reward(config.scorers, config.ensemble, accelerator.device)
    if isinstance(config, DRaFTConfig):
        return DRaFTMethod(config, adapter, accelerator, scorer)
    assert isinstance(config, RolloutConfig)
    engine = RolloutEngine(config, adapter, accelerator, scorer)
    if isinstance(config, GRPOConfig) and config.trust != "none":
        engine.trust = fit_trust(config, engine.scorer)
    if isinstance(config, GRPOConfig) and config.fused_rollouts:
        return FusedGRPOMethod(config, adapter, engine, accelerator)
    return METHODS[type(config)](config, adapter, engine, accelerator)


METHODS: Mapping[type[RolloutConfig], Callable[[Any, Adapter, RolloutEngine, Accelerator], Method]] = MappingProxyType(
    {GRPOConfig: GRPOMethod, InpaintRLConfig: GRPOMethod, NFTConfig: NFTMethod, RAFTConfig: RAFTMethod}
)


def items_per_rollout(config: RolloutConfig) -> int:
    """Training items of one process' rollout: pictures that are kept, times steps or noise levels of each."""
    if isinstance(config, GRPOConfig):
        return config.prompts_per_rollout * config.num_generations * config.train_steps
    if isinstance(config, RAFTConfig):
        return config.prompts_per_rollout * config.keep * config.updates_per_picture
    assert isinstance(config, NFTConfig)
    return config.prompts_per_rollout * config.num_generations * config.updates_per_picture


def check_rollout(config: RolloutConfig) -> None:
    """Rollouts must be whole numbers of optimiser steps: an update never mixes two of them.

    Raises:
        ValueError: they are not; or a group of one, which has nothing to be compared with.
    """
    if config.num_generations < 2 and config.advantage_scale != "none":
        raise ValueError("num_generations = 1: pictures of a prompt are compared with each other, expected at least 2")
    items = items_per_rollout(config)
    if isinstance(config, GRPOConfig) and config.fused_rollouts:
        check_fused(config, items)
        return
    used = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if items % used:
        raise ValueError(
            f"a rollout has {items} training items, an optimiser step takes {used} (per_device_train_batch_size x "
            "gradient_accumulation_steps): the first must be a multiple of the second"
        )
