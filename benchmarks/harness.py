"""What every benchmark shares: fair timing in one process, and a result file that says how it was made."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_align.environment import git_commit, versions
from diffusion_align.files import write_whole

RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round. Variants take turns, so that a noisy machine disturbs all alike."""
    for variant in variants.values():  # warm-up
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            synchronize()
            started = time.perf_counter()
            variant()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio_interval(slow: list[float], fast: list[float], draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Ratio of medians slow / fast with a 95% bootstrap interval over rounds."""
    rng = np.random.default_rng(seed)
    a, b = np.asarray(slow), np.asarray(fast)
    rows = rng.integers(len(a), size=(draws, len(a)))
    ratios = np.median(a[rows], axis=1) / np.median(b[rows], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(np.median(a) / np.median(b)), "interval": [float(low), float(high)], "rounds": len(a)}


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and thread count: absolute CPU times are never reported."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def folder_name(row: str) -> str:
    """Name of the folder for the run of a table's row: "full, twice as long" is kept in full-twice-as-long."""
    return row.replace(", ", "-").replace(" ", "-")


def read_parts(out: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Those of ``parts`` that the file has now: they may be measured one at a time, and two at once."""
    kept = json.loads(out.read_text()) if out.is_file() else {}
    return {part: kept[part] for part in parts if part in kept}


def in_order(by_number: Mapping[str, Any]) -> dict[str, Any]:
    """By the numbers (of seeds, of steps) that the keys are."""
    return dict(sorted(by_number.items(), key=lambda each: int(each[0])))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is: two that measure parts of one file read and write it one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def change_result(out: Path, parts: Iterable[str], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Give ``change`` what the file has now of ``parts``, and write what it returns: a process that is killed keeps
    what it had measured, and two may measure parts of one file at once."""
    with alone(out.parent):
        write_whole(out, encoded(change(read_parts(out, parts))))


def encoded(result: Mapping[str, Any]) -> bytes:
    """``result`` as JSON with device, versions, command and git commit."""
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    record = {"command": command, "git_commit": git_commit(), "device": device_name(), "versions": versions(), **result}
    return (json.dumps(record, indent=2) + "\n").encode()


def write_result(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write ``result`` as JSON with device, versions, command and git commit, and print it."""
    path = out or RESULTS / f"{name}.json"
    write_whole(path, encoded(result))
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return path
