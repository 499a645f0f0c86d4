"""The one training loop. A method brings batches and a loss; everything else is here, in the order it happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from diffusion_align.quiet import progress_bar

from .checkpoint import load_checkpoint, save_checkpoint
from .config import RunConfig
from .guard import FiniteGuard, Patience, StopSignal
from .metrics import MetricLog
from .optimizer import build_optimizer
from .protocols import Method, RunInterrupted, Trainable, Validate
from .reporting.last_words import validated_line
from .resuming import record_of
from .sharding import distribute, forget_gathered, is_cut, saved_whole, uncut
from .state import collect_state, restore_state
from .watching.watchdog import Watchdog

#: What stopped a run that found no better weights for long, or raised an alarm (then with its name behind a colon); it
#: has ended, and is not to be continued.
EARLY_STOPPING = "early stopping"


@dataclass(repr=False)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        output_dir: folder with the weights, config.yaml, metrics.jsonl and checkpoints, which hold weights, too.
        weights: what ``Adapter.load_weights`` or diffusers load; None if the run was interrupted (the checkpoints have
            them then), and in all processes but the first.
        step: optimiser steps done.
        stopped: None when it ran to the end, "early stopping", or the name of the signal that stopped it; where an
            alarm did it, "early stopping: " and the name of its rule.
        history: every logged line: {"step": ..., "loss": ..., ...}.
    """

    output_dir: Path
    weights: Path | None
    step: int
    stopped: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        how = "" if self.stopped is None else f", ended by {self.stopped}"
        loss = next((f", loss {line['loss']:.4g}" for line in reversed(self.history) if "loss" in line), "")
        return f"TrainResult({self.step:,} steps{loss}{how}: {self.weights or self.output_dir})"

    @property
    def ended_early(self) -> bool:
        """Whether it ended by early stopping, and is not to be continued."""
        return self.stopped is not None and self.stopped.startswith(EARLY_STOPPING)


def sync_gradients(accelerator: Accelerator, model: Any, last: bool) -> AbstractContextManager[Any]:
    """All-reduce gradients in the last micro-step only. Of a cut network whole gradients are never kept: they are what
    it was cut for."""
    return nullcontext() if last or is_cut(model) else accelerator.no_sync(model)


