"""One sampler: any adapter, any guider, any diffusers scheduler; the images diffusers' own pipelines give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.guidance.guider import DISTILLED, EXPERIMENTAL, StepGuidance
from diffusion_align.guidance.schedules import as_guider
from diffusion_align.quiet import unsaid

from .batch_run import BatchRun, Samples
from .control import PLAIN, SamplingOptions, StepPlan

#: A scale, one per image, a (steps, images) table, or a guider (ours or diffusers').
Guidance: TypeAlias = float | Sequence[float] | Tensor | BaseGuidance


def generate(
    adapter: Adapter,
    prompts: str | Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    negative_prompts: str | Sequence[str] | None = None,
    inpaint: Tensor | None = None,
) -> Tensor:
    """The images of :func:`sample` with constant guidance and the pipeline's scheduler.

    Args:
        guidance_scale: w in eps_null + w (eps_prompt - eps_null); 1 or less predicts with the prompt only.
        height, width, batch_size: see :class:`~.control.SamplingOptions`; the others: see :func:`sample`.

    Returns:
        (N, 3, height, width) float32 in [0, 1] on the CPU.

    Raises:
        ValueError: as :func:`sample`.
    """
    return sample(
        adapter,
        prompts,
        num_inference_steps=num_inference_steps,
        guidance=guidance_scale,
        seeds=seeds,
        negative_prompts=negative_prompts,
        inpaint=inpaint,
        options=SamplingOptions(height=height, width=width, batch_size=batch_size),
    ).images


def asked(prompts: str | Sequence[str], seeds: Sequence[int] | None) -> tuple[list[str], Sequence[int]]:
    """A prompt and a seed for each picture: one prompt is drawn once for each of ``seeds``, and without ``seeds`` they
    are 0, 1, 2, ..."""
    if isinstance(prompts, str):
        prompts = [prompts] * (1 if seeds is None else len(seeds))
    return list(prompts), range(len(prompts)) if seeds is None else seeds


@torch.no_grad()
def sample(
    adapter: Adapter,
    prompts: str | Sequence[str],
    *,
    num_inference_steps: int = 25,
    guidance: Guidance = 5.0,
    seeds: Sequence[int] | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    scheduler: Any = None,
    eta: float | Sequence[float] = 0.0,
    inpaint: Tensor | None = None,
    options: SamplingOptions = PLAIN,
) -> Samples:
    """Draw one image per prompt with the adapter's policy (inside ``adapter.reference()``: with the base).

    An image depends on its prompt and seed alone, not on its batch; with constant guidance it is the one that the
    diffusers pipeline draws with ``generator=torch.Generator().manual_seed(seed)`` and the same scheduler.

    Every value per step, given or returned, has ``num_inference_steps`` entries, one for each step that is asked for:
    where a scheduler calls the denoiser more often (Heun, KDPM2, PNDM), a step's calls share it.

    Args:
        prompts: one is drawn once for each of ``seeds``.
        num_inference_steps: N; any number that the scheduler can make.
        guidance: w in eps_null + w (eps_prompt - eps_null) (2207.12598), 1 or less predicts with the prompt only; or
            one w per image, a (steps, images) table, or a guider, ours or diffusers'.
        seeds: one per prompt; None takes 0, 1, 2, ...
        negative_prompts: one per prompt, or one for all, instead of the pipeline's null prompt (SDXL's zeros; "" is
            encoded).
        scheduler: a diffusers scheduler; None is the pipeline's. A copy is used. DPM++ SDE draws each picture's noise
            from its own seed, as the pipeline does with ``noise_sampler_seed`` set to it.
        eta: DDIM's share of fresh noise, for schedulers that have it; one number or one per step.
        inpaint: mask and masked-image latents (N, 1 + C, h, w) for inpainting models.
        options: size, batch size, a callback, and what else is rarely changed.

    Raises:
        ValueError: numbers of prompts, seeds or negative prompts differ, a size the VAE cannot make, guidance that does
            not fit, another ``alignment_strength`` than 1 without trained weights, ``copies`` across batches, a
            scheduler of another noising process (EDM, flow matching), or steps that it cannot make.
    """
    prompts, seeds = asked(prompts, seeds)
    if isinstance(negative_prompts, str):
        negative_prompts = [negative_prompts] * len(prompts)
    sampler = scheduler or adapter.pipeline.scheduler
    adapter.family.check_scheduler(sampler)
    for name, values in (
        ("seeds", seeds),
        ("negative_prompts", negative_prompts),
        ("inpaint", inpaint),
        ("latents", options.latents),
    ):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name}: expected one for each of the {len(prompts)} prompts, found {len(values)}")
    two_branches = _two_branches(adapter, negative_prompts is not None, options.embedded_guidance)
    factor, divisor = adapter.vae_scale_factor, adapter.side_factor
    height, width = options.height or adapter.default_resolution, options.width or adapter.default_resolution
    if height % divisor or width % divisor:
        raise ValueError(f"images of {height}x{width} pixels cannot be made: both sides must be divisible by {divisor}")
    plan = StepPlan.make(num_inference_steps, len(prompts), eta, options, two_branches)
    if any(value != 1 for value in plan.strengths) and not adapter.has_reference:
        raise ValueError("alignment_strength other than 1 needs trained weights: load a LoRA, or train a policy")
    if options.skipped_layers is not None:
        options.skipped_layers.check(adapter, num_inference_steps)
    guider = as_guider(guidance)
    parts: list[Samples] = []
    for start in range(0, len(prompts), options.batch_size):
        rows = range(start, min(start + options.batch_size, len(prompts)))
        texts = list(prompts[start : rows.stop])
        cond = conditioning(adapter, texts, height, width, None if inpaint is None else inpaint[start : rows.stop])
        nulls = [None] * len(rows) if negative_prompts is None else list(negative_prompts[start : rows.stop])
        null = conditioning(adapter, nulls, height, width, cond.inpaint)
        if options.embedded_guidance is not None:
            scales = torch.full((len(rows),), options.embedded_guidance, device=cond.embeds.device)
            cond, null = replace(cond, guidance=scales), replace(null, guidance=scales)
        run = BatchRun(
            adapter,
            fresh(guider),
            copy.deepcopy(sampler),
            texts,
            cond,
            null,
            rows,
            plan,
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : rows.stop]]
        if options.latents is None:
            shape = (1, adapter.latent_channels, height // factor, width // factor)
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        else:
            noise = options.latents[start : rows.stop]
        parts.append(run.draw(noise, generators, options.callback, options.keep_trajectory))
        if options.on_pictures is not None:
            options.on_pictures(rows, parts[-1].images)
    if not parts:
        nothing = torch.empty(0, adapter.latent_channels, height // factor, width // factor)
        return Samples(torch.empty(0, 3, height, width), nothing, torch.empty(num_inference_steps, 0), 0.0)
    paths = [part.trajectory for part in parts if part.trajectory is not None]
    return Samples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.latents for part in parts]),
        torch.cat([part.scales for part in parts], dim=1),
        sum(part.nfe * len(part.images) for part in parts) / len(prompts),
        [record for part in parts for record in part.records],
        torch.cat(paths, dim=1) if paths else None,
    )


def _two_branches(adapter: Adapter, negative: bool, embedded: float | None) -> bool:
    """Whether prompts are combined with null prompts.

    Args:
        negative: there are negative prompts.
        embedded: ``embedded_guidance``.

    Raises:
        ValueError: a model that takes the scale as an input has one for it or negative prompts, but not both ways.
    """
    if adapter.guidance != "embedded":
        if embedded is not None:
            raise ValueError(
                f"embedded_guidance = {embedded:g} is for models that take the guidance scale as an input (FLUX dev), "
                "which this one does not: leave it unset"
            )
        return adapter.guidance == "cfg" or negative
    if negative and embedded is None:
        raise ValueError(f"negative_prompts steer away from a second prediction, {DISTILLED}")
    return embedded is not None


def fresh(guider: BaseGuidance) -> BaseGuidance:
    """One that remembers nothing: ours forget by themselves, diffusers' guiders remember their last run."""
    if isinstance(guider, StepGuidance):
        return guider
    with unsaid(EXPERIMENTAL):
        return guider.new()


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images (N, 3, H, W) in [0, 1] as pixels (N, H, W, 3) uint8."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
