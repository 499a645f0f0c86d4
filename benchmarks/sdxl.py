"""SDXL at its true size with random weights: step time and memory are real, no download is needed.

The configurations are those of stabilityai/stable-diffusion-xl-base-1.0, which come with the package. The tokenizer is
the scenes world's (ids of a smaller vocabulary, padded to the same 77 tokens), which changes neither shapes nor cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_align.adapters import Adapter
from diffusion_align.shipped import LAYOUT_FOLDER, shipped_path


def settings(folder: Path) -> dict[str, Any]:
    """What a part's configuration says of its shape, as its class takes it."""
    values = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in values.items() if not name.startswith("_") and name != "model_type"}


UNET = settings(LAYOUT_FOLDER / "sdxl" / "unet")
VAE = settings(LAYOUT_FOLDER / "sdxl" / "vae") | {"force_upcast": False}  # as madebyollin/sdxl-vae-fp16-fix
CLIP_L = settings(LAYOUT_FOLDER / "sdxl" / "text_encoder")
CLIP_BIG_G = settings(LAYOUT_FOLDER / "sdxl" / "text_encoder_2")


def build_random_sdxl(device: torch.device | str, dtype: torch.dtype) -> Adapter:
    """An adapter around SDXL's true architecture with random weights, made on ``device`` in ``dtype``."""
    tokenizer = CLIPTokenizer.from_pretrained(shipped_path("scenes-sdxl") / "tokenizer", model_max_length=77)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipeline = StableDiffusionXLPipeline(
                AutoencoderKL(**VAE),
                CLIPTextModel(CLIPTextConfig(**CLIP_L)),
                CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)),
                tokenizer,
                tokenizer,
                UNet2DConditionModel(**UNET),
                DDIMScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
                ),
            )
    finally:
        torch.set_default_dtype(default)
    return Adapter(pipeline).to(device)
