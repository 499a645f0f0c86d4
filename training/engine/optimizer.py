"""The optimisers a run can choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Adafactor

from .config import RunConfig


def build_optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Optimiser named by ``config.optim``.

    ``adafactor`` (1804.04235) steps by lr G / sqrt(V), its RMS clipped to lr; V is a running mean of G^2, kept as a row
    and a column. ``adafactor_scaled`` multiplies that by the RMS of each parameter, too.

    Raises:
        ImportError: adamw_8bit without bitsandbytes; the message says how to install it.
    """
    # Adafactor clips its own update, which stands in for beta1 and epsilon.
    if config.optim == "adafactor":
        return Adafactor(
            parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    if config.optim == "adafactor_scaled":
        return torch.optim.Adafactor(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("optim adamw_8bit needs bitsandbytes: pip install 'diffusion-align[bnb]'") from error
    return AdamW8bit(parameters, **settings)
