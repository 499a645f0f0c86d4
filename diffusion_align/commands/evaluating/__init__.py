"""``diffusion-align evaluate``: models side by side, scorers beside people's verdicts (``scorer``), and ways to guide
(``guidance``)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from diffusion_align.commands.guiding.guidance_options import EvaluateGuidanceOptions
from diffusion_align.commands.options import Options
from diffusion_align.commands.parsing import asks_for_help, parse_options

from .comparison_options import EvaluateOptions
from .scorer_options import EvaluateScorerOptions

#: Options of each form of the command to the module that carries it out.
FORMS: Mapping[type[Options], str] = MappingProxyType(
    {
        EvaluateOptions: ".comparison",
        EvaluateScorerOptions: ".scorer_accuracy",
        EvaluateGuidanceOptions: "..evaluate_guidance",
    }
)

USAGE = """usage: diffusion-align evaluate A B [C ...] [--FLAG VALUE ...]
       diffusion-align evaluate scorer NAME ... --dataset PAIRS [--FLAG VALUE ...]
       diffusion-align evaluate guidance [--FLAG VALUE ...]

  A B C     models side by side, each as [NAME=]WHAT[@key=value,...]; WHAT: base, a run's folder, a LoRA file, a
            pipeline's folder or hub name, a folder of pictures (one called guidance or scorer is ./guidance, ./scorer);
            all flags: diffusion-align evaluate A B --help
  scorer    how well scorers predict people's verdicts on pairs
  guidance  ways to guide at equal cost"""


def parse(arguments: list[str]) -> Options:
    """Options of the form that the first word names; any other word is a side.

    Raises:
        ValueError: options that do not fit each other.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        print(USAGE)
        raise SystemExit(0)
    if arguments[0] == "guidance":
        return parse_options(EvaluateGuidanceOptions, "evaluate guidance", arguments[1:])
    if arguments[0] == "scorer":
        return parse_options(EvaluateScorerOptions, "evaluate scorer", arguments[1:], bare="--scorers")
    return parse_options(EvaluateOptions, "evaluate", arguments, bare="--sides")


def run(options: Options) -> int:
    """Carry out what ``parse`` found; returns the exit status."""
    status: int = import_module(FORMS[type(options)], __name__).run(options)
    return status
