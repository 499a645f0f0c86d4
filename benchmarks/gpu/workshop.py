"""The size of a run, and the models that its rows share."""

from __future__ import annotations

import gc
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.files import write_whole

from ..sdxl import build_random_sdxl


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name: on the page.
        resolution: pixels of the true-size stages.
        batches: pairs per step of the step's stage.
        pairs: pairs per optimiser step in the comparison with other scripts.
        steps: steps that are timed, after ``warmup`` untimed ones.
        sampling_steps: of guidance and rollouts.
        matmul, copy_bytes: side of the square matrices, and bytes, of the device's own figures.
        product_steps: of the runs through ``train``.
        true_size: SDXL as published; else the shipped miniature.
    """

    name: str
    resolution: int
    batches: tuple[int, ...]
    pairs: int
    steps: int
    warmup: int
    sampling_steps: int
    rollout_steps: int
    matmul: int
    copy_bytes: int
    product_steps: int
    vae_pictures: int
    true_size: bool


TRUE = Scale("SDXL, 1024 px, bf16", 1024, (1, 2, 4, 8), 8, 3, 1, 25, 10, 8192, 2**30, 20, 8, True)
#: Does everything run? True size, few steps, one batch size: two minutes instead of eight.
REHEARSAL = Scale("a rehearsal of SDXL, 1024 px, bf16", 1024, (2,), 2, 1, 1, 3, 2, 8192, 2**30, 3, 2, True)
SMALL = Scale("scenes-sdxl, 64 px, fp32", 64, (2,), 2, 1, 1, 2, 2, 128, 2**16, 2, 2, False)


@dataclass
class Workshop:
    """What rows share. ``adapter`` is made when it is first asked for, and again after ``clear``.

    Attributes:
        device: where everything runs.
        folder: for files of a run.
        found: figures of earlier rows by "stage/row".
        helpers: processes on the CPU, by what they find out.
        answers: what was found out on the CPU without one.
    """

    scale: Scale
    device: torch.device
    folder: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    helpers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _adapter: Adapter | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights: bf16 at true size."""
        return torch.bfloat16 if self.scale.true_size else torch.float32

    @property
    def precision(self) -> str:
        """``mixed_precision`` of the runs."""
        return "bf16" if self.scale.true_size else "no"

    def new_adapter(self) -> Adapter:
        """The run's model, its own: SDXL's true size with random weights made on the device, or the miniature."""
        if not self.scale.true_size:
            return load_adapter("scenes-sdxl", device=self.device)
        torch.manual_seed(0)
        return build_random_sdxl(self.device, self.dtype)

    @property
    def adapter(self) -> Adapter:
        """The model of the true-size stages with a LoRA of rank 8."""
        if self._adapter is None:
            self._adapter = self.new_adapter().train_lora(rank=8)
        return self._adapter

    def checkpointing(self, kind: str) -> Adapter:
        """The shared model, recomputing "none", "attention" or "full" of its activations."""
        unet = self.adapter.unet
        unet.disable_gradient_checkpointing()
        if kind != "none":
            self.adapter.family.recompute(unet, attention_only=kind == "attention")
        return self.adapter

    def with_encoders(self, checkpointing: str = "none") -> Adapter:
        """The shared model with VAE and text encoders beside it on the device."""
        return self.checkpointing(checkpointing).to(self.device)

    def clear(self) -> None:
        """Let go of the shared model."""
        self._adapter = None
        self.free()

    def free(self) -> None:
        """Give the device memory back that nothing uses any more."""
        if self.cuda:
            gc.collect()  # on a CPU it would only take its second before every row
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, whenever the process is stopped."""
    write_whole(path, json.dumps(content, indent=2).encode() + b"\n")
