"""``train --dry-run``: what a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from diffusion_align.hardware import find_card

from .engine.config import RunConfig
from .settings import to_dict


def make_plan(config: RunConfig, world_size: int | None = None) -> str:
    """Resolved settings, data counts, memory, disk, operations and hours, steps and epochs, as text.

    Args:
        world_size: number of devices; None: as many cards as ``config.card`` means.

    Raises:
        ValueError, FileNotFoundError, OSError: what would stop the run early: data or model that cannot be read.
    """
    world_size = world_size or (1 if config.card is None else find_card(config.card).count)
    notes = config.plan(world_size)
    costs = dict(notes.sections)
    if config.card is not None:
        costs.setdefault("hours", f"not estimated: the operations of {config.method} are not counted")
    sections = {
        "settings": yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        **costs,
        "steps": _steps(config, world_size, notes.examples),
    }
    return "\n\n".join(f"{title}\n{_indented(content)}" for title, content in sections.items())


def _steps(config: RunConfig, world_size: int, examples: int | None) -> dict[str, str]:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    rows = {
        "optimiser steps": f"{config.max_steps:,}",
        "global batch": f"{batch:,} = {config.per_device_train_batch_size} per device x "
        f"{config.gradient_accumulation_steps} accumulated x {world_size} devices",
        "examples seen": f"{batch * config.max_steps:,}",
    }
    if examples:
        rows["epochs"] = f"{batch * config.max_steps / examples:.2f}"
    rows["checkpoints"] = f"every {config.save_steps} steps, {config.save_total_limit} kept, in {config.output_dir}"
    return rows


def _indented(content: str | Mapping[str, str]) -> str:
    if not isinstance(content, str):
        width = max(len(name) for name in content) + 2
        content = "\n".join(f"{name:<{width}}{value}" for name, value in content.items())
    return "\n".join("  " + line for line in content.splitlines())
