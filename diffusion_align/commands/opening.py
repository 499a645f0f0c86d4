"""From a command's options to the model that it draws with."""

from __future__ import annotations

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.devices import DTYPES
from diffusion_align.training.policy.model import load_model

from .options import DrawingOptions


def open_model(options: DrawingOptions, device: torch.device) -> Adapter:
    """The model on ``device``, with trained weights if there are any; dtype auto is fp16 on CUDA, fp32 elsewhere.

    Raises:
        ValueError, FileNotFoundError, OSError: as ``load_adapter`` and ``Adapter.load_weights``.
    """
    name = options.dtype
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return load_model(options, DTYPES[name], device).load_weights(*options.lora)
