"""Whether and where reference errors are remembered, as a run's settings say."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.data import CachedPairs, PairBatch, PairLoader
from diffusion_align.data.cache import hash_weights
from diffusion_align.training.engine.sourced_method import BatchSource

from .config import DPOConfig, ReferencedConfig
from .error_memory import ErrorMemory
from .loading import fixed_draws
from .reference import PairByPair, Reference, WholeBatch
from .switches.moving_reference import MovingReference


def batch_reference(config: ReferencedConfig, adapter: Adapter) -> Reference:
    """A reference that answers batch by batch: frozen, or moving as the settings say."""
    return WholeBatch(adapter) if config.reference == "frozen" else MovingReference(config, adapter)


def build_reference(config: DPOConfig, adapter: Adapter, source: BatchSource[PairBatch]) -> Reference:
    """Batch by batch for fresh noise, for lists, and where the reference moves; pair by pair for fixed draws, with a
    memory if ``reference_cache`` says so."""
    draws = fixed_draws(config)
    if draws is None or config.is_list or config.reference != "frozen":
        return batch_reference(config, adapter)
    if not config.reference_cache:
        return PairByPair(adapter)
    assert config.cache_dir is not None
    assert isinstance(source, PairLoader)
    assert isinstance(source.examples, CachedPairs)
    keys = [source.key(index) for index in range(len(source.examples))]
    folder = Path(config.cache_dir) / "reference"
    return PairByPair(
        adapter, ErrorMemory(folder, facts(config, adapter, source.examples), keys, draws, adapter.device)
    )


def facts(config: DPOConfig, adapter: Adapter, pairs: CachedPairs) -> dict[str, Any]:
    """Everything that a reference error depends on to its last bit: model, data, settings, and where it is computed."""
    digest = hashlib.sha256()
    hash_weights(digest, adapter.reference_state())
    device = adapter.device
    return {
        "method": config.method,
        "reference": digest.hexdigest(),
        "schedule": adapter.path.facts(),
        "pairs": pairs.contents,
        **config.reference_settings(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}",
        "libraries": {name: version(name) for name in ("torch", "diffusers")},
    }


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
