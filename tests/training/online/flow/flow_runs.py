"""Settings of online methods on tiny flow models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import OnlineConfig
from tests.adapters.families.tiny_flow import LENGTH
from tests.brightness import Brightness
from tests.training.online.short_runs import PROMPTS


def flow_settings(folder: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return {
        "model": str(folder), "dataset": str(prompts), "output_dir": str(tmp_path / "run"), "resolution": 16,
        "guidance_scale": 2.0, "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": "none", "progress": False, "max_sequence_length": LENGTH,
    }  # fmt: skip


def loaded(config: OnlineConfig) -> Adapter:
    return load_adapter(config.model, max_sequence_length=LENGTH)


def method_of(config: OnlineConfig, adapter: Adapter | None = None, scorer: RewardScorer | None = None) -> Any:
    """The method, before any step; its reward is the brightness, or another scorer."""
    adapter = loaded(config) if adapter is None else adapter
    return build_job(config, build_accelerator(config), adapter, scorer or Brightness()).method
