"""``serve-scorer`` as a user starts and stops it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffusion_align.cli import main
from diffusion_align.rewards import load_scorer
from tests.faults.harness import outcome


@pytest.fixture
def _interrupts_by_default() -> Iterator[None]:
    """Processes in the background of a shell ignore SIGINT, and so do those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_interrupts_by_default")
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_served_scorer_scores_and_ends_by_a_signal(ended_by: signal.Signals, tmp_path: Path) -> None:
    images, prompts = torch.rand(2, 3, 64, 64), ["one large red star on a light background"] * 2
    found: list[torch.Tensor] = []

    def scores(printed: str) -> bool:
        address = re.search(r" is at (\S+): give", printed)
        if address is not None:
            found.append(load_scorer(address[1]).score(images, prompts).reward)
        return address is not None

    served = ["serve-scorer", "scenes-vp-words", "--port", "0", "--device", "cpu"]
    assert outcome(served, tmp_path, scores, ended_by).status == 0
    torch.testing.assert_close(found, [load_scorer("scenes-vp-words").score(images, prompts).reward])


@pytest.mark.parametrize(
    ("flags", "message"), [(["--host", "0.0.0.0"], "DIFFUSION_ALIGN_TOKEN"), (["--port", "70000"], "--port 70000")]
)
def test_what_cannot_be_served_is_one_clear_error(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFUSION_ALIGN_TOKEN", raising=False)
    assert main(["serve-scorer", "scenes-oracle", *flags]) == 2
    assert message in capsys.readouterr().err
