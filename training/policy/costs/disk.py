"""How many bytes a run writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .memory import GIB, MemoryEstimate
from .meta_model import MetaModel

if TYPE_CHECKING:
    from ..config import TrainConfig

#: Bytes of a cached value: float16.
CACHED = 2


def checkpoint_bytes(config: TrainConfig, memory: MemoryEstimate) -> int:
    """Of one checkpoint: trained weights, optimiser, EMA and copies as in the run, and loadable weights."""
    state = memory.trained_weights + memory.optimizer + memory.ema + memory.copies
    return state + weights_bytes(config, memory)


def weights_bytes(config: TrainConfig, memory: MemoryEstimate) -> int:
    """Of the weights that users load: a whole UNet, or a LoRA in two layouts."""
    return memory.trained_weights * (1 if config.full_finetuning else 2)


def cached_bytes(config: TrainConfig, model: MetaModel) -> int:
    """Of one example in the cache of latents, where images and caption are no other example's; 0: there is no cache.

    Mean and deviation of each image, and again of its mirror image with ``random_flip``, and the prompt's embeddings.
    """
    cached = config.cached_example()
    if cached is None:
        return 0
    channels, height, width = model.latent
    latents = cached.pictures * cached.versions * 2 * channels * height * width
    return CACHED * (latents + model.prompt_values)


def disk_rows(config: TrainConfig, model: MetaModel, memory: MemoryEstimate, examples: int | None) -> dict[str, str]:
    """For reading: name and size of what a run writes.

    Args:
        examples: how many the data set has; None where that is not known.
    """
    each, weights, kept = checkpoint_bytes(config, memory), weights_bytes(config, memory), config.save_total_limit
    best = weights if config.early_stopping_patience else 0
    rows = {
        "checkpoint": _size(each),
        "run folder": f"{_size((kept + 1) * each + weights + best)} at most: {kept} checkpoints, one being written, "
        f"weights{' twice' if best else ''}; no logs, no pictures",
    }
    one = cached_bytes(config, model)
    if not one:
        return rows
    used = "" if config.memory_needs().cached else " (not used: --cache-dir)"
    rows["latent cache"] = f"{one / 2**20:9.3f} MiB a {config.work().name}{used}"
    if examples is not None:
        rows["latent cache, all"] = f"{_size(one * examples)} for {examples:,}; if none recurs"
    return rows


def _size(count: int) -> str:
    return f"{count / GIB:9.3f} GiB"
