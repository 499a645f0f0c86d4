"""Settings that every method that trains a diffusion model shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from diffusion_align.training.engine.config import Fraction, NonNegativeFloat, Positive, PositiveFloat, RunConfig


@dataclass(frozen=True, kw_only=True)
class VAEOptions:
    """How the VAE codes pictures, for every command and run that loads a diffusion model."""

    vae_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Pictures that the VAE encodes or decodes at once; 1 is what diffusers calls slicing. Unset goes by their size: 2
    of 1024 pixels, 8 of 512, at most 16."""
    vae_tiling: bool = False
    """Let the VAE cut pictures larger than it was trained on into tiles: less memory, and seams may show."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(VAEOptions, RunConfig):
    """What every method that trains a diffusion model shares."""

    # -- model
    model: str = "scenes-sdxl"
    """Shipped name, pipeline folder, single .safetensors file, or hub name."""
    model_config: str | None = None
    """For a single-file model: folder or hub name with the pipeline's configs and tokenizers."""
    variant: str | None = None
    """Weight variant of a hub model, e.g. fp16."""
    vae: str | None = None
    """Another autoencoder, e.g. madebyollin/sdxl-vae-fp16-fix."""
    init_weights: str | None = None
    """LoRA file or UNet folder merged into the base before training (e.g. an SFT run); it is then the reference too."""

    # -- policy
    full_finetuning: bool = False
    """Train all UNet weights against a frozen copy, instead of a LoRA whose reference is the UNet without it."""
    lora_rank: Positive = 8
    """Rank of the LoRA matrices."""
    lora_alpha: PositiveFloat | None = None
    """LoRA scale is alpha / rank; unset means alpha = rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the LoRA input."""
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Suffixes of the UNet modules that get a LoRA."""

    # -- speed and memory
    weight_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Storage of the frozen weights (base UNet under LoRA, text encoders, reference copy)."""
    gradient_checkpointing: Literal["none", "attention", "full"] = "none"
    """Recompute activations in the backward pass: nowhere, in the transformer layers, everywhere."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernels."""
    torch_compile: bool = False
    """Compile each transformer block of the UNet (torch.compile)."""
    channels_last: bool = False
    """Channels-last memory format of the UNet."""

    # -- validation
    validation_prompts: str | None = None
    """File of prompts (.txt, .csv, .jsonl, .parquet); unset takes captions of the validation split."""
    num_validation_prompts: Positive = 64
    """How many prompts are used."""
    validation_scorer: str | None = None
    """Scorer that compares policy and base, e.g. scenes-oracle; unset saves pictures only."""
    validation_inference_steps: Positive = 20
    """Sampling steps."""
    validation_guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance scale."""
    validation_seed: int = 1234
    """Image i is drawn with this seed + i."""
