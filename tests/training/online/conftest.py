"""What the runs of online methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.online.short_runs import PROMPTS


@pytest.fixture
def settings(sdxl_folder: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return {
        "model": str(sdxl_folder),
        "dataset": str(prompts),
        "output_dir": str(tmp_path / "run"),
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lora_rank": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "progress": False,
    }
