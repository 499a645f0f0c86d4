"""What stops a run before it does harm: numbers that are not finite, and signals."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from diffusion_align.files import save_tensors

from .config import RunConfig
from .metrics import read_metrics

#: Steps in a row with a loss or gradient that is not finite before the run stops.
MAX_BAD_STEPS = 3


class FiniteGuard:
    """Skips optimiser steps whose loss or gradient is not finite, without asking the device for an answer.

    Fused optimisers take the verdict as a device tensor (``found_inf``); the count of bad steps in a row stays on the
    device too. On the CPU it is read at every step; on an accelerator every ``read_every`` steps a copy of it is asked
    for, and read when the next one is, so that the run stops some steps later but never waits.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any, output_dir: Path, read_every: int = 3) -> None:
        self.accelerator, self.optimizer, self.output_dir = accelerator, optimizer, output_dir
        device = accelerator.device
        self.waits = device.type == "cpu"
        self.read_every = 1 if self.waits else read_every
        self.asked: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.fused = bool(optimizer.optimizer.defaults.get("fused")) and accelerator.scaler is None
        self.skipped = torch.zeros((), device=device)
        self.streak = torch.zeros((), device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = 0
        self.batch: Any = None

    def watch(self, loss: Tensor, batch: Any) -> None:
        """Note one micro-step's loss and keep its batch in case it has to be saved."""
        self.finite = self.finite & torch.isfinite(loss.detach())
        self.batch = batch

    def step(self, grad_norm: Tensor) -> None:
        """Take the optimiser step, or skip it.

        Raises:
            FloatingPointError: this was the third bad step in a row.
        """
        finite = self.finite
        if self.accelerator.scaler is None:  # with fp16 the loss scaler handles gradients, which overflow by design
            finite = finite & torch.isfinite(grad_norm)
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce((~finite).float(), "sum") == 0
        if self.fused:
            self.optimizer.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        self.skipped = self.skipped + (~finite).float()
        self.streak = torch.where(finite, torch.zeros_like(self.streak), self.streak + 1)
        self.finite = torch.ones_like(self.finite)
        self.steps += 1
        if self.steps % self.read_every:
            return
        streak = int(self.streak) if self.waits else self._earlier_streak()
        if streak >= MAX_BAD_STEPS:
            raise FloatingPointError(
                f"the loss or its gradient was not finite for {streak} optimiser steps in a row; "
                f"the last batch is saved in {self._save_batch()}"
            )

    def _earlier_streak(self) -> int:
        """The count that was asked for at the last reading, while the device works on; asks for the present one."""
        asked, event = self.asked or (None, None)
        done = torch.cuda.Event() if self.streak.is_cuda else None
        copied = self.streak.to("cpu", non_blocking=True)
        if done is not None:
            done.record()
        self.asked = copied, done
        if event is not None:
            event.synchronize()
        return 0 if asked is None else int(asked)

    def _save_batch(self) -> Path:
        content = dict(leaves(self.batch))
        tensors = {  # copies: a file takes no two views of one tensor
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in content.items()
            if isinstance(value, Tensor)
        }
        notes = {name: str(value) for name, value in content.items() if not isinstance(value, Tensor)}
        path = self.output_dir / f"bad_batch_rank{self.accelerator.process_index}.safetensors"
        return save_tensors(path, tensors, notes)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a batch is made of, whatever holds it: dataclasses, mappings and tuples are opened, and the names of what is
    in them joined by dots; lists of text become one text. What is None is left out."""
    parts: Iterable[tuple[Any, Any]]
    if value is None:
        return
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        yield name, "\n".join(value)
        return
    if is_dataclass(value):
        parts = ((part.name, getattr(value, part.name)) for part in fields(value))
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for part, content in parts:
        yield from leaves(content, f"{name}.{part}" if name else str(part))


class Patience:
    """Watches one metric of validation (larger is better), tells a new best, and counts validations without one: early
    stopping.

    A resumed run reads what was seen before from the run's metrics.jsonl.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, metrics_file: Path) -> None:
        self.config, self.accelerator = config, accelerator
        self.best, self.waited, self.seen = float("-inf"), 0, -1
        # The first process decides for all: another one may see another file, or none.
        for values in read_metrics(metrics_file) if accelerator.is_main_process else ():
            if config.best_metric in values:
                self._note(values["step"], values)

    def is_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note a validation; whether its weights are the best so far and to be kept. Called by all processes together.

        Raises:
            ValueError: validation has no such metric, and early stopping waits for it.
        """
        return self.agreed(self._note(step, metrics))

    def _note(self, step: int, metrics: Mapping[str, float]) -> bool:
        name = self.config.best_metric
        if step <= self.seen or (name not in metrics and not self.config.early_stopping_patience):
            return False
        if name not in metrics:
            raise ValueError(f"metric_for_best_model = {name!r}: validation has {', '.join(metrics) or 'no metrics'}")
        self.seen = step
        better = metrics[name] > self.best
        self.best, self.waited = (metrics[name], 0) if better else (self.best, self.waited + 1)
        return better

    def exhausted(self) -> bool:
        """Whether the run should stop, on all processes alike."""
        patience = self.config.early_stopping_patience
        if not patience:
            return False
        return self.agreed(self.waited >= patience)

    def agreed(self, answer: bool) -> bool:
        """The first process's answer; one process alone does not ask its device for its own."""
        if self.accelerator.num_processes == 1:
            return answer
        return bool(broadcast(torch.tensor(float(answer), device=self.accelerator.device)))


class StopSignal(AbstractContextManager["StopSignal"]):
    """Turns SIGINT and SIGTERM into a polite request to stop after the current step; a second one kills."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # only the main thread may; a run in a notebook's worker thread goes without
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def received_anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop, so that all leave at the same step."""
        if accelerator.num_processes > 1:
            mine = torch.tensor(float(self.received is not None), device=accelerator.device)
            if accelerator.reduce(mine, "sum") > 0 and self.received is None:
                self.received = "signal on another process"
        return self.received is not None
