"""Signals at a bad moment, a clock that was set back, and files that were cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.faults.kills import COMMANDS, files_of, fork
from diffusion_align.training.engine.checkpoint import find_checkpoint, list_checkpoints, verify
from diffusion_align.training.engine.resuming import saved_values

from .harness import outcome

RESUME = ["--resume-from-checkpoint", "latest"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
@pytest.mark.slow
def test_a_signal_during_a_checkpoint_lets_it_be_finished(
    number: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    command = COMMANDS["train dpo"]
    partial = tmp_path / "run" / ".checkpoint-00000002.partial"
    stopped = outcome(command.arguments(tmp_path), tmp_path, lambda _: partial.is_dir(), number)
    assert stopped.status == 130
    assert f"stopped by {signal.Signals(number).name} after step 2; continue with" in stopped.output
    assert not partial.exists()
    found, passed = find_checkpoint("latest", tmp_path / "run")
    assert (found.name, passed) == ("checkpoint-00000002", [])
    assert outcome(command.arguments(tmp_path), tmp_path).status == 0
    assert files_of(tmp_path / "run") == files_of(whole("train dpo") / "run")


@pytest.mark.faults
def test_a_second_signal_ends_it_at_once_without_a_traceback(tmp_path: Path) -> None:
    partial = tmp_path / "run" / ".checkpoint-00000002.partial"
    seen: list[str] = []

    def twice(printed: str) -> bool:
        if partial.is_dir() and not seen:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGINT)
            seen.append(children[-1])
            time.sleep(0.002)
        return bool(seen)

    command = COMMANDS["train dpo"]
    stopped = outcome(command.arguments(tmp_path), tmp_path, twice, signal.SIGINT)
    assert stopped.status == 130
    assert "Traceback" not in stopped.output
    for checkpoint in list_checkpoints(tmp_path / "run"):
        verify(checkpoint)
    assert not list((tmp_path / "run").glob(".checkpoint-*"))


@pytest.mark.slow
def test_a_clock_that_was_set_back_changes_neither_the_latest_checkpoint_nor_the_run(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """The newest checkpoint is older than the first, and all files are from the future."""
    shutil.copytree(whole("train dpo") / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000004")
    now = time.time()
    for place, seconds in (("", 10_000.0), ("checkpoint-00000003", -10_000.0)):
        for path in [tmp_path / "run" / place, *(tmp_path / "run" / place).rglob("*")]:
            os.utime(path, (now + seconds, now + seconds))
    assert find_checkpoint("latest", tmp_path / "run")[0].name == "checkpoint-00000003"
    assert outcome(COMMANDS["train dpo"].arguments(tmp_path), tmp_path).status == 0
    found = files_of(tmp_path / "run")
    assert found == files_of(whole("train dpo") / "run")


@pytest.mark.faults
def test_a_clock_that_goes_back_in_a_run_changes_only_its_times(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.time()
    monkeypatch.setattr(time, "time", lambda: started - 1000 * time.perf_counter())
    assert outcome(COMMANDS["train dpo"].arguments(tmp_path), tmp_path).status == 0
    assert files_of(tmp_path / "run") == files_of(whole("train dpo") / "run")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["samples_per_second"] > 0


def test_checkpoints_are_ordered_by_step_whatever_their_times(tmp_path: Path) -> None:
    for age, step in enumerate((3, 20, 100)):
        (tmp_path / f"checkpoint-{step:08d}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step:08d}", (age, 1000 - age))
    assert [int(path.name[-8:]) for path in list_checkpoints(tmp_path)] == [3, 20, 100]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "streaming"),
    [
        (0.5, False),
        *(pytest.param(*case, marks=pytest.mark.faults) for case in ((0.99, False), (0.5, True), (0.99, True))),
    ],
)
def test_a_torn_shard_is_named_before_the_first_step(
    part: float, streaming: bool, pairs_folder: Path, tmp_path: Path
) -> None:
    (written,) = pairs_folder.glob("train-*.parquet")
    for number in range(2):
        shutil.copy(written, tmp_path / f"train-{number:05d}-of-00002.parquet")
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[: int(part * shard.stat().st_size)])
    more = ["--streaming"] if streaming else []
    flags = ["--output-dir", "run", "--max-steps", "2", "--report-to", "none", "--no-progress", "--lora-rank", "2"]
    for dry in ([], ["--dry-run"]):
        failed = outcome(["train", "dpo", "--dataset", str(tmp_path), *flags, *more, *dry], tmp_path)
        assert shard.name in failed.error, failed.error
        assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.faults
def test_a_damaged_checkpoint_is_passed_over_and_made_again(whole: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole("train dpo") / "run", run)
    weights = run / "checkpoint-00000004" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    ended = outcome([*COMMANDS["train dpo"].arguments(tmp_path)], tmp_path)
    assert ended.status == 0, ended.output
    assert "skipped torn checkpoint: run/checkpoint-00000004/policy.safetensors does not match" in ended.output
    assert files_of(run) == files_of(whole("train dpo") / "run")
    assert saved_values(run / "checkpoint-00000004")["step"] == 4


def test_torch_has_its_threads_in_every_fork() -> None:
    """Without ``fork``'s care about one child in four fails here, and one run in three hundred passes."""
    x = torch.rand(3_000_000)
    for _ in range(20):
        child = fork()
        if not child:
            done: list[float] = []
            gate = threading.Barrier(2)

            def add(gate: threading.Barrier = gate, done: list[float] = done) -> None:
                gate.wait()
                done.append(float(x.sum()))

            threads = [threading.Thread(target=add) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(len(done) != 2)
        assert os.waitpid(child, 0)[1] == 0
