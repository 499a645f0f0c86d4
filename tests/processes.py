"""Trainings in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.commands import launch

import diffusion_align
from diffusion_align.training.engine import sharding
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import save_config
from tests.training.engine.trains_recipes import serve

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FORK = multiprocessing.get_context("fork")


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
def forked(
    work: Callable[..., int | None], *arguments: Any, log: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> Iterator[BaseProcess]:
    """A process that does ``work``, writes to ``log`` and does not outlive the context. It is a fork: what this process
    has imported need not be imported again, which takes ten seconds of a core."""
    process = FORK.Process(target=_in_fork, args=(work, arguments, log, environment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _in_fork(work: Callable[..., int | None], arguments: Any, log: Path, environment: Mapping[str, str]) -> None:
    torch.set_num_threads(1)  # see benchmarks.faults.kills.fork
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(written, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(work(*arguments))


def found_in(folder: Path) -> None:
    """From now on the package is the one in ``folder``, and nothing is found in the checkout: for a fork."""
    for name in [name for name in sys.modules if name.partition(".")[0] == diffusion_align.__name__]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != diffusion_align.__name__]
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() != checkout)]


def _launch(arguments: list[str]) -> None:
    sys.argv = ["accelerate launch", *arguments]
    launch.main()


def train_on_two_nodes(config: TrainConfig, recipe: Path) -> list[dict[str, float]]:
    """The log of ``diffusion-align train`` as two machines launch it, one process each, with gloo on the CPU. They find
    each other by torchrun's rendezvous, here on one machine."""
    save_config(config, recipe)
    nodes = Path(sharding.__file__).parent / "launch" / "two_nodes.yaml"
    launcher = ["--config_file", str(nodes), "--num_processes", "2"]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    command = ["-m", "diffusion_align.cli", "train", config.method, "--config", str(recipe)]
    logs = [recipe.with_name(f"{recipe.stem}-{rank}.log") for rank in range(2)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(forked(_launch, [*launcher, "--machine_rank", str(rank), *command], log=logs[rank]))
            for rank in range(2)
        ]
        for process, log in zip(started, logs, strict=True):
            process.join(600)
            assert process.exitcode == 0, log.read_text()
    return lines(config.output_dir)


class TwoProcesses:
    """Two processes that train one recipe, or run one command, after another."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runs, self._stack = folder, 0, ExitStack()
        self._logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        self._started: list[Connection] = []

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
            for environment, log in zip(ranks(), self._logs, strict=True):
                here, there = FORK.Pipe()
                self._stack.enter_context(forked(serve, there, log=log, environment=environment))
                there.close()  # so that its end is heard here
                self._started.append(here)
        for process in self._started:
            process.send((what, file, launched))
        for process, log in zip(self._started, self._logs, strict=True):
            try:
                assert process.recv() == file
            except EOFError:
                raise AssertionError(log.read_text()) from None

    def log(self) -> str:
        """What the first process has written so far."""
        return self._logs[0].read_text()

    def close(self) -> None:
        self._stack.close()
