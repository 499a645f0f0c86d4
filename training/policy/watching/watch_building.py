"""The rules that a run is watched by."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusion_align.training.engine.watching.watchdog import Watchdog, WatchRule
from diffusion_align.training.policy.config import TrainConfig

from .watch_rules import (
    ARTEFACT_VALIDATIONS,
    FIRST_STEPS,
    ArtefactRule,
    DivergenceRule,
    EntanglementRule,
    HeldOutRule,
    LargeMarginRule,
    SpreadRule,
)


@dataclass(frozen=True)
class ValidationRules:
    """Rules that validation tells what a line of metrics does not hold; the watchdog keeps their state."""

    held_out: HeldOutRule = field(default_factory=HeldOutRule)
    artefacts: ArtefactRule = field(default_factory=ArtefactRule)

    @classmethod
    def of(cls, config: TrainConfig) -> ValidationRules:
        """As the settings want them."""
        return cls(artefacts=ArtefactRule(ARTEFACT_VALIDATIONS if config.artefact_monitor else 1))


def build_watchdog(config: TrainConfig, told: ValidationRules) -> Watchdog:
    """All rules; those whose metrics a run does not log have nothing to say.

    Args:
        told: by validation.
    """
    margins = LargeMarginRule(max(FIRST_STEPS, config.logging_steps))
    rules: list[WatchRule] = [told.artefacts, EntanglementRule(), margins, told.held_out, SpreadRule()]
    if config.kl_budget is not None:
        rules.append(DivergenceRule(config.kl_budget))
    return Watchdog(rules, config.stop_on)
