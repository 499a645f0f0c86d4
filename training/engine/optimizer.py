"""The optimisers a run can choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import RunConfig


def build_optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Optimiser named by ``config.optim``.

    Raises:
        ImportError: adamw_8bit without bitsandbytes; the message says how to install it.
    """
    if config.optim == "adafactor":
        # Adafactor's relative update clipping stands in for beta1 and epsilon.
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
