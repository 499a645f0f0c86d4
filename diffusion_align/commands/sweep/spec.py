"""From a file and flags to the runs of a sweep, each with checked settings."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from diffusion_align.names import nearest
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.methods import METHODS, config_class
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import load_config, recipe_method, to_dict, validated

from .sweep_options import SweepOptions

KEYS = ("base", "method", "parameters", "runs", "settings", "seeds", "metric", "run_cap", "seed", "jobs", "out")
PARAMETER_KEYS = ("value", "values", "min", "max", "distribution")
DISTRIBUTIONS = ("uniform", "int_uniform", "log_uniform_values")
#: Settings that belong to one start of one run, which the sweep makes itself, and why they are no parameters.
OWN = {
    "output_dir": "each run has a folder of its own",
    "seed": "give seeds",
    **dict.fromkeys(("resume_from_checkpoint", "overwrite_output_dir"), "a sweep goes on by itself"),
    **dict.fromkeys(("config", "dry_run", "card"), "it is of the command train"),
}


@dataclass(frozen=True)
class Sweep:
    """What is tried, and what counts.

    Attributes:
        base: recipe or method.
        method: grid, random or list.
        parameters: what is tried of each setting, as in the file: ``values``, or a range.
        listed: method list: the settings of each run.
        settings: of all runs.
        seeds: training seeds; empty: the base's own.
        metric, maximize: what counts, and whether much of it is good.
        run_cap: method random: settings that are drawn; else the most there may be.
        seed: of the drawing.
    """

    base: str
    out: Path
    method: str = "grid"
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    listed: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    metric: str = "eval/win_rate"
    maximize: bool = True
    run_cap: int | None = None
    seed: int = 0
    jobs: int = 1
    devices: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """One run: what is tried in it, and all its settings, with its folder and seed."""

    number: int
    tried: Mapping[str, Any]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where it is made."""
        return Path(self.config.output_dir)


def load_sweep(options: SweepOptions) -> Sweep:
    """What the file says, with flags in its place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key (with the nearest known one), or values that do not fit each other.
    """
    said, source = read_file(options.file), options.file or "sweep"
    metric = said.get("metric", {})
    metric = {"name": metric} if isinstance(metric, str) else mapping(source, "metric", metric, ("name", "goal"))
    name = "sweep" if options.file is None else Path(options.file).stem
    base = options.base or said.get("base")
    if base is None:
        raise ValueError(f"{source}: base is missing: a recipe, or one of {', '.join(METHODS)}")
    parameters = {
        key: mapping(source, f"parameters: {key}", each, PARAMETER_KEYS)
        for key, each in mapping(source, "parameters", said.get("parameters", {})).items()
    }
    parameters |= {key: {"values": yaml_of(f"[{text}]")} for key, text in given("values", options.values)}
    goal = options.goal or metric.get("goal", "maximize")
    if goal not in ("maximize", "minimize"):
        raise ValueError(f"{source}: metric: goal {goal!r}: expected maximize or minimize")
    sweep = Sweep(
        base=base,
        out=Path(options.out or said.get("out") or f"runs/{name}"),
        method=options.method or said.get("method", "grid"),
        parameters=parameters,
        listed=said.get("runs", ()),
        settings=mapping(source, "settings", said.get("settings", {}))
        | {key: yaml_of(text) for key, text in given("set", options.set)},
        seeds=tuple(options.seeds if options.seeds is not None else said.get("seeds", ())),
        metric=options.metric or metric.get("name", "eval/win_rate"),
        maximize=goal == "maximize",
        run_cap=options.run_cap or said.get("run_cap"),
        seed=said.get("seed", 0),
        jobs=options.jobs or said.get("jobs") or len(options.devices) or 1,
        devices=options.devices,
    )
    check(sweep, source)
    return sweep


