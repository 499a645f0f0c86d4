"""Settings from YAML files and back; every mistake is an error that names file, key and what was expected."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from .engine.config import RunConfig
from .methods import CONFIGS
from .pairs.config import DPOConfig, InPOConfig

C = TypeVar("C", bound=RunConfig)

#: What ``save_config`` adds for the reader; never settings.
_RECORD_KEYS = ("versions", "git_commit")


def validated(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Build ``cls`` from ``values``.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value of the wrong type or range; ``source`` (a
            file name, or "command line") and the key are named.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" of method {cls.method!r}"
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    try:
        config = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"][:1])
        raise ValueError(f"{source}: {key} = {problem['input']!r} is wrong: {problem['msg']}") from None
    _check_combination(config, source)
    return config


def _check_combination(config: RunConfig, source: str) -> None:
    if getattr(config, "cache_dir", None) and getattr(config, "random_crop", False):
        raise ValueError(f"{source}: random_crop cannot be used with cache_dir: cached latents hold one crop per image")
    low, high = getattr(config, "min_timestep", 0), getattr(config, "max_timestep", 1000)
    if low >= high:
        raise ValueError(f"{source}: min_timestep = {low} must be smaller than max_timestep = {high}")
    if isinstance(config, DPOConfig):
        _check_draws(config, source)
    full_fp16 = getattr(config, "full_finetuning", False) and getattr(config, "weight_dtype", None) == "fp16"
    if full_fp16 and config.mixed_precision == "no":
        raise ValueError(f"{source}: weight_dtype fp16 with full_finetuning needs mixed_precision fp16 or bf16")


def _check_draws(config: DPOConfig, source: str) -> None:
    if config.noise_draws is not None and config.streaming:
        raise ValueError(
            f"{source}: noise_draws needs pairs with random access, which meet again: set streaming to false"
        )
    if not config.reference_cache:
        return
    if config.noise_draws is None:
        raise ValueError(f"{source}: reference_cache needs noise_draws, e.g. 8: fresh noise has no second visit")
    if config.cache_dir is None:
        raise ValueError(
            f"{source}: reference_cache needs cache_dir: the errors belong to its latents and lie beside them"
        )
    if config.loss_type == "mapo":
        raise ValueError(f"{source}: reference_cache has nothing to remember: loss_type mapo has no reference")
    if isinstance(config, InPOConfig) and config.inversion_model == "policy":
        raise ValueError(
            f"{source}: reference_cache cannot be used with inversion_model policy, whose noise changes as it learns: "
            "set inversion_model to reference"
        )


def load_config(cls: type[C], path: str | Path) -> C:
    """Read a YAML recipe (a file, or the name of a shipped one) or a run's config.yaml.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no mapping, not YAML, or wrong keys or values; also a file of another method.
    """
    path = Path(path)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(f"--config {path}: no such file")
        path = recipe_path(path.name)
    values = _read_yaml(path)
    method = values.pop("method", cls.method)
    if method != cls.method:
        raise ValueError(f"{path}: is a recipe for method {method!r}, not {cls.method!r}")
    return validated(cls, {k: v for k, v in values.items() if k not in _RECORD_KEYS}, str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def load_recipe(name: str, **overrides: Any) -> RunConfig:
    """Settings of a shipped recipe, e.g. ``load_recipe("scenes_dpo", max_steps=50)``; its method decides the class.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an override that is no setting, or of the wrong type or range.
    """
    path = recipe_path(name)
    cls = CONFIGS[_read_yaml(path)["method"]]
    values = {k: v for k, v in to_dict(load_config(cls, path)).items() if k != "method"}
    return validated(cls, values | overrides, f"recipe {name}")


def recipe_path(name: str) -> Path:
    """File of a shipped recipe, e.g. ``scenes_dpo``.

    Raises:
        FileNotFoundError: no such recipe; the message lists them.
    """
    folder = Path(str(resources.files("diffusion_align.training") / "recipes"))
    found = {path.stem: path for path in folder.rglob("*.yaml")}
    if name not in found:
        raise FileNotFoundError(f"no recipe {name!r}: expected one of {', '.join(sorted(found))}")
    return found[name]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every setting as plain YAML types, ``method`` first."""
    values = dataclasses.asdict(config)
    return {"method": config.method} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings with library versions and git commit; ``load_config`` reads them back."""
    from diffusion_align.environment import git_commit, versions

    path.parent.mkdir(parents=True, exist_ok=True)
    once = {"config": None, "dry_run": False, "resume_from_checkpoint": None, "overwrite_output_dir": False}
    record = to_dict(config) | once | {"versions": versions(), "git_commit": git_commit()}
    path.write_text(yaml.safe_dump(record, sort_keys=False))
