"""SD3.5 medium and FLUX dev with random weights, made on the device; for a CPU small models of the same layouts.

Transformer and VAE have their published configs. Text encoders have one layer, of the published widths: a cached step
does not ask them, and what they take of a picture is not what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from diffusion_align.adapters import Adapter
from diffusion_align.shipped import LAYOUT_FOLDER, shipped_path

from ...sdxl import settings

SD35, FLUX = "sd35-medium", "flux-dev"
#: What makes each part of a layout small, by its folder.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    SD35: {
        "transformer": {
            "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 72, "caption_projection_dim": 16, "pooled_projection_dim": 64,
            "pos_embed_max_size": 16, "dual_attention_layers": [0],
        },
    },
    FLUX: {
        "transformer": {
            "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 72, "pooled_projection_dim": 32, "axes_dims_rope": [2, 2, 4],
        },
    },
}  # fmt: skip
SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 32}
SMALL_T5 = {"d_model": 72, "d_kv": 8, "d_ff": 32, "num_heads": 2}
SMALL_VAE = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}


def build(name: str, small: bool, device: torch.device, dtype: torch.dtype) -> Adapter:
    """An adapter around the layout ``name`` with random weights."""
    folder = LAYOUT_FOLDER / name
    tokenizer = CLIPTokenizer.from_pretrained(shipped_path("scenes-sdxl") / "tokenizer", model_max_length=77)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipeline = _sd35(folder, tokenizer, small) if name == SD35 else _flux(folder, tokenizer, small)
    finally:
        torch.set_default_dtype(default)
    pipeline.transformer.to(dtype)  # its table of places, too, as ``from_pretrained`` loads it
    pipeline.set_progress_bar_config(disable=True)
    return Adapter(pipeline).to(device)


def _sd35(folder: Path, tokenizer: CLIPTokenizer, small: bool) -> Any:
    clips = [CLIPTextModelWithProjection(_clip(folder / f"text_encoder{end}", small)) for end in ("", "_2")]
    transformer = SD3Transformer2DModel(**_part(folder, "transformer", SMALL[SD35]["transformer"] if small else {}))
    return StableDiffusion3Pipeline(
        transformer, _scheduler(folder), _vae(folder, small), clips[0], tokenizer, clips[1], tokenizer,
        _t5(folder / "text_encoder_3", small), tokenizer,
    )  # fmt: skip


def _flux(folder: Path, tokenizer: CLIPTokenizer, small: bool) -> Any:
    clip = CLIPTextModel(_clip(folder / "text_encoder", small))
    transformer = FluxTransformer2DModel(**_part(folder, "transformer", SMALL[FLUX]["transformer"] if small else {}))
    t5 = _t5(folder / "text_encoder_2", small)
    return FluxPipeline(_scheduler(folder), _vae(folder, small), clip, tokenizer, t5, tokenizer, transformer)


def _part(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return settings(folder / name) | changes


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")


def _vae(folder: Path, small: bool) -> AutoencoderKL:
    return AutoencoderKL(**_part(folder, "vae", SMALL_VAE if small else {}))


def _clip(folder: Path, small: bool) -> CLIPTextConfig:
    return CLIPTextConfig(**settings(folder) | {"num_hidden_layers": 1} | (SMALL_CLIP if small else {}))


def _t5(folder: Path, small: bool) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**settings(folder) | {"num_layers": 1} | (SMALL_T5 if small else {})))
