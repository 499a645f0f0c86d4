"""The run's folder and its accelerator."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from diffusion_align.devices import computes_bf16
from diffusion_align.files import CHECKSUMS, check_writable

from .checkpoint import CheckpointError, list_checkpoints
from .config import RunConfig
from .sharding import check_launch


def prepare_folder(config: RunConfig, output_dir: Path) -> None:
    """Make the run's folder, and refuse to mix two runs in one.

    Raises:
        CheckpointError: checkpoints of an earlier run would be mixed with this one's, or its weights written over.
        ImportError: the tracker of ``report_to`` is not installed.
        OSError: nothing can be written there.
    """
    check_tracker(config.report_to)
    existing = list_checkpoints(output_dir)
    if existing and config.overwrite_output_dir:
        for checkpoint in existing:
            while checkpoint.exists():  # all processes of a run delete them, and meet files that are gone
                with suppress(FileNotFoundError):
                    shutil.rmtree(checkpoint)
    held = [] if config.overwrite_output_dir else existing or weights_in(output_dir)
    if held and config.resume_from_checkpoint is None:
        going_on = "--resume-from-checkpoint latest to continue it, " if existing else ""
        raise CheckpointError(
            f"output_dir {output_dir} holds {held[-1].name} of an earlier run: pass {going_on}"
            "--overwrite-output-dir to start again, or another --output-dir"
        )
    check_writable(output_dir)


def weights_in(folder: Path) -> list[Path]:
    """Files and sealed folders of weights that a run has left, its checkpoints aside."""
    sealed = (path.parent for path in folder.glob(f"*/{CHECKSUMS}") if not path.parent.name.startswith("checkpoint"))
    return [*sorted(sealed), *sorted(folder.glob("*.safetensors"))]


def check_tracker(name: str) -> None:
    """Raise ImportError where accelerate would train on without the tracker that was asked for."""
    if name != "none" and find_spec(name) is None:
        raise ImportError(
            f"report_to {name} needs the {name} package: pip install 'diffusion-align[{name}]', "
            "or set report_to to none"
        )


def leave_processes() -> None:
    """Part from the other processes of a run, if there are any, at the end of the program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_accelerator(config: RunConfig) -> Accelerator:
    """One accelerator per run; settings of an earlier run in the same Python process do not stick.

    Raises:
        ValueError: the launcher asks for what the loop cannot do.
    """
    check_launch(config)
    AcceleratorState._reset_state(reset_partial_state=False)
    tracker = None if config.report_to == "none" else config.report_to
    precision: str = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_bf16("cuda" if torch.cuda.is_available() else "cpu") else "no"
    return Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        project_dir=config.output_dir,
        cpu=not torch.cuda.is_available(),
    )


def filled_steps(config: RunConfig, accelerator: Accelerator, wanted: Tensor, items: int) -> Tensor:
    """Places of ``wanted`` (N,) bool in order, filled up with the first others to a whole number of optimiser steps
    that is the same in all processes; called by all together.

    Args:
        items: training items of each.
    """
    used = config.per_device_train_batch_size * config.gradient_accumulation_steps
    together = used // math.gcd(used, items)
    needed = torch.tensor([-(-int(wanted.sum()) // together) * together], device=accelerator.device)
    count = int(accelerator.gather(needed).max())
    return (~wanted).int().argsort(stable=True)[:count].sort().values
