"""Stage 9: SD3.5 medium and FLUX dev: the cached LoRA DPO step beside its memory estimate, and a picture."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.costs.memory import estimate_memory

from ..measure import GIB, NO_CUDA, loop_cost, peak_of, seconds_of
from ..reference import answer
from ..rows import Finding, Goal, Row, Stage
from ..step import cached_batch, pair_method
from ..workshop import Scale, Workshop
from .models import FLUX, SD35, build

#: Side of the pictures at true size, where one 80 GB card holds both models' steps.
PIXELS = 512
#: Pairs of a step and what is recomputed, by model.
STEPS: dict[str, tuple[tuple[int, str], ...]] = {SD35: ((1, "none"), (4, "full")), FLUX: ((1, "full"),)}
#: What the smallest card of the docs has, GiB.
CARD = 24.0
#: Guidance of a picture, by model: two predictions, and told to the network.
SCALES = {SD35: 4.5, FLUX: 3.5}


def pixels(scale: Scale) -> int:
    return PIXELS if scale.true_size else scale.resolution


def settings(scale: Scale, batch: int, kind: Any) -> dict[str, Any]:
    """Of a cached LoRA DPO step."""
    precision: Any = {"weight_dtype": "bf16", "mixed_precision": "bf16"} if scale.true_size else {}
    return {
        "resolution": pixels(scale), "per_device_train_batch_size": batch, "gradient_checkpointing": kind,
        "cache_dir": "cache", "lora_rank": 16, **precision,
    }  # fmt: skip


def estimates(name: str, scale: Scale, folder: Path) -> dict[str, float]:
    """Estimated GiB of the model's steps, by ``step_name``."""
    model = name
    if not scale.true_size:
        build(name, True, torch.device("cpu"), torch.float32).pipeline.save_pretrained(folder)
        model = str(folder)
    return {
        step_name(batch, kind): estimate_memory(DPOConfig(model=model, **settings(scale, batch, kind))).total / GIB
        for batch, kind in STEPS[name]
    }


def step_name(batch: int, kind: str) -> str:
    return f"batch {batch}, checkpointing {kind}"


def with_lora(name: str, kind: str, shop: Workshop) -> Adapter:
    """The model, its own, with a LoRA; the encoders are where a cached run has them."""
    shop.clear()
    adapter = build(name, not shop.scale.true_size, shop.device, shop.dtype).train_lora(rank=16)
    if kind != "none":
        adapter.family.recompute(adapter.network, attention_only=kind == "attention")
    return adapter.park_encoders()


def dpo_step(name: str, batch: int, kind: str, shop: Workshop) -> Finding:
    """Speed, and memory beside its estimate."""
    adapter = with_lora(name, kind, shop)
    pairs = cached_batch(adapter, replace(shop.scale, resolution=pixels(shop.scale)), batch)
    config = DPOConfig(**settings(shop.scale, batch, kind))
    make = partial(pair_method, adapter, pairs)
    cost = loop_cost(shop, config, adapter, make, shop.scale.warmup, shop.scale.steps)
    estimate = answer(shop, f"flow-{name}").get(step_name(batch, kind))
    ratio = None if cost.peak_gib is None or estimate is None else estimate / cost.peak_gib
    figures = cost.figures(batch) | {"estimated_gib": estimate, "estimate_over_measured": ratio}
    late = "the CPU had no answer yet" if shop.cuda else "needs a GPU"
    goal = Goal.at_most("memory estimate within 10%", None if ratio is None else abs(ratio - 1), 0.10, late)
    return Finding(figures, (goal,), () if shop.cuda else (NO_CUDA,))


@torch.no_grad()
def picture(name: str, shop: Workshop) -> Finding:
    """Seconds of a picture, and the memory that drawing takes beyond the weights."""
    shop.clear()
    adapter = build(name, not shop.scale.true_size, shop.device, shop.dtype)
    side, steps = pixels(shop.scale), shop.scale.sampling_steps

    def draw() -> float:
        drawn = sample(
            adapter, ["a red star"], num_inference_steps=steps, guidance=SCALES[name],
            options=SamplingOptions(height=side, width=side),
        )  # fmt: skip
        return drawn.nfe

    figures = {"steps": steps, "denoiser_calls": draw(), "seconds_per_picture": seconds_of(draw, 0, 1)}
    return Finding(figures | {"peak_gib": peak_of(shop, draw)}, notes=() if shop.cuda else (NO_CUDA,))


def too_large(shop: Workshop) -> Finding:
    """FLUX dev's step in bf16 beside a card of 24 GB, where ``train`` refuses it before anything is loaded."""
    estimate = answer(shop, f"flow-{FLUX}").get(step_name(*STEPS[FLUX][0]))
    value = estimate if shop.scale.true_size else None
    goal = Goal.at_least("FLUX dev in bf16 is known not to fit 24 GB", value, CARD, "needs the true size")
    return Finding({"estimated_gib": estimate, "card_gib": CARD}, (goal,))


def rows(shop: Workshop) -> list[Row]:
    expected = {SD35: 9, FLUX: 18}
    steps = [
        Row(f"{name}, LoRA DPO step, {step_name(*each)}", expected[name], partial(dpo_step, name, *each))
        for name, found in STEPS.items()
        for each in found
    ]
    pictures = [Row(f"{name}, a picture", expected[name], partial(picture, name)) for name in STEPS]
    return [*steps, *pictures, Row("flux-dev on 24 GB", 1, too_large)]


STAGE = Stage("flow", "SD3.5 medium and FLUX dev", rows)
