"""PickScore: CLIP with other weights, in transformers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.protocol import RewardScorer

from .clip import CosineScorer


class PickScorer(CosineScorer):
    """PickScore (2305.01569): transformers' CLIP-H tuned on Pick-a-Pic, exp(logit_scale) * cos; about 21.5 on average.

    Takes what ``get_*_features`` returns in transformers 4 and 5.
    """

    def __init__(self, model: Any, tokenizer: Any, size: int) -> None:
        super().__init__("pickscore", Preprocess(size), scale=float(model.logit_scale.detach().exp()))
        self.model, self.tokenizer = model, tokenizer

    def encode_images(self, values: Tensor) -> Tensor:
        return _projected(self.model.get_image_features(pixel_values=values.to(self.model.dtype)))

    def encode_texts(self, texts: list[str]) -> Tensor:
        # Padded to the full length as in training: attention is causal, so the positions after the text do not matter.
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        return _projected(self.model.get_text_features(input_ids=ids.input_ids.to(self.device)))


def _projected(features: Any) -> Tensor:
    """transformers 4 returns the projected embedding, transformers 5 an output whose pooler_output it is."""
    projected: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return projected


def load_pickscore(
    name: str = "pickscore",
    checkpoint: str = "yuvalkirstain/PickScore_v1",
    tokenizer: str | None = None,
) -> RewardScorer:
    """PickScore from the hub or a local folder in transformers' layout.

    Without ``tokenizer`` it is the checkpoint's, or laion's CLIP-H when the folder has none (the published one).
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"pickscore: {checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from None
    own = (Path(checkpoint) / "tokenizer_config.json").is_file()
    source = tokenizer or (checkpoint if own else "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    return PickScorer(model, AutoTokenizer.from_pretrained(source), model.config.vision_config.image_size)
