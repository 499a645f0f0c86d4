"""Metrics of a run: averaged on the device, written to metrics.jsonl and a tracker."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_align.devices import send
from diffusion_align.files import naming, write_whole

from .config import RunConfig
from .watching.watchdog import Watchdog


@dataclass(frozen=True)
class WeightedMean:
    """A metric of some examples only: a log line has sum of totals / sum of weights, or lacks it where there was none.

    Attributes:
        total: scalar, sum of weight x value; of several groups of examples (n,).
        weight: like ``total``, e.g. how many examples.
        groups: what the metric's name ends in for each of them; empty for a scalar.
    """

    total: Tensor
    weight: Tensor
    groups: tuple[str, ...] = ()


#: Metrics of one micro-step, which stay on the device: scalars, whose mean is logged, and means of some examples.
Metrics = Mapping[str, Tensor | WeightedMean]


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

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, first_step: int, watchdog: Watchdog | None = None
    ) -> None:
        self.config, self.accelerator, self.watchdog = config, accelerator, watchdog
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.history: list[dict[str, float]] = []
        self.summary = ""
        self._sums: dict[str, Tensor] = {}
        self._weighted: dict[tuple[str, ...], Tensor] = {}
        self._count, self._seconds, self._steps = 0, 0.0, 0
        if accelerator.is_main_process:
            self._drop_lines_after(first_step)

    def _drop_lines_after(self, step: int) -> None:
        """A run that died after its last checkpoint wrote lines that the resumed run will write again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode())

    def add(self, metrics: Metrics) -> None:
        """Add one micro-step's metrics."""
        for name, value in metrics.items():
            if isinstance(value, WeightedMean):
                both = torch.stack([value.total, value.weight]).detach().float().view(2, -1)
                both = send(both, self.accelerator.device)
                names = tuple(f"{name}{group}" for group in value.groups) or (name,)
                self._weighted[names] = self._weighted[names] + both if names in self._weighted else both
                continue
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
        line = dict(zip(names, values, strict=True)) | self._weighted_means()
        samples = self._steps * self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        line["samples_per_second"] = samples * self.accelerator.num_processes / self._seconds
        line["learning_rate"] = learning_rate
        line["skipped_steps"] = float(skipped)
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(step, line)
        shown = {"loss": "loss", "implicit_accuracy": "acc", "samples_per_second": "samples/s"}
        self.summary = " ".join(f"{short}={line[name]:.3g}" for name, short in shown.items() if name in line)
        self._sums, self._weighted, self._count, self._seconds, self._steps = {}, {}, 0, 0.0, 0

    def _weighted_means(self) -> dict[str, float]:
        """Over all processes, which have the same names; without those that nothing was measured for."""
        if not self._weighted:
            return {}
        groups = sorted(self._weighted)
        sums = self.accelerator.reduce(torch.cat([self._weighted[names] for names in groups], dim=1), "sum")
        names = [name for group in groups for name in group]
        return {name: total / weight for name, (total, weight) in zip(names, sums.T.tolist(), strict=True) if weight}

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of evaluation metrics."""
        if metrics:
            self._write(step, metrics)

    def _write(self, step: int, line: dict[str, float]) -> None:
        if self.watchdog is not None:
            line = line | self.watchdog.seen(step, line)
            for said in self.watchdog.said if self.accelerator.is_main_process else ():
                tqdm.write(said, file=sys.stderr)
        self.history.append({"step": step, **line})
        self.accelerator.log(line, step=step)
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")

    def close(self) -> None:
        """End the trackers. The processes stay connected: another run may follow in them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
