"""Rewards on Qwen-VL with uncertainty heads: HPSv3 (2508.03789), HPSv3++ (2606.14657), EditReward (2509.26346)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffusion_align.rewards.fusion import ASPECTS, Fusion
from diffusion_align.rewards.preprocess import in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import find_file, find_folder, load_exactly, read_weights

from .qwen_reading import COUNTED, TWICE, WHOLE, Reading, row_positions

REWARD_TOKEN = "<|Reward|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def rank_head(width: int) -> nn.Sequential:
    """Hidden state to mean and log-deviation of the score; weights at 0, 3 and 5, as published."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class CapabilityEncoder(nn.Module):
    """HPSv3++'s guess, from a picture's state, of how able the model is that drew it.

    The published layer also pools the states of several pictures; of one picture nothing is left to weigh, so that
    ``pool_attn`` has no effect.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj, self.pool_attn, self.out_proj = nn.Linear(width, inner), nn.Linear(inner, 1), nn.Linear(inner, 1)

    def forward(self, state: Tensor) -> Tensor:
        """(B, width) to (B,) in [0, 1]."""
        found: Tensor = self.out_proj(self.proj(state)).sigmoid().squeeze(-1)
        return found


class ConditionedHead(nn.Module):
    """HPSv3++'s head (2606.14657): :func:`rank_head` of h (1 + gamma) + beta, where gamma and beta depend on the
    guessed capability and on the progress of an RL run.

    Args:
        progress: 0 before any RL, 1 after a thousand steps.
        inner: width of the condition.

    Raises:
        ValueError: ``progress`` is outside [0, 1].
    """

    def __init__(self, width: int, progress: float = 0.0, inner: int = 256) -> None:
        super().__init__()
        if not 0 <= progress <= 1:
            raise ValueError(f"progress {progress:g}: expected 0 (before RL) to 1")
        self.progress = progress
        self.score = rank_head(width)
        self.cap_encoder = CapabilityEncoder(width, inner)
        self.cond_encoder = nn.Sequential(nn.Linear(2, inner), nn.GELU(), nn.Linear(inner, inner))
        self.film_gen = nn.Sequential(nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, 2 * width))

    def forward(self, state: Tensor) -> Tensor:
        """(B, width) to mean and log-deviation (B, 2)."""
        capability = self.cap_encoder(state)
        condition = torch.stack([capability, torch.full_like(capability, self.progress)], dim=-1)
        gamma, beta = self.film_gen(self.cond_encoder(condition)).chunk(2, dim=-1)
        found: Tensor = self.score(state * (1 + gamma) + beta)
        return found


class QwenReward(RewardScorer):
    """Reads (before,) picture and instruction, and scores at the token ``<|Reward|>``.

    One head for HPSv3; two for EditReward (instruction following, visual quality), each with an instruction and a pass
    of its own. ``reward`` is the (fused) mean, ``std`` the (fused) deviation, see :func:`fuse_outputs`.

    Args:
        backbone: transformers' Qwen2VLModel, Qwen2_5_VLModel or Qwen3VLModel.
        templates: one per head: the instruction the weights were trained with, holding ``{text_prompt}`` and
            ``<|Reward|>``.
        edits: whether there is a picture before (``source_images``), and the text is the edit's instruction.
        head: makes a head for states of a width: (B, width) to mean and log-deviation (B, 2).
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
        reading: Reading = COUNTED,
        head: Callable[[int], nn.Module] = rank_head,
    ) -> None:
        super().__init__()
        self.name, self.backbone, self.tokenizer, self.image_processor = name, backbone, tokenizer, image_processor
        self.templates, self.edits, self.fusion, self.reading = list(templates), edits, fusion, reading
        self.needs = frozenset({"source_images", "instructions"}) if edits else frozenset()
        width = backbone.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({f"head_{i}": head(width) for i in range(len(self.templates))})
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
        flat = [self.reading.resize(picture) for group in pictures for picture in group]
        seen = self.image_processor(images=flat, **self.reading.limits, return_tensors="pt")
        grids = seen["image_grid_thw"]
        merged = (grids.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        messages, used = [], 0
        for group, text in zip(pictures, texts, strict=True):
            counts = merged[used : used + len(group)]
            used += len(group)
            blocks = "".join(IMAGE.replace("<|image_pad|>", "<|image_pad|>" * int(count)) for count in counts)
            messages.append(self.reading.chat.replace("{content}", blocks + text))
        tokens = self.tokenizer(messages, padding=True, return_tensors="pt", padding_side="right")
        ids = tokens.input_ids.to(self.device)
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        if self.reading.by_rows:
            image = tokens.input_ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            sides = (grids[:, 1:] // self.image_processor.merge_size).tolist()
            positions = row_positions(image, sides)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=tokens.attention_mask.to(self.device),
            position_ids=positions.to(self.device),
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


def rename_qwen(weights: Mapping[str, Tensor], inside: str = "") -> dict[str, Tensor]:
    """Keys of the published checkpoints (transformers before 4.52, or after) as :class:`QwenReward` has them.

    Args:
        inside: where a single head's own layers are within it.
    """
    rules = (
        (r"^(model\.)?visual\.", "backbone.visual."),
        (r"^model\.language_model\.", "backbone.language_model."),
        (r"^model\.", "backbone.language_model."),
        (r"^rm_heads\.", "heads."),
        (r"^rm_head\.", f"heads.head_0.{inside}"),
        (r"^(cond_encoder|film_gen|cap_encoder)\.", r"heads.head_0.\1."),
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


@dataclass(frozen=True)
class Published:
    """Where a reward's weights are, and what they are weights of.

    Attributes:
        base: what has the configuration, the tokenizer and the image processor; None: the weights' own folder.
        file: the weights in ``source``; None: all its *.safetensors.
    """

    source: str
    base: str | None
    templates: int
    file: str | None = None


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "hps-v3": Published("MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct", 1),
        "hps-v3++": Published("Junjun2333/HPSv3-PlusPlus", "Qwen/Qwen3-VL-8B-Instruct", 1, "hpsv3++.pth"),
        "edit-reward": Published("TIGER-Lab/EditReward-Qwen2.5-VL-7B", None, 2),
    }
)


def load_qwen(
    name: str,
    checkpoint: str | None = None,
    base: str | None = None,
    templates: Sequence[str] = (),
    fusion: Fusion = "mean",
) -> RewardScorer:
    """HPSv3 ("hps-v3") or EditReward ("edit-reward"), the latter also on Qwen3-VL: the base's configuration says which.

    Args:
        checkpoint: folder with the weights (*.safetensors), downloaded from MizzenAI/HPSv3 or TIGER-Lab/EditReward-*;
            unset takes them from the hub.
        base: folder or hub name with the base model's config, tokenizer and image processor; unset takes
            Qwen/Qwen2-VL-7B-Instruct (HPSv3) or the checkpoint's folder (EditReward).
        templates: text files, one per head, with the instructions the weights were trained with. They are their
            authors' texts (``INSTRUCTION`` in the official hpsv3/dataset, ``INSTRUCTION_EDIT_FOLLOWING`` and
            ``INSTRUCTION_EDIT_QUALITY`` in EditReward/dataset, each followed by the line with ``<|Reward|>``) and do
            not come with this package.
    """
    check_templates(name, templates)
    folder = find_folder(checkpoint, PUBLISHED[name].source)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= read_weights(file)
    return build_qwen(name, weights, folder, base or PUBLISHED[name].base or str(folder), templates, fusion=fusion)


def load_hps_v3_plus(
    name: str = "hps-v3++",
    checkpoint: str | None = None,
    base: str | None = None,
    templates: Sequence[str] = (),
    progress: float = 0.0,
    condition_width: int = 256,
) -> RewardScorer:
    """HPSv3++, on Qwen3-VL.

    Each picture's capability is guessed from that picture alone, so that its score does not depend on its neighbours in
    a batch; the authors' code pools a batch of several.

    Args:
        checkpoint: hpsv3++.pth, or a folder that holds it.
        base: as in :func:`load_qwen`; unset takes Qwen/Qwen3-VL-8B-Instruct.
        templates: one text file, as in :func:`load_qwen` (``INSTRUCTION`` in the official hpsv3/dataset).
        progress: see :class:`ConditionedHead`; the authors raise it from 0.3 to 1 in the course of an RL run.
        condition_width: ``cond_dim`` of its configuration.
    """
    check_templates(name, templates)
    known = PUBLISHED[name]
    path = find_file(checkpoint, known.source, str(known.file))
    head = partial(ConditionedHead, progress=progress, inner=condition_width)
    return build_qwen(name, read_weights(path), path, base or str(known.base), templates, reading=TWICE, head=head)


def check_templates(name: str, files: Sequence[str]) -> None:
    """Raises ``ValueError``: there are not as many templates as the scorer has heads."""
    wanted = PUBLISHED[name].templates
    if len(files) != wanted:
        raise ValueError(
            f"scorer {name} needs templates, {wanted} text file(s) with the instructions its weights were trained "
            f"with; found {len(files)}"
        )


def build_qwen(
    name: str,
    published: Mapping[str, Tensor],
    source: Path,
    base: str,
    templates: Sequence[str],
    fusion: Fusion = "mean",
    reading: Reading | None = None,
    head: Callable[[int], nn.Module] = rank_head,
) -> RewardScorer:
    """The scorer with ``published`` weights on the base's architecture; ``reading`` is the base's unless given.

    Raises:
        FileNotFoundError: the base's configuration is neither here nor can it be fetched.
        ValueError: weights that do not fit.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        image_processor = AutoImageProcessor.from_pretrained(base)
    except OSError as error:
        raise FileNotFoundError(
            f"scorer {name}: configuration, tokenizer and image processor of {base} are not in the local cache and "
            f"cannot be fetched: give base=, a folder that has them ({str(error).splitlines()[0]})"
        ) from None
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    weights = rename_qwen(published, "score." if head is not rank_head else "")
    embedding = weights.get("backbone.language_model.embed_tokens.weight")
    if embedding is not None:  # resized for the reward token
        config.get_text_config().vocab_size = len(embedding)
    shown = reading or (WHOLE if config.model_type == "qwen3_vl" else COUNTED)
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are no weights
        backbone = AutoModel.from_config(config)
        edits = name == "edit-reward"
        texts = [Path(file).read_text() for file in templates]
        scorer = QwenReward(name, backbone, tokenizer, image_processor, texts, edits, fusion, shown, head)
    load_exactly(scorer, weights, source)
    return scorer
