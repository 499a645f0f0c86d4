"""What tests of rewards on Qwen-VL share: special tokens, random heads, and the published layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def published(backbone: Any, heads: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The checkpoint as it is on the hub: the keys of transformers before 4.52, an lm_head, the reward heads."""
    weights = {"lm_head.weight": torch.zeros(4, 32)}
    for key, value in backbone.state_dict().items():
        old = key.replace("language_model.", "model.") if key.startswith("language_model.") else key
        weights[old] = value.clone()
    for prefix, head in heads.items():
        weights |= {f"{prefix}.{key}": value for key, value in head.items()}
    return weights


def random_head(seed: int) -> dict[str, Tensor]:
    """A reward head of width 32."""
    return random_layers({"0": (1024, 32), "3": (16, 1024), "5": (2, 16)}, seed)


def random_layers(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Linear layers by their names, outputs first."""
    rng = torch.Generator().manual_seed(seed)
    layers = {
        f"{place}.weight": torch.randn(*shape, generator=rng) / shape[1] ** 0.5 for place, shape in shapes.items()
    }
    return layers | {f"{place}.bias": torch.randn(shape[0], generator=rng) for place, shape in shapes.items()}


def head_by_hand(head: dict[str, Tensor], state: Tensor) -> Tensor:
    """Mean and log-deviation (B, 2) of states (B, 32)."""
    state = linear(state, head["0.weight"], head["0.bias"]).relu()
    state = linear(state, head["3.weight"], head["3.bias"]).relu()
    return linear(state, head["5.weight"], head["5.bias"])
