"""Shapes of the small readers that training builds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SMALL_TEXT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}


#: Readers by ``RewardConfig.architecture``.
READERS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "small": {
            "vision_type": "resnet",
            "vision": {
                "embedding_size": 48,
                "hidden_sizes": [48, 128],
                "depths": [2, 2],
                "layer_type": "basic",
                "downsample_in_first_stage": False,
            },
            "text": SMALL_TEXT,
            "image_size": 64,
            "max_tokens": 24,
        },
        "objects": {
            "vision_type": "objects",
            "vision": {"hidden_sizes": [32, 64, 128], "kinds": [6, 7, 2], "objects": 6},
            # BERT's 0.02 is for 768 channels: with 128 attention stays uniform, and little is learnt for long.
            "text": {**SMALL_TEXT, "initializer_range": 0.09},
            "image_size": 64,
            "max_tokens": 24,
        },
        "image-reward": {
            "vision_type": "blip",
            "vision": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 16,
                "layer_norm_eps": 1e-6,
            },
            "text": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
            "image_size": 224,
            "max_tokens": 35,
        },
    }
)


def reader_settings(architecture: str, tokenizer: Any) -> dict[str, Any]:
    """Settings of a :class:`~diffusion_align.rewards.trained.vp.PictureReader`."""
    if architecture not in READERS:
        raise ValueError(f"architecture = {architecture!r}: expected one of {', '.join(READERS)}")
    settings = json.loads(json.dumps(READERS[architecture]))
    settings["text"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": max(64, settings["max_tokens"])}
    return dict(settings)
