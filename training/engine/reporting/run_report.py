"""``report.html`` of a run: what was set, what was measured, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from diffusion_align.environment import git_commit, versions
from diffusion_align.evaluation.report import Report
from diffusion_align.pictures import decoded_picture
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.metrics import read_metrics
from diffusion_align.training.engine.protocols import AddToReport

from .last_words import figures, next_lines, notes, series

#: Settings of one start, which are not repeated.
OF_THIS_START = frozenset({"config", "dry_run", "card", "resume_from_checkpoint", "overwrite_output_dir"})
#: Points of a running mean, where a curve has many more.
SMOOTH = 5


def write_run_report(config: RunConfig, step: int, stopped: str | None, add: AddToReport | None = None) -> Path:
    """Write ``report.html`` into the run's folder, from its metrics.jsonl.

    Args:
        step: optimiser steps done.
        stopped: why it ended before its last step, if it did.
        add: what only this method has to show, above the curves that all have.
    """
    folder = Path(config.output_dir)
    report = Report(f"{config.method}: {folder.name}")
    done = f"{step:,} of {config.max_steps:,} steps" + (f", ended by {stopped}" if stopped else "")
    report.facts({"method": config.method, "steps": done, "folder": str(folder)})
    lines = read_metrics(folder / "metrics.jsonl")
    if found := figures(lines):
        report.text("## What it came to").facts(found)
    for said in notes(lines):
        report.text(f"**{said}**")
    pictures = sorted((folder / "samples").glob("step-*.png"))
    if pictures:
        report.image(decoded_picture(pictures[-1], str(pictures[-1])), "Base and trained model, same prompts and seeds")
    if add is not None:
        add(report, lines)
    add_curves(report, lines)
    changed = changed_settings(config)
    report.text("## Settings that are not the defaults")
    if changed:
        report.table([{"setting": name, "value": value, "default": usual} for name, value, usual in changed])
    else:
        report.text("None.")
    report.text(f"All of them are in `config.yaml`. The same run again:\n\n`{command(config)}`")
    if following := next_lines(config):
        report.text("What to do with what it made:\n\n" + "\n".join(f"- `{line}`" for line in following))
    report.facts({**versions(), "git commit": git_commit() or "not known"})
    return report.write(folder)


def add_curves(report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
    """A chart of each metric that changes, and a table of those that do not."""
    report.text("## Everything that was logged")
    names = sorted({name for line in lines for name in line if name != "step"}, key=_order)
    curves = {name: series(lines, name) for name in names}
    constant = {name: points[-1][1] for name, points in curves.items() if len({value for _, value in points}) == 1}
    if not curves:
        report.text("No step was logged.")
    for name, points in curves.items():
        if name not in constant:
            report.chart({name: points}, name, SMOOTH if len(points) > 4 * SMOOTH else 1)
    if constant:
        report.table([{"metric": name, "always": value} for name, value in constant.items()])


def _order(name: str) -> tuple[bool, bool, str]:
    """The loss, other metrics of training, those of validation."""
    return name.startswith("eval/"), name != "loss", name


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """Name, value and default of every setting that has another value than its default."""
    found = [(field.name, getattr(config, field.name), _default(field)) for field in fields(config)]
    return [
        (name, _shown(value), _shown(usual))
        for name, value, usual in found
        if value != usual and name not in OF_THIS_START
    ]


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def command(config: RunConfig) -> str:
    """The line that repeats the run beside it."""
    again, recipe = f"{config.output_dir}-again", str(Path(config.output_dir) / "config.yaml")
    return shlex.join(["diffusion-align", "train", config.method, "--config", recipe, "--output-dir", again])
