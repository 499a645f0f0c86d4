"""``diffusion-align train``: a method's settings in, a run out, or with --dry-run its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from diffusion_align.training import methods
from diffusion_align.training.engine.config import RunConfig

from .console import conclude
from .parsing import asks_for_help, unknown

C = TypeVar("C", bound=RunConfig)


def parse(arguments: list[str]) -> RunConfig:
    """Settings of the method that the first argument names.

    Raises:
        ValueError, FileNotFoundError: as ``parse_config``; an unknown method.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        texts = {name: (methods.config_class(name).__doc__ or "").splitlines()[0] for name in methods.METHODS}
        print("usage: diffusion-align train METHOD [--config RECIPE.yaml] [--FLAG VALUE ...]\n")
        print("\n".join(f"  {name:<12}{text}" for name, text in texts.items()))
        raise SystemExit(0)
    name, *flags = arguments
    if name not in methods.METHODS:
        raise ValueError(unknown("training method", name, methods.METHODS))
    cls = methods.config_class(name)
    return parse_config(cls, flags, f"diffusion-align train {name}", cls.__doc__ or "")


def parse_config(cls: type[C], arguments: list[str], prog: str, description: str) -> C:
    """Defaults, then the ``--config`` file, then flags; all checked.

    Raises:
        ValueError, FileNotFoundError: the file, key or flag that is wrong is named.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    import tyro

    from diffusion_align.training.settings import load_config, to_dict, validated

    path = config_argument(arguments)
    # Flags may complete what the file leaves out: how all fit each other is seen at the end.
    default = cls() if path is None else load_config(cls, path, complete=False)
    config = tyro.cli(cls, prog=prog, description=description, args=arguments, default=default)
    source = "command line" if path is None else f"command line and {path}"
    return validated(cls, {k: v for k, v in to_dict(config).items() if k != "method"}, source)


def config_argument(arguments: Sequence[str]) -> str | None:
    """Value of ``--config`` in ``arguments``, needed before the rest can be parsed."""
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def run(config: RunConfig) -> int:
    """Train, or print the plan; returns the exit status."""
    if config.dry_run:
        from diffusion_align.training.plan import make_plan

        plan = make_plan(config)
        conclude(plan, {"plan": str(plan)})
        return 0
    from diffusion_align.training.engine.accelerator import leave_processes
    from diffusion_align.training.engine.metrics import read_metrics
    from diffusion_align.training.engine.reporting.last_words import last_words
    from diffusion_align.training.run import train

    result = train(config, last_pictures=True)
    leave_processes()
    if result.stopped is not None and not result.ended_early:
        told = f"stopped by {result.stopped} after step {result.step}; continue with --resume-from-checkpoint latest"
        conclude(told, {"stopped": result.stopped, "step": result.step, "output_dir": str(result.output_dir)})
        return 130
    if result.weights is not None:  # only the first of several processes writes them
        best = result.output_dir / "best"
        kept = f"; the best weights are in {best}" if best.is_dir() else ""
        early = f" ({result.stopped}{kept})" if result.stopped else ""
        said = {"output_dir": str(result.output_dir), "weights": str(result.weights), "step": result.step}
        last = {name: value for line in result.history for name, value in line.items()}
        lines = [f"trained {result.step} steps{early}: {result.weights}"]
        lines += last_words(config, read_metrics(result.output_dir / "metrics.jsonl"))
        conclude("\n".join(lines), {**said, "stopped": result.stopped, "metrics": last})
        if getattr(config, "push_to_hub", False):
            from .sharing.hub import push
            from .sharing.sharing_options import PushOptions

            repo = str(getattr(config, "hub_model_id", None))
            address, _ = push(PushOptions(run=str(result.output_dir), repo=repo))
            conclude(f"pushed: {address}", {"repository": address})
    return 0
