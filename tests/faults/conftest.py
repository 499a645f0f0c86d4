"""Whole runs of commands, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults.kills import prepared

from .harness import ALL_COMMANDS, import_early, outcome


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder in which a command, by name, ran undisturbed."""
    import_early()
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            command = ALL_COMMANDS[name]
            place = prepared(command, tmp_path_factory.mktemp("whole") / "run")
            ended = outcome(command.arguments(place), place)
            assert ended.status == 0, ended.output
            made[name] = place
        return made[name]

    return folder
