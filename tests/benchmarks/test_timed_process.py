"""Another project's training script, timed in a process of its own without a change to it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dpo_script.timed_process import run_timed

SCRIPT = """
import argparse, time
from tqdm.auto import tqdm

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
steps = parser.parse_args().steps
time.sleep(0.3)
for _ in tqdm(range(steps + 1), desc="reading"):
    pass
bar = tqdm(range(0, steps), desc="Steps")
held = []
for _ in range(steps):
    held.append(bytearray(32 * 2**20))
    time.sleep(0.1)
    bar.update(1)
time.sleep(0.3)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.slow
def test_the_clock_runs_from_the_bars_birth_to_its_last_step(script: str, tmp_path: Path) -> None:
    timing = run_timed(script, ["--steps", "4"], 4, tmp_path / "work", {})
    assert timing.loop_seconds >= 0.4
    assert timing.process_seconds >= timing.loop_seconds + 0.6


@pytest.mark.slow
def test_memory_is_the_childs_own_peak(script: str, tmp_path: Path) -> None:
    few, many = (run_timed(script, ["--steps", str(n)], n, tmp_path / "work", {}).peak_memory for n in (1, 5))
    assert 3.5 * 32 * 2**20 < many - few < 4.5 * 32 * 2**20


def test_a_failing_script_names_its_log(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit('no such data')")
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        run_timed(str(path), [], 4, tmp_path / "work", {})
    assert "no such data" in (tmp_path / "work" / "log.txt").read_text()


@pytest.mark.slow
def test_a_script_without_so_many_steps_is_an_error(script: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="took no 9 steps"):
        run_timed(script, ["--steps", "4"], 9, tmp_path / "work", {})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_an_unused_module_that_is_missing_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "imports.py"
    path.write_text("import importlib.util, wandb\nprint(importlib.util.find_spec('wandb').name, len(vars(wandb)))")
    with pytest.raises(RuntimeError):  # it has no bar
        run_timed(str(path), [], 1, tmp_path / "work", {})
    assert (tmp_path / "work" / "log.txt").read_text().startswith("wandb")


def test_the_child_imports_nothing_heavy_of_its_own() -> None:
    code = "import sys, json, benchmarks.dpo_script.timed_process; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "diffusion_align"} & set(json.loads(found.stdout))
