"""When a run is worth an alarm: what spec and users have seen go wrong, as rules on lines of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_align.training.engine.watching.watchdog import Alarm

#: Log lines in a row with entangled gradients before there is an alarm.
ENTANGLED_LINES = 3
#: Share of chosen pictures whose error is above the reference's from which entanglement is an alarm.
ERROR_UP = 0.6
#: Mean |u| of pairs that is too large in as many steps at the start.
LARGE_MARGIN, FIRST_STEPS = 3.0, 50
#: Validations in a row on which held-out scorers fall while the reward rises.
FALLING_VALIDATIONS = 3
#: How many of the base's deviations a fall has at least: the same seeds show the smallest changes as certain ones.
LEAST_FALL = 0.02
#: Validations in a row with the same artefact that stop a run; for the artefact monitor they are the alarm.
ARTEFACT_VALIDATIONS = 2
#: How far an ensemble may disagree on own pictures, in times of its spread on the base's.
SPREAD_RATIO = 1.5
#: And by how many paired standard errors, so that a few prompts do not make an alarm.
SPREAD_ERRORS = 3.0

#: Beginnings of names: alarms about figures, figures that are judged by the base's spread, and by paired intervals.
ARTEFACT, PICTURE, MONITORED = "alarm/picture_", "eval/picture_", "artefact/"
#: End of the name of how far a figure moved.
MOVED = "_moved"


class ArtefactRule:
    """A figure of the validation pictures left the base's; it stops a run that shows it twice in a row.

    Args:
        validations: in a row that make an alarm.

    Attributes:
        in_a_row: at how many validations up to now a figure was out of bounds.
    """

    name = "artefacts"

    def __init__(self, validations: int = 1) -> None:
        self.validations = validations
        self.in_a_row: dict[str, int] = {}

    def count(self, out: Mapping[str, bool]) -> dict[str, float]:
        """``alarm/picture_NAME``, 1 or 0, of all figures of a validation, by whether each was out of bounds at it."""
        self.in_a_row = {name: self.in_a_row.get(name, 0) + 1 for name, is_out in out.items() if is_out}
        return {f"{ARTEFACT}{name}": float(self.in_a_row.get(name, 0) >= self.validations) for name in out}

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return any(name.startswith(ARTEFACT) for name in metrics)

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        found = [name.removeprefix(ARTEFACT) for name, value in metrics.items() if name.startswith(ARTEFACT) and value]
        if not found:
            return None
        told = [
            f"{name} {metrics[f'{figure}{name}']:.3g} ({metrics[f'{figure}{name}{MOVED}']:+.2f} "
            "times as far from the base's as it may move)"
            for name in found
            for figure in (PICTURE, MONITORED)
            if f"{figure}{name}" in metrics
        ]
        return Alarm(", ".join(told), max(self.in_a_row.get(name, 0) for name in found) >= ARTEFACT_VALIDATIONS)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = dict(state["in_a_row"])


class EntanglementRule:
    """kappa = q / e_w above 1: the step that raises the rejected error raises the chosen one as well (2410.13828).

    An alarm where its median is above 1 on three log lines in a row, while ``chosen_error_up`` is above 0.6.
    """

    name = "entanglement"

    def __init__(self) -> None:
        self.lines = 0

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "kappa_above_1" in metrics and "chosen_error_up" in metrics

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        if not self.judges(metrics):
            return None
        entangled = metrics["kappa_above_1"] > 0.5 and metrics["chosen_error_up"] > ERROR_UP
        self.lines = self.lines + 1 if entangled else 0
        if self.lines < ENTANGLED_LINES:
            return None
        return Alarm(
            f"kappa is above 1 for {metrics['kappa_above_1']:.0%} of the pairs, {self.lines} log lines in a row, and "
            f"{metrics['chosen_error_up']:.0%} of the chosen pictures have errors above the reference's: all get worse"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = int(state["lines"])


class LargeMarginRule:
    """u = r_w - r_l is large before anything was learnt: ``beta`` or the learning rate is too high for the pairs.

    An alarm where a line of the first steps has a mean |u| above 3, where sig(-u), the factor of the gradients, is 0.05
    for pairs that are told apart and 0.95 for those that are not.

    Args:
        steps: how many are the first ones.
    """

    name = "large_margins"

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "abs_margin" in metrics and metrics["step"] <= self.steps

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        if not self.judges(metrics) or metrics["abs_margin"] <= LARGE_MARGIN:
            return None
        return Alarm(
            f"mean |u| is {metrics['abs_margin']:.3g} in the first {self.steps} steps, and the mean gradient factor "
            f"sig(-u) {metrics['gradient_factor']:.3g} instead of 0.5: lower beta or the learning rate"
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It remembers nothing."""


