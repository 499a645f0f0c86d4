"""Small random checkpoints in the published key layouts, and straight-line computations to compare loaders with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, softmax

Weights = dict[str, Tensor]

VISION_LAYERS, VISION_WIDTH, PATCH, SIZE, EMBED = 2, 32, 14, 224, 24
TEXT_LAYERS, TEXT_WIDTH, CONTEXT, VOCAB = 2, 32, 77, 49408
HEAD_WIDTH = 16


def noise(*shape: int, scale: float = 0.2) -> Tensor:
    return scale * torch.randn(*shape)


def _block(prefix: str, width: int) -> Weights:
    return {
        f"{prefix}.ln_1.weight": 1 + noise(width),
        f"{prefix}.ln_1.bias": noise(width),
        f"{prefix}.attn.in_proj_weight": noise(3 * width, width),
        f"{prefix}.attn.in_proj_bias": noise(3 * width),
        f"{prefix}.attn.out_proj.weight": noise(width, width),
        f"{prefix}.attn.out_proj.bias": noise(width),
        f"{prefix}.ln_2.weight": 1 + noise(width),
        f"{prefix}.ln_2.bias": noise(width),
        f"{prefix}.mlp.c_fc.weight": noise(4 * width, width),
        f"{prefix}.mlp.c_fc.bias": noise(4 * width),
        f"{prefix}.mlp.c_proj.weight": noise(width, 4 * width),
        f"{prefix}.mlp.c_proj.bias": noise(width),
    }


def clip_weights(seed: int) -> Weights:
    """A CLIP in the key layout of OpenAI and open_clip."""
    torch.manual_seed(seed)
    weights = {
        "positional_embedding": noise(CONTEXT, TEXT_WIDTH),
        "text_projection": noise(TEXT_WIDTH, EMBED),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": noise(VISION_WIDTH),
        "visual.positional_embedding": noise((SIZE // PATCH) ** 2 + 1, VISION_WIDTH),
        "visual.proj": noise(VISION_WIDTH, EMBED),
        "visual.conv1.weight": noise(VISION_WIDTH, 3, PATCH, PATCH, scale=0.05),
        "visual.ln_pre.weight": 1 + noise(VISION_WIDTH),
        "visual.ln_pre.bias": noise(VISION_WIDTH),
        "visual.ln_post.weight": 1 + noise(VISION_WIDTH),
        "visual.ln_post.bias": noise(VISION_WIDTH),
        "token_embedding.weight": noise(VOCAB, TEXT_WIDTH),
        "ln_final.weight": 1 + noise(TEXT_WIDTH),
        "ln_final.bias": noise(TEXT_WIDTH),
    }
    for i in range(VISION_LAYERS):
        weights |= _block(f"visual.transformer.resblocks.{i}", VISION_WIDTH)
    for i in range(TEXT_LAYERS):
        weights |= _block(f"transformer.resblocks.{i}", TEXT_WIDTH)
    return weights


def clip_folder(folder: Path, quick_gelu: bool = False) -> str:
    """open_clip's name of a local model with these widths."""
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": VISION_LAYERS,
                "width": VISION_WIDTH,
                "head_width": HEAD_WIDTH,
                "patch_size": PATCH,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": VOCAB,
                "width": TEXT_WIDTH,
                "heads": TEXT_WIDTH // HEAD_WIDTH,
                "layers": TEXT_LAYERS,
            },
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip_weights(0), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def _transformer(x: Tensor, weights: Weights, prefix: str, layers: int, quick_gelu: bool, causal: bool) -> Tensor:
    batch, length, width = x.shape
    heads = width // HEAD_WIDTH
    for i in range(layers):
        w = {k.removeprefix(f"{prefix}.{i}."): v for k, v in weights.items() if k.startswith(f"{prefix}.{i}.")}
        y = layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"], 1e-5)
        qkv = linear(y, w["attn.in_proj_weight"], w["attn.in_proj_bias"])
        q, k, v = (part.view(batch, length, heads, HEAD_WIDTH).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        logits = q @ k.transpose(2, 3) / HEAD_WIDTH**0.5
        if causal:
            logits = logits + torch.full((length, length), -torch.inf).triu(1)
        y = (softmax(logits, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + linear(y, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        y = layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"], 1e-5)
        y = linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick_gelu else gelu(y)
        x = x + linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


def clip_image_embedding(weights: Weights, pixels: Tensor, quick_gelu: bool = False) -> Tensor:
    """(B, EMBED) of normalised pixels (B, 3, SIZE, SIZE), by hand."""
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, n, n, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights["visual.conv1.weight"].flatten(1).T
    cls = weights["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([cls, x], dim=1) + weights["visual.positional_embedding"]
    x = layer_norm(x, (VISION_WIDTH,), weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"], 1e-5)
    x = _transformer(x, weights, "visual.transformer.resblocks", VISION_LAYERS, quick_gelu, causal=False)
    x = layer_norm(x[:, 0], (VISION_WIDTH,), weights["visual.ln_post.weight"], weights["visual.ln_post.bias"], 1e-5)
    return x @ weights["visual.proj"]


def clip_text_embedding(weights: Weights, ids: Tensor, quick_gelu: bool = False) -> Tensor:
    """(B, EMBED) of token ids (B, CONTEXT), by hand; the end token has the highest id."""
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = _transformer(x, weights, "transformer.resblocks", TEXT_LAYERS, quick_gelu, causal=True)
    x = layer_norm(x, (TEXT_WIDTH,), weights["ln_final.weight"], weights["ln_final.bias"], 1e-5)
    return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ weights["text_projection"]


def affine_head_weights(width: int, prefix: str = "") -> Weights:
    """The 768-1024-128-64-16-1 head that the aesthetic predictor and ImageReward share."""
    sizes, places = [width, 1024, 128, 64, 16, 1], [0, 2, 4, 6, 7]
    weights = {}
    for place, inner, outer in zip(places, sizes[:-1], sizes[1:], strict=True):
        weights[f"{prefix}layers.{place}.weight"] = torch.randn(outer, inner) / inner**0.5
        weights[f"{prefix}layers.{place}.bias"] = noise(outer)
    return weights


def affine_head(weights: Weights, x: Tensor, prefix: str = "") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = linear(x, weights[f"{prefix}layers.{place}.weight"], weights[f"{prefix}layers.{place}.bias"])
    return x[:, 0]


# -- ImageReward -------------------------------------------------------------------------------------------------------

BLIP_VISION, BLIP_TEXT, BLIP_HEADS, BLIP_LAYERS, BLIP_PATCH, BLIP_SIZE = 48, 36, 3, 2, 16, 32


def image_reward_weights(vocab: int, seed: int = 3) -> Weights:
    """ImageReward.pt's keys, small."""
    torch.manual_seed(seed)
    v, t = BLIP_VISION, BLIP_TEXT
    weights = {
        "blip.visual_encoder.cls_token": noise(1, 1, v),
        "blip.visual_encoder.pos_embed": noise(1, (BLIP_SIZE // BLIP_PATCH) ** 2 + 1, v),
        "blip.visual_encoder.patch_embed.proj.weight": noise(v, 3, BLIP_PATCH, BLIP_PATCH, scale=0.05),
        "blip.visual_encoder.patch_embed.proj.bias": noise(v),
        "blip.visual_encoder.norm.weight": 1 + noise(v),
        "blip.visual_encoder.norm.bias": noise(v),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": noise(vocab, t),
        "blip.text_encoder.embeddings.position_embeddings.weight": noise(512, t),
        "blip.text_encoder.embeddings.LayerNorm.weight": 1 + noise(t),
        "blip.text_encoder.embeddings.LayerNorm.bias": noise(t),
        "blip.vision_proj.weight": noise(8, v),
        "blip.vision_proj.bias": noise(8),
        "blip.text_proj.weight": noise(8, t),
        "blip.text_proj.bias": noise(8),
    }
    for i in range(BLIP_LAYERS):
        p = f"blip.visual_encoder.blocks.{i}."
        shapes = {"attn.qkv": (3 * v, v), "attn.proj": (v, v), "mlp.fc1": (4 * v, v), "mlp.fc2": (v, 4 * v)}
        for name, (outer, inner) in shapes.items():
            weights |= {p + name + ".weight": noise(outer, inner), p + name + ".bias": noise(outer)}
        for name in ("norm1", "norm2"):
            weights |= {p + name + ".weight": 1 + noise(v), p + name + ".bias": noise(v)}
        p = f"blip.text_encoder.encoder.layer.{i}."
        for kind, source in (("attention", t), ("crossattention", v)):
            for part, inner in (("query", t), ("key", source), ("value", source)):
                weights |= {p + f"{kind}.self.{part}.weight": noise(t, inner), p + f"{kind}.self.{part}.bias": noise(t)}
            weights |= {
                p + f"{kind}.output.dense.weight": noise(t, t),
                p + f"{kind}.output.dense.bias": noise(t),
                p + f"{kind}.output.LayerNorm.weight": 1 + noise(t),
                p + f"{kind}.output.LayerNorm.bias": noise(t),
            }
        weights |= {
            p + "intermediate.dense.weight": noise(4 * t, t),
            p + "intermediate.dense.bias": noise(4 * t),
            p + "output.dense.weight": noise(t, 4 * t),
            p + "output.dense.bias": noise(t),
            p + "output.LayerNorm.weight": 1 + noise(t),
            p + "output.LayerNorm.bias": noise(t),
        }
    return weights | affine_head_weights(t, "mlp.")


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    batch, length, width = q.shape
    q, k, v = (x.view(batch, x.shape[1], BLIP_HEADS, width // BLIP_HEADS).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) / (width // BLIP_HEADS) ** 0.5
    if allowed is not None:
        logits = logits.masked_fill(allowed[:, None, None] == 0, -torch.inf)
    return (softmax(logits, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)


def image_reward_by_hand(weights: Weights, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published score of normalised pixels (B, 3, BLIP_SIZE, BLIP_SIZE) and token ids and mask (B, L)."""

    def affine(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)

    vit = "blip.visual_encoder."
    patches = pixels.unfold(2, BLIP_PATCH, BLIP_PATCH).unfold(3, BLIP_PATCH, BLIP_PATCH)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights[vit + "patch_embed.proj.weight"].flatten(1).T + weights[vit + "patch_embed.proj.bias"]
    x = torch.cat([weights[vit + "cls_token"].expand(len(x), 1, -1), x], dim=1) + weights[vit + "pos_embed"]
    for i in range(BLIP_LAYERS):
        p = f"{vit}blocks.{i}."
        q, k, v = affine(norm(x, p + "norm1", 1e-6), p + "attn.qkv").chunk(3, dim=-1)
        x = x + affine(_attend(q, k, v), p + "attn.proj")
        x = x + affine(gelu(affine(norm(x, p + "norm2", 1e-6), p + "mlp.fc1")), p + "mlp.fc2")
    picture = norm(x, vit + "norm", 1e-6)

    bert = "blip.text_encoder."
    x = weights[bert + "embeddings.word_embeddings.weight"][ids]
    x = x + weights[bert + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, bert + "embeddings.LayerNorm", 1e-12)
    for i in range(BLIP_LAYERS):
        p = f"{bert}encoder.layer.{i}."
        for kind, source, allowed in (("attention", None, mask), ("crossattention", picture, None)):
            keys = x if source is None else source
            q, k, v = (
                affine(x, p + f"{kind}.self.query"),
                affine(keys, p + f"{kind}.self.key"),
                affine(keys, p + f"{kind}.self.value"),
            )
            y = affine(_attend(q, k, v, allowed), p + f"{kind}.output.dense")
            x = norm(x + y, p + f"{kind}.output.LayerNorm", 1e-12)
        y = affine(gelu(affine(x, p + "intermediate.dense")), p + "output.dense")
        x = norm(x + y, p + "output.LayerNorm", 1e-12)
    return (affine_head(weights, x[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072
