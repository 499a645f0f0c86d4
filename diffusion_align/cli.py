"""The command line. Nothing heavy is imported before a command needs it, so that every --help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

from diffusion_align.training.methods import METHODS

from .commands import cache, data_sets, evaluating, helping, scorers, sharing, sweep, train
from .commands.console import talking
from .commands.helping.helping_options import CompletionOptions, DoctorOptions, InitOptions
from .commands.options import (
    AnnotateOptions,
    DemoOptions,
    ExportOptions,
    GenerateOptions,
    ScoreOptions,
    ServeScorerOptions,
)
from .commands.parsing import parse_options, unknown
from .studio import studio_options


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        text: its line in the overview.
        parse: arguments to checked options; it prints the help and raises ``SystemExit`` where that is asked for.
        module: of ``room``, whose ``run`` does what the options say.
        room: of the package.
        ends: by itself; others run until they are stopped.
    """

    text: str
    parse: Callable[[list[str]], Any]
    module: str
    room: str = "commands"
    ends: bool = True

    def run(self, options: Any) -> int:
        """Do what ``options`` say; returns the exit status."""
        status: int = import_module(f"{__package__}.{self.room}.{self.module}").run(options)
        return status


#: Flags that stand anywhere behind any command.
FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "--json": "every command: one JSON object on stdout instead of text",
        "--quiet": "every command: nothing on stderr but errors",
    }
)

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "demo": Command(
            "DPO and InPO on the embedded world in about five minutes, with a report",
            partial(parse_options, DemoOptions, "demo"),
            "demo",
        ),
        "train": Command(
            f"fine-tune on preference, or train what judges: {', '.join(METHODS)}",
            train.parse,
            "train",
        ),
        "sweep": Command("train with many settings and compare what they come to", sweep.parse, "sweep"),
        "generate": Command(
            "draw images with a model and trained weights",
            partial(parse_options, GenerateOptions, "generate", bare="--prompt"),
            "generate",
        ),
        "export": Command(
            "write trained weights for diffusers, ComfyUI, kohya's tools, or as a whole pipeline",
            partial(parse_options, ExportOptions, "export", bare="--run"),
            "export",
        ),
        "score": Command(
            "score pictures with any scorers", partial(parse_options, ScoreOptions, "score", bare="--source"), "score"
        ),
        "serve-scorer": Command(
            "serve a scorer to runs in other processes",
            partial(parse_options, ServeScorerOptions, "serve-scorer", bare="--scorer"),
            "serve_scorer",
            ends=False,
        ),
        "scorers": Command(
            "list scorers and where their weights are; scorers verify NAME tries one", scorers.parse, "scorers"
        ),
        "annotate": Command(
            "make preference pairs by AI feedback: draw, score, compare",
            partial(parse_options, AnnotateOptions, "annotate", bare="--prompts"),
            "annotate",
        ),
        "data": Command(
            "import, export, check, dedup, split and count pairs; new labels (relabel), ranked lists (lists)",
            data_sets.parse,
            "data_sets",
        ),
        "evaluate": Command(
            "compare models (evaluate A B), scorers with people (evaluate scorer), ways to guide (evaluate guidance)",
            evaluating.parse,
            "evaluating",
        ),
        "studio": Command(
            "label pictures, compare models and watch runs in a browser",
            studio_options.parse,
            "launching",
            "studio",
            False,
        ),
        "card": Command("write a model card into a run's folder", sharing.parse_card, "sharing"),
        "push": Command("send a run with its card to the hub", sharing.parse_push, "sharing"),
        "cache": Command("encode a training set's images and captions once", cache.parse, "cache"),
        "recipes": Command("list, show and copy the shipped recipes", helping.parse_recipes, "helping"),
        "init": Command(
            "write a commented recipe that fits a method, a model, a data set and a card",
            partial(parse_options, InitOptions, "init", bare="--method"),
            "helping",
        ),
        "doctor": Command(
            "look at this machine: what is there, what is missing, what to do",
            partial(parse_options, DoctorOptions, "doctor"),
            "helping",
        ),
        "completion": Command(
            "print a script that completes commands and flags in bash, zsh or fish",
            partial(parse_options, CompletionOptions, "completion", bare="--shell"),
            "helping",
        ),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: returns the exit status (0 done, 2 bad input, 1 failed run, 130 stopped by a signal)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("diffusion-align"))
        return 0
    if argv is None and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # bars of a log are a line now and then
    try:
        arguments, flags = without_flags(arguments)
        command, options = parse(arguments)
        as_json = "--json" in flags
        if as_json and hasattr(options, "json"):
            options = replace(options, json=True)
        if as_json and not command.ends:
            raise ValueError(f"--json: {arguments[0]} runs until it is stopped, and has no result to print")
        with talking(as_json, "--quiet" in flags) as talk:
            status = command.run(options)
        if talk is not None and os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
            print(talk.text(status), flush=True)
        return status
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        if os.environ.get("DIFFUSION_ALIGN_DEBUG"):
            raise
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError | ImportError) else 1


def without_flags(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Arguments without the flags that every command has, and which of those were there."""
    found = {flag for flag in FLAGS if flag in arguments}
    return [argument for argument in arguments if argument not in found], found


def parse(arguments: Sequence[str]) -> tuple[Command, Any]:
    """The command that ``arguments`` (at least one) name, and its checked options; nothing is run.

    Raises:
        ValueError, FileNotFoundError: an unknown command or method, or the option that is wrong, is named.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS))
    return COMMANDS[name], COMMANDS[name].parse(rest)


def overview() -> str:
    """The text of ``diffusion-align --help``."""
    lines = ["usage: diffusion-align COMMAND ... (each command has its own --help)", ""]
    lines += [f"  {name:<14}{command.text}" for name, command in COMMANDS.items()]
    lines += ["", *(f"  {flag:<14}{text}" for flag, text in FLAGS.items())]
    return "\n".join([*lines, "", "Full tracebacks: DIFFUSION_ALIGN_DEBUG=1; no colours: NO_COLOR=1"])


if __name__ == "__main__":
    sys.exit(main())
