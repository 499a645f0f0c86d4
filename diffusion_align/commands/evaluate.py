"""``diffusion-align evaluate``: which comparison is meant."""

from __future__ import annotations

from .options import EvaluateGuidanceOptions
from .parsing import asks_for_help, parse_options, unknown


def parse(arguments: list[str]) -> EvaluateGuidanceOptions:
    """Options of the comparison that the first argument names.

    Raises:
        ValueError: no such comparison.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        print("usage: diffusion-align evaluate guidance [--FLAG VALUE ...]\n\n  guidance  ways to guide at equal cost")
        raise SystemExit(0)
    if arguments[0] != "guidance":
        raise ValueError(unknown("evaluation", arguments[0], ["guidance"]))
    return parse_options(EvaluateGuidanceOptions, "evaluate guidance", arguments[1:])
