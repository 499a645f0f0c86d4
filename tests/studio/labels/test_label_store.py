"""Labels are on the disk when they count, and survive whatever ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_align.studio.labels.label_store import FolderInUseError, LabelFile, folder_lock, read_events, read_labels
from diffusion_align.studio.labels.verdicts import Verdict, outcomes

SETTINGS = {"seed": 1}


def verdict(number: int, **changes: object) -> Verdict:
    values = {
        "id": f"v{number}",
        "unit": f"u{number}",
        "visit": 0,
        "shown": (1, 0),
        "choice": "better",
        "best": 1,
        "worst": 0,
    }
    return Verdict(**{**values, **changes})  # type: ignore[arg-type]


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    given = verdict(
        1, aspects={"light": 0.5}, wrong_words=((0, 2), ()), ms=250, p_selected=0.25, time="2026-01-01T00:00:00Z"
    )
    assert file.add(given)
    assert file.add(verdict(2, choice="skip", best=None, worst=None))
    assert LabelFile.open(tmp_path, "ada", SETTINGS).verdicts == file.verdicts == [given, file.verdicts[1]]
    assert given.hasty


def test_a_verdict_that_is_sent_twice_counts_once(tmp_path: Path) -> None:
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    assert file.add(verdict(1))
    before = file.path.read_bytes()
    assert not file.add(verdict(1))
    assert not LabelFile.open(tmp_path, "ada", SETTINGS).add(verdict(1))
    assert file.path.read_bytes() == before


def test_undo_goes_back_to_the_first_verdict_also_after_a_restart(tmp_path: Path) -> None:
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    for number in range(3):
        file.add(verdict(number))
    assert file.undo() == verdict(2)
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    assert [file.undo(), file.undo(), file.undo()] == [verdict(1), verdict(0), None]
    assert LabelFile.open(tmp_path, "ada", SETTINGS).verdicts == []


def test_a_torn_last_line_is_cut_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    file.add(verdict(1))
    whole = file.path.read_bytes()
    file.add(verdict(2))
    file.path.write_bytes(file.path.read_bytes()[:-5])
    assert LabelFile.open(tmp_path, "ada", SETTINGS).verdicts == [verdict(1)]
    assert file.path.read_bytes() == whole
    file.path.write_bytes(whole.replace(b'"best": 1', b'"best": 0'))
    with pytest.raises(ValueError, match=r"ada.jsonl, line 2 does not match its checksum"):
        read_events(file.path)


@pytest.mark.parametrize("name", ["", "../ada", ".ada", "a b", "a" * 65])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="annotator"):
        LabelFile.open(tmp_path, name, SETTINGS)


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    LabelFile.open(tmp_path, "ada", SETTINGS)
    with pytest.raises(ValueError, match="begun with other seed"):
        LabelFile.open(tmp_path, "ada", {"seed": 2})


def test_a_second_studio_is_told_the_first_ones_pid(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match=f"pid {os.getpid()}"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        pass


def test_best_and_worst_of_k_say_2k_minus_3_pairs() -> None:
    for count in range(3, 8):
        shown = tuple(range(count))
        found = list(outcomes(verdict(0, shown=shown, best=2, worst=0)))
        assert len({(one.first, one.second) for one in found}) == len(found) == 2 * count - 3
        assert [one.implied for one in found].count(False) == 1
        assert {(one.first, one.second, one.label) for one in found} >= {(0, 2, 0.0), (0, 1, 0.0)}


def label_without_end(folder: Path, told: int) -> None:
    """Add one verdict after another, and say the number of each once it counts."""
    file = LabelFile.open(folder, "ada", SETTINGS)
    for number in range(len(file.ids()), 10**9):
        file.add(verdict(number))
        os.write(told, f"v{number}\n".encode())


@pytest.mark.slow
def test_no_acknowledged_verdict_is_lost_or_doubled_by_50_kills(tmp_path: Path) -> None:
    told: list[str] = []
    for instant in range(50):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                label_without_end(tmp_path, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as heard:
            told.append(heard.readline().strip())
            time.sleep(instant * 0.0007)
            os.kill(process, signal.SIGKILL)
            told += [line.strip() for line in heard if line.endswith("\n")]
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    file = LabelFile.open(tmp_path, "ada", SETTINGS)
    ids = [event.id for event in file.events if isinstance(event, Verdict)]
    assert len(ids) == len(set(ids))
    assert set(told) <= set(ids)
    assert len(told) > 50


FULL = """
import resource, sys
from pathlib import Path
from diffusion_align.studio.labels.label_store import LabelFile
from diffusion_align.studio.labels.verdicts import Verdict
file = LabelFile.open(Path(sys.argv[1]), "ada", {"seed": 1})
file.add(Verdict("v0", "u0", 0, (0, 1), "better", 0, 1))
size = file.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, size + 40))
try:
    file.add(Verdict("v1", "u1", 0, (0, 1), "better", 0, 1))
except OSError as error:
    print(error)
assert file.path.stat().st_size == size, "half a line stayed"
assert [verdict.id for verdict in file.verdicts] == ["v0"]
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "ada.jsonl cannot be written" in done.stdout
    assert [found.id for found in read_labels(tmp_path)["ada"]] == ["v0"]
