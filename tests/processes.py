"""Trainings in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusion_align.training.engine import sharding
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import save_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def lines(folder: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks() -> list[dict[str, str]]:
    """The environments of two processes that are told of each other as a launcher tells them, without the seconds
    that one takes to start."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [ENVIRONMENT | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


@contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path, **pipes: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to ``log`` and does not outlive the context."""
    with log.open("w") as file:
        into: dict[str, Any] = {"stdout": file, "stderr": file, "text": True}
        process = subprocess.Popen(command, env=environment, **(into | pipes))
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def train_on_two_nodes(config: TrainConfig, recipe: Path) -> list[dict[str, float]]:
    """The log of ``diffusion-align train`` as two machines launch it, one process each, with gloo on the CPU. They find
    each other by torchrun's rendezvous, here on one machine."""
    save_config(config, recipe)
    nodes = Path(sharding.__file__).parent / "launch" / "two_nodes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(nodes), "--num_processes", "2"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    command = ["-m", "diffusion_align.cli", "train", config.method, "--config", str(recipe)]
    logs = [recipe.with_name(f"{recipe.stem}-{rank}.log") for rank in range(2)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(running([*launch, "--machine_rank", str(rank), *command], ENVIRONMENT, logs[rank]))
            for rank in range(2)
        ]
        for process, log in zip(started, logs, strict=True):
            assert process.wait(timeout=600) == 0, log.read_text()
    return lines(config.output_dir)


class TwoProcesses:
    """Two processes that train one recipe, or run one command, after another: only the first waits for imports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runs, self._stack = folder, 0, ExitStack()
        self._logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        self._started: list[subprocess.Popen[str]] = []

    def train(self, config: TrainConfig, *launched: str) -> list[dict[str, float]]:
        """The log of a run with gloo on the CPU.

        Args:
            launched: variables of a launcher, each as NAME=VALUE, for this run only.
        """
        self._runs += 1
        recipe = self.folder / f"{self._runs}.yaml"
        save_config(config, recipe)
        if config.resume_from_checkpoint is not None:  # what is saved is to repeat a run, not to go on with it
            recipe.write_text(f"{recipe.read_text()}resume_from_checkpoint: {config.resume_from_checkpoint}\n")
        self._done(config.method, recipe, *launched)
        return lines(config.output_dir)

    def command(self, *arguments: str) -> list[str]:
        """What ``diffusion-align`` with these arguments says in each process; it must succeed."""
        self._runs += 1
        file = self.folder / f"{self._runs}.json"
        file.write_text(json.dumps(arguments))
        before = [len(log.read_text()) if log.exists() else 0 for log in self._logs]
        self._done("command", file)
        return [log.read_text()[start:] for log, start in zip(self._logs, before, strict=True)]

    def _done(self, what: str, file: Path, *launched: str) -> None:
        """Returns when both have done it."""
        if not self._started:
            command = [sys.executable, "-m", "tests.training.engine.trains_recipes"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            for each in zip(ranks(), self._logs, strict=True):
                self._started.append(self._stack.enter_context(running(command, *each, **pipes)))
        for process in self._started:
            assert process.stdin is not None
            process.stdin.write(" ".join([what, str(file), *launched]) + "\n")
            process.stdin.flush()
        for process, log in zip(self._started, self._logs, strict=True):
            assert process.stdout is not None
            assert process.stdout.readline() == f"{file}\n", log.read_text()

    def log(self) -> str:
        """What the first process has written so far."""
        return self._logs[0].read_text()

    def close(self) -> None:
        self._stack.close()