def check(sweep: Sweep, source: str) -> None:
    """Raises ValueError where the parts of a sweep do not fit each other."""
    if sweep.method not in ("grid", "random", "list"):
        raise ValueError(f"{source}: method {sweep.method!r}: expected grid, random or list")
    if sweep.method == "list" and (sweep.parameters or not sweep.listed):
        raise ValueError(f"{source}: method list needs runs, a list of settings, and no parameters")
    if sweep.method != "list" and (sweep.listed or not sweep.parameters):
        raise ValueError(f"{source}: method {sweep.method} needs parameters (--values), and no runs")
    if sweep.method == "random" and sweep.run_cap is None:
        raise ValueError(f"{source}: method random needs run_cap, how many settings are drawn")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(f"{source}: seeds {list(sweep.seeds)}: expected each of them once")
    for name in {*sweep.parameters, *sweep.settings, *(key for each in sweep.listed for key in each)}:
        if name in OWN:
            raise ValueError(f"{source}: {name} is no setting of a sweep: {OWN[name]}")
    for name in sweep.parameters:
        if name in sweep.settings:
            raise ValueError(f"{source}: {name} is both tried (parameters) and fixed (settings)")


def read_file(path: str | None) -> dict[str, Any]:
    """The file's mapping, its keys checked; without a file, nothing."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"sweep {path}: no such file")
    try:
        said = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    return mapping(path, "the file", said, KEYS)


def mapping(source: str, name: str, found: object, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """``found`` if it is a mapping with no other keys than ``keys``; else a ValueError names the nearest."""
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {name}: expected 'key: value' lines, found {type(found).__name__}")
    for key in found if keys is not None else ():
        if key not in (keys or ()):
            near = nearest(str(key), keys or ())
            hint = f"did you mean {near!r}?" if near else f"expected {', '.join(keys or ())}"
            raise ValueError(f"{source}: {name}: unknown key {key!r}; {hint}")
    return found


def given(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Name and value of each NAME=VALUE."""
    found = [text.partition("=") for text in texts]
    for name, sign, value in found:
        if not (name and sign and value):
            raise ValueError(f"--{flag} {name}{sign}{value}: expected NAME=VALUE")
    return [(name.replace("-", "_"), value) for name, _, value in found]


