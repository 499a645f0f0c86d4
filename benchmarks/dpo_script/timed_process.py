"""A training program in a process of its own: its whole time, its loop's time and its peak memory.

As ``python -m benchmarks.dpo_script.timed_process STEPS REPORT PROGRAM [ARGUMENTS]`` this is also the child: it runs
PROGRAM, a script or a module, as ``python`` would, with a clock on its progress bar of STEPS steps.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

#: Modules that the script imports and does not use here; where one is not installed an empty one stands in.
STAND_INS = ("wandb",)


@dataclass(frozen=True)
class Timing:
    """What one process took: seconds, and bytes of resident memory at its peak."""

    loop_seconds: float
    process_seconds: float
    peak_memory: int


def run_timed(program: str, arguments: Sequence[str], steps: int, work: Path, environment: Mapping[str, str]) -> Timing:
    """Run ``program`` (a file, or a module's dotted name) and wait for its end; its output goes to ``work``/log.txt.

    Raises:
        RuntimeError: it failed, or showed no progress bar of ``steps`` steps; the message names the log.
    """
    work.mkdir(parents=True, exist_ok=True)
    report, log = work / "clock.json", work / "log.txt"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, str(steps), str(report), program, *arguments]
    with log.open("w") as output:
        started = time.perf_counter()
        code = subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **environment}).returncode
        seconds = time.perf_counter() - started
    if code or not report.is_file():
        raise RuntimeError(f"{program} failed (exit code {code}) or took no {steps} steps: see {log}")
    found = json.loads(report.read_text())
    return Timing(found["loop_seconds"], seconds, found["peak_memory"])


def clocked(bar_class: Any, steps: int, report: Path) -> Any:
    """``bar_class`` (tqdm's) that writes the seconds from the birth of a bar of ``steps`` steps to its last update."""

    class Clocked(bar_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.born, self.steps_done = time.perf_counter(), 0
            total = options.get("total")
            self.watched = (len(args[0]) if total is None and args and hasattr(args[0], "__len__") else total) == steps

        def update(self, n: float | None = 1) -> bool | None:
            self.steps_done += int(n or 0)
            if self.watched and self.steps_done == steps:
                seconds = time.perf_counter() - self.born
                atexit.register(lambda: report.write_text(json.dumps(record(seconds))))
            done: bool | None = super().update(n)
            return done

    return Clocked


def record(loop_seconds: float) -> dict[str, float]:
    """What the child tells at its end. A process' resource usage counts what its parent held when it was born, too."""
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"loop_seconds": loop_seconds, "peak_memory": int(kibibytes) * 1024}


def main(steps: int, report: Path, program: str, arguments: list[str]) -> None:
    import tqdm.auto

    tqdm.auto.tqdm = clocked(tqdm.auto.tqdm, steps, report)  # type: ignore[misc]
    sys.argv = [program, *arguments]
    if not program.endswith(".py"):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    for name in STAND_INS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
