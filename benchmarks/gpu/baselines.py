"""Stage 4: the two public scripts' ways of doing the step, on the same model, beside ours.

Both are written anew from what the scripts do, in the order they do it, and with their own settings. The published
Diffusion-DPO script: a second UNet is the reference, one pair makes a micro-step, gradients are accumulated over the
pairs of an optimiser step, pictures and captions are encoded in the step, and four numbers are read for its log in
every micro-step. diffusers' research script: chosen and rejected in one forward, the reference is the UNet with its
adapters off, the VAE is float32 and encodes up to eight pictures at once, captions are encoded in the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch
from diffusion_align.training.pairs.config import DPOConfig

from .measure import NO_CUDA, plain_cost
from .reference import CHECKPOINTING
from .rows import Finding, Goal, Row, Stage
from .step import KEY, cached_batch, pixel_batch, row_name, step_cost
from .workshop import Workshop

BETA = 5000.0
#: Pictures that diffusers' script encodes at once.
ENCODE_AT_ONCE = 8


def autocast(shop: Workshop) -> torch.autocast:
    return torch.autocast(shop.device.type, dtype=torch.bfloat16, enabled=shop.scale.true_size)


def pair_loss(outputs: Tensor, references: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diffusion-DPO's loss of B pairs, chosen first, and three numbers that both scripts log."""
    errors, ref_errors = (
        mse_loss(output.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
        for output in (outputs, references)
    )
    chosen, rejected = errors.chunk(2)
    ref_chosen, ref_rejected = ref_errors.chunk(2)
    inside = -0.5 * BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))
    return -logsigmoid(inside).mean(), errors.mean(), ref_errors.mean(), (inside > 0).float().mean()


def conditions(shop: Workshop, adapter: Adapter, captions: list[str]) -> dict[str, Any]:
    """Captions encoded now, for both pictures of each pair."""
    side = shop.scale.resolution
    cond = adapter.family.encode(adapter.pipeline, captions).repeat(2)
    ids = torch.tensor([[side, side, 0, 0, side, side]] * len(cond), dtype=shop.dtype, device=shop.device)
    added = {"time_ids": ids, "text_embeds": cond.pooled}
    return {"encoder_hidden_states": cond.embeds, "added_cond_kwargs": added}


