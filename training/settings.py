"""Settings from YAML files and back; every mistake is an error that names file, key and what was expected."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from diffusion_align.files import write_whole
from diffusion_align.names import hint

from .engine.config import RunConfig, nearest_setting
from .methods import config_class

C = TypeVar("C", bound=RunConfig)

#: What ``save_config`` adds for the reader; never settings.
_RECORD_KEYS = ("versions", "git_commit")


@cache
def _checker(cls: Any) -> TypeAdapter[Any]:
    """Made once: it takes longer than all that it checks."""
    return TypeAdapter(cls)


def validated(cls: type[C], values: dict[str, Any], source: str, complete: bool = True) -> C:
    """Build ``cls`` from ``values``.

    Args:
        source: where they come from, for errors: a file name, or "command line".
        complete: nothing is added to them, so that they must fit each other.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type or range, or values that do
            not fit each other; source and key are named.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = nearest_setting(str(key), known)
            hint = f"; did you mean {near!r}?" if near else f" of method {cls.method!r}"
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    kind: Any = cls  # mypy takes a class for as unhashable as its instances
    try:
        config: C = _checker(kind).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"][:1])
        raise ValueError(f"{source}: {key} = {problem['input']!r} is wrong: {problem['msg']}") from None
    if complete:
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return config


def load_config(cls: type[C], path: str | Path, complete: bool = True) -> C:
    """Read a YAML recipe (a file, or the name of a shipped one) or a run's config.yaml.

    Args:
        complete: nothing is added to its settings, so that they must fit each other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no mapping, not YAML, or wrong keys or values; also a file of another method.
    """
    path = _recipe_file(path)
    values = _read_yaml(path)
    method = values.pop("method", cls.method)
    if method != cls.method:
        raise ValueError(f"{path}: is a recipe for method {method!r}, not {cls.method!r}")
    return validated(cls, {k: v for k, v in values.items() if k not in _RECORD_KEYS}, str(path), complete)


def recipe_method(path: str | Path) -> str | None:
    """The method that a recipe (a file, or the name of a shipped one) is for; None where it does not say.

    Raises:
        FileNotFoundError, ValueError: as ``load_config``.
    """
    return _read_yaml(_recipe_file(path)).get("method")


def _recipe_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"--config {path}: no such file")
    return recipe_path(path.name)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_bytes()) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date with month 13
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
    cls = config_class(_read_yaml(path)["method"])
    values = {k: v for k, v in to_dict(load_config(cls, path, complete=False)).items() if k != "method"}
    return validated(cls, values | overrides, f"recipe {name}")


def load_run(folder: str | Path) -> RunConfig | None:
    """Settings of the run that wrote ``folder``, or in whose folder it lies, e.g. a checkpoint; None without any.

    Raises:
        ValueError: a config.yaml that cannot be read, or of no known method.
    """
    for place in (Path(folder), Path(folder).parent):
        path = place / "config.yaml"
        if path.is_file():
            return load_config(config_class(_read_yaml(path).get("method", "")), path, complete=False)
    return None


def recipe_path(name: str) -> Path:
    """File of a shipped recipe, e.g. ``scenes_dpo``.

    Raises:
        FileNotFoundError: no such recipe; the message lists them.
    """
    found = known_recipes()
    if name not in found:
        raise FileNotFoundError(f"no recipe {name!r}{hint(name, found)}: expected one of {', '.join(found)}")
    return found[name]


def known_recipes() -> dict[str, Path]:
    """Files of the shipped recipes, by name."""
    folder = Path(str(resources.files("diffusion_align.training") / "recipes"))
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"), key=lambda path: path.stem)}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every setting as plain YAML types, ``method`` first."""
    values = dataclasses.asdict(config)
    return {"method": config.method} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings with library versions and git commit; ``load_config`` reads them back."""
    from diffusion_align.environment import git_commit, versions

    names = frozenset().union(*(vars(cls).get("once", ()) for cls in type(config).__mro__))
    once = {field.name: field.default for field in dataclasses.fields(config) if field.name in names}
    record = to_dict(config) | once | {"versions": versions(), "git_commit": git_commit()}
    write_whole(path, yaml.safe_dump(record, sort_keys=False).encode())
