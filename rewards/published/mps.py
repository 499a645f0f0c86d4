"""MPS (Zhang et al., CVPR 2024): CLIP-H whose picture asks the prompt's words, those that a condition touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention, silu

from diffusion_align.rewards.catalogue import CLIP_H
from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import find_file, load_exactly, read_module, read_weights

#: What the overall preference looks at, as in the authors' evaluation.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
#: A word of the prompt counts if it is this near to the condition, relative to the nearest one; as in the authors'
#: evaluation (their training code has 0.01).
THRESHOLD = 0.3
SOURCE, FILE = "https://github.com/Kwai-Kolors/MPS", "MPS_overall_checkpoint.pth"
HEAD_WIDTH, HEADS, LAYERS, WIDER = 64, 16, 4, 4
MAX_TOKENS = 77


class Norm(nn.Module):
    """Layer norm without a learnt shift."""

    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weight, self.bias)


class GatedUnit(nn.Module):
    """(..., 2 D) to (..., D): the first half times the SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return silu(gate) * value


def heads_of(x: Tensor) -> Tensor:
    """(B, L, H W) as (B, H, L, W)."""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """All heads of ``queries`` (B, H, L, W) look at one head of keys and values (B, S, W); (B, L, H W)."""
    shape = (-1, queries.shape[1], -1, -1)
    found = scaled_dot_product_attention(
        queries, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=mask
    )
    return found.transpose(1, 2).flatten(2)


class CrossLayer(nn.Module):
    """Pictures ask words, with a feed-forward net beside the attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * WIDER * width, bias=False), GatedUnit(), nn.Linear(WIDER * width, width, bias=False)
        )

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        out: Tensor = x + self.to_out(attended(heads_of(self.to_q(y)), keys, values, mask)) + self.ff(y)
        return out


class SelfLayer(nn.Module):
    """Patches ask patches, with rotary positions and a feed-forward net beside the attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.sizes = [heads * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * WIDER * width]
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(GatedUnit(), nn.Linear(WIDER * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        angles = rotary_angles(x.shape[1], x.device)
        found = attended(turned(heads_of(queries), angles), turned(keys, angles), values)
        out: Tensor = x + self.attn_out(found) + self.ff_out(inner)
        return out


def rotary_angles(length: int, device: torch.device) -> Tensor:
    """(L, W) float32: position times frequency, for the first and again for the second half of a head."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2, device=device).float() / HEAD_WIDTH)
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    return torch.cat([angles, angles], dim=-1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` (..., L, W) with its halves as coordinates, turned by ``angles``."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(x.dtype)


class Wrapped(nn.Module):
    """A layer below the name ``fn``, as in the published keys."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        found: Tensor = self.fn(*args)
        return found


class CrossModel(nn.Module):
    """Layers of :class:`CrossLayer` and :class:`SelfLayer` in turns."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Wrapped(CrossLayer(width, heads)), Wrapped(SelfLayer(width, heads))]) for _ in range(layers)
        )

    def forward(self, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            crossed, alone = layer.children()
            patches = alone(crossed(patches, words, mask))
        return patches


class MPSScorer(RewardScorer):
    """exp(logit_scale) cos of the prompt's embedding and of the picture's class token after it has read the prompt.

    All states are projected to the common space first. The picture sees only words i of the prompt with
    max_j <t_i, c_j> > ``threshold`` max_i max_j <t_i, c_j>, where c are the condition's states.

    Args:
        model: transformers' CLIPModel.
        condition: what the preference looks at.
    """

    name = "mps"
    differentiable = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        heads: int = HEADS,
        layers: int = LAYERS,
        condition: str = CONDITION,
        threshold: float = THRESHOLD,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.condition, self.threshold = model, tokenizer, condition, threshold
        self.cross_model = CrossModel(model.config.projection_dim, heads, layers)
        self.preprocessing = Preprocess(model.config.vision_config.image_size)

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        words, text = self.read(prompts)
        condition, _ = self.read([self.condition])
        patches = self.model.visual_projection(self.model.vision_model(images.to(words.dtype)).last_hidden_state)
        near = (words @ condition.transpose(1, 2)).amax(dim=-1)  # (B, L)
        seen = near / near.amax(dim=-1, keepdim=True) > self.threshold
        picture = self.cross_model(patches, words, seen[:, None, None])[:, 0]
        cosine = (normalize(picture.float(), dim=-1) * normalize(text.float(), dim=-1)).sum(dim=-1)
        return RewardOutput(self.model.logit_scale.float().exp() * cosine)

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected states (B, L, D) of every token, padding included, and of the end token (B, D)."""
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        output = self.model.text_model(input_ids=ids.to(self.device))
        project = self.model.text_projection
        return project(output.last_hidden_state), project(output.pooler_output)


def rename_mps(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys without what is computed: positions' numbers and rotary frequencies."""
    return {
        key: value.float()
        for key, value in weights.items()
        if not key.endswith((".position_ids", "rotary_emb.inv_freq"))
    }


def published_config() -> Any:
    """CLIP-H, as laion's folder on the hub says."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024}  # fmt: skip
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 1024, "eos_token_id": 49407}  # fmt: skip
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=1024)


def load_mps(
    name: str = "mps",
    checkpoint: str | None = None,
    tokenizer: str = CLIP_H,
    condition: str = CONDITION,
    threshold: float = THRESHOLD,
    config: Any = None,
    heads: int = HEADS,
) -> RewardScorer:
    """MPS for the overall preference, the one that its authors published.

    Args:
        checkpoint: MPS_overall_checkpoint.pth, for which the README of Kwai-Kolors/MPS has a link, or the same weights
            as .safetensors. The .pth is a pickled module; its tensors are read without running anything of it.
        condition, threshold: see :class:`MPSScorer`.
        config, heads: CLIPConfig and heads of other sizes of the same layout.
    """
    from transformers import AutoTokenizer, CLIPModel

    if checkpoint is None:
        raise FileNotFoundError(
            f"scorer {name}: its authors publish the weights behind a link in the README of {SOURCE} only: download "
            f"{FILE} there and give checkpoint="
        )
    path = find_file(checkpoint, SOURCE, FILE)
    weights = rename_mps(read_weights(path) if path.suffix == ".safetensors" else read_module(path))
    layers = len({key.split(".")[2] for key in weights if key.startswith("cross_model.layers.")})
    model = CLIPModel(config or published_config())
    scorer = MPSScorer(model, AutoTokenizer.from_pretrained(tokenizer), heads, layers, condition, threshold)
    load_exactly(scorer, weights, path)
    return scorer
