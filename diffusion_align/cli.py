"""The command line. Nothing heavy is imported before a command needs it, so that every --help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from diffusion_align.training.config import DPOConfig, RunConfig
from diffusion_align.training.methods import CONFIGS

from .options import AnnotateOptions, DemoOptions, EvaluateGuidanceOptions, GenerateOptions, ScoreOptions

C = TypeVar("C", bound=RunConfig)


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
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise ValueError(unknown("command", command, COMMANDS))
        return COMMANDS[command][1](rest)
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DIFFUSION_ALIGN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError | ImportError) else 1


def overview() -> str:
    """The text of ``diffusion-align --help``."""
    lines = ["usage: diffusion-align COMMAND ... (each command has its own --help)", ""]
    lines += [f"  {name:<10}{text}" for name, (text, _) in COMMANDS.items()]
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


def run_train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        methods = "\n".join(f"  {name:<10}{(cls.__doc__ or '').splitlines()[0]}" for name, cls in CONFIGS.items())
        print(f"usage: diffusion-align train METHOD [--config RECIPE.yaml] [--FLAG VALUE ...]\n\n{methods}")
        return 0
    if arguments[0] not in CONFIGS:
        raise ValueError(unknown("training method", arguments[0], CONFIGS))
    cls = CONFIGS[arguments[0]]
    config = parse_config(cls, arguments[1:], f"diffusion-align train {arguments[0]}", cls.__doc__ or "")
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


def run_cache(arguments: list[str]) -> int:
    config = parse_config(DPOConfig, arguments, "diffusion-align cache", "Encode a recipe's images and captions once.")
    if config.cache_dir is None:
        raise ValueError("cache needs --cache-dir, the folder for the encoded latents and captions")
    from diffusion_align.training.run import cache_pairs

    print(cache_pairs(config))
    return 0


# -- generate, score and demo ------------------------------------------------------------------------------------------


def run_generate(arguments: list[str]) -> int:
    import tyro

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--prompt", *arguments]
    options = tyro.cli(GenerateOptions, prog="diffusion-align generate", args=arguments)
    replayed = options.guidance == "replay" and options.schedule is not None
    if (options.prompt is None) == (options.prompts is None) and not (replayed and options.prompt is None):
        raise ValueError("generate needs a prompt, or --prompts FILE (and not both)")
    for name in ("num_images", "num_inference_steps", "batch_size", "particles"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    from .generation import generate_files

    for path in generate_files(options):
        print(path)
    return 0


def run_score(arguments: list[str]) -> int:
    import tyro

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--source", *arguments]
    options = tyro.cli(ScoreOptions, prog="diffusion-align score", args=arguments)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected at least 1")
    from .scoring import score_files

    print(score_files(options))
    return 0


def run_annotate(arguments: list[str]) -> int:
    import tyro

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--prompts", *arguments]
    options = tyro.cli(AnnotateOptions, prog="diffusion-align annotate", args=arguments)
    from .annotation import annotate_files

    print(annotate_files(options))
    return 0


def run_evaluate(arguments: list[str]) -> int:
    import tyro

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: diffusion-align evaluate guidance [--FLAG VALUE ...]\n\n  guidance  ways to guide at equal cost")
        return 0
    if arguments[0] != "guidance":
        raise ValueError(unknown("evaluation", arguments[0], ["guidance"]))
    options = tyro.cli(EvaluateGuidanceOptions, prog="diffusion-align evaluate guidance", args=arguments[1:])
    from .evaluate import evaluate_guidance

    print(f"report: {evaluate_guidance(options)}")
    return 0


def run_demo(arguments: list[str]) -> int:
    import tyro

    options = tyro.cli(DemoOptions, prog="diffusion-align demo", args=arguments)
    from .demo import run_demo as demo

    print(f"report: {demo(options)}")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "demo": ("DPO and InPO on the embedded world in about five minutes, with a report", run_demo),
    "train": (
        "fine-tune on preference: dpo, inpo, inpaint-rl, grpo, nft, raft, draft; scorers: reward, evaluator",
        run_train,
    ),
    "generate": ("draw images with a model and trained weights", run_generate),
    "score": ("score pictures with any scorers", run_score),
    "annotate": ("make preference pairs by AI feedback: draw, score, compare", run_annotate),
    "evaluate": ("compare ways to guide at equal cost: evaluate guidance", run_evaluate),
    "cache": ("encode a training set's images and captions once", run_cache),
}

if __name__ == "__main__":
    sys.exit(main())
