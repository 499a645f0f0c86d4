"""Going on from a checkpoint, perhaps with other settings than it was written with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, find_checkpoint, saved_values
from .config import RunConfig

#: Settings of the examples in one optimiser step; where they may change, so may the number of processes.
BATCH = "per_device_train_batch_size"


#: Settings of one start of a run.
ONCE = frozenset(
    {"config", "dry_run", "card", "overwrite_output_dir", "resume_from_checkpoint", "output_dir", "progress"}
)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What a run does, as JSON has it."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in ONCE}
    settings: dict[str, Any] = json.loads(json.dumps(values))
    return settings


def record_of(config: RunConfig, num_processes: int) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    return {"settings": settings_of(config), "num_processes": num_processes}


def may_change(config: RunConfig) -> frozenset[str]:
    """The settings that a resumed run may change: what its class and those below it declare."""
    return frozenset().union(*(vars(cls).get("changeable", ()) for cls in type(config).__mro__))


def resumed_checkpoint(config: RunConfig, output_dir: Path, num_processes: int) -> tuple[Path, list[str]]:
    """The whole checkpoint that ``config.resume_from_checkpoint`` leads to, and what there is to say about it.

    Settings that only say how to go on (learning rate, steps, logging, validation, ...) may differ from those of the
    checkpoint's run; they are applied. A checkpoint of before there was a record of settings is taken as it is.

    Raises:
        CheckpointError: no whole checkpoint is there, or its run had other settings that cannot change on the way
            (data, seed, objective, ...); each is named with both values.
    """
    assert config.resume_from_checkpoint is not None
    checkpoint, notes = find_checkpoint(config.resume_from_checkpoint, output_dir)
    values = saved_values(checkpoint)
    if "settings" not in values:
        return checkpoint, notes
    saved, ours, free = values["settings"], settings_of(config), may_change(config)
    changed = {name: (saved[name], now) for name, now in ours.items() if name in saved and saved[name] != now}
    if BATCH not in free and values["num_processes"] != num_processes:
        changed["number of processes"] = (values["num_processes"], num_processes)
    refused = [_told(name, *both) for name, both in changed.items() if name not in free]
    if refused:
        raise CheckpointError(
            f"{checkpoint} was written with other settings, which cannot change on the way: {'; '.join(refused)}. "
            "Resume with the checkpoint's, or start a new run (a diffusion model's with init_weights)"
        )
    applied = [_told(name, *both) for name, both in changed.items()]
    return checkpoint, [*notes, *([f"settings changed on the way: {'; '.join(applied)}"] if applied else [])]


def _told(name: str, before: Any, now: Any) -> str:
    return f"{name} was {before!r}, is {now!r}"
