"""A command of the package in a process of its own, and how much memory it takes."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

import torch

from diffusion_align.cli import main as diffusion_align

GIB = 2**30
#: Seconds between two looks at the process.
INTERVAL = 0.02
#: Loaded once: every command is a fork of this process, which would else load them for ten seconds each time.
LIBRARIES = ("datasets", "diffusers", "peft", "transformers", "diffusion_align.training.pairs.job")


@dataclass(frozen=True)
class Watched:
    """What a process printed, and its peaks in bytes.

    Attributes:
        resident: all that was in memory, pages of mapped weight files included, which the system can drop.
        own: what it had allocated.
    """

    output: str
    resident: int
    own: int


def run_watched(program: Callable[[], object], name: str, enough: Callable[[], bool] = lambda: False) -> Watched:
    """Run ``program`` in a fork of this process and wait for its end. It fails by raising, or by returning a number
    other than 0.

    Args:
        enough: whether all has been seen: the process is then killed, which is no failure.

    Raises:
        RuntimeError: it failed; the message has its ``name`` and its last lines.
    """
    resident, own = 0, 0
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            _be_the_child(program, output)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            now = memory_of(pid)
            resident, own = max(resident, now.get("VmHWM", 0)), max(own, now.get("RssAnon", 0))
            if enough():
                os.kill(pid, signal.SIGKILL)
            time.sleep(INTERVAL)
        output.seek(0)
        printed = output.read()
    code = os.waitstatus_to_exitcode(ended[1])
    if code not in (0, -signal.SIGKILL) or (code and not enough()):
        end = "\n".join(printed.splitlines()[-20:])
        raise RuntimeError(f"{name} failed (exit code {code}):\n{end}")
    return Watched(printed, resident, own)


def _be_the_child(program: Callable[[], object], output: IO[str]) -> None:
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        sys.stdout = sys.stderr = output
        found = program()
        code = found if isinstance(found, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(arguments: Sequence[str], threads: int, enough: Callable[[], bool] = lambda: False) -> Watched:
    """Run ``diffusion-align ARGUMENTS``.

    Args:
        enough: as for ``run_watched``.

    Raises:
        RuntimeError: it failed.
    """
    line = " ".join(["diffusion-align", *arguments])
    print(line, flush=True)

    def program() -> int:
        torch.set_num_threads(threads)
        return diffusion_align(list(arguments))

    return run_watched(program, line, enough)


def memory_of(pid: int) -> dict[str, int]:
    """Linux's count of a process' memory by kind, in bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kibibytes) * 1024 for name, kibibytes, _ in fields}


def before_any_model() -> int:
    """Bytes that a process has allocated before it loads a model: Python and its libraries, which are loaded here."""
    for name in LIBRARIES:
        import_module(name)
    return run_watched(lambda: time.sleep(5 * INTERVAL), "a process that does nothing").own


def in_gib(count: int) -> float:
    return round(count / GIB, 2)
