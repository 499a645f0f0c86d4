"""Trainings in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import save_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def lines(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def train_in_two_processes(config: TrainConfig, recipe: Path) -> list[dict[str, float]]:
    """The log of a run with gloo on the CPU. The processes are told of each other as a launcher tells them, without
    the seconds that one takes to start."""
    save_config(config, recipe)
    command = [sys.executable, "-m", "diffusion_align.cli", "train", config.method, "--config", str(recipe)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [ENVIRONMENT | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    logs = [recipe.with_name(f"{recipe.stem}-{rank}.log") for rank in range(2)]
    started = []
    try:
        for environment, log in zip(ranks, logs, strict=True):
            with log.open("w") as file:
                started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        for process, log in zip(started, logs, strict=True):
            assert process.wait(timeout=600) == 0, log.read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    return lines(config.output_dir)
