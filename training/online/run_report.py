"""What a run that learned from a reward leaves to look at: does anything else rise with it?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_align.evaluation.figures import curve_figure
from diffusion_align.evaluation.report import Report
from diffusion_align.pictures import decoded_picture

from .config import OnlineConfig


def write_online_report(config: OnlineConfig) -> Path | None:
    """``report.html`` in the run's folder from its metrics.jsonl: the reward trained on, the scorers that are only
    watched, divergence from the reference; and the last validation pictures. None if nothing was logged."""
    folder = Path(config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reward = {"training reward": series(lines, "reward"), "validation reward": series(lines, "eval/reward")}
    reward = {name: points for name, points in reward.items() if points}
    if not reward:
        return None
    report = Report(f"{config.method} of {config.model}")
    report.text(
        "A reward that rises while scorers it was not trained on fall is being exploited: stop at the last step where "
        "all rise, lower the learning rate, add `kl_beta`, or give several `scorers` as an ensemble."
    )
    report.figure(curve_figure(reward, f"Reward: {', '.join(config.scorers)}", "reward", smooth=3), "Reward")
    for name in config.held_out_scorers:
        if points := series(lines, f"eval/{name}"):
            report.figure(curve_figure({name: points}, f"{name}, not trained on", "score"), name)
    wins = {n: series(lines, f"eval/{n}_win_rate") for n in config.held_out_scorers}
    wins |= {config.validation_scorer or "": series(lines, "eval/win_rate")}
    if found := {name: points for name, points in wins.items() if points}:
        report.figure(curve_figure(found, "Win rate over the base", "win rate"), "Win rate over the base")
    if divergence := series(lines, "kl"):
        report.figure(curve_figure({"kl": divergence}, "Divergence from the reference", "kl", smooth=3), "Divergence")
    pictures = sorted((folder / "samples").glob("step-*.png"))
    if pictures:
        report.image(decoded_picture(pictures[-1], str(pictures[-1])), "Base and trained model, same prompts and seeds")
    return report.write(folder)


def series(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]
