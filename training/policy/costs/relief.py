"""What to say when a run dies for want of memory or of disk: what helps most, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_align.devices import is_out_of_memory
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.resuming import may_change

GIB = 2**30
#: How many settings are named.
MOST = 3


@contextmanager
def with_advice(config: RunConfig) -> Iterator[None]:
    """Inside, a run of ``config`` is on its way: errors for want of memory or of disk say how to go on.

    Raises:
        RuntimeError: out of memory; in one line, with the settings that would help most.
        OSError: of the same kind as the one inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = (str(error).splitlines() or ["no more of the host's"])[0].split(". ")[0]
        helps = "; ".join(best_savings(config)) or "a smaller model or resolution"
        raise RuntimeError(f"out of memory ({told}). What helps most: {helps}{standing(config)}") from error
    except OSError as error:
        if "cannot be written" not in str(error):
            raise
        raise type(error)(f"{error}{standing(config)}") from error


def check_room(config: RunConfig, room: int) -> None:
    """Whether a device with ``room`` bytes can hold a run, before anything is loaded; where there is no estimate, it is
    tried.

    Raises:
        ValueError: the estimate is larger.
    """
    needed, model = _estimate(config, {}), getattr(config, "model", "the model")
    if needed is None or needed <= room:
        return
    helps = "; ".join(_told(change, 0, False) for change in config.savings()[:MOST]) or "a smaller model"
    raise ValueError(
        f"this run of {model} is estimated to need {needed / GIB:.1f} GiB, and the device has {room / GIB:.1f}: it "
        f"does not fit. What helps: {helps}, or cached latents (cache_dir); base weights in fewer bits (int8, nf4) are "
        "not supported"
    )


def standing(config: RunConfig) -> str:
    """Which checkpoint a run of ``config`` goes on from; "" without any."""
    found = list_checkpoints(Path(config.output_dir))
    return f". {found[-1]} stands: go on with --resume-from-checkpoint latest" if found else ""


def best_savings(config: RunConfig) -> list[str]:
    """The settings, at most three, that take most memory off a run, with what the estimate says that they save.

    Where there is no estimate (the training of scorers, a single file without its configs) they stand in the order of
    ``RunConfig.savings``.
    """
    whole, changes = _estimate(config, {}), config.savings()
    after = [None if whole is None else _estimate(config, change) for change in changes]
    saved = [0 if whole is None or bytes_ is None else whole - bytes_ for bytes_ in after]
    best = sorted(range(len(changes)), key=lambda i: -saved[i])[:MOST]
    resumes = bool(list_checkpoints(Path(config.output_dir)))
    return [_told(changes[i], saved[i], resumes and not changes[i].keys() <= may_change(config)) for i in best]


def _told(change: Mapping[str, Any], saved: int, anew: bool) -> str:
    text = " with ".join(f"{name} {str(value).lower()}" for name, value in change.items())
    notes = [f"about {saved / GIB:.2f} GiB less"] if saved > 0.005 * GIB else []
    notes += ["in a new run only"] if anew else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _estimate(config: RunConfig, change: Mapping[str, Any]) -> int | None:
    try:
        return replace(config, **change).memory_bytes()
    except Exception:  # an estimate that fails must not hide why a run did, nor keep one from its start
        return None
