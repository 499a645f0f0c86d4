"""The policy: loaded, and made ready to be trained."""

from __future__ import annotations

import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.devices import DTYPES

from .config import TrainConfig


def load_policy_model(config: TrainConfig, device: torch.device | str) -> Adapter:
    """The adapter of ``config.model``, with ``init_weights`` merged into it."""
    adapter = load_adapter(
        config.model,
        dtype=DTYPES[config.weight_dtype],
        device=device,
        variant=config.variant,
        vae=config.vae,
        config=config.model_config,
        vae_batch_size=config.vae_batch_size,
        vae_tiling=config.vae_tiling,
    )
    if config.init_weights is not None:
        adapter.load_weights(config.init_weights)
        if adapter.pipeline.get_active_adapters():
            adapter.pipeline.fuse_lora()
            adapter.pipeline.unload_lora_weights()
    return adapter


def prepare_policy(config: TrainConfig, adapter: Adapter) -> None:
    """Choose what is trained and how the UNet runs."""
    if config.full_finetuning:
        adapter.train_full(reference_dtype=DTYPES[config.weight_dtype])
    else:
        adapter.train_lora(
            config.lora_rank, config.lora_alpha, config.lora_target_modules, config.lora_dropout, config.seed
        )
    if config.channels_last:
        adapter.network.to(memory_format=torch.channels_last)
    adapter.optimize(config.gradient_checkpointing, config.attention, config.torch_compile)
    adapter.code_in_chunks(config.vae_batch_size, config.vae_tiling)
