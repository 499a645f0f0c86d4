"""``train --dry-run``: what a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import yaml

from diffusion_align.data import StreamedPairs

from .engine.config import RunConfig
from .online.config import RolloutConfig
from .online.method import check_rollout, items_per_rollout
from .pairs.config import DPOConfig
from .pairs.loading import load_training_pairs
from .policy.config import TrainConfig
from .policy.memory import MemoryEstimate, estimate_memory
from .scorers.building import open_judgements
from .scorers.config import RewardConfig
from .settings import to_dict

GIB = 2**30


def make_plan(config: RunConfig, world_size: int = 1) -> str:
    """Resolved settings, steps and epochs, data counts and memory, as text.

    Raises:
        ValueError, FileNotFoundError, OSError: what would stop the run early: data or model that cannot be read.
    """
    sections = {"settings": yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()}
    used = None
    if isinstance(config, DPOConfig):
        pairs = load_training_pairs(config)
        if isinstance(pairs, StreamedPairs):
            sections["data"] = f"{config.dataset} ({config.dataset_split}) is streamed: not counted"
        else:
            used = len(pairs)
            counts = pairs.counts | {"pairs used": used}
            sections["data"] = _lines({name: f"{count:,}" for name, count in counts.items()})
    if isinstance(config, RewardConfig):
        judgements = open_judgements(config, config.dataset_split, config.max_pairs)
        used = len(judgements)
        sections["data"] = f"{used:,} {judgements.unit}"
    if isinstance(config, RolloutConfig):
        check_rollout(config)
        steps = config.per_device_train_batch_size * config.gradient_accumulation_steps
        sections["rollouts"] = _lines(
            {
                "pictures": f"{config.prompts_per_rollout * config.num_generations} = {config.prompts_per_rollout} "
                f"prompts x {config.num_generations}, per device",
                "training items": f"{items_per_rollout(config)} a rollout, {steps} an optimiser step",
            }
        )
    sections["steps"] = _lines(_steps(config, world_size, used))
    if isinstance(config, TrainConfig):
        estimate = estimate_memory(config, world_size)
        sections["memory"] = "unknown: give --model-config for a single file" if estimate is None else _memory(estimate)
    return "\n\n".join(f"{title}\n{_indented(text)}" for title, text in sections.items())


def _steps(config: RunConfig, world_size: int, pairs: int | None) -> dict[str, str]:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    rows = {
        "optimiser steps": f"{config.max_steps:,}",
        "global batch": f"{batch:,} = {config.per_device_train_batch_size} per device x "
        f"{config.gradient_accumulation_steps} accumulated x {world_size} devices",
        "examples seen": f"{batch * config.max_steps:,}",
    }
    if pairs:
        rows["epochs"] = f"{batch * config.max_steps / pairs:.2f}"
    rows["checkpoints"] = f"every {config.save_steps} steps, {config.save_total_limit} kept, in {config.output_dir}"
    return rows


def _memory(estimate: MemoryEstimate) -> str:
    rows = {
        field.name.replace("_", " "): f"{getattr(estimate, field.name) / GIB:9.3f} GiB"
        for field in fields(estimate)
        if field.name not in ("trained_parameters", "vae_in_backward")
    }
    rows["activations"] += " (kept for the backward pass)"
    rows["vae"] += " (with the activations)" if estimate.vae_in_backward else " (not while activations are kept)"
    rows["total, per device"] = f"{estimate.total / GIB:9.3f} GiB (allocator overhead is not in it)"
    rows["trained parameters"] = f"{estimate.trained_parameters:,}"
    return _lines(rows)


def _lines(rows: Mapping[str, str]) -> str:
    width = max(len(name) for name in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
