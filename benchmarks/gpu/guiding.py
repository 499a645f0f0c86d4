"""Stage 6: what the search of dynamic guidance costs beside static guidance."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample

from ..harness import time_interleaved
from .measure import counted_waits, profiled
from .rows import Finding, Goal, Row, Stage
from .workshop import Workshop

CANDIDATES = (2.0, 3.5, 5.0, 7.0, 9.0)
KINDS = ("alignment", "fidelity", "preference")


def evaluator(shop: Workshop, adapter: Adapter) -> LatentEvaluator:
    """Three judges of the model's latents, with random weights."""
    cond = adapter.encode_prompts(["a red star"])
    side = shop.scale.resolution // adapter.vae_scale_factor
    pooled = 0 if cond.pooled is None else cond.pooled.shape[-1]
    torch.manual_seed(0)
    settings = EvaluatorSettings(adapter.latent_channels, side, cond.embeds.shape[-1], pooled, KINDS)
    return LatentEvaluator(settings).requires_grad_(False).eval().to(shop.device)


def overhead(batch: int, shop: Workshop) -> Finding:
    """Seconds of whole pictures, in turn."""
    adapter, steps = shop.with_encoders(), shop.scale.sampling_steps
    adapter.unet.eval()
    dynamic = DynamicGuidance(kinds=KINDS, candidates=CANDIDATES)
    dynamic.use(evaluator(shop, adapter))
    prompts, seeds = ["a red star"] * batch, list(range(batch))
    precision = torch.autocast(shop.device.type, dtype=torch.bfloat16, enabled=shop.scale.true_size)

    def draw(guidance: DynamicGuidance | float) -> None:
        with precision:
            sample(
                adapter, prompts, num_inference_steps=steps, guidance=guidance, seeds=seeds,
                options=SamplingOptions(height=shop.scale.resolution, width=shop.scale.resolution, batch_size=batch),
            )  # fmt: skip

    variants = {"static": lambda: draw(5.0), "dynamic": lambda: draw(dynamic)}
    rounds = 3 if shop.scale.true_size else 1
    seconds = {name: sorted(found)[len(found) // 2] for name, found in time_interleaved(variants, rounds).items()}
    waits: dict[str, int | None] = {}
    spent: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        found: list[str] = []
        with counted_waits(found):
            variant()
        waits[name] = len(found) if shop.cuda else None
        with profiled(spent.setdefault(name, {})):
            variant()
    more = seconds["dynamic"] / seconds["static"] - 1
    figures = {"steps": steps, "candidates": len(CANDIDATES), "evaluators": len(KINDS), "seconds": seconds}
    figures |= {"more_time": more, "host_waits": waits}
    figures |= {f"{name}_busy_ms": cost["busy_ms"] for name, cost in spent.items()}
    figures |= {f"{name}_kinds_ms": cost["kinds_ms"] for name, cost in spent.items()}
    goal = Goal.at_most("at most 5% more time", more if shop.cuda else None, 0.05)
    return Finding(figures, (goal,), () if shop.cuda else ("host waits are counted by CUDA alone",))


STAGE = Stage(
    "guidance",
    "Dynamic guidance beside static guidance",
    lambda shop: [
        Row("batch 1", 18, partial(overhead, 1)),
        Row("batch 4", 50, partial(overhead, 4 if shop.scale.true_size else 2)),
    ],
)
