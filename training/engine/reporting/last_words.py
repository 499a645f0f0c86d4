"""What a run says on screen: a line for each validation, and at its end figures, files and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_align.training.engine.config import RunConfig

#: Log lines at the end of a run whose mean is its training accuracy.
LAST_LINES = 5
#: Above this share of chosen pictures that have become less likely, it is said.
MANY_UP = 0.9


def series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]


def validated_line(step: int, metrics: Mapping[str, float]) -> str:
    """What a validation found, in one line."""
    parts = []
    if "eval/win_rate" in metrics:
        parts.append(f"win rate {_won(metrics)}")
    if "eval/reward" in metrics:
        base = f" (base {metrics['eval/base_reward']:.4g})" if "eval/base_reward" in metrics else ""
        parts.append(f"reward {metrics['eval/reward']:.4g}{base}")
    if "eval/held_out" in metrics:
        parts.append(f"held-out scorers {metrics['eval/held_out']:+.3g}")
    if "eval/accuracy/overall" in metrics:
        parts.append(f"accuracy {metrics['eval/accuracy/overall']:.1%}")
    others = [name for name in metrics if name.startswith("eval/")]
    told = ", ".join(parts) or ", ".join(f"{name.removeprefix('eval/')} {metrics[name]:.4g}" for name in others[:4])
    return f"validation at step {step}: {told or 'pictures only'}"


def last_words(config: RunConfig, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines at the end of a run that is done.

    Args:
        lines: of its metrics.jsonl.
    """
    folder = Path(config.output_dir)
    found = figures(lines)
    pictures = sorted((folder / "samples").glob("step-*.png"))
    if pictures:
        found["pictures"] = f"{pictures[-1]} (base and trained model, same prompts and seeds)"
    if (folder / "report.html").is_file():
        found["report"] = str(folder / "report.html")
    rows = [f"  {name:<10}{text}" for name, text in found.items()]
    return [
        *rows,
        *(f"  {'note':<10}{text}" for text in notes(lines)),
        *(f"  {'next':<10}{line}" for line in next_lines(config)),
    ]


def figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Accuracy and win rate, as far as the run measured them."""
    found = {}
    latest = {name: value for line in lines for name, value in line.items()}
    trained = [value for _, value in series(lines, "implicit_accuracy")][-LAST_LINES:]
    if trained:
        found["accuracy"] = f"{sum(trained) / len(trained):.1%} of the last pairs as labelled (chance: 50%)"
    if "eval/accuracy/overall" in latest:
        found["accuracy"] = f"{latest['eval/accuracy/overall']:.1%} of the validation pairs as labelled (chance: 50%)"
    if "eval/win_rate" in latest:
        found["win rate"] = f"{_won(latest)} over the base, by the validation scorer (no change: 50%)"
    if "eval/reward" in latest and "eval/base_reward" in latest:
        found["reward"] = f"{latest['eval/reward']:.4g}, the base's is {latest['eval/base_reward']:.4g}"
    return found


def notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What whoever made the run should know of it."""
    said = []
    up = [value for _, value in series(lines, "chosen_error_up")][-LAST_LINES:]
    if up and (share := sum(up) / len(up)) > MANY_UP:
        said.append(
            f"chosen_error_up is {share:.3g}: nearly every chosen picture is predicted worse than by the base, the "
            "rejected ones more so. Look at the pictures; safeguard_mu or a smaller learning_rate holds them "
            "(docs/dpo.md)"
        )
    skipped = max((value for _, value in series(lines, "skipped_steps")), default=0)
    if skipped:
        said.append(f"{skipped:.0f} steps were skipped, because their loss or gradient was not finite")
    alarms = {
        name.removeprefix("alarm/"): line["step"]
        for line in lines
        for name, value in line.items()
        if name.startswith("alarm/") and value
    }
    if alarms:
        told = ", ".join(f"{name} (last at step {step})" for name, step in alarms.items())
        said.append(f"alarms: {told}; docs/diagnostics.md says what they mean")
    return said


def _won(metrics: Mapping[str, float]) -> str:
    low, high = metrics.get("eval/win_rate_low"), metrics.get("eval/win_rate_high")
    interval = "" if low is None or high is None else f" [{low:.1%}, {high:.1%}]"
    return f"{metrics['eval/win_rate']:.1%}{interval}"


def next_lines(config: RunConfig) -> list[str]:
    """The commands that come after the run."""
    return [shlex.join(["diffusion-align", *line]) for line in config.next_commands()]
