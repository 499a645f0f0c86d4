"""What each round brought and took: one line a round, and the policy after it against its base and its last self."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from diffusion_align.evaluation.report import Report
from diffusion_align.evaluation.stats import win_rate
from diffusion_align.files import write_whole
from diffusion_align.rewards import RewardScorer
from diffusion_align.rewards.combine import Combined
from diffusion_align.rewards.context import score_with_context
from diffusion_align.training.policy.validation import Validator, prompt_means

from .rounds import RoundFacts

ROUNDS = "rounds.jsonl"


def scorers_by_name(reward: RewardScorer) -> dict[str, RewardScorer]:
    """The members of an ensemble, or the scorer itself, by name."""
    members = reward.members if isinstance(reward, Combined) else [reward]
    return {member.name: member for member in members if isinstance(member, RewardScorer)}


@dataclass
class RoundMonitor:
    """Compares the policy with its base, and with itself one comparison earlier, on the validation's prompts and seeds.

    Attributes:
        validator: draws the pictures.
        scorers: those that are trained on and those that are only watched.
        base, last, before: rewards of the base, and of the policies of the last comparison and of the one before it, by
            scorer, prompt by prompt.
    """

    validator: Validator
    scorers: Mapping[str, RewardScorer]
    base: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self) -> dict[str, Any]:
        """By scorer the mean reward, the base's, and both win rates with intervals; by all processes together."""
        network = self.validator.adapter.network
        training = network.training
        network.eval()
        if not self.base:
            with self.validator.adapter.reference():
                self.base = self.scores()
            self.last = self.base
        now = self.scores()
        network.train(training)
        found = {}
        for name, rewards in now.items():
            over_base, over_last = win_rate(rewards, self.base[name]), win_rate(rewards, self.last[name])
            found[name] = {
                "reward": mean(rewards),
                "base_reward": mean(self.base[name]),
                "over_base": {"win_rate": over_base.rate, "interval": list(over_base.interval)},
                "over_last": {"win_rate": over_last.rate, "interval": list(over_last.interval)},
            }
        self.before, self.last = self.last, now
        return found

    def scores(self) -> dict[str, list[float]]:
        """Rewards of the present policy's pictures by scorer, all turned so that higher is better."""
        images = self.validator.draw().images
        found = {}
        for name, scorer in self.scorers.items():
            reward = score_with_context(scorer, images, self.validator.prompts, self.validator.holes).reward
            signed = reward if scorer.higher_is_better else -reward
            found[name] = prompt_means(signed, self.validator.seeds_per_prompt).tolist()
        return found


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


class RoundLog:
    """``rounds.jsonl``, a line for each round of the run.

    Args:
        calls_per_item: rows of the denoiser that a training item takes, backward passes counted twice.

    Attributes:
        monitor: looks at the policy after a round; None: nobody does.
        rows: the lines.
    """

    def __init__(self, folder: Path, every: int, calls_per_item: float) -> None:
        self.file, self.every, self.calls_per_item = folder / ROUNDS, every, calls_per_item
        self.monitor: RoundMonitor | None = None
        self.rows: list[dict[str, Any]] = []

    def drawn(self, number: int, step: int, facts: RoundFacts, items: int) -> None:
        """Round ``number`` was drawn when ``step`` optimiser steps were done; ``items`` are trained on in it."""
        self.rows = [row for row in self.rows if row["round"] < number]
        before = self.rows[-1] if self.rows else {"pictures_so_far": 0, "calls_so_far": 0.0}
        calls = facts.calls + self.calls_per_item * items
        self.rows.append(
            {
                "round": number,
                "step": step,
                "reward": facts.reward,
                "reward_gap": facts.gap,
                "accepted": facts.counts.accepted,
                "counts": facts.to_json()["counts"],
                "pairs": facts.counts.kept,
                "pictures": facts.pictures,
                "drawing_calls": facts.calls,
                "training_calls": self.calls_per_item * items,
                "pictures_so_far": before["pictures_so_far"] + facts.pictures,
                "calls_so_far": before["calls_so_far"] + calls,
                "after": None,
            }
        )
        self.write()

    def finished(self, step: int) -> None:
        """The last round that was drawn is trained on, and ``step`` optimiser steps are done: look at the policy.

        A run that ended inside the round and then went on is looked at again.
        """
        if self.monitor is None or not self.rows:
            return
        seen = self.rows[-1]["after"]
        if seen is not None and seen["step"] == step:
            return
        if seen is not None:
            self.monitor.last = self.monitor.before
        self.rows[-1]["after"] = {"step": step, "scorers": self.monitor()}
        self.write()

    def due(self, number: int) -> bool:
        """Whether the policy is looked at before round ``number`` is drawn."""
        return self.every > 0 and number > 0 and number % self.every == 0

    def write(self) -> None:
        """Called by all processes; the first one writes."""
        if PartialState().is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def state_dict(self) -> dict[str, Any]:
        seen = self.monitor
        compared = {} if seen is None else {"base": seen.base, "last": seen.last, "before": seen.before}
        return {"round_log": {"rows": self.rows, **compared}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["round_log"]
        self.rows = list(saved["rows"])
        if self.monitor is not None and "base" in saved:
            self.monitor.base, self.monitor.last, self.monitor.before = (saved[k] for k in ("base", "last", "before"))
        self.write()


def add_rounds(folder: Path, report: Report) -> None:
    """The rounds of a run's ``rounds.jsonl`` in its report."""
    rows = [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()]
    report.text(
        "## Rounds\n\nReward is that of the pictures that were drawn for training, with the guidance of the rollouts. "
        "Denoiser calls are rows of the network, with backward passes counted twice."
    )
    report.table(
        [
            {
                "round": row["round"],
                "at step": row["step"],
                "reward": row["reward"],
                "gap of pairs": row["reward_gap"],
                "prompts accepted": row["accepted"],
                "pairs": row["pairs"],
                "left out: spread, gap, duplicates": ", ".join(
                    str(row["counts"][name]) for name in ("small_spread", "small_gap", "near_duplicates")
                ),
                "pictures so far": row["pictures_so_far"],
                "denoiser calls so far": row["calls_so_far"],
            }
            for row in rows
        ]
    )
    compared = [(row["round"], row["after"]["scorers"]) for row in rows if row["after"] is not None]
    if not compared:
        return
    report.text("### After the rounds\n\nOn the same prompts and seeds every time.")
    report.table(
        [
            {
                "after round": number,
                "scorer": name,
                "reward": found["reward"],
                "base": found["base_reward"],
                "win rate over the base": shown(found["over_base"]),
                "over the round compared last": shown(found["over_last"]),
            }
            for number, scorers in compared
            for name, found in scorers.items()
        ]
    )
    rates = {name: [(n, scorers[name]["over_base"]["win_rate"]) for n, scorers in compared] for name in compared[0][1]}
    report.chart(rates, "Win rate over the base after each round")


def shown(rate: Mapping[str, Any]) -> str:
    """A win rate with its interval."""
    low, high = rate["interval"]
    return f"{rate['win_rate']:.1%} [{low:.1%}, {high:.1%}]"
