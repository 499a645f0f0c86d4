"""Rewards on Qwen-VL: HPSv3 (2508.03789) and EditReward (2509.26346), one class with one or two uncertainty heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from diffusion_align.rewards.fusion import ASPECTS, Fusion
from diffusion_align.rewards.preprocess import in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import load_exactly, read_weights

REWARD_TOKEN = "<|Reward|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
#: Qwen's chat format around one user message.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
#: 256 patches of 28 x 28 pixels, whatever the picture's size.
PIXELS = 256 * 28 * 28


def rank_head(width: int) -> nn.Sequential:
    """Hidden state to mean and log-deviation of the score; weights at 0, 3 and 5, as published."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class QwenReward(RewardScorer):
    """Reads (before,) picture and instruction, and scores at the token ``<|Reward|>``.

    One head for HPSv3; two for EditReward (instruction following, visual quality), each with an instruction and a pass
    of its own. ``reward`` is the (fused) mean, ``std`` the (fused) deviation, see :func:`fuse_outputs`. The language
    model's positions count tokens, as in the official forward passes: it is not told of the pictures' rows and columns.

    Args:
        backbone: transformers' Qwen2VLModel or Qwen2_5_VLModel.
        templates: one per head: the instruction the weights were trained with, holding ``{text_prompt}`` and
            ``<|Reward|>``.
        edits: whether there is a picture before (``source_images``), and the text is the edit's instruction.
    """

    def __init__(
        self,
        name: str,
        backbone: Any,
        tokenizer: Any,
        image_processor: Any,
        templates: Sequence[str],
        edits: bool,
        fusion: Fusion = "mean",
    ) -> None:
        super().__init__()
        self.name, self.backbone, self.tokenizer, self.image_processor = name, backbone, tokenizer, image_processor
        self.templates, self.edits, self.fusion = list(templates), edits, fusion
        self.needs = frozenset({"source_images", "instructions"}) if edits else frozenset()
        width = backbone.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({f"head_{i}": rank_head(width) for i in range(len(self.templates))})
        for template in self.templates:
            if template.count(REWARD_TOKEN) != 1 or "{text_prompt}" not in template:
                raise ValueError(f"scorer {name}: a template must hold {{text_prompt}} and {REWARD_TOKEN} once")

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        texts = list(context["instructions"]) if self.edits else prompts
        pictures = [[image] for image in images]
        if self.edits:
            pictures = [[source, image] for source, image in zip(context["source_images"], images, strict=True)]
        found = []
        for template, head in zip(self.templates, self.heads.values(), strict=True):
            state = self.read(pictures, [template.replace("{text_prompt}", text) for text in texts]).float()
            with in_float32(state):
                found.append(head(state))
        outputs = torch.stack(found)
        reward, log_std = fuse_outputs(outputs, self.fusion).unbind(dim=-1)
        aspects = dict(zip(ASPECTS, outputs[..., 0], strict=True)) if self.edits else {}
        return RewardOutput(reward, aspects, log_std.exp())

    def read(self, pictures: Sequence[Sequence[Tensor]], texts: Sequence[str]) -> Tensor:
        """Hidden states (B, D) at the reward token, for lists of pictures (3, H, W) in [0, 1] and user texts."""
        flat = [to_pil_image(picture.clamp(0, 1).cpu()) for group in pictures for picture in group]
        seen = self.image_processor(images=flat, min_pixels=PIXELS, max_pixels=PIXELS, return_tensors="pt")
        grids = seen["image_grid_thw"]
        merged = (grids.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        messages, used = [], 0
        for group, text in zip(pictures, texts, strict=True):
            counts = merged[used : used + len(group)]
            used += len(group)
            blocks = "".join(IMAGE.replace("<|image_pad|>", "<|image_pad|>" * int(count)) for count in counts)
            messages.append(CHAT.format(content=blocks + text))
        tokens = self.tokenizer(messages, padding=True, return_tensors="pt", padding_side="right")
        ids = tokens.input_ids.to(self.device)
        # The authors give the language model no grids, in training neither: its positions just count tokens.
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=tokens.attention_mask.to(self.device),
            position_ids=positions,
            pixel_values=seen["pixel_values"].to(self.device, self.backbone.dtype),
            image_grid_thw=grids.to(self.device),
            use_cache=False,
        ).last_hidden_state
        states: Tensor = hidden[ids == self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)]
        return states


