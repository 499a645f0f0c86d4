"""Train and assemble each shipped pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffusion_align.data.masks import sample_mask
from diffusion_align.scenes.world.render import IMAGE_SIZE

from .corpus import Corpus
from .denoiser import LatentSet, Networks, build_scheduler, build_unet, encode_sd, encode_sdxl, train_denoiser
from .text import MAX_TOKENS, build_sd_text_encoder, build_sdxl_text_encoders, build_tokenizer
from .vae import encode_corpus, encode_pixels, pixels


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, MAX_TOKENS) as the pipelines make them."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def cached_posterior(vae: AutoencoderKL, corpus: Corpus, work: Path) -> Tensor:
    """The corpus' VAE posteriors (N, 8, 16, 16), computed once."""
    file = work / "posterior.pt"
    if not file.is_file():
        torch.save(encode_corpus(vae, corpus, range(len(corpus.captions))), file)
    return torch.load(file, weights_only=True)


def train_sdxl(corpus: Corpus, work: Path, out: Path, minutes: float) -> None:
    """scenes-sdxl from nothing: UNet and both text encoders together."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    tokenizer = build_tokenizer(work / "tokenizer")
    posterior = cached_posterior(vae, corpus, work)
    data = LatentSet(posterior, tokenize(tokenizer, corpus.captions), vae.config.scaling_factor)
    torch.manual_seed(0)
    first, second = build_sdxl_text_encoders(tokenizer)
    networks = Networks(build_unet(64 + 128, sdxl=True), [first, second], encode_sdxl)
    train_denoiser(networks, data, minutes, work / "sdxl.pt")
    pipeline = StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, networks.unet, build_scheduler(), force_zeros_for_empty_prompt=True
    )
    save_half(pipeline, out)


def train_sd(corpus: Corpus, work: Path, out: Path, sdxl: Path, minutes: float) -> None:
    """scenes-sd, started from scenes-sdxl: its UNet without size ids, its second text encoder without projection."""
    source = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    tokenizer = source.tokenizer
    unet, encoder = build_unet(128, sdxl=False), build_sd_text_encoder(tokenizer)
    copy_matching(unet, source.unet.state_dict())
    copy_matching(encoder, source.text_encoder_2.state_dict())
    vae = source.vae
    posterior = cached_posterior(vae, corpus, work)
    data = LatentSet(posterior, tokenize(tokenizer, corpus.captions), vae.config.scaling_factor)
    networks = Networks(unet, [encoder], encode_sd)
    empty = tokenize(tokenizer, [""])[0]
    train_denoiser(networks, data, minutes, work / "sd.pt", learning_rate=1e-3, empty_ids=empty)
    pipeline = StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    save_half(pipeline, out)


def train_inpaint(corpus: Corpus, work: Path, out: Path, sd: Path, minutes: float, images: int = 24_000) -> None:
    """scenes-inpaint, started from scenes-sd: five more input channels (mask, masked-image latents), zero at first."""
    source = StableDiffusionPipeline.from_pretrained(sd, torch_dtype=torch.float32)
    unet = build_unet(128, sdxl=False, in_channels=9)
    state = source.unet.state_dict()
    extra = unet.conv_in.weight.shape[1] - state["conv_in.weight"].shape[1]
    state["conv_in.weight"] = nn.functional.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, extra))
    unet.load_state_dict(state)
    encoder, tokenizer, vae = source.text_encoder, source.tokenizer, source.vae
    rows = torch.arange(images)
    data = LatentSet(
        cached_posterior(vae, corpus, work)[:images],
        tokenize(tokenizer, corpus.captions[:images]),
        vae.config.scaling_factor,
        inpaint_channels(vae, corpus, rows),
    )
    networks = Networks(unet, [encoder], encode_sd)
    empty = tokenize(tokenizer, [""])[0]
    train_denoiser(networks, data, minutes, work / "inpaint.pt", learning_rate=8e-4, empty_ids=empty)
    pipeline = StableDiffusionInpaintPipeline(
        vae, encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    save_half(pipeline, out)


def inpaint_channels(vae: AutoencoderKL, corpus: Corpus, rows: Tensor, batch_size: int = 128) -> Tensor:
    """Mask and masked-image latents (N, 5, 16, 16) for random masks, as StableDiffusionInpaintPipeline makes them."""
    rng = np.random.default_rng(7)
    parts = []
    for batch in rows.split(batch_size):
        images = pixels(corpus.images, batch)
        masks = (
            torch.from_numpy(np.stack([sample_mask(rng, IMAGE_SIZE, IMAGE_SIZE) for _ in batch])).unsqueeze(1).float()
        )
        latents = encode_pixels(vae, images * (masks < 0.5))[:, :4] * vae.config.scaling_factor
        parts.append(torch.cat([nn.functional.interpolate(masks, size=latents.shape[-2:]), latents], dim=1))
    return torch.cat(parts)


def copy_matching(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what fits; keys and values of cross-attention keep the columns of the last (wider) text encoder."""
    own = module.state_dict()
    for name, value in state.items():
        if name not in own:
            continue
        target = own[name]
        if value.shape != target.shape and value.ndim == 4:  # SDXL projects linearly, SD by 1x1 convolution, or back
            value = value[:, :, 0, 0]
        if value.numel() == target.numel():
            own[name] = value.reshape(target.shape)
        elif value.ndim == 2 and len(value) == len(target):
            own[name] = value[:, -target.shape[1] :]
    module.load_state_dict(own)


def save_half(pipeline: object, out: Path) -> None:
    """Write the pipeline with fp16 weights: half the size in the repository, no visible difference."""
    pipeline.to(dtype=torch.float16)  # type: ignore[attr-defined]
    pipeline.save_pretrained(out)  # type: ignore[attr-defined]
    for file in out.rglob("*.json"):
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            continue
        content.pop("_name_or_path", None)  # where a part was read from is of no use elsewhere
        if "dtype" in content:
            content["dtype"] = "float32"  # which diffusers makes of the other parts, too
        file.write_text(json.dumps(content, indent=2) + "\n")
