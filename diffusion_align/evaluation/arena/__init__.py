"""Models side by side: what a side is, tests of many comparisons at once, strengths, and the table of it all."""

from __future__ import annotations

from .many_tests import detectable_gap, holm, paired_p
from .side_grammar import SideText, parse_sides
from .standings import Board, Contest, Verdict, verdicts
from .strengths import Strength, strengths

__all__ = ["Board", "Contest", "SideText", "Strength", "Verdict", "detectable_gap", "holm", "paired_p", "parse_sides",
           "strengths", "verdicts"]  # fmt: skip
