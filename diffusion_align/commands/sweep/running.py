"""Runs, one process each: those that are done stay, those that were stopped go on, a failed one is not the end."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import yaml

from diffusion_align.commands.console import note
from diffusion_align.files import write_whole
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.engine.guard import StopSignal
from diffusion_align.training.settings import to_dict

from .spec import Run

#: In a run's folder: its settings, as the sweep made them; what its process said; how it ended.
SETTINGS, LOG, OUTCOME = "sweep_run.yaml", "log.txt", "outcome.json"
#: Arguments of ``diffusion-align``, the file for what it says, the environment, and an open file that the process
#: holds as long as it lives; to a started process.
Start = Callable[[Sequence[str], Path, Mapping[str, str], int], "subprocess.Popen[bytes]"]
STOPPED = 130


def start_process(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], held: int
) -> subprocess.Popen[bytes]:
    """One run in a process of its own: what it breaks, it breaks alone."""
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "diffusion_align.cli", *arguments],
            stdout=said,
            stderr=said,
            env=dict(environment),
            pass_fds=(held,),
            start_new_session=True,  # a terminal's Ctrl-C would reach it twice, and twice means without checkpoint
        )


def run_all(runs: Sequence[Run], start: Start, jobs: int = 1, devices: Sequence[str] = ()) -> int:
    """Do what is not done; 0, 1 where a run failed, or 130 where a signal came (runs in progress write checkpoints).

    Raises:
        ValueError: a folder holds a run of other settings.
    """
    for run in runs:
        check_folder(run)
    free: queue.Queue[str | None] = queue.Queue()
    for place in range(jobs):
        free.put(devices[place % len(devices)] if devices else None)
    halt = Event()

    def one(run: Run) -> int:
        if halt.is_set():
            return STOPPED
        device = free.get()
        try:
            return finish(run, start, device, halt)
        finally:
            free.put(device)

    with StopSignal() as stop, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, run) for run in runs if outcome(run).get("status") != 0]
        while not all(each.done() for each in waiting):
            time.sleep(0.1)
            if stop.received:
                halt.set()
        found = [each.result() for each in waiting]
    return STOPPED if stop.received or STOPPED in found else int(any(found))


def check_folder(run: Run) -> None:
    """Raises ValueError where a run's folder is of another sweep. Settings that it does not know, of a later version of
    the package, are not compared."""
    path = run.folder / SETTINGS
    if not path.is_file():
        return
    saved, ours = yaml.safe_load(path.read_text()), settings_of(run)
    for name in saved.keys() & ours.keys():
        if saved[name] != ours[name]:
            raise ValueError(
                f"{run.folder} holds a run of other settings, {name} was {saved[name]!r} and is {ours[name]!r}: give "
                "the sweep another --out, or move that folder away"
            )


def settings_of(run: Run) -> dict[str, Any]:
    """A run's settings, as YAML gives them back."""
    found: dict[str, Any] = yaml.safe_load(yaml.safe_dump(to_dict(run.config), sort_keys=False))
    return found


def finish(run: Run, start: Start, device: str | None, halt: Event) -> int:
    """Start one run, or go on with it, and wait for it; its exit status.

    The process holds a lock on the folder. Where a sweep was killed and its run lives on, this waits for its end.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    held = os.open(run.folder, os.O_RDONLY)
    try:
        while not locked(held):
            if halt.wait(0.5):
                return STOPPED
        return started(run, start, device, halt, held)
    finally:
        os.close(held)


def locked(held: int) -> bool:
    """Whether nobody else holds the lock; then this process does."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def started(run: Run, start: Start, device: str | None, halt: Event, held: int) -> int:
    """The process, from its start to its end."""
    write_whole(run.folder / SETTINGS, yaml.safe_dump(settings_of(run), sort_keys=False).encode())
    arguments = ["train", run.config.method, "--config", str(run.folder / SETTINGS)]
    if list_checkpoints(run.folder):
        arguments += ["--resume-from-checkpoint", "latest"]
    environment = {**os.environ, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
    note(f"{run.folder.name}: starts")
    began = time.perf_counter()
    process = start(arguments, run.folder / LOG, environment, held)
    while process.poll() is None:
        if halt.wait(0.1):
            process.terminate()  # it writes a checkpoint
            process.wait()
    status, seconds = process.returncode, round(time.perf_counter() - began, 1)
    if status == STOPPED or halt.is_set():
        note(f"{run.folder.name}: stopped")
        return STOPPED
    ended = {"status": status, "seconds": seconds, "error": None if status == 0 else last_words(run.folder / LOG)}
    write_whole(run.folder / OUTCOME, json.dumps(ended).encode())
    note(f"{run.folder.name}: {'done' if status == 0 else 'failed: ' + str(ended['error'])}")
    return int(status != 0)


def outcome(run: Run) -> dict[str, Any]:
    """How a run ended; empty where it has not."""
    path = run.folder / OUTCOME
    return json.loads(path.read_text()) if path.is_file() else {}


def last_words(log: Path) -> str:
    """The last line that a process said."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return lines[-1] if lines else "said nothing"
