"""From a command's options to the model that it draws with."""

from __future__ import annotations

import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.devices import DTYPES
from diffusion_align.training.policy.config import VAEOptions


def open_model(
    model: str,
    device: torch.device,
    lora: str | None,
    coding: VAEOptions,
    dtype: str = "auto",
    config: str | None = None,
) -> Adapter:
    """The model on ``device``, with trained weights if there are any.

    Args:
        coding: how the VAE works.
        dtype: a name of ``DTYPES``; "auto" is fp16 on CUDA, fp32 elsewhere.
        config: for a single file, folder or hub name of the pipeline's configs.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_adapter`` and ``Adapter.load_weights``.
    """
    if dtype == "auto":
        dtype = "fp16" if device.type == "cuda" else "fp32"
    adapter = load_adapter(
        model,
        dtype=DTYPES[dtype],
        device=device,
        config=config,
        vae_batch_size=coding.vae_batch_size,
        vae_tiling=coding.vae_tiling,
    )
    return adapter if lora is None else adapter.load_weights(lora)
