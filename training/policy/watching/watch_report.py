"""Alarms, artefacts, divergence and figures by timestep of a run, as parts of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_align.evaluation.artefacts import RULES
from diffusion_align.evaluation.report import Report
from diffusion_align.training.engine.reporting.last_words import series

from .watch_rules import MONITORED, MOVED, PICTURE

#: What is drawn by timestep where a run has it: metric, title.
BY_TIMESTEP = {
    "chosen_error_up": "Share of chosen pictures whose error is above the reference's, by timestep",
    "reward_chosen": "Implicit reward of the chosen pictures, by timestep",
    "reward_rejected": "Implicit reward of the rejected pictures, by timestep",
    "kappa": "kappa by timestep",
    "kl_data": "Divergence from the reference on data, by timestep",
    "eval/kl": "Divergence from the base along own pictures, by timestep",
}


def add_watching(report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
    """What a run was watched for; nothing where it was not.

    Args:
        lines: of its metrics.jsonl.
    """
    alarms = [
        {"step": line["step"], "alarm": name.removeprefix("alarm/")}
        for line in lines
        for name, value in line.items()
        if is_alarm(name, value)
    ]
    watched = any(name.startswith("alarm/") for line in lines for name in line)
    if watched:
        report.text("## Alarms\n\n" + ("" if alarms else "None."))
    if alarms:
        report.text("What each means and what to do is in docs/diagnostics.md.")
        report.table(alarms)
    moved = {
        name: points
        for name in RULES
        for beginning in (PICTURE, MONITORED)
        if (points := series(lines, f"{beginning}{name}{MOVED}"))
    }
    if moved:
        title = "Figures of pictures, in times of what they may move from the base's"
        report.chart(moved, title)
    held_out = {
        "held-out scorers, mean": series(lines, "eval/held_out"),
        "spread of the ensemble, times the base's": series(lines, "eval/spread_ratio"),
    }
    for name, points in held_out.items():
        if points:
            report.chart({name: points}, name)
    for metric, title in BY_TIMESTEP.items():
        bins = {
            name.rpartition("/")[2]: series(lines, name)
            for name in dict.fromkeys(name for line in lines for name in line)
            if name.startswith(f"{metric}/t")
        }
        if bins:
            report.chart(bins, title, smooth=1 if "eval" in metric else 5)


def is_alarm(name: str, value: Any) -> bool:
    """Whether a metric says that there was an alarm; artefacts are named one by one."""
    return name.startswith("alarm/") and name != "alarm/artefacts" and bool(value)
