"""Stage 7: the other methods: InPO's step, GRPO's rollout and update, all weights with Adafactor and 8-bit AdamW."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.rewards import RewardOutput, RewardScorer
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.online.grpo import GRPOMethod
from diffusion_align.training.online.rollout import RolloutEngine
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig

from ..harness import synchronize
from .measure import NO_CUDA, counted_waits, loop_cost
from .rows import Finding, Row, Stage
from .step import cached_batch, pair_method, step_cost
from .workshop import Workshop


class Brightness(RewardScorer):
    """A reward that needs no weights: what a rollout costs beside its scorer."""

    name = "brightness"

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1), requires_grad=False)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        return RewardOutput(images.flatten(1).mean(dim=1) + self.zero)


def inpo(shop: Workshop) -> Finding:
    """Ten inversion steps before each step."""
    shop.checkpointing("attention").park_encoders()
    pairs = min(2, shop.scale.pairs)
    cost = step_cost(
        shop, InPOConfig(inversion_steps=shop.scale.rollout_steps), cached_batch(shop.adapter, shop.scale, pairs), 1
    )
    figures = cost.figures(pairs) | {"inversion_steps": shop.scale.rollout_steps}
    return Finding(figures, notes=() if shop.cuda else (NO_CUDA,))


def grpo(shop: Workshop) -> Finding:
    """Drawing and scoring a rollout, and an update on its steps."""
    adapter, pictures = shop.with_encoders("attention"), 4
    prompts = shop.folder / "prompts.txt"
    prompts.write_text("one red star\ntwo blue circles\n")
    config = GRPOConfig(
        dataset=str(prompts), num_generations=pictures, prompts_per_rollout=1, train_steps=1,
        num_inference_steps=shop.scale.rollout_steps, resolution=shop.scale.resolution,
        rollout_batch_size=pictures, per_device_train_batch_size=pictures // 2, min_timestep=100,
        output_dir=str(shop.folder / "grpo"), mixed_precision=shop.precision, progress=False, report_to="none",
    )  # type: ignore[arg-type]  # fmt: skip
    accelerator = build_accelerator(config)
    engine = RolloutEngine(config, adapter, accelerator, Brightness().to(shop.device))
    method: Any = GRPOMethod(config, adapter, engine, accelerator)
    method.draw(0)  # compiles kernels and runs the self-test
    waits: list[str] = []
    synchronize()
    started = time.perf_counter()
    with counted_waits(waits):
        method.draw(1)
    synchronize()
    drawn = time.perf_counter() - started
    stream, seconds = method.batches(), []
    for _ in range(2):
        batch = next(stream)
        synchronize()
        started = time.perf_counter()
        method.loss(batch)[0].backward()
        synchronize()
        seconds.append(time.perf_counter() - started)
    for parameter in adapter.trainable_parameters().values():
        parameter.grad = None
    figures = {
        "steps": shop.scale.rollout_steps,
        "pictures": pictures,
        "rollout_pictures_per_second": pictures / drawn,
        "rollout_host_waits": len(waits) if shop.cuda else None,
        "update_items_per_second": (pictures // 2) / seconds[-1],
    }
    return Finding(figures, notes=() if shop.cuda else (NO_CUDA,))


def full(optim: str, shop: Workshop) -> Finding:
    """All weights in float32, the reference a copy in bf16; the shared model makes room."""
    shop.clear()
    adapter = shop.new_adapter()
    batch = cached_batch(adapter, shop.scale, 1)
    adapter.train_full(reference_dtype=shop.dtype).park_encoders()
    adapter.optimize("full")
    config: Any = DPOConfig(full_finetuning=True, optim=optim, learning_rate=1e-7)  # type: ignore[arg-type]
    cost = loop_cost(shop, config, adapter, partial(pair_method, adapter, batch), 1, 2)
    return Finding(cost.figures(1) | {"optim": optim}, notes=() if shop.cuda else (NO_CUDA,))


STAGE = Stage(
    "methods",
    "Other methods",
    lambda shop: [
        Row("inpo", 10, inpo),
        Row("grpo", 13, grpo),
        Row("all weights, adafactor", 9, partial(full, "adafactor")),
        Row("all weights, adamw_8bit", 20, partial(full, "adamw_8bit"), needs="bitsandbytes"),
    ],
)
