"""``diffusion-align scorers``: which scorers there are (``listing``), and whether one works here (``verify``)."""

from __future__ import annotations

from importlib import import_module

from diffusion_align.commands.options import Options, ScorersOptions, VerifyScorerOptions
from diffusion_align.commands.parsing import parse_options

#: Options of each form of the command to the module that carries it out.
FORMS: dict[type[Options], str] = {ScorersOptions: ".listing", VerifyScorerOptions: ".verify"}


def parse(arguments: list[str]) -> Options:
    """Options of the list, or, where the first argument is "verify", of the check of one scorer.

    Raises:
        ValueError: options that do not fit each other, or a word that is none of the command's.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if arguments[:1] == ["verify"]:
        return parse_options(VerifyScorerOptions, "scorers verify", arguments[1:], bare="--scorer")
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"scorers {arguments[0]}: expected 'scorers' alone, with --json, or 'scorers verify NAME'")
    return parse_options(ScorersOptions, "scorers", arguments)


def run(options: Options) -> int:
    """Carry out what ``parse`` found; returns the exit status."""
    status: int = import_module(FORMS[type(options)], __name__).run(options)
    return status
