"""Trainings in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import save_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def lines(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def train_in_two_processes(config: TrainConfig, recipe: Path) -> list[dict[str, float]]:
    """The log of a run with gloo on the CPU."""
    save_config(config, recipe)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(20_000 + os.getpid() % 9999)]
    command = [sys.executable, *launch, "-m", "diffusion_align.cli", "train", config.method, "--config", str(recipe)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(config.output_dir)
