"""Checkpoints: safetensors and JSON only, written beside the run and renamed into place, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


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
    """
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, group in state.tensors.items():
        save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(state.values))
    if save_weights is not None:
        save_weights(partial)
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in written
    }
    manifest = {"step": step, "state": sorted(state.tensors), "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*written, partial / MANIFEST]:
        path.chmod(0o644)  # safetensors writes for the owner alone
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or torn."""
    return sorted(p for p in folder.glob(PREFIX + "*") if p.is_dir())


def verify(checkpoint: Path) -> None:
    """Check every file against the manifest.

    Raises:
        CheckpointError: the first file that is missing or differs.
    """
    manifest = checkpoint / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{manifest} is missing or unreadable: this is no whole checkpoint") from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} does not match its checksum")


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
    tensors = {name: load_file(checkpoint / f"{name}.safetensors") for name in names}
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
