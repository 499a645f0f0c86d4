"""EditReward's design (2509.26346) on a small backbone: two heads that also say how sure they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffusion_align.rewards.fusion import ASPECTS, Fusion, fuse
from diffusion_align.rewards.preprocess import HALF, Preprocess, in_float32
from diffusion_align.rewards.protocol import RewardOutput

from .scorer import TrainedScorer
from .vp import PictureReader, head


class EditScore(TrainedScorer):
    """Scores an edited picture: ``score(edited, prompts, source_images=..., instructions=...)``.

    Each head gives mean and spread of its aspect's score. Aspects: the two means, and ``..._std``; ``std`` is that of
    the fused reward. Prompts are not used: the instruction says everything.

    Args:
        settings: of :class:`PictureReader`, and "max_tokens", "fusion" ("mean" as published, "min" or "sum").
    """

    kind = "edit"
    name = "edit"
    differentiable = True
    needs = frozenset({"source_images", "instructions"})

    def __init__(self, settings: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self._settings, self.tokenizer = settings, tokenizer
        self.reader = PictureReader(settings, pictures=2)
        self.heads = nn.ModuleDict({aspect: head(self.reader.width, 2) for aspect in ASPECTS})
        self.fusion: Fusion = settings.get("fusion", "mean")
        self.preprocessing = Preprocess(settings["image_size"], "crop", HALF, HALF)

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        tokens = self.tokenizer(
            list(context["instructions"]),
            padding="max_length",
            truncation=True,
            max_length=self._settings["max_tokens"],
            return_tensors="pt",
        ).to(self.device)
        state = self.reader([context["source_images"], images], tokens.input_ids, tokens.attention_mask).float()
        with in_float32(state):
            outputs = {aspect: module(state) for aspect, module in self.heads.items()}
        means = torch.stack([output[:, 0] for output in outputs.values()])
        stds = torch.stack([softplus(output[:, 1]) for output in outputs.values()])
        reward, std = fuse(means, stds, self.fusion)
        aspects = dict(zip(ASPECTS, means, strict=True)) | {
            f"{aspect}_std": value for aspect, value in zip(ASPECTS, stds, strict=True)
        }
        return RewardOutput(reward, aspects, std)

    def settings(self) -> dict[str, Any]:
        return self._settings

    @classmethod
    def build(cls, settings: dict[str, Any], folder: Path) -> Self:
        from transformers import AutoTokenizer

        return cls(settings, AutoTokenizer.from_pretrained(folder))

    def save_extras(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
