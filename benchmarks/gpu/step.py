"""Stage 3: the cached LoRA DPO step at true size, through ``PairMethod`` and the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.data import PairBatch
from diffusion_align.training.engine.protocols import Method
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising, InvertedNoising, Noising
from diffusion_align.training.policy.config import TrainConfig

from ..dpo_step import make_batch
from .measure import NO_CUDA, StepCost, loop_cost
from .reference import CHECKPOINTING, answer
from .rows import Finding, Goal, Row, Stage
from .workshop import Scale, Workshop

#: Names of this stage's rows, which others compare themselves with.
KEY = "step"


class Repeated:
    """A source of one batch from the host, as a loader gives it; each time with new seeds, and with new captions where
    they are still to be encoded: the product remembers those it knows."""

    def __init__(self, batch: PairBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[PairBatch]:
        batch = self.batch
        while True:
            yield batch
            captions = [f"{caption} again" for caption in batch.captions] if batch.cond is None else batch.captions
            batch = replace(batch, seeds=batch.seeds + len(batch), captions=captions)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no position."""


def pixel_batch(adapter: Adapter, scale: Scale, pairs: int) -> PairBatch:
    """Random pictures on the host."""
    return make_batch(adapter, pairs, scale.resolution, seed=0)


def cached_batch(adapter: Adapter, scale: Scale, pairs: int) -> PairBatch:
    """What a cache would give: random posteriors and prompt embeddings in half precision, on the host.

    What they hold does not change what a step costs, and encoding pictures would take the budget of other rows.
    """
    side = scale.resolution // adapter.vae_scale_factor
    prompts = adapter.family.memory_inputs(adapter.network, pairs, side, adapter.max_sequence_length).cond
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, pairs, adapter.latent_channels, side, side, generator=generator)
    embeds, pooled = (
        None if part is None else torch.randn(part.shape, generator=generator).half()
        for part in (prompts.embeds, prompts.pooled)
    )
    assert embeds is not None
    cond = Conditioning(embeds, pooled)
    size = torch.tensor([scale.resolution] * 2 + [0, 0] + [scale.resolution] * 2, dtype=torch.float32)
    return PairBatch(
        captions=[f"number {i}" for i in range(pairs)],
        size_ids=size.expand(2, pairs, 6).contiguous(),
        preference=torch.ones(pairs),
        weight=torch.ones(pairs),
        seeds=torch.arange(pairs),
        keys=[str(i) for i in range(pairs)],
        posterior=(mean.half(), torch.full_like(mean, 0.05).half()),
        cond=cond,
    )


def pair_method(adapter: Adapter, batch: PairBatch, config: Any, accelerator: Any) -> Method:
    """The product's method on one batch over and over."""
    noising: Noising = InvertedNoising(adapter, config) if isinstance(config, InPOConfig) else GaussianNoising(adapter)
    return PairMethod(config, adapter, Repeated(batch), noising, accelerator.autocast)


def step_cost(
    shop: Workshop, config: TrainConfig, batch: PairBatch, steps: int | None = None, look: bool = False
) -> StepCost:
    """What the loop's step costs with the shared model as it is."""
    adapter = shop.adapter
    return loop_cost(
        shop, replace(config, per_device_train_batch_size=len(batch)), adapter, partial(pair_method, adapter, batch),
        shop.scale.warmup, steps or shop.scale.steps, look,
    )  # fmt: skip


def cached_step(batch: int, kind: str, shop: Workshop) -> Finding:
    """Speed, memory beside its estimate, and the share of the matmul peak."""
    shop.checkpointing(kind).park_encoders()
    shop.free()
    cost = step_cost(shop, DPOConfig(), cached_batch(shop.adapter, shop.scale, batch))
    figures = cost.figures(batch)
    estimate = answer(shop, f"memory-{batch}").get(kind)
    ratio = None if cost.peak_gib is None or estimate is None else estimate / cost.peak_gib
    figures |= {"estimated_gib": estimate, "estimate_over_measured": ratio}
    operations, peak = answer(shop, "operations"), shop.found.get("device/matmul", {}).get("tflops")
    for name, counted in (("share_of_peak", kind), ("share_without_recomputing", "none")):
        known = counted in operations and peak is not None
        figures[name] = batch * operations[counted] / cost.seconds / 1e12 / peak if known else None
    share = figures["share_of_peak"] if shop.cuda else None
    late = "the CPU had no answer yet" if shop.cuda else "needs a GPU"
    goals = (
        Goal.at_most("memory estimate within 10%", None if ratio is None else abs(ratio - 1), 0.10, late),
        Goal.at_least("half of the matmul peak", share, 0.5, late),
    )
    return Finding(figures, goals, () if shop.cuda else (NO_CUDA,))


def time_spent(batch: int, kind: str, shop: Workshop) -> Finding:
    """Where the time of a step goes: milliseconds by kind of kernel."""
    shop.checkpointing(kind).park_encoders()
    shop.free()
    cost = step_cost(shop, DPOConfig(), cached_batch(shop.adapter, shop.scale, batch), 1, look=True)
    idle = max(0.0, 1 - cost.spent["busy_ms"] / 1000 / cost.seconds) if shop.cuda else None
    figures = {"seconds_per_step": cost.seconds, "device_idle": idle, **cost.spent}
    return Finding(figures, notes=() if shop.cuda else ("operators of the CPU instead of kernels",))


def row_name(batch: int, kind: str) -> str:
    return f"batch {batch}, checkpointing {kind}"


def rows(shop: Workshop) -> list[Row]:
    """What matters most first: a budget that runs out loses the small batches."""
    largest = max(shop.scale.batches)
    order = sorted(shop.scale.batches, key=lambda batch: (batch != largest, -batch))
    seconds = dict(zip(CHECKPOINTING, (0.8, 0.9, 1.1), strict=True))
    looked = min(4, largest)
    return [
        *(
            Row(row_name(batch, kind), 3 + seconds[kind] * batch, partial(cached_step, batch, kind))
            for batch in order
            for kind in reversed(CHECKPOINTING)
        ),
        *(
            Row(f"profile, batch {looked}, checkpointing {kind}", 8, partial(time_spent, looked, kind))
            for kind in ("none", "full")
        ),
    ]


STAGE = Stage(KEY, "The cached LoRA DPO step", rows)
