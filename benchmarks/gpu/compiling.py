"""Stage 8: what can be switched on: compiled blocks, channels_last, the fused optimiser."""

from __future__ import annotations

import time

import torch
from torch import nn

from diffusion_align.training.pairs.config import DPOConfig

from ..harness import synchronize
from .measure import seconds_of
from .product import backend
from .rows import Finding, Row, Stage
from .step import cached_batch, step_cost
from .workshop import Workshop

#: Pairs of a step here.
PAIRS = 4


def plain(shop: Workshop) -> float:
    """Seconds of the step with nothing switched on."""
    return step_cost(shop, DPOConfig(), cached_batch(shop.adapter, shop.scale, min(PAIRS, shop.scale.pairs)), 2).seconds


def channels_last(shop: Workshop) -> Finding:
    """The UNet's memory format."""
    adapter = shop.checkpointing("attention").park_encoders()
    before = plain(shop)
    adapter.unet.to(memory_format=torch.channels_last)
    try:
        after = plain(shop)
    finally:
        adapter.unet.to(memory_format=torch.contiguous_format)
    return Finding({"seconds_per_step": before, "channels_last": after, "speed_ratio": before / after})


def fused_optimizer(shop: Workshop) -> Finding:
    """AdamW's own step on the LoRA's parameters."""
    parameters = [
        nn.Parameter(torch.randn_like(p), requires_grad=True) for p in shop.adapter.trainable_parameters().values()
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    seconds = {}
    for name, options in {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}.items():
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, **options)
        seconds[name] = seconds_of(optimizer.step, warmup=2, rounds=5)
    return Finding({"parameters": sum(p.numel() for p in parameters), "seconds": seconds})


def compiled(shop: Workshop) -> Finding:
    """The repeated transformer blocks: seconds to compile, seconds of a step, and when the first are made up for."""
    adapter = shop.checkpointing("none" if not shop.scale.true_size else "attention").park_encoders()
    before = plain(shop)
    adapter.unet.compile_repeated_blocks(backend=backend(shop))
    synchronize()
    started = time.perf_counter()
    after = plain(shop)
    synchronize()
    steps = shop.scale.warmup + 2 + 1
    compiling = max(time.perf_counter() - started - steps * after, 0.0)
    shop.clear()  # blocks stay compiled
    saved = before - after
    figures = {
        "compile_seconds": compiling,
        "seconds_per_step": before,
        "compiled_seconds_per_step": after,
        "speed_ratio": before / after,
        "break_even_steps": compiling / saved if saved > 0 else None,
    }
    notes = () if saved > 0 else ("compiled steps are no faster: there is no break-even",)
    return Finding(figures, notes=notes if shop.scale.true_size else (*notes, "traced, not compiled: backend eager"))


STAGE = Stage(
    "compiling",
    "What can be switched on",
    lambda shop: [
        Row("channels_last", 12, channels_last),
        Row("fused optimiser", 3, fused_optimizer),
        Row("torch.compile", 44, compiled),
    ],
)
