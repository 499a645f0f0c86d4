"""From a command's options to the model that it draws with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.devices import DTYPES
from diffusion_align.training.policy.model import load_model
from diffusion_align.training.policy.model_options import ModelOptions


def open_model(options: ModelOptions, device: torch.device, lora: Sequence[str]) -> Adapter:
    """The model on ``device``, with trained weights if there are any; dtype auto is fp16 on CUDA, fp32 elsewhere.

    Args:
        lora: PATH or PATH:WEIGHT of weights, as ``Adapter.load_weights`` takes them.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_adapter`` and ``Adapter.load_weights``.
    """
    name = options.dtype
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return load_model(options, DTYPES[name], device).load_weights(*lora)
