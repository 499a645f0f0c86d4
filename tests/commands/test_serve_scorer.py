"""``serve-scorer`` as a user starts and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusion_align.cli import main
from diffusion_align.rewards import load_scorer

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """A test that fails does not wait for a process that nobody ends."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_served_scorer_scores_and_ends_by_a_signal(ended_by: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "diffusion_align.cli", "serve-scorer", "scenes-vp-words", "--port", "0"]
    # Processes in the background of a shell ignore SIGINT, and so would what they start.
    by_default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=by_default
    ) as process, ended(process):  # fmt: skip
        assert process.stdout is not None
        url = next(line for line in process.stdout if " is at " in line).split(" is at ")[1].split(": give")[0]
        images, prompts = torch.rand(2, 3, 64, 64), ["one large red star on a light background"] * 2
        found = load_scorer(url).score(images, prompts).reward
        process.send_signal(ended_by)
        assert process.wait(30) == 0
    torch.testing.assert_close(found, load_scorer("scenes-vp-words").score(images, prompts).reward)


@pytest.mark.parametrize(
    ("flags", "message"), [(["--host", "0.0.0.0"], "DIFFUSION_ALIGN_TOKEN"), (["--port", "70000"], "--port 70000")]
)
def test_what_cannot_be_served_is_one_clear_error(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFUSION_ALIGN_TOKEN", raising=False)
    assert main(["serve-scorer", "scenes-oracle", *flags]) == 2
    assert message in capsys.readouterr().err
