"""The rules that a run is watched by."""

from __future__ import annotations

from diffusion_align.training.engine.watching.watchdog import Watchdog, WatchRule
from diffusion_align.training.policy.config import TrainConfig

from .watch_rules import ArtefactRule, DivergenceRule, EntanglementRule, HeldOutRule, SpreadRule


def build_watchdog(config: TrainConfig, held_out: HeldOutRule) -> Watchdog:
    """All rules; those whose metrics a run does not log have nothing to say.

    Args:
        held_out: told by validation.
    """
    rules: list[WatchRule] = [ArtefactRule(), EntanglementRule(), held_out, SpreadRule()]
    if config.kl_budget is not None:
        rules.append(DivergenceRule(config.kl_budget))
    return Watchdog(rules, config.stop_on)
