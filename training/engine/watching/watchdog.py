"""Rules that read every line of metrics, what they say, and whether that stops the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: In ``stop_on``: whatever rule it is.
ANY = "alarm"


@dataclass(frozen=True)
class Alarm:
    """What a rule says about a line of metrics.

    Attributes:
        text: one line, for people.
        stops: whether that is enough to stop a run whose ``stop_on`` has the rule.
    """

    text: str
    stops: bool = True


class WatchRule(Protocol):
    """Something to look out for. Each rule sees every line with its ``step``, and reads the metrics that it knows."""

    name: str

    def judges(self, metrics: Mapping[str, float]) -> bool:
        """Whether the line has what the rule decides by."""

    def seen(self, metrics: Mapping[str, float]) -> Alarm | None:
        """Take a line into account; what there is to say about it."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers: JSON-able values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo ``state_dict``."""


class Watchdog:
    """All rules of a run.

    Args:
        stop_on: names of rules whose alarms stop the run; "alarm" is all of them.

    Attributes:
        stopped: the rule that stopped the run.
        said: alarms of the last line, as they are shown on screen.
    """

    def __init__(self, rules: Sequence[WatchRule], stop_on: Collection[str] = ()) -> None:
        self.rules, self.stop_on = tuple(rules), frozenset(stop_on)
        self.stopped: str | None = None
        self.said: list[str] = []

    def seen(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Show a line of metrics to all rules.

        Returns:
            ``alarm/NAME`` of each rule that could judge it, 1 or 0.
        """
        found: dict[str, float] = {}
        self.said, metrics = [], {**metrics, "step": float(step)}
        for rule in self.rules:
            alarm = rule.seen(metrics)
            if not rule.judges(metrics):
                continue
            found[f"alarm/{rule.name}"] = float(alarm is not None)
            if alarm is None:
                continue
            stops = alarm.stops and self.listens_to(rule.name)
            if stops and self.stopped is None:
                self.stopped = rule.name
            self.said.append(f"ALARM at step {step}, {rule.name}: {alarm.text}{'; the run stops' if stops else ''}")
        return found

    def listens_to(self, name: str) -> bool:
        """Whether an alarm of this rule may stop the run."""
        return bool(self.stop_on & {name, ANY})

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self.stopped, "rules": {rule.name: rule.state_dict() for rule in self.rules}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint has of it; rules that it does not know begin anew. A run that was stopped stays so unless
        ``stop_on`` no longer has the rule."""
        for rule in self.rules:
            if rule.name in state["rules"]:
                rule.load_state_dict(state["rules"][rule.name])
        stopped = state["stopped"]
        self.stopped = stopped if stopped is not None and self.listens_to(stopped) else None
