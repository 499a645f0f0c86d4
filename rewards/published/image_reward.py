"""ImageReward (2304.05977): BLIP's image-grounded text encoder and an affine head, on transformers' BLIP classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffusion_align.rewards.preprocess import Preprocess, in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import find_file, load_exactly, read_weights

from .aesthetic import AffineHead

#: The published standardisation of the head's output.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


class BlipBackbone(nn.Module):
    """A caption read beside its picture: the first token's state of BLIP's text encoder, (B, D)."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Preprocessed images (B, 3, S, S), token ids and mask (B, L) to (B, D)."""
        picture = self.vision(pixel_values=images.to(self.vision.dtype)).last_hidden_state
        seen = torch.ones(picture.shape[:2], dtype=torch.long, device=picture.device)
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=picture,
            encoder_attention_mask=seen,
        ).last_hidden_state
        first: Tensor = states[:, 0]
        return first


def published_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """ViT-L/16 at 224 pixels and BERT-base; transformers' defaults differ in heads and epsilons."""
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    return vision, BlipTextConfig(vocab_size=30524, num_attention_heads=12, encoder_hidden_size=1024)


class ImageReward(RewardScorer):
    """The published scorer: mean 0, standard deviation 1 over its training pictures."""

    name = "image-reward"
    differentiable = True
    statistics = (0.0, 1.0)

    def __init__(self, backbone: BlipBackbone, tokenizer: Any) -> None:
        super().__init__()
        self.backbone, self.tokenizer = backbone, tokenizer
        self.mlp = AffineHead(backbone.text.config.hidden_size)
        self.preprocessing = Preprocess(backbone.vision.config.image_size)

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        state = self.backbone(images, tokens.input_ids, tokens.attention_mask).float()
        with in_float32(state):
            return RewardOutput((self.mlp(state) - MEAN) / STD)


def rename_blip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of ImageReward.pt as :class:`ImageReward` has them; the contrastive projections are dropped."""
    renamed = {}
    for key, value in weights.items():
        if key.startswith(("blip.vision_proj.", "blip.text_proj.")) or key.endswith("position_ids"):
            continue
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION_NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[f"backbone.vision.{name}"] = value
        elif key.startswith("blip.text_encoder."):
            renamed[f"backbone.text.{key.removeprefix('blip.text_encoder.')}"] = value
        else:
            renamed[key] = value
    return renamed


def load_image_reward(
    name: str = "image-reward",
    checkpoint: str | None = None,
    tokenizer: str = "bert-base-uncased",
    configs: tuple[BlipVisionConfig, BlipTextConfig] | None = None,
) -> RewardScorer:
    """ImageReward.pt (``checkpoint``, or from the hub); other ``configs`` are for other sizes of the same layout."""
    from transformers import AutoTokenizer

    path: Path = find_file(checkpoint, "THUDM/ImageReward", "ImageReward.pt")
    scorer = ImageReward(BlipBackbone(*(configs or published_configs())), AutoTokenizer.from_pretrained(tokenizer))
    load_exactly(scorer, rename_blip(read_weights(path)), path)
    return scorer