@contextmanager
def ema_weights(ema: EMAModel | None, network: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, ``parameters`` of ``network`` have their averaged values."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    forget_gathered(network)
    try:
        yield
    finally:
        ema.restore(parameters)
        forget_gathered(network)


def run_loop(
    config: RunConfig,
    trained: Trainable,
    method: Method,
    accelerator: Accelerator,
    validate: Validate | None = None,
    checkpoint: Path | None = None,
    bare_optimizer: torch.optim.Optimizer | None = None,
    watchdog: Watchdog | None = None,
) -> TrainResult:
    """Train ``trained`` with ``method`` for ``config.max_steps`` optimiser steps.

    Args:
        validate: gives the figures of a validation; called by all processes together.
        checkpoint: a verified one to go on from.
        bare_optimizer: over ``trained``'s parameters, not prepared yet; None makes the one that ``config`` names.
        watchdog: shown every line of metrics; may stop the run. Its state is part of the checkpoints.

    Raises:
        FloatingPointError: three optimiser steps in a row had a loss or gradient that is not finite; the offending
            batch is saved in ``output_dir`` and named.
        CheckpointError: ``checkpoint`` is of a run that trained other weights, or with another optimiser.
        RunInterrupted: the method cannot go on; a checkpoint was written before.
    """
    output_dir = Path(config.output_dir)
    wrapped = distribute(trained, accelerator)
    parameters = list(trained.trainable_parameters().values())
    optimizer = accelerator.prepare_optimizer(bare_optimizer or build_optimizer(config, parameters))
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer.optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    ema = EMAModel(parameters, decay=config.ema_decay) if config.use_ema else None
    step = 0
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
        step = restore_state(state, trained, optimizer.optimizer, scheduler, ema, accelerator.scaler, method)
        accelerator.print(f"resumed from {checkpoint}", file=sys.stderr)
        if watchdog is not None and "watchdog" in state.values:  # checkpoints of before there was one begin anew
            watchdog.load_state_dict(state.values["watchdog"])

    guard = FiniteGuard(accelerator, optimizer, output_dir)
    log = MetricLog(config, accelerator, step, watchdog)
    patience = Patience(config, accelerator, log.path)
    batches = method.batches()
    shown = config.progress and accelerator.is_main_process
    bar = progress_bar(desc="steps", total=config.max_steps, initial=step, disable=not shown)
    trained.network.train()

    def save_weights(folder: Path) -> None:
        """Called by all processes together, each of which may hold a part; the first one writes."""
        trained.network.eval()
        with ema_weights(ema, trained.network, parameters), saved_whole(trained.network):
            if accelerator.is_main_process:  # what the run would leave behind if it ended now
                trained.save(folder)
        trained.network.train()

    def checkpoint_now() -> None:
        state = collect_state(step, trained, optimizer.optimizer, scheduler, ema, accelerator.scaler, method)
        state.values |= record_of(config, accelerator.num_processes)
        if watchdog is not None:
            state.values["watchdog"] = watchdog.state_dict()
        if accelerator.is_main_process:
            save_checkpoint(output_dir, state, step, config.save_total_limit, save_weights)
        else:
            save_weights(output_dir)
        accelerator.wait_for_everyone()

    def validate_now() -> None:
        assert validate is not None
        trained.network.eval()
        with ema_weights(ema, trained.network, parameters):
            metrics = validate(step)
        trained.network.train()
        if patience.is_best(step, metrics):
            save_weights(output_dir / "best")
        log.add_evaluation(step, metrics)
        if config.progress and accelerator.is_main_process:
            tqdm.write(validated_line(step, metrics), file=sys.stderr)

    def early() -> str | None:
        """Why the run should end before its last step, on all processes alike."""
        if patience.exhausted():
            return EARLY_STOPPING
        if watchdog is None or not watchdog.stop_on or not patience.agreed(watchdog.stopped is not None):
            return None
        return f"{EARLY_STOPPING}: {watchdog.stopped}"

    with StopSignal() as stop:
        if validate is not None and step == 0:
            validate_now()
        while step < config.max_steps and not stop.received_anywhere(accelerator) and not early():
            started = time.perf_counter()
            for micro_step in range(config.gradient_accumulation_steps):
                last = micro_step + 1 == config.gradient_accumulation_steps
                # A method may run the forward pass that is trained while it makes the batch.
                with sync_gradients(accelerator, wrapped, last):
                    try:
                        batch = next(batches)
                        loss, metrics = method.loss(batch)
                    except RunInterrupted:
                        checkpoint_now()
                        raise
                    accelerator.backward(loss / config.gradient_accumulation_steps)
                guard.watch(loss, batch)
                log.add(metrics)
            norm = uncut(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
            guard.step(norm)
            optimizer.zero_grad()
            scheduler.step()
            if ema is not None:
                ema.step(parameters)
            step += 1
            log.end_step(step, norm, scheduler.get_last_lr()[0], guard.skipped, time.perf_counter() - started)
            bar.update()
            bar.set_postfix_str(log.summary, refresh=False)
            if validate is not None and (step % config.eval_steps == 0 or step == config.max_steps):
                validate_now()
            if step % config.save_steps == 0 or step == config.max_steps:
                checkpoint_now()
        if stop.received and step % config.save_steps and step < config.max_steps:
            checkpoint_now()

    bar.close()
    log.close()
    trained.wrap(lambda module: accelerator.unwrap_model(module, keep_fp32_wrapper=False))
    trained.network.eval()
    weights = None
    ended = early()
    if step >= config.max_steps or ended:
        if ema is not None:
            ema.copy_to(parameters)
            forget_gathered(trained.network)
        with saved_whole(trained.network):
            if accelerator.is_main_process:
                weights = trained.save(output_dir)
    return TrainResult(output_dir, weights, step, ended or stop.received, log.history)
