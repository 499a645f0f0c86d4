"""What a run that learned from a reward has to show: does anything else rise with it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_align.evaluation.report import Report
from diffusion_align.training.engine.reporting.last_words import series

from .config import OnlineConfig


def add_rewards(config: OnlineConfig, report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
    """The reward trained on, the scorers that are only watched, and divergence from the reference. Nothing if no
    reward was logged."""
    reward = {"training reward": series(lines, "reward"), "validation reward": series(lines, "eval/reward")}
    reward = {name: points for name, points in reward.items() if points}
    if not reward:
        return
    report.text(
        "## Rewards\n\n"
        "A reward that rises while scorers it was not trained on fall is being exploited: stop at the last step where "
        "all rise, lower the learning rate, add `kl_beta`, or give several `scorers` as an ensemble."
    )
    report.chart(reward, f"Reward: {', '.join(config.scorers)}", smooth=3)
    for name in config.held_out_scorers:
        if points := series(lines, f"eval/{name}"):
            report.chart({name: points}, f"{name}, not trained on")
    wins = {n: series(lines, f"eval/{n}_win_rate") for n in config.held_out_scorers}
    wins |= {config.validation_scorer or "": series(lines, "eval/win_rate")}
    if found := {name: points for name, points in wins.items() if points}:
        report.chart(found, "Win rate over the base")
    if divergence := series(lines, "kl"):
        report.chart({"kl": divergence}, "Divergence from the reference", smooth=3)
