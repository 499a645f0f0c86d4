"""A disk that is full: one error that names the file, nothing lost, and going on once there is space."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults.kills import files_of, prepared
from diffusion_align.training.engine.checkpoint import list_checkpoints, verify

from .harness import ALL_COMMANDS, READ_ONLY, REMOUNT, apart, mount, outcome

#: What the system says, or a command that knows beforehand what it will write.
FULL = "No space left on device|needs about .* more, and its disk has"
#: Sizes of the disk, in parts of what the command leaves.
SAMPLE = [("train dpo", 0.7), ("score", 0.2)]
ALL = [(name, part) for name in ALL_COMMANDS for part in (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)]


PAGE = 4096


def pages_of(path: Path) -> int:
    """Of a file or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE) for file in files)


def fill(name: str, part: float, whole: Path, folder: Path) -> None:
    command = ALL_COMMANDS[name]
    disk, leaves = folder / "disk", whole / command.leaves
    needed = pages_of(leaves) * (2 if leaves.is_file() else 1)  # a table lies beside its rows for a moment
    mount(disk, 1 << 30)
    prepared(command, disk / "x")
    for path in list((disk / "x").iterdir()):
        shutil.move(path, disk / path.name)
    found = os.statvfs(disk)
    free = max(1, int(part * needed))  # a size of 0 would be no limit
    mount(disk, (found.f_blocks - found.f_bfree + free) * PAGE, REMOUNT)
    failed = outcome(command.arguments(disk), disk)
    assert Path(command.leaves).stem in failed.error, failed.error
    assert re.search(FULL, failed.error), failed.error
    if command.resumes:
        for checkpoint in list_checkpoints(disk / command.leaves):
            verify(checkpoint)
            assert checkpoint.name in failed.error or checkpoint != list_checkpoints(disk / command.leaves)[-1]
    mount(disk, 1 << 30, REMOUNT)
    again = outcome(command.arguments(disk), disk)
    assert again.status == 0, again.output
    assert files_of(disk / command.leaves) == files_of(leaves)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), SAMPLE)
def test_a_full_disk_is_named_and_going_on_gives_the_same(
    name: str, part: float, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    found = whole(name)
    apart(lambda: fill(name, part, found, tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize(("name", "part"), ALL)
def test_a_disk_full_at_any_moment(name: str, part: float, whole: Callable[[str], Path], tmp_path: Path) -> None:
    found = whole(name)
    apart(lambda: fill(name, part, found, tmp_path))


def refuse(name: str, folder: Path) -> None:
    command = ALL_COMMANDS[name]
    disk = folder / "disk"
    mount(disk, 1 << 26)
    prepared(command, disk / "x")
    mount(disk, 1 << 26, REMOUNT | READ_ONLY)
    failed = outcome(command.arguments(disk / "x"), disk / "x")
    assert "Read-only file system" in failed.error
    assert "cannot be written" in failed.error
    assert "Loading" not in failed.output  # before a model is


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    apart(lambda: refuse(name, tmp_path))
