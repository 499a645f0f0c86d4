"""Metrics of a run: averaged on the device, written to metrics.jsonl and a tracker."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.devices import send
from diffusion_align.files import naming, write_whole

from .config import RunConfig


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl; none if it is not there.

    A damaged line is passed over with a warning that names it, the torn last one of a run that died without.
    """
    rows = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int | float):
                raise TypeError("its step is no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}, line {number} is damaged and passed over: {error}", stacklevel=2)
    return rows


class MetricLog:
    """Collects metrics between log lines; the device is read once a line.

    Attributes:
        history: every line written since the start of this process.
        summary: short text for the progress bar.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, first_step: int) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.history: list[dict[str, float]] = []
        self.summary = ""
        self._sums: dict[str, Tensor] = {}
        self._count, self._seconds, self._steps = 0, 0.0, 0
        if accelerator.is_main_process:
            self._drop_lines_after(first_step)

    def _drop_lines_after(self, step: int) -> None:
        """A run that died after its last checkpoint wrote lines that the resumed run will write again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode())

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one micro-step's scalars."""
        for name, value in metrics.items():
            value = send(value.detach().float(), self.accelerator.device)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def end_step(self, step: int, grad_norm: Tensor, learning_rate: float, skipped: Tensor, seconds: float) -> None:
        """Finish an optimiser step; every ``logging_steps`` write a line with means over processes and steps."""
        self._sums["grad_norm"] = self._sums.get("grad_norm", 0.0) + grad_norm.detach().float()
        self._seconds += seconds
        self._steps += 1
        if step % self.config.logging_steps and step != self.config.max_steps:
            return
        names = sorted(self._sums)
        values = torch.stack([self._sums[n] / (self._steps if n == "grad_norm" else self._count) for n in names])
        values = self.accelerator.reduce(values, "mean").tolist()
        line = dict(zip(names, values, strict=True))
        samples = self._steps * self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        line["samples_per_second"] = samples * self.accelerator.num_processes / self._seconds
        line["learning_rate"] = learning_rate
        line["skipped_steps"] = float(skipped)
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(step, line)
        shown = {"loss": "loss", "implicit_accuracy": "acc", "samples_per_second": "samples/s"}
        self.summary = " ".join(f"{short}={line[name]:.3g}" for name, short in shown.items() if name in line)
        self._sums, self._count, self._seconds, self._steps = {}, 0, 0.0, 0

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of evaluation metrics."""
        if metrics:
            self._write(step, metrics)

    def _write(self, step: int, line: dict[str, float]) -> None:
        self.history.append({"step": step, **line})
        self.accelerator.log(line, step=step)
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")

    def close(self) -> None:
        """End the trackers. The processes stay connected: another run may follow in them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
