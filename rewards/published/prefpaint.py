"""PrefPaint's inpainting reward (2410.21966): CLIP embeddings of the inpainted and the masked picture, fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.rewards.preprocess import Preprocess, in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import find_file, load_exactly, read_weights

from .clip import build_open_clip

#: The published standardisation of its score.
MEAN, STD = 0.4064, 2.3021


class PrefPaintHead(nn.Module):
    """Both embeddings (B, 2D) to features (B, 256) and scores (B, outputs); the published head has one output.

    The encoder layer sees a sequence of one token, so its attention is an affine map; the MLP has no activations.
    """

    def __init__(self, width: int, heads: int = 16, feedforward: int = 1024, outputs: int = 1) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.1, batch_first=True)
        self.features = nn.Sequential(nn.Linear(width, 512), nn.Dropout(0.2), nn.Linear(512, 256))
        self.last = nn.Linear(256, outputs, bias=False)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.encoder(embeddings.unsqueeze(1)).squeeze(1))
        return features, self.last(features)


class PrefPaintScorer(RewardScorer):
    """Scores an inpainted picture beside what was left of the original; prompts are not used.

    ``score(images, prompts, source_images=..., masks=...)``; masks are 1 where the picture was inpainted.

    ``features`` (B, 256) are what the trust weight of PrefPaint's reinforcement learning is computed from.
    """

    name = "prefpaint"
    differentiable = True
    needs = frozenset({"source_images", "masks"})
    statistics = (0.0, 1.0)

    def __init__(self, clip: nn.Module, head: PrefPaintHead, preprocessing: Preprocess) -> None:
        super().__init__()
        self.clip, self.head, self.preprocessing = clip, head, preprocessing

    def preprocess(self, images: Tensor) -> Tensor:
        return images.float()  # the hole is cut at full size, before anything is resized

    def features(self, images: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features (B, 256) and the head's scores (B, outputs)."""
        masks = context["masks"].to(images)
        if masks.shape != (len(images), 1, *images.shape[-2:]):
            raise ValueError(
                f"scorer {self.name}: expected masks of shape {(len(images), 1, *images.shape[-2:])}, "
                f"found {tuple(masks.shape)}"
            )
        masked = context["source_images"] * (masks < 0.5)
        dtype = next(self.clip.parameters()).dtype
        pictures = self.preprocessing(torch.cat([images, masked])).to(dtype)
        inpainted, left = self.clip.encode_image(pictures).float().chunk(2)  # type: ignore[operator]
        with in_float32(inpainted):
            features, scores = self.head(torch.cat([inpainted, left], dim=-1))
        return features, scores

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        features, scores = self.features(images, context)
        return RewardOutput((scores[:, 0] - MEAN) / STD, features=features)


def rename_prefpaint(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the published checkpoint as :class:`PrefPaintScorer` has them.

    ``vit_block.encoder_layer`` is the untrained original of which the encoder holds a copy, ``mlp.last_layer_weight``
    a second name of the last layer.
    """
    prefixes = {
        "clip_model.": "clip.",
        "vit_block.transformer_encoder.layers.0.": "head.encoder.",
        "mlp.layers.": "head.features.",
        "mlp.last_layer.": "head.last.",
    }
    renamed = {}
    for key, value in weights.items():
        if key.startswith("vit_block.encoder_layer.") or key == "mlp.last_layer_weight":
            continue
        for old, new in prefixes.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = value.float() if value.is_floating_point() else value
    # OpenAI's scripted models carry these as buffers.
    return {
        k: v for k, v in renamed.items() if k not in ("clip.input_resolution", "clip.context_length", "clip.vocab_size")
    }


def load_prefpaint(
    name: str = "prefpaint", checkpoint: str | None = None, model: str = "ViT-B-32-quickgelu", heads: int = 16
) -> RewardScorer:
    """The published reward (``checkpoint``, or from the hub)."""
    path = find_file(checkpoint, "kd5678/prefpaintReward", "prefpaintReward.pt")
    clip, _, preprocessing = build_open_clip(model)
    width = 2 * int(clip.visual.output_dim)  # type: ignore[union-attr, arg-type]
    scorer = PrefPaintScorer(clip, PrefPaintHead(width, heads), preprocessing)
    load_exactly(scorer, rename_prefpaint(read_weights(path)), path)
    return scorer
