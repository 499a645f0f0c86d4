"""Runs of every online method that last seconds, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.sampling.sampler import generate
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.online.config import GRPOConfig, NFTConfig, OnlineConfig, RAFTConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.run import train
from tests.brightness import Brightness

PROMPTS = ("a red circle", "two blue squares", "a green star", "a yellow triangle")
ROLLOUTS: dict[str, Any] = {"num_generations": 2, "prompts_per_rollout": 2, "rollout_batch_size": 3}
METHODS: dict[str, tuple[type[OnlineConfig], dict[str, Any]]] = {
    "grpo": (GRPOConfig, {**ROLLOUTS, "train_steps": 2, "kl_beta": 0.1, "kl_target": 0.01}),
    "window": (GRPOConfig, {**ROLLOUTS, "train_steps": 2, "stochastic_steps": "window", "num_iterations": 2}),
    "history": (
        GRPOConfig,
        {
            **ROLLOUTS,
            "train_steps": 2,
            "advantage_baseline": "history",
            "advantage_scale": "group",
            "history_min_count": 3,
            "loss_reduction": "sum",
        },
    ),
    "nft": (NFTConfig, {**ROLLOUTS, "kl_beta": 0.1}),
    "nft-x0": (NFTConfig, {**ROLLOUTS, "kl_beta": 0.1, "space": "x0"}),
    "raft": (RAFTConfig, {**ROLLOUTS, "updates_per_picture": 4, "kl_beta": 0.1}),
    "draft": (DRaFTConfig, {"kl_beta": 0.1, "gradient_steps": 2}),
    "draft-lv": (DRaFTConfig, {"lv_repeats": 2, "kl_beta": 0.1}),
    "refl": (DRaFTConfig, {"random_last_step": True, "reward_loss": "hinge"}),
}


def build(name: str, settings: dict[str, Any], **changes: Any) -> OnlineConfig:
    cls, own = METHODS[name]
    return cls(**{**settings, **own, **changes})


def trained(config: OnlineConfig, adapter: Adapter | None = None, scorer: RewardScorer | None = None) -> TrainResult:
    """A run whose reward is the brightness, or another scorer."""
    return train(config, adapter, Brightness() if scorer is None else scorer)


def brightness_gained(config: OnlineConfig) -> float:
    """By how much pictures are brighter after a run than those of its base."""
    adapter = load_adapter(config.model)
    trained(config, adapter)

    def brightness() -> float:
        images = generate(adapter, PROMPTS * 2, seeds=range(8), num_inference_steps=4, guidance_scale=1.0)
        return float(images.mean())

    with adapter.reference():
        before = brightness()
    return brightness() - before


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


@torch.no_grad()
def new_and_old(method: Any, batch: Any, noisy: Any) -> tuple[Tensor, Tensor]:
    """NFT's outputs (B, C, h, w) for a re-noised batch: the policy's, and those of the one that drew, which differ."""
    conditions = method.policy.conditions(batch.rollout.prompts, None)
    new = method.policy.predict(noisy.x_t, noisy.t, conditions).output
    with method.old.in_place():
        old = method.policy.predict(noisy.x_t, noisy.t, conditions).output
    assert (new - old).abs().max() > 1e-3
    return new, old