def noised(adapter: Adapter, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the noise and the timesteps, which the pictures of a pair share."""
    pairs = len(latents) // 2
    noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
    t = torch.randint(0, 1000, (pairs,), device=latents.device).repeat(2)
    return adapter.path.noise(latents, noise, t), noise, t


def optimizer_of(shop: Workshop, adapter: Adapter) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = list(adapter.trainable_parameters().values())
    return parameters, torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-2)


def published_step(shop: Workshop, adapter: Adapter, reference: Any, batch: PairBatch) -> Callable[[], Tensor]:
    """One optimiser step of the published script's way."""
    parameters, optimizer = optimizer_of(shop, adapter)
    vae, pixels = adapter.vae, batch.pixels
    assert pixels is not None

    def step() -> Tensor:
        for i in range(len(batch)):
            with torch.no_grad():
                pictures = pixels[:, i].to(shop.device, vae.dtype)
                latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
                arguments = conditions(shop, adapter, [batch.captions[i]])
            noisy, noise, t = noised(adapter, latents)
            with autocast(shop):
                output = adapter.unet(noisy, t, **arguments).sample
                with torch.no_grad():
                    expected = reference(noisy, t, **arguments).sample
            loss, *told = pair_loss(output, expected, noise)
            for number in (loss, *told):
                number.item()
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def diffusers_step(shop: Workshop, adapter: Adapter, batch: PairBatch) -> Callable[[], Tensor]:
    """One optimiser step of the research script's way."""
    parameters, optimizer = optimizer_of(shop, adapter)
    vae, unet, pixels = adapter.vae, adapter.unet, batch.pixels
    assert pixels is not None

    def step() -> Tensor:
        pictures = pixels.flatten(0, 1).to(shop.device, vae.dtype)
        with torch.no_grad():
            parts = [vae.encode(part).latent_dist.sample() for part in pictures.split(ENCODE_AT_ONCE)]
            latents = (torch.cat(parts) * vae.config.scaling_factor).to(shop.dtype)
            arguments = conditions(shop, adapter, list(batch.captions))
        noisy, noise, t = noised(adapter, latents)
        with autocast(shop):
            output = unet(noisy, t, **arguments).sample
            unet.disable_adapters()
            with torch.no_grad():
                expected = unet(noisy, t, **arguments).sample
            unet.enable_adapters()
        loss, *_ = pair_loss(output, expected, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return loss.detach()

    return step


def scripts_model(shop: Workshop) -> Adapter:
    """The run's model as the scripts make theirs: peft's own LoRA layers, checkpointing full; the shared one goes."""
    shop.clear()
    adapter = shop.new_adapter()
    adapter.unet.add_adapter(LoraConfig(r=8, target_modules=list(adapter.family.lora_targets)))
    cast_training_params(adapter.unet, dtype=torch.float32)
    adapter.family.recompute(adapter.unet, attention_only=False)
    adapter.unet.train()
    return adapter.to(shop.device)


def ours(shop: Workshop, quantity: str) -> dict[str, float]:
    """One figure of every row of the cached step that was measured, by the row's name."""
    names = [row_name(batch, kind) for batch in shop.scale.batches for kind in CHECKPOINTING]
    found = {name: shop.found.get(f"{KEY}/{name}", {}).get(quantity) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def published(shop: Workshop) -> Finding:
    """Its way, with the same LoRA trained as ours, so that the ways alone differ."""
    adapter = scripts_model(shop)
    reference = copy.deepcopy(adapter.unet)
    reference.unload_lora()
    reference.requires_grad_(False).eval()
    pairs = shop.scale.pairs
    cost = plain_cost(shop, published_step(shop, adapter, reference, pixel_batch(adapter, shop.scale, pairs)), 1, 1)
    speed = pairs / cost.seconds
    speeds = {name: value / speed for name, value in ours(shop, "pairs_per_second").items()}
    memories = {name: value / cost.peak_gib for name, value in ours(shop, "peak_gib").items() if cost.peak_gib}
    figures = cost.figures(pairs) | {"our_speed_over_its": speeds, "our_memory_over_its": memories}
    both = [name for name in speeds if speeds[name] >= 1.5 and memories.get(name, 9) <= 0.6]
    best = max(both or speeds, key=lambda name: speeds[name], default=None)
    measured = best if shop.cuda else None
    goals = (
        Goal.at_least("1.5 times its pairs per second", None if measured is None else speeds[measured], 1.5),
        Goal.at_most("0.6 times its memory, with the same settings of ours", memories.get(measured or ""), 0.6),
    )
    notes = (f"ours: {best}", "checkpointing full, as the script has for SDXL; the second UNet stays on the device")
    return Finding(figures, goals, notes if shop.cuda else (*notes, NO_CUDA))


def research(shop: Workshop) -> Finding:
    """Its way at its own settings: checkpointing full, rank 8, eight pairs at once."""
    adapter, pairs = scripts_model(shop), shop.scale.pairs
    adapter.vae.to(torch.float32)
    cost = plain_cost(shop, diffusers_step(shop, adapter, pixel_batch(adapter, shop.scale, pairs)), 1, 2)
    return Finding(cost.figures(pairs), notes=() if shop.cuda else (NO_CUDA,))


def against_research(cached: bool, shop: Workshop) -> Finding:
    """Ours at the settings of the research script."""
    pairs = shop.scale.pairs
    if cached:
        shop.checkpointing("full").park_encoders()
    else:
        shop.with_encoders("full")
    cost = step_cost(shop, DPOConfig(), (cached_batch if cached else pixel_batch)(shop.adapter, shop.scale, pairs))
    theirs = shop.found.get("baselines/diffusers' script", {})
    ratio = None if "pairs_per_second" not in theirs else pairs / cost.seconds / theirs["pairs_per_second"]
    memory = None if not cost.peak_gib or not theirs.get("peak_gib") else cost.peak_gib / theirs["peak_gib"]
    figures = cost.figures(pairs) | {"our_speed_over_its": ratio, "our_memory_over_its": memory}
    goal = Goal.at_least("as many pairs per second as diffusers' script", ratio if shop.cuda else None, 1.0)
    return Finding(figures, (goal,), () if shop.cuda else (NO_CUDA,))


STAGE = Stage(
    "baselines",
    "The public scripts' ways beside ours",
    lambda shop: [
        Row("published script", 37, published),
        Row("diffusers' script", 15, research),
        Row("ours at its settings, cached", 10, partial(against_research, True)),
        Row("ours at its settings, uncached", 12, partial(against_research, False)),
    ],
)
