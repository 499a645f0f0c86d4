"""What a checkpoint holds of a run, and how it is put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel

from .checkpoint import CheckpointError, TrainState, optimizer_to_state, state_to_optimizer
from .sharding import cut_like, uncut_by_first

if TYPE_CHECKING:
    from .protocols import Method, Trainable


def collect_state(
    step: int,
    trained: Trainable,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    ema: EMAModel | None,
    scaler: torch.amp.GradScaler | None,
    method: Method,
) -> TrainState:
    """Trained weights and buffers, optimiser, schedule, EMA, fp16 loss scale, random state and data position.

    Called by all processes together. The first gets all of it, whole, so that a checkpoint is the same however many
    processes there are; the others lack what is cut.
    """
    tensors, values = optimizer_to_state(optimizer)
    policy = {name: p.detach() for name, p in trained.trainable_parameters().items()}
    buffers = {name: buffer.detach() for name, buffer in trained.network.named_buffers()}  # e.g. of batch norms
    position = method.state_dict()
    of_method = {name: value for name, value in position.items() if isinstance(value, torch.Tensor)}
    position = {name: value for name, value in position.items() if name not in of_method}
    state = TrainState(
        {
            "policy": uncut_by_first(policy),
            "buffers": buffers,
            "optimizer": uncut_by_first(tensors),
            "rng": {"cpu": torch.get_rng_state()},
        },
        {"step": step, "optimizer": values, "scheduler": scheduler.state_dict(), "method": position},
    )
    if of_method:
        state.tensors["method"] = of_method
    if torch.cuda.is_available():
        state.tensors["rng"]["cuda"] = torch.cuda.get_rng_state()
    if scaler is not None:
        state.values["scaler"] = scaler.state_dict()
    if ema is not None:
        state.tensors["ema"] = uncut_by_first(dict(zip(policy, ema.shadow_params, strict=True)))
        state.values["ema"] = {"optimization_step": ema.optimization_step}
    return state


def go_on(scheduler: Any, saved: dict[str, Any]) -> None:
    """Set this run's schedule of the learning rate to the saved step; its form and its peak stay this run's."""
    scheduler.last_epoch, scheduler._step_count = saved["last_epoch"], saved["_step_count"]
    forms = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
    scheduler._last_lr = [peak * form(scheduler.last_epoch) for form, peak in forms]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def restore_state(
    state: TrainState,
    trained: Trainable,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    ema: EMAModel | None,
    scaler: torch.amp.GradScaler | None,
    method: Method,
) -> int:
    """Put a checkpoint back; returns its step.

    Raises:
        CheckpointError: it was written by a run with other trained parameters (rank, targets, LoRA or full) or EMA.
    """
    own, saved = trained.trainable_parameters(), state.tensors["policy"]
    differing = own.keys() ^ saved.keys() | {n for n in own.keys() & saved.keys() if own[n].shape != saved[n].shape}
    if differing:
        raise CheckpointError(
            f"the checkpoint trains other parameters than this run, e.g. {sorted(differing)[0]!r}: "
            "model, full_finetuning, lora_rank and lora_target_modules must be the same"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(cut_like(saved[name], parameter))
        for name, buffer in trained.network.named_buffers():
            buffer.copy_(state.tensors["buffers"][name])
    state_to_optimizer(optimizer, state.tensors["optimizer"], state.values["optimizer"])
    go_on(scheduler, state.values["scheduler"])
    method.load_state_dict(state.values["method"] | state.tensors.get("method", {}))
    if scaler is not None and "scaler" in state.values:
        scaler.load_state_dict(state.values["scaler"])
    if (ema is not None) != ("ema" in state.values):
        raise CheckpointError("use_ema differs between the checkpoint and this run")
    if ema is not None:
        averages = state.tensors["ema"]
        ema.shadow_params = [cut_like(averages[name].to(p.device, p.dtype), p) for name, p in own.items()]
        ema.optimization_step = state.values["ema"]["optimization_step"]
    torch.set_rng_state(state.tensors["rng"]["cpu"])
    if "cuda" in state.tensors["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["rng"]["cuda"])
    return int(state.values["step"])
