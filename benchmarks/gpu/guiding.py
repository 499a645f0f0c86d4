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
from .measure import counted_waits, places, profiled
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

    def draw(guidance: DynamicGuidance | float, count: int = steps) -> None:
        with precision:
            sample(
                adapter, prompts, num_inference_steps=count, guidance=guidance, seeds=seeds,
                options=SamplingOptions(height=shop.scale.resolution, width=shop.scale.resolution, batch_size=batch),
            )  # fmt: skip

    guidances: dict[str, DynamicGuidance | float] = {"static": 5.0, "dynamic": dynamic}
    variants = {name: partial(draw, guidance) for name, guidance in guidances.items()}
    rounds = 3 if shop.scale.true_size else 1
    seconds = {name: sorted(found)[len(found) // 2] for name, found in time_interleaved(variants, rounds).items()}
    more = seconds["dynamic"] / seconds["static"] - 1
    figures: dict[str, Any] = {"steps": steps, "candidates": len(CANDIDATES), "evaluators": len(KINDS)}
    figures |= {"seconds": seconds, "more_time": more, "profiled_steps": min(3, steps)}
    for name, guidance in guidances.items():
        waits: list[str] = []
        with counted_waits(waits):
            variants[name]()
        spent: dict[str, Any] = {}
        with profiled(spent):
            draw(guidance, min(3, steps))
        figures |= {f"{name}_host_waits": len(waits) if shop.cuda else None, f"{name}_waits_at": places(waits)}
        figures |= {f"{name}_busy_ms": spent["busy_ms"], f"{name}_kinds_ms": spent["kinds_ms"]}
    goal = Goal.at_most("at most 5% more time", more if shop.cuda else None, 0.05)
    return Finding(figures, (goal,), () if shop.cuda else ("host waits are counted by CUDA alone",))


STAGE = Stage(
    "guidance",
    "Dynamic guidance beside static guidance",
    lambda shop: [
        Row("batch 1", 60, partial(overhead, 1)),
        Row("batch 4", 62, partial(overhead, 4 if shop.scale.true_size else 2)),
    ],
)
