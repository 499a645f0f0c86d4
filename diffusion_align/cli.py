"""The command line. Nothing heavy is imported before a command needs it, so that every --help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.methods import CONFIGS
from diffusion_align.training.pairs.config import DPOConfig

from .commands.options import AnnotateOptions, DemoOptions, EvaluateGuidanceOptions, GenerateOptions, ScoreOptions

C = TypeVar("C", bound=RunConfig)
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        text: its line in the overview.
        parse: arguments to checked options; it prints the help and raises ``SystemExit`` where that is asked for.
        run: does what the options say and returns the exit status.
    """

    text: str
    parse: Callable[[list[str]], Any]
    run: Callable[[Any], int]


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
    try:
        command, options = parse(arguments)
        return command.run(options)
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DIFFUSION_ALIGN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError | ImportError) else 1


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
    lines += [f"  {name:<10}{command.text}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "Full tracebacks: DIFFUSION_ALIGN_DEBUG=1"])


def unknown(kind: str, given: str, known: Any) -> str:
    """An error text with the nearest known name."""
    import difflib

    near = difflib.get_close_matches(given, list(known), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {given!r}{hint}: expected one of {', '.join(known)}"


# -- train and cache ---------------------------------------------------------------------------------------------------


def parse_config(cls: type[C], arguments: list[str], prog: str, description: str) -> C:
    """Defaults, then the ``--config`` file, then flags; all validated.

    Raises:
        ValueError, FileNotFoundError: the file, key or flag that is wrong is named.
    """
    import tyro

    from diffusion_align.training.settings import load_config, to_dict, validated

    path = config_argument(arguments)
    default = cls() if path is None else load_config(cls, path)
    config = tyro.cli(cls, prog=prog, description=description, args=arguments, default=default)
    return validated(cls, {k: v for k, v in to_dict(config).items() if k != "method"}, "command line")


def config_argument(arguments: Sequence[str]) -> str | None:
    """Value of ``--config`` in ``arguments``, needed before the rest can be parsed."""
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def parse_train(arguments: list[str]) -> RunConfig:
    if not arguments or arguments[0] in ("-h", "--help"):
        methods = "\n".join(f"  {name:<10}{(cls.__doc__ or '').splitlines()[0]}" for name, cls in CONFIGS.items())
        print(f"usage: diffusion-align train METHOD [--config RECIPE.yaml] [--FLAG VALUE ...]\n\n{methods}")
        raise SystemExit(0)
    if arguments[0] not in CONFIGS:
        raise ValueError(unknown("training method", arguments[0], CONFIGS))
    cls = CONFIGS[arguments[0]]
    return parse_config(cls, arguments[1:], f"diffusion-align train {arguments[0]}", cls.__doc__ or "")


def run_train(config: RunConfig) -> int:
    if config.dry_run:
        from diffusion_align.training.plan import make_plan

        print(make_plan(config))
        return 0
    from diffusion_align.training.run import train

    result = train(config)
    if result.stopped is not None:
        print(f"stopped by {result.stopped} after step {result.step}; go on with --resume-from-checkpoint latest")
        return 130
    if result.weights is not None:  # only the first of several processes writes them
        print(f"trained {result.step} steps: {result.weights}")
    return 0


def parse_cache(arguments: list[str]) -> DPOConfig:
    config = parse_config(DPOConfig, arguments, "diffusion-align cache", "Encode a recipe's images and captions once.")
    if config.cache_dir is None:
        raise ValueError("cache needs --cache-dir, the folder for the encoded latents and captions")
    return config


def run_cache(config: DPOConfig) -> int:
    from diffusion_align.training.pairs.job import cache_pairs

    print(cache_pairs(config))
    return 0


# -- generate, score and demo ------------------------------------------------------------------------------------------


def parse_options(cls: type[OptionsT], name: str, arguments: list[str], bare: str | None = None) -> OptionsT:
    """Options of the command ``name``; ``bare``: the flag whose value may stand first, without its name."""
    import tyro

    if bare is not None and arguments and not arguments[0].startswith("-"):
        arguments = [bare, *arguments]
    return tyro.cli(cls, prog=f"diffusion-align {name}", args=arguments)


def parse_generate(arguments: list[str]) -> GenerateOptions:
    options = parse_options(GenerateOptions, "generate", arguments, bare="--prompt")
    replayed = options.guidance == "replay" and options.schedule is not None
    if (options.prompt is None) == (options.prompts is None) and not (replayed and options.prompt is None):
        raise ValueError("generate needs a prompt, or --prompts FILE (and not both)")
    for name in ("num_images", "num_inference_steps", "batch_size", "particles"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    return options


def run_generate(options: GenerateOptions) -> int:
    from .commands.generate import generate_files

    for path in generate_files(options):
        print(path)
    return 0


def parse_score(arguments: list[str]) -> ScoreOptions:
    options = parse_options(ScoreOptions, "score", arguments, bare="--source")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected at least 1")
    return options


def run_score(options: ScoreOptions) -> int:
    from .commands.score import score_files

    print(score_files(options))
    return 0


def parse_annotate(arguments: list[str]) -> AnnotateOptions:
    return parse_options(AnnotateOptions, "annotate", arguments, bare="--prompts")


def run_annotate(options: AnnotateOptions) -> int:
    from .commands.annotate import annotate_files

    print(annotate_files(options))
    return 0


def parse_evaluate(arguments: list[str]) -> EvaluateGuidanceOptions:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: diffusion-align evaluate guidance [--FLAG VALUE ...]\n\n  guidance  ways to guide at equal cost")
        raise SystemExit(0)
    if arguments[0] != "guidance":
        raise ValueError(unknown("evaluation", arguments[0], ["guidance"]))
    return parse_options(EvaluateGuidanceOptions, "evaluate guidance", arguments[1:])


def run_evaluate(options: EvaluateGuidanceOptions) -> int:
    from .commands.evaluate_guidance import evaluate_guidance

    print(f"report: {evaluate_guidance(options)}")
    return 0


def parse_demo(arguments: list[str]) -> DemoOptions:
    return parse_options(DemoOptions, "demo", arguments)


def run_demo(options: DemoOptions) -> int:
    from .commands.demo import run_demo as demo

    print(f"report: {demo(options)}")
    return 0


COMMANDS: dict[str, Command] = {
    "demo": Command("DPO and InPO on the embedded world in about five minutes, with a report", parse_demo, run_demo),
    "train": Command(
        "fine-tune on preference: dpo, inpo, inpaint-rl, grpo, nft, raft, draft; scorers: reward, evaluator",
        parse_train,
        run_train,
    ),
    "generate": Command("draw images with a model and trained weights", parse_generate, run_generate),
    "score": Command("score pictures with any scorers", parse_score, run_score),
    "annotate": Command("make preference pairs by AI feedback: draw, score, compare", parse_annotate, run_annotate),
    "evaluate": Command("compare ways to guide at equal cost: evaluate guidance", parse_evaluate, run_evaluate),
    "cache": Command("encode a training set's images and captions once", parse_cache, run_cache),
}

if __name__ == "__main__":
    sys.exit(main())
