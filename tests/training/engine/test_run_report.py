"""The report of every run: curves, settings and the line that repeats it, for configs of any method."""

from __future__ import annotations

import json
import shlex
from html import unescape
from pathlib import Path

import pytest

from diffusion_align.cli import parse
from diffusion_align.training.engine.reporting.run_report import changed_settings, write_run_report
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.scorers.config import RewardConfig
from diffusion_align.training.settings import save_config

LINES = [
    {"step": 0, "eval/reward": 0.25},
    {"step": 1, "loss": 0.7, "skipped_steps": 0.0},
    {"step": 2, "loss": 0.6, "skipped_steps": 0.0},
    {"step": 2, "eval/reward": 0.5},
]


@pytest.fixture
def config(tmp_path: Path) -> DPOConfig:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return DPOConfig(model="scenes-sdxl", output_dir=str(folder), beta=500.0, max_steps=4, overwrite_output_dir=True)


def test_what_changes_is_a_curve_and_the_loss_is_first(config: DPOConfig) -> None:
    page = write_run_report(config, 2, "SIGTERM").read_text()
    assert "<dd>2 of 4 steps, ended by SIGTERM</dd>" in page
    captions = [part.partition("<")[0] for part in page.split("<figcaption>")[1:]]
    assert captions == ["loss", "eval/reward"]
    assert '<td>skipped_steps</td><td class="number">0</td>' in page
    assert "<script" not in page
    assert "http" not in page


def test_the_line_of_the_report_repeats_the_run(config: DPOConfig) -> None:
    page = write_run_report(config, 4, None).read_text()
    save_config(config, Path(config.output_dir) / "config.yaml")
    line = page.partition("<code>diffusion-align ")[2].partition("</code>")[0]
    again = parse(shlex.split(unescape(line)))[1]
    assert {name: value for name, value, _ in changed_settings(again)} == {
        name: value for name, value, _ in changed_settings(config)
    } | {"output_dir": f"{config.output_dir}-again"}


def test_settings_are_told_from_defaults_and_from_those_of_one_start(config: DPOConfig) -> None:
    changed = {name: (value, usual) for name, value, usual in changed_settings(config)}
    assert changed.keys() == {"model", "output_dir", "beta", "max_steps"} - (
        {"model"} if DPOConfig().model == "scenes-sdxl" else set()
    )
    assert changed["beta"] == ("500.0", str(DPOConfig().beta))
    assert changed_settings(RewardConfig()) == []


def test_what_a_method_adds_stands_above_the_curves_and_is_told_the_lines(config: DPOConfig) -> None:
    page = write_run_report(config, 4, None, lambda report, lines: report.text(f"## Own: {len(lines)}")).read_text()
    assert page.index("Own: 4") < page.index("Everything that was logged")


def test_a_run_without_a_line_says_so(config: DPOConfig) -> None:
    (Path(config.output_dir) / "metrics.jsonl").unlink()
    assert "No step was logged." in write_run_report(config, 0, None).read_text()