def yaml_of(text: str) -> Any:
    """A flag's value, read as in a file."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: cannot be read as YAML: {error}") from None


def planned(sweep: Sweep) -> list[Run]:
    """The runs, in the order of their numbers; every setting is checked.

    Raises:
        ValueError: an unknown setting (with the nearest known one) or a wrong value, more settings than run_cap, or a
            metric of validation without validation.
    """
    cls, base = base_settings(sweep.base)
    names = {part.name for part in fields(cls)}
    tried = combinations(sweep)
    if sweep.method != "random" and sweep.run_cap is not None and len(tried) > sweep.run_cap:
        raise ValueError(f"{len(tried)} settings are more than run_cap = {sweep.run_cap}: nothing was started")
    seeds = sweep.seeds or (base["seed"],)
    runs: list[Run] = []
    for each in tried:
        for seed in seeds:
            label = ", ".join(f"{key}={value}" for key, value in each.items())
            folder = sweep.out / folder_name(len(runs), {**each, **({"seed": seed} if len(seeds) > 1 else {})})
            settings = base | {**sweep.settings, **each} | {"seed": seed, "output_dir": str(folder)}
            settings |= {"progress": False} if "progress" in names else {}
            config = validated(cls, settings, f"run {len(runs)} ({label})")
            check_metric(sweep.metric, config)
            runs.append(Run(len(runs), each, config))
    return runs


def base_settings(base: str) -> tuple[type[RunConfig], dict[str, Any]]:
    """Class and values of a recipe's settings, or of a method's defaults."""
    name = base if base in METHODS else recipe_method(base)
    if name is None:
        raise ValueError(f"base {base}: the recipe names no method: write 'method: dpo' or another one into it")
    cls = config_class(name)
    config = cls() if base in METHODS else load_config(cls, base, complete=False)
    return cls, {key: value for key, value in to_dict(config).items() if key != "method"}


def check_metric(name: str, config: RunConfig) -> None:
    """Raises ValueError where no validation would log the metric."""
    if not name.startswith("eval/"):
        return
    if not config.eval_steps:
        raise ValueError(f"metric {name} needs validation: set eval_steps, e.g. to max_steps = {config.max_steps}")
    if name == "eval/win_rate" and isinstance(config, TrainConfig) and config.validation_scorer is None:
        raise ValueError(f"metric {name} needs validation_scorer, which compares policy and base")


def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """The settings that are tried: all, those that are drawn, or those that are listed."""
    if sweep.method == "list":
        return [mapping("runs", f"number {index}", each) for index, each in enumerate(sweep.listed)]
    if sweep.method == "grid":
        axes = {name: all_values(name, parameter) for name, parameter in sweep.parameters.items()}
        return [dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())]
    chance = random.Random(sweep.seed)
    assert sweep.run_cap is not None  # check
    return [
        {name: one_value(name, parameter, chance) for name, parameter in sweep.parameters.items()}
        for _ in range(sweep.run_cap)
    ]


def all_values(name: str, parameter: Mapping[str, Any]) -> list[Any]:
    """Of a grid."""
    if "value" in parameter:
        return [parameter["value"]]
    values = parameter.get("values")
    if not isinstance(values, list) or not values:
        raise ValueError(f"parameters: {name}: a grid needs values, a list; a range is for method random")
    return values


def one_value(name: str, parameter: Mapping[str, Any], chance: random.Random) -> Any:
    """Drawn from values, or from a range."""
    if "values" in parameter or "value" in parameter:
        return chance.choice(all_values(name, parameter))
    if not {"min", "max"} <= parameter.keys():
        raise ValueError(f"parameters: {name}: expected values, or min and max")
    try:
        low, high = (float(parameter[key]) for key in ("min", "max"))  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise ValueError(f"parameters: {name}: min and max are no numbers: {dict(parameter)}") from None
    whole = all(isinstance(parameter[key], int) for key in ("min", "max"))
    kind = parameter.get("distribution", "int_uniform" if whole else "uniform")
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"parameters: {name}: distribution {kind!r}: expected one of {', '.join(DISTRIBUTIONS)}")
    if low > high or (kind == "log_uniform_values" and low <= 0):
        raise ValueError(f"parameters: {name}: {kind} from {low:g} to {high:g} is no range")
    if kind == "int_uniform":
        return chance.randint(int(low), int(high))
    drawn = chance.uniform(math.log(low), math.log(high)) if kind == "log_uniform_values" else chance.uniform(low, high)
    return float(f"{math.exp(drawn) if kind == 'log_uniform_values' else drawn:.4g}")


def folder_name(number: int, tried: Mapping[str, Any]) -> str:
    """Of a run: its number and what is tried in it, as far as a file name goes."""
    text = "-".join(f"{key}={value}" for key, value in tried.items())
    return f"{number:03d}-{re.sub(r'[^A-Za-z0-9=._+-]+', '_', text)}"[:100].rstrip("-")


def plan_text(sweep: Sweep, runs: Sequence[Run]) -> str:
    """The runs, and what they cost together."""
    lines = [f"{run.folder.name:<40} {run.config.max_steps:,} steps of {run.config.method}" for run in runs]
    steps = sum(run.config.max_steps for run in runs)
    examples = sum(examples_of(run.config) for run in runs)
    settings = len(runs) // max(1, len(sweep.seeds))
    lines += [
        "",
        f"{len(runs)} runs in {sweep.out}: {settings} settings, {max(1, len(sweep.seeds))} seeds each, by "
        f"{sweep.metric} ({'more' if sweep.maximize else 'less'} is better)",
        f"{steps:,} optimiser steps, {examples:,} training examples{denoiser_cost(runs)}",
    ]
    return "\n".join(lines)


def examples_of(config: RunConfig) -> int:
    """Training examples of a run on one device."""
    return config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps


def denoiser_cost(runs: Sequence[Run]) -> str:
    """Rows of the network in all runs, where a diffusion model is trained."""
    calls = 0.0
    for run in runs:
        if isinstance(run.config, TrainConfig):
            work = run.config.counted().work()
            calls += examples_of(run.config) * (3 * work.trained + sum(work.forward.values()))
    return f", {calls:,.0f} calls of the denoiser on one picture (a backward pass counts as two)" if calls else ""
