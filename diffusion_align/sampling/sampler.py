"""Classifier-free guided sampling: the images diffusers' own pipelines give, one seed per image."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning


@torch.no_grad()
def generate(
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    scheduler: Any = None,
    negative_prompts: Sequence[str] | None = None,
    eta: float = 0.0,
    inpaint: Tensor | None = None,
) -> Tensor:
    """Draw one image per prompt with the adapter's policy (inside ``adapter.reference()``: with the base).

    An image depends on its prompt and seed alone, not on its batch; it is the one that the diffusers pipeline draws
    with ``generator=torch.Generator().manual_seed(seed)`` and the same scheduler.

    Args:
        guidance_scale: w in eps_null + w (eps_prompt - eps_null) (2207.12598); 1 or less predicts with the prompt only.
        seeds: one per prompt.
        height, width: pixels, divisible by the VAE factor; None is the model's own.
        scheduler: a diffusers scheduler; None is the pipeline's. A copy is used.
        negative_prompts: one per prompt, instead of the pipeline's null prompt.
        eta: DDIM's share of fresh noise, for schedulers that have it.
        inpaint: mask and masked-image latents (N, 1 + C, h, w) for inpainting models.

    Returns:
        (N, 3, height, width) float32 in [0, 1], on the CPU.

    Raises:
        ValueError: numbers of prompts, seeds or negative prompts differ, or a size the VAE cannot make.
    """
    for name, values in (("seeds", seeds), ("negative_prompts", negative_prompts), ("inpaint", inpaint)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name}: expected one for each of the {len(prompts)} prompts, found {len(values)}")
    factor = adapter.vae_scale_factor
    height, width = height or adapter.default_resolution, width or adapter.default_resolution
    if height % factor or width % factor:
        raise ValueError(f"images of {height}x{width} pixels cannot be made: both sides must be divisible by {factor}")
    images = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        cond = _conditioning(adapter, prompts[rows], height, width, None if inpaint is None else inpaint[rows])
        null = None
        if guidance_scale > 1:
            negative = [""] * len(cond) if negative_prompts is None else negative_prompts[rows]
            null = _conditioning(adapter, negative, height, width, cond.inpaint)
        latents = _sample(
            adapter,
            cond,
            null,
            copy.deepcopy(scheduler or adapter.pipeline.scheduler),
            [torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            (height // factor, width // factor),
            num_inference_steps,
            guidance_scale,
            eta,
        )
        images.append((adapter.decode(latents) / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images) if images else torch.empty(0, 3, height, width)


def _conditioning(
    adapter: Adapter, prompts: Sequence[str], height: int, width: int, inpaint: Tensor | None
) -> Conditioning:
    cond = adapter.encode_prompts(prompts)
    time_ids = None
    if adapter.family.name == "sdxl":
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=adapter.device)
        time_ids = size.expand(len(prompts), 6)
    return Conditioning(cond.embeds, cond.pooled, time_ids, None if inpaint is None else inpaint.to(adapter.device))


def _sample(
    adapter: Adapter,
    cond: Conditioning,
    null: Conditioning | None,
    scheduler: Any,
    generators: list[torch.Generator],
    size: tuple[int, int],
    steps: int,
    guidance_scale: float,
    eta: float,
) -> Tensor:
    """Latents (B, C, *size) of one batch."""
    shape = (1, adapter.latent_channels, *size)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(adapter.device)
    both = cond if null is None else Conditioning.cat([null, cond])
    # Schedulers differ in what their steps take; a deterministic one has neither eta nor generator.
    accepted = inspect.signature(scheduler.step).parameters
    offered: dict[str, Any] = {"eta": eta, "generator": generators}
    extras = {name: value for name, value in offered.items() if name in accepted}
    scheduler.set_timesteps(steps, device=adapter.device)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(latents, t)
        if null is not None:
            x_t = torch.cat([x_t, x_t])
        output = adapter.predict(x_t, t.expand(len(x_t)), both).output
        if null is not None:
            unguided, guided = output.chunk(2)
            output = unguided + guidance_scale * (guided - unguided)
        latents = scheduler.step(output, t, latents, **extras, return_dict=False)[0]
    return latents


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images (N, 3, H, W) in [0, 1] as pixels (N, H, W, 3) uint8."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
