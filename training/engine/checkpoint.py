"""Checkpoints: safetensors and JSON only, written beside the run and renamed into place, verified when read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.files import (
    check_files,
    files_in,
    load_tensors,
    naming,
    save_tensors,
    with_checksum,
    write_whole,
)

from .sharding import cut_like

MANIFEST = "manifest.json"
#: What only the groups of one optimiser have, and how ``optim`` names it.
OPTIMIZERS = {
    "amsgrad": "adamw",
    "betas": "adamw_8bit",
    "clip_threshold": "adafactor",
    "beta2_decay": "adafactor_scaled",
}
PREFIX = "checkpoint-"


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint that cannot be used, or a run's folder that is taken; the message names the file and what is wrong.

    It is a ValueError because that is bad input, as the command line's exit status says.
    """


@dataclass
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        tensors: named groups of tensors; each becomes one safetensors file.
        values: JSON-able rest (step, optimiser settings, data position, ...).
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: TrainState, step: int, keep: int, save_weights: Callable[[Path], object] | None = None
) -> Path:
    """Write ``folder/checkpoint-STEP`` atomically, then delete all but the newest ``keep``.

    A crash at any moment leaves either the whole checkpoint under its final name or none.

    Args:
        save_weights: writes the trained weights into a folder, as their users load them; None leaves them out.

    Raises:
        OSError: it cannot be written; the file is named. What was written of it is deleted, older ones stay.
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(partial):
            _write(partial, state, step, save_weights)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, state: TrainState, step: int, save_weights: Callable[[Path], object] | None) -> None:
    """A checkpoint's files, the manifest last."""
    folder.mkdir(parents=True)
    for name, group in state.tensors.items():
        save_tensors(folder / f"{name}.safetensors", group)
    write_whole(folder / "state.json", json.dumps(state.values).encode())
    if save_weights is not None:
        save_weights(folder)
    manifest = {"step": step, "state": sorted(state.tensors), "files": files_in(folder)}
    write_whole(folder / MANIFEST, json.dumps(with_checksum(manifest), indent=1).encode())
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for the owner alone
            _flush(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or torn."""
    return sorted(p for p in folder.glob(PREFIX + "*") if p.is_dir())


def verify(checkpoint: Path) -> None:
    """Check every file against the manifest.

    Raises:
        CheckpointError: the first file that is missing or differs.
    """
    try:
        check_files(checkpoint / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint / MANIFEST} is missing: this is no whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None


def find_checkpoint(where: str, output_dir: Path) -> tuple[Path, list[str]]:
    """Resolve ``resume_from_checkpoint`` to a whole checkpoint.

    Args:
        where: "latest", a run folder (its latest whole checkpoint), or one checkpoint folder (that one or an error).

    Returns:
        The checkpoint, and a message for every newer torn one that was skipped.

    Raises:
        CheckpointError: none is there, or none is whole.
    """
    folder = output_dir if where == "latest" else Path(where)
    if folder.name.startswith(PREFIX):
        verify(folder)
        return folder, []
    passed: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            passed.append(f"skipped torn checkpoint: {error}")
        else:
            return checkpoint, passed
    detail = "; ".join(passed) or "expected folders named checkpoint-STEP"
    raise CheckpointError(f"resume_from_checkpoint {where}: no whole checkpoint in {folder} ({detail})")


def saved_values(checkpoint: Path) -> dict[str, Any]:
    """The values of a verified checkpoint, without its tensors."""
    values: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return values


def load_checkpoint(checkpoint: Path) -> TrainState:
    """Read a verified checkpoint back."""
    # Checkpoints of 0.1 have no list: all of their files are state.
    names = json.loads((checkpoint / MANIFEST).read_text()).get("state")
    names = sorted(path.stem for path in checkpoint.glob("*.safetensors")) if names is None else names
    tensors = {name: load_tensors(checkpoint / f"{name}.safetensors") for name in names}
    return TrainState(tensors, saved_values(checkpoint))


def optimizer_to_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors ("INDEX.NAME") and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def state_to_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Undo ``optimizer_to_state``; learning rate, decays and the like stay this run's.

    Raises:
        CheckpointError: it is another optimiser's state.
    """
    own, saved = optimizer.param_groups, values["param_groups"]
    if (theirs := _kind(saved)) != (ours := _kind(own)):
        raise CheckpointError(
            f"the checkpoint's optimiser is {theirs}, this run's is {ours}: set optim to {theirs} "
            "(adafactor_scaled is what was called adafactor up to 0.1)"
        )
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in own for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = cut_like(tensor, parameters[int(index)])
    for index, entries in values["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _kind(groups: list[dict[str, Any]]) -> str:
    return next((name for mark, name in OPTIMIZERS.items() if mark in groups[0]), "another one")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
