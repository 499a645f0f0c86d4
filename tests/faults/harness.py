"""Commands in forks of this process: what they print and leave, on disks that are full, small or read-only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.faults.command import IMPORTED
from benchmarks.faults.kills import COMMANDS, Command, fork
from diffusion_align.cli import main

#: ``generate`` keeps nothing to go on from: it draws again.
ALL_COMMANDS = {
    **COMMANDS,
    "generate": Command(
        "generate red --num-images 3 --num-inference-steps 2 --batch-size 1 --out drawn --overwrite --device cpu",
        "drawn",
    ),
}

NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, RECURSIVE, PRIVATE = 1, 32, 0x4000, 1 << 18


def import_early() -> None:
    """What the commands import late: forks have it from here."""
    for name in IMPORTED:
        import_module(name)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status; minus the signal's number if one killed it.
        output: all that it printed.
    """

    status: int
    output: str

    @property
    def error(self) -> str:
        """The line that says what went wrong, of a command that fails as it should.

        Raises:
            AssertionError: it did not fail, printed a traceback or more than one such line, or has another status.
        """
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert self.status in (1, 2), (self.status, self.output[-2000:])
        assert "Traceback" not in self.output, self.output[-3000:]
        assert len(lines) == 1, self.output[-2000:]
        return lines[0]


#: Seconds after which a command that hangs ends by SIGALRM, so that its test fails.
DEADLINE = 600


def outcome(
    arguments: Sequence[str], folder: Path, when: Callable[[str], bool] | None = None, number: int = signal.SIGTERM
) -> Outcome:
    """Run ``diffusion-align ARGUMENTS`` in ``folder``.

    Args:
        when: asked of what was printed so far, again and again; once it is true, signal ``number`` is sent.
    """
    with tempfile.TemporaryFile(dir="/tmp") as log:
        child = fork()
        if not child:
            status = 70
            signal.alarm(DEADLINE)
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
                os.chdir(folder)
                status = main(list(arguments))
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        try:
            while when is not None and not when(printed(log.fileno())):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), printed(log.fileno())
                time.sleep(0.001)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            raise
        if when is not None:
            os.kill(child, number)
        return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed(log.fileno()))


def printed(log: int) -> str:
    return os.pread(log, 1 << 22, 0).decode(errors="replace")


def apart(work: Callable[[], None]) -> None:
    """Do ``work`` in a fork that may mount what nobody else sees.

    Raises:
        AssertionError: it raised; with its traceback.
        pytest.skip.Exception: this machine lets nobody mount.
    """
    with tempfile.TemporaryFile(dir="/tmp") as log:
        child = fork()
        if not child:
            status = 1
            try:
                if enter_own_mounts():
                    work()
                    status = 0
                else:
                    status = 77
            except BaseException:
                os.write(log.fileno(), traceback.format_exc().encode())
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 77:
            pytest.skip("this machine lets nobody mount a file system")
        assert status == 0, printed(log.fileno())


def enter_own_mounts() -> bool:
    """Whether this process, which has one thread, now has mounts and, if it was not root, users of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS | (NEW_USERS if user else 0)):
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)


def mount(folder: Path, size: int, flags: int = 0) -> None:
    """A disk of ``size`` bytes in ``folder``; with ``REMOUNT`` the one that is there gets this size."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), f"{folder} cannot be mounted")
