"""Latent-CLIP (2503.08455): a CLIP whose picture tower reads clean SDXL latents, published by its authors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import open_clip
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from diffusion_align.adapters import Conditioning
from diffusion_align.rewards.weights import find_file, load_exactly, read_weights

from .published_latents import INSTEAD, PUBLISHED_LATENTS

#: Where the authors' checkpoint of an open_clip training run lies.
REPOSITORY, FILE = "wendlerc/latent-clip-b-8-512-34b-80k", "checkpoints/epoch_34.pt"
#: SDXL's VAE: the sampler's latents are scaled by it, Latent-CLIP's are not.
SCALING = 0.13025
#: Width of an attention head, in both towers.
HEAD_WIDTH = 64


class LatentCLIP(nn.Module):
    """exp(logit_scale) cos of a clean latent's and a prompt's embeddings, as the kind "alignment".

    Args:
        clip: of open_clip, whose first convolution reads latents.
        size: side of the latents it was trained on (64: pictures of 512 pixels); larger ones are average-pooled to it.
    """

    kinds = ("alignment",)
    clean = True
    calibrated = False
    latents = PUBLISHED_LATENTS["SDXL"]

    def __init__(self, clip: open_clip.CLIP, size: int) -> None:
        super().__init__()
        self.clip, self.size = clip, size
        self.tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)

    def check(self, x: Tensor, cond: Conditioning) -> None:
        channels = self.clip.visual.conv1.in_channels
        if x.shape[1] != channels or min(x.shape[-2:]) < self.size:
            raise ValueError(
                f"Latent-CLIP reads SDXL latents of {channels} channels and at least {self.size} x {self.size}, "
                f"found {tuple(x.shape[1:])}: {INSTEAD}"
            )

    def read(self, cond: Conditioning, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        ids = self.tokenizer(list(prompts)).to(self.clip.logit_scale.device)
        return (normalize(self.clip.encode_text(ids).float(), dim=-1),)

    def judge(self, x: Tensor, log_snr: Tensor, read: tuple[Tensor, ...], scale: Tensor) -> dict[str, Tensor]:
        (text,) = read
        latents = adaptive_avg_pool2d(x / SCALING, self.size).to(self.clip.logit_scale.dtype)
        picture = normalize(self.clip.encode_image(latents).float(), dim=-1)
        return {"alignment": self.clip.logit_scale.exp().float() * (picture * text).sum(dim=-1)}


def load_latent_clip(path: str | Path | None = None) -> LatentCLIP:
    """The published checkpoint: ``path`` (a file, or a folder that has checkpoints/epoch_34.pt), or from the hub.

    The widths are read off the weights, so that the other published sizes load, too.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its keys are not Latent-CLIP's.
    """
    file = find_file(path, REPOSITORY, FILE)
    weights = rename_latent_clip(read_weights(file))
    clip, size = build(weights, file)
    load_exactly(clip, weights, file)
    return LatentCLIP(clip, size).requires_grad_(False).eval()


def rename_latent_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys as open_clip's CLIP has them; the VAE's encoder, of which the file holds a copy, stays out."""
    return {
        key.replace("visual.latent_vit.", "visual."): value.float()
        for key, value in weights.items()
        if not key.startswith(("visual.vae_encoder.", "visual.vae_quant_conv."))
    }


def build(weights: Mapping[str, Tensor], source: str | Path) -> tuple[open_clip.CLIP, int]:
    """An untrained CLIP of the shapes of ``weights``, and the side of the latents that it reads."""
    for key in ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight"):
        if key not in weights:
            published = key.replace("visual.", "visual.latent_vit.")
            raise ValueError(f"checkpoint {source} is no Latent-CLIP: {published} is missing among {len(weights)} keys")
    width, channels, patch, _ = weights["visual.conv1.weight"].shape
    side = patch * round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = weights["token_embedding.weight"].shape
    clip = open_clip.CLIP(
        weights["visual.proj"].shape[1],
        {
            "image_size": side, "patch_size": patch, "width": width, "layers": depth(weights, "visual.transformer."),
            "head_width": HEAD_WIDTH,
        },
        {
            "context_length": len(weights["positional_embedding"]), "vocab_size": vocabulary, "width": text_width,
            "heads": text_width // HEAD_WIDTH, "layers": depth(weights, "transformer."),
        },
    )  # fmt: skip
    clip.visual.conv1 = nn.Conv2d(channels, width, patch, stride=patch, bias=False)
    return clip, side


def depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Number of residual blocks below ``prefix``."""
    found = {match[1] for key in weights if (match := re.match(re.escape(prefix) + r"resblocks\.(\d+)\.", key))}
    return len(found)
