"""``diffusion-align init``: a commented recipe that fits a method, a model, a data set and a card, and its plan."""

from __future__ import annotations

import ast
import inspect
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffusion_align.commands.console import conclude, note
from diffusion_align.files import write_whole
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.methods import config_class
from diffusion_align.training.plan import make_plan
from diffusion_align.training.settings import to_dict, validated

from .helping_options import InitOptions

GIB = 2**30
#: Settings that most people look at, in the order of a recipe; those that a method has.
SHOWN = (
    "method", "model", "variant", "vae", "dataset", "dataset_split", "resolution", "output_dir",
    "scorer", "scorers", "kinds", "real_dataset", "lora_rank", "full_finetuning",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "optim", "loss_type", "beta", "num_generations", "prompts_per_rollout", "num_inference_steps",
    "guidance_scale", "caption_dropout", "random_flip", "cache_dir",
    "weight_dtype", "mixed_precision", "gradient_checkpointing", "vae_batch_size", "use_ema",
    "eval_steps", "validation_prompts", "validation_scorer", "num_validation_prompts", "save_steps", "report_to",
    "seed",
)  # fmt: skip


def fitted(config: RunConfig, vram: float | None) -> tuple[RunConfig, list[str]]:
    """The settings with those that save memory, one after the other, until the estimate fits; and what there is to say.

    Args:
        vram: GiB; None changes nothing.
    """
    notes: list[str] = []
    needed = config.memory_bytes()
    if vram is None or needed is None:
        return config, [] if vram is None else ["the memory of this run cannot be estimated: nothing was fitted"]
    while needed > vram * GIB:
        tried = (replace(config, **change) for change in config.savings())  # those that usually help most come first
        costs = ((cost, other) for other in tried if (cost := other.memory_bytes()) is not None and cost < needed)
        found = next(costs, None)
        if found is None:
            notes.append(f"no setting is left that saves memory: about {needed / GIB:.3g} GiB are needed")
            return config, notes
        needed, config = found
    return config, [*notes, f"about {needed / GIB:.3g} of {vram:g} GiB"]


def recipe_text(config: RunConfig, command: str) -> str:
    """YAML with each setting's help above it; what is at its default is commented out."""
    values, usual, texts = to_dict(config), to_dict(type(config)()), help_texts(type(config))
    lines = [f"# {(type(config).__doc__ or '').splitlines()[0]}", f"# {command}", ""]
    for name in SHOWN:
        if name not in values:
            continue
        lines += [f"# {line}" for line in textwrap.wrap(texts.get(name, ""), 110)]
        entry = f"{name}: {_yaml(values[name])}"
        kept = name in ("method", "model", "dataset", "output_dir") or values[name] != usual[name]
        lines += [entry if kept else f"# {entry}", ""]
    lines.append("# All other settings: diffusion-align train " + config.method + " --help")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def help_texts(cls: type) -> dict[str, str]:
    """The text under each field of a class of settings, and of those below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            found |= _texts(base)
    return {field.name: found[field.name] for field in fields(cls) if field.name in found}


@cache
def _texts(cls: type) -> Mapping[str, str]:
    """The text under each field that stands in the class itself."""
    found = {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for field, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[field.target.id] = " ".join(str(following.value.value).split())
    return found


def run(options: InitOptions) -> int:
    """Write the recipe, print it and its plan; returns the exit status.

    Raises:
        FileExistsError: the file is there.
        ValueError, FileNotFoundError, OSError: settings that do not fit each other; model or data that a plan needs.
    """
    out = Path(options.out or f"{options.method}.yaml")
    if out.exists():
        raise FileExistsError(f"--out {out} is already there: give another")
    cls = config_class(options.method)
    known = {field.name for field in fields(cls)}
    given = {"model": options.model, "dataset": options.dataset, "output_dir": f"runs/{out.stem}"}
    config = validated(cls, {k: v for k, v in given.items() if v is not None and k in known}, "init", complete=False)
    config, notes = fitted(config, options.vram)
    command = shlex.join(["diffusion-align", "train", options.method, "--config", str(out)])
    text = recipe_text(config, command)
    write_whole(out, text.encode())
    conclude(text, {"recipe": text})
    for line in notes:
        note(line)
    try:
        config.check()
        plan = make_plan(config)
        conclude(plan, {"plan": plan})
    except (ValueError, OSError) as error:
        note(f"no plan yet: {error}")
    conclude(f"{out}\nnext: {command} --dry-run", {"out": str(out)})
    return 0
