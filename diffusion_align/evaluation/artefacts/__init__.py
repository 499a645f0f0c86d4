"""Artefacts of tuning: figures of pictures, the base's own spread of them, and alarms."""

from __future__ import annotations

from .artefact_alarms import Change, Spread, alarms, changes, paired_changes
from .artefact_figures import RULES, Figures, Rule, measure
from .further_figures import Further
from .picture_folders import compare_pictures, load_pictures

__all__ = ["RULES", "Change", "Figures", "Further", "Rule", "Spread", "alarms", "changes", "compare_pictures",
           "load_pictures", "measure", "paired_changes"]  # fmt: skip
