"""What README, docs and notebooks show works: Python blocks run, and the command line takes every line.

A block that needs real weights or the network has ``<!-- not run: reason -->`` right above it. What CONTRIBUTING.md
adds to the package is run by ``test_extending.py``. The other blocks of a page run from top to bottom in one namespace,
as they stand, but for ``train``, which here takes a single small step, and for pictures, which are drawn in few.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import diffusion_align
from diffusion_align.cli import COMMANDS, parse
from tests.documents.pages import NOTEBOOKS, PAGES, ROOT, blocks, command_lines

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
RUN = [page for page in WITH_PYTHON if any(block.runs_alone for block in blocks(page, "python"))]
LINES = [(page, line) for page in [*PAGES, *NOTEBOOKS] for line in command_lines(page)]


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws pictures takes three sampling steps where a page does not say how many."""
    for name in ("best_of_n", "fk_steering", "generate", "sample"):
        monkeypatch.setattr(diffusion_align, name, partial(getattr(diffusion_align, name), num_inference_steps=3))


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``diffusion_align.train`` stops after one step of a quarter of the examples, and rollouts have few sampling
    steps."""
    whole = diffusion_align.train

    def train(config: Any, *models: Any) -> Any:
        fewer = {"num_inference_steps": 4} if hasattr(config, "num_inference_steps") else {}
        for name in ("per_device_train_batch_size", "prompts_per_rollout"):
            if getattr(config, name, 1) >= 4:
                fewer[name] = getattr(config, name) // 4
        return whole(replace(config, max_steps=1, report_to="none", progress=False, **fewer), *models)

    monkeypatch.setattr(diffusion_align, "train", train, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("short_training", "few_steps")
@pytest.mark.parametrize("page", RUN, ids=relative)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks(page, "python"):
        if block.runs_alone:
            exec(compile(block.code, relative(page), "exec"), names)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=relative)
def test_python_blocks_are_short_and_compile_even_if_they_are_not_run(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.code, relative(page), "exec")
        assert len(block.code.splitlines()) < 40
        assert not block.note or not block.runs_alone, f"{block.note!r}: expected 'not run: reason'"


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{relative(page)}:{' '.join(line[:3])}" for page, line in LINES]
)
def test_the_command_line_takes_every_line_of_the_docs(
    page: Path, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named as seen from the checkout
    if line[-1] != "--help" and len(line) > 1 + (line[0] in ("train", "evaluate", "data")):
        assert parse(line)[0] is COMMANDS[line[0]]
        return
    with pytest.raises(SystemExit) as stopped:  # the name of a command, no whole line
        parse([*line, "--help"])
    assert stopped.value.code == 0


def test_the_docs_have_blocks_and_lines_to_check() -> None:
    assert {"README.md", "docs/rewards.md", "docs/guidance.md"} <= {relative(page) for page in RUN}
    assert {line[0] for _, line in LINES} >= {"train", "generate", "score", "annotate", "cache"}
    assert {page.suffix for page, _ in LINES} == {".md", ".ipynb"}
