"""The policy: loaded, and made ready to be trained."""

from __future__ import annotations

from collections.abc import Collection

import torch

from diffusion_align.adapters import PARTS, Adapter, Part, load_adapter
from diffusion_align.devices import DTYPES
from diffusion_align.training.engine.sharding import shards

from .config import TrainConfig
from .costs.relief import check_room
from .model_options import ModelOptions


def load_model(
    options: ModelOptions,
    dtype: torch.dtype,
    device: torch.device | str,
    parts: Collection[Part] = PARTS,
    network_dtype: torch.dtype | None = None,
    bf16_instead: bool = False,
) -> Adapter:
    """The model that the options name; every command and method loads it here.

    Args:
        dtype, device, parts, network_dtype, bf16_instead: as in ``load_adapter``.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_adapter``.
    """
    return load_adapter(
        options.model,
        dtype=dtype,
        device=device,
        variant=options.variant,
        revision=options.revision,
        vae=options.vae,
        config=options.model_config,
        family=options.family,
        prediction_type=options.prediction_type,
        vae_batch_size=options.vae_batch_size,
        vae_tiling=options.vae_tiling,
        max_sequence_length=options.max_sequence_length,
        parts=parts,
        network_dtype=network_dtype,
        bf16_instead=bf16_instead,
    )


def load_policy_model(config: TrainConfig, device: torch.device | str, parts: Collection[Part] = PARTS) -> Adapter:
    """The adapter of ``config.model``, with ``init_weights`` merged into it.

    What is trained is read in float32 if all of it is: the files may hold more than ``weight_dtype`` keeps. The
    reference is stored in ``weight_dtype`` (``prepare_policy``).

    Args:
        parts: what is loaded. All is with ``init_weights``, which may belong to any of them.
    """
    place = torch.device(device)
    if place.type == "cuda" and "network" in parts and not shards():  # what is cut over processes needs less on each
        check_room(config, torch.cuda.get_device_properties(place).total_memory)
    dtype = DTYPES[config.weight_dtype]
    adapter = load_model(
        config,
        dtype,
        device,
        PARTS if config.init_weights is not None else parts,
        torch.float32 if config.full_finetuning else dtype,
    )
    if config.init_weights is not None:
        adapter.load_weights(config.init_weights).fold_loras()
    return adapter


def prepare_policy(config: TrainConfig, adapter: Adapter) -> None:
    """Choose what is trained and how the denoiser runs.

    Raises:
        ValueError: kernels or a memory format that the denoiser has not, or modules for a LoRA that it has not.
    """
    adapter.family.check_speed(config.attention, config.channels_last)
    if config.full_finetuning:
        adapter.train_full(reference_dtype=DTYPES[config.weight_dtype])
    else:
        adapter.train_lora(
            config.lora_rank,
            config.lora_alpha,
            None if config.lora_target_modules == TrainConfig.lora_target_modules else config.lora_target_modules,
            config.lora_dropout,
            config.seed,
            config.lora_init,
        )
    if config.channels_last:
        adapter.network.to(memory_format=torch.channels_last)
    adapter.optimize(config.gradient_checkpointing, config.attention, config.torch_compile)
    adapter.code_in_chunks(config.vae_batch_size, config.vae_tiling)