class HeldOutRule:
    """The trained reward rises while scorers that are only watched fall: the reward is being exploited.

    A validation counts where the mean of the held-out scorers, each in the base's standard deviations, lies more than
    one paired standard error (and 0.02) below its best, and the trained reward above what it was then; three in a row
    are an alarm.

    Attributes:
        best: means over the scorers, prompt by prompt, at the best validation so far.
        best_reward, reward: mean of the training lines between that validation and the one before it, and of the last
            validation; where the best one was at the start, the first line.
    """

    name = "held_out"

    def __init__(self) -> None:
        self.best: list[float] = []
        self.best_reward: float | None = None
        self.reward: float | None = None
        self.falling = 0
        self.lines: list[float] = []

    def measure(self, standardised: Sequence[float]) -> dict[str, float]:
        """The held-out mean, and its paired change since the best validation so far, whose place it may take.

        Args:
            standardised: of each prompt, mean over the scorers of (policy - base's mean) / base's deviation.
        """
        count = len(standardised)
        mean = sum(standardised) / count
        if self.lines:
            self.reward, self.lines = sum(self.lines) / len(self.lines), []
        found = {"eval/held_out": mean}
        if len(self.best) == count > 1:
            moved = [now - then for now, then in zip(standardised, self.best, strict=True)]
            change = sum(moved) / count
            variance = sum((each - change) ** 2 for each in moved) / (count - 1)
            found |= {"eval/held_out_change": change, "eval/held_out_error": math.sqrt(variance / count)}
        if len(self.best) != count or mean > sum(self.best) / count:
            self.best, self.best_reward = list(standardised), self.reward
        return found

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "eval/held_out_change" in metrics

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        reward = trained_reward(metrics)
        if reward is not None:
            self.lines.append(reward)
            if self.best_reward is None:  # the best validation was before the first line
                self.best_reward = reward
        if not self.judges(metrics):
            return None
        change, error = metrics["eval/held_out_change"], metrics["eval/held_out_error"]
        rising = self.reward is not None and self.best_reward is not None and self.reward > self.best_reward
        self.falling = self.falling + 1 if change < -max(error, LEAST_FALL) and rising else 0
        if self.falling < FALLING_VALIDATIONS:
            return None
        return Alarm(
            f"the trained reward rose from {self.best_reward:.3g} to {self.reward:.3g}, while the held-out scorers "
            f"fell by {-change:.2f} +- {error:.2f} of the base's deviations, at {self.falling} validations in a row"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_reward": self.best_reward,
            "reward": self.reward,
            "falling": self.falling,
            "lines": self.lines,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.falling, self.lines = list(state["best"]), int(state["falling"]), list(state["lines"])
        self.best_reward, self.reward = state["best_reward"], state["reward"]


class SpreadRule:
    """The members of the reward's ensemble disagree on own pictures much more than on the base's: at least 1.5 times as
    much, and by more than three paired standard errors."""

    name = "spread"

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "eval/spread_ratio" in metrics

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        if not self.judges(metrics):
            return None
        ratio, errors = metrics["eval/spread_ratio"], metrics["eval/spread_errors"]
        if ratio <= SPREAD_RATIO or errors <= SPREAD_ERRORS:
            return None
        return Alarm(
            f"the reward's ensemble disagrees on the model's pictures {ratio:.2f} times as much as on the base's: they "
            "have left what the scorers know"
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It remembers nothing."""


class DivergenceRule:
    """The divergence from the base is spent.

    Args:
        budget: largest ``eval/kl``, in nats a picture.
    """

    name = "kl_budget"

    def __init__(self, budget: float) -> None:
        self.budget = budget

    def judges(self, metrics: Mapping[str, float]) -> bool:
        return "eval/kl" in metrics

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        if not self.judges(metrics) or metrics["eval/kl"] <= self.budget:
            return None
        return Alarm(
            f"the divergence from the base is {metrics['eval/kl']:.3g}, above the {self.budget:g} of kl_budget"
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It remembers nothing."""


def trained_reward(metrics: Mapping[str, float]) -> float | None:
    """What training maximises, of a log line: the reward of own pictures, or the pairs' implicit margin."""
    return metrics.get("reward", metrics.get("margin"))