def fuse_outputs(outputs: Tensor, how: Fusion) -> Tensor:
    """Outputs (H, B, 2) of the heads, mean and log-deviation, as one (B, 2), the way EditReward's code merges them.

    "mean" and "min" take mean or least of each number by itself, "sum" adds the means and the variances.
    """
    if how == "min":
        return outputs.amin(dim=0)
    if how == "mean":
        return outputs.mean(dim=0)
    means, log_stds = outputs.unbind(dim=-1)
    return torch.stack([means.sum(dim=0), torch.logsumexp(2 * log_stds, dim=0) / 2], dim=-1)


def rename_qwen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the published checkpoints (transformers before 4.52, or after) as :class:`QwenReward` has them."""
    rules = (
        (r"^(model\.)?visual\.", "backbone.visual."),
        (r"^model\.language_model\.", "backbone.language_model."),
        (r"^model\.", "backbone.language_model."),
        (r"^rm_heads\.", "heads."),
        (r"^rm_head\.", "heads.head_0."),
    )
    renamed = {}
    for key, value in weights.items():
        if key.startswith("lm_head."):
            continue
        for pattern, replacement in rules:
            if re.match(pattern, key):
                key = re.sub(pattern, replacement, key)
                break
        renamed[key] = value.float() if key.startswith("heads.") else value
    return renamed


def load_qwen(
    name: str,
    checkpoint: str | None = None,
    base: str | None = None,
    templates: Sequence[str] = (),
    fusion: Fusion = "mean",
) -> RewardScorer:
    """HPSv3 ("hps-v3") or EditReward ("edit-reward").

    Args:
        checkpoint: folder with the weights (*.safetensors), downloaded from MizzenAI/HPSv3 or TIGER-Lab/EditReward-*.
        base: folder or hub name with the base model's config, tokenizer and image processor; unset takes
            Qwen/Qwen2-VL-7B-Instruct (HPSv3) or the checkpoint's folder (EditReward).
        templates: text files, one per head, with the instructions the weights were trained with. They are their
            authors' texts (``INSTRUCTION`` in the official hpsv3/dataset, ``INSTRUCTION_EDIT_FOLLOWING`` and
            ``INSTRUCTION_EDIT_QUALITY`` in EditReward/dataset, each followed by the line with ``<|Reward|>``) and do
            not come with this package.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    edits = name == "edit-reward"
    wanted = 2 if edits else 1
    if len(templates) != wanted:
        raise ValueError(
            f"scorer {name} needs templates, {wanted} text file(s) with the instructions its weights were trained "
            f"with; found {len(templates)}"
        )
    source = "TIGER-Lab/EditReward-Qwen2.5-VL-7B" if edits else "MizzenAI/HPSv3"
    files = sorted(Path(checkpoint).glob("*.safetensors")) if checkpoint is not None else []
    if not files:
        raise FileNotFoundError(
            f"checkpoint {checkpoint}: no .safetensors files: download {source} ('hf download {source}') and give "
            "its folder"
        )
    base = base or (str(checkpoint) if edits else "Qwen/Qwen2-VL-7B-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_weights(file)
    weights = rename_qwen(weights)
    embedding = weights.get("backbone.language_model.embed_tokens.weight")
    config = AutoConfig.from_pretrained(base)
    if embedding is not None:  # resized for the reward token
        config.get_text_config().vocab_size = len(embedding)
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are no weights
        backbone = AutoModel.from_config(config)
        texts = [Path(file).read_text() for file in templates]
        scorer = QwenReward(name, backbone, tokenizer, AutoImageProcessor.from_pretrained(base), texts, edits, fusion)
    load_exactly(scorer, weights, str(checkpoint))
    return scorer
