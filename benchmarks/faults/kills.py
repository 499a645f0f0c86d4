"""Commands that are killed at a random instant and started again must leave what an uninterrupted one leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from diffusion_align.cli import main

#: What differs between two runs of the same settings: how long they took.
TIMES = ("samples_per_second",)
_CHART = re.compile(rb'<figure class="chart">(?:(?!</figure>).)*<figcaption>([^<]*)</figcaption></figure>', re.DOTALL)


def nothing(folder: Path) -> None:
    """For commands that need no file."""


def prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\na green star\na yellow triangle\n")


def pictures(folder: Path) -> None:
    prompts(folder)
    (folder / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 80, 120)).save(folder / "pictures" / f"{i}.png")


@dataclass(frozen=True)
class Command:
    """A command line that works in its current folder.

    Attributes:
        leaves: the folder or file that it makes.
        prepare: makes the files that it reads.
        resumes: whether it goes on by ``--resume-from-checkpoint`` instead of by being called again.
    """

    line: str
    leaves: str
    prepare: Callable[[Path], None] = nothing
    resumes: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """What a user would type in ``folder``, whatever is there already."""
        checkpoints = any((folder / self.leaves).glob("checkpoint-*")) if self.resumes else False
        return [*self.line.split(), *(["--resume-from-checkpoint", "latest"] if checkpoints else [])]


TRAINING = (
    "--output-dir run --max-steps 4 --save-steps 1 --logging-steps 1 --lora-rank 2 --report-to none --no-progress "
    "--learning-rate 1e-3"
)
COMMANDS = {
    "train dpo": Command(
        f"train dpo {TRAINING} --max-pairs 8 --per-device-train-batch-size 1 --use-ema --lora-dropout 0.1",
        "run",
        resumes=True,
    ),
    "train grpo": Command(
        f"train grpo {TRAINING} --dataset prompts.txt --scorers scenes-clip --num-inference-steps 3 "
        "--guidance-scale 1 --num-generations 2 --prompts-per-rollout 2 --train-steps 2 "
        "--per-device-train-batch-size 4",
        "run",
        prompts,
        resumes=True,
    ),
    "cache": Command("cache --cache-dir cache --max-pairs 12", "cache"),
    "annotate": Command(
        "annotate prompts.txt --scorers scenes-clip --per-prompt 2 --num-inference-steps 2 --out pairs --device cpu",
        "pairs",
        prompts,
    ),
    "score": Command(
        "score pictures --scorers scenes-clip --prompts prompts.txt --out scores.jsonl --batch-size 1 --device cpu",
        "scores.jsonl",
        pictures,
    ),
}


@dataclass(frozen=True)
class Count:
    """How often a command was killed, how often it had not ended then, and how often all files were equal in the end.

    Attributes:
        first_difference: of the first attempt that was not.
    """

    tried: int
    running: int
    equal: int
    first_difference: str | None = None


def count_kills(command: Command, folder: Path, tries: int, seed: int = 0) -> Count:
    """Kill ``command`` at ``tries`` instants drawn from the time that it takes, and start it again each time.

    Raises:
        RuntimeError: the command fails without being killed; with what it printed.
    """
    rng = random.Random(seed)
    whole = prepared(command, folder / "whole")
    started = time.monotonic()
    finish(command, whole)
    seconds = time.monotonic() - started
    expected = files_of(whole / command.leaves)
    running = equal = 0
    difference = None
    for number in range(tries):
        place = prepared(command, folder / f"{number}")
        running += killed(command, place, rng.uniform(0, seconds))
        try:
            finish(command, place)
            found = files_of(place / command.leaves)
        except RuntimeError as error:
            found = {"the second start": str(error)}
        equal += found == expected
        if found != expected and difference is None:
            differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            difference = f"attempt {number}: {', '.join(sorted(differing))} {found.get('the second start', '')}".strip()
    return Count(tries, running, equal, difference)


def prepared(command: Command, folder: Path) -> Path:
    folder.mkdir(parents=True)
    command.prepare(folder)
    return folder


def killed(command: Command, folder: Path, after: float) -> bool:
    """Start ``command`` and kill it after so many seconds; whether it was still running."""
    child = start(command.arguments(folder), folder)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def finish(command: Command, folder: Path) -> None:
    """Run ``command`` to its end.

    Raises:
        RuntimeError: it failed.
    """
    status = os.waitpid(start(command.arguments(folder), folder), 0)[1]
    if status:
        raise RuntimeError(f"{command.line}: exit status {status}: {(folder / 'log').read_text()[-2000:]}")


def fork() -> int:
    """``os.fork()``, after which the child may use torch in several threads.

    The child's first use of torch renews a pool of threads. Two threads at once would each find the other's half-made
    pool ("Invalid thread pool"), so it is renewed here, by the only one.
    """
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
    return child


def start(arguments: Sequence[str], folder: Path) -> int:
    """The process of ``diffusion-align ARGUMENTS`` in ``folder``.

    It is a fork, so that the seconds that imports take are not the ones in which most kills fall.
    """
    child = fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = main(arguments)
    finally:
        os._exit(status)


def files_of(path: Path) -> dict[str, str]:
    """A hash for each file, by name; a run's log and report without their times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): hashlib.sha256(content_of(file)).hexdigest() for file in files}


def content_of(file: Path) -> bytes:
    if file.name == "report.html":
        return _CHART.sub(lambda found: b"" if found[1].decode() in TIMES else found[0], file.read_bytes())
    if file.name != "metrics.jsonl":
        return file.read_bytes()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return json.dumps([{name: value for name, value in row.items() if name not in TIMES} for row in rows]).encode()
