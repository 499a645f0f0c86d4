"""``diffusion-align recipes``: the shipped recipes, listed, shown and copied."""

from __future__ import annotations

from pathlib import Path

import yaml

from diffusion_align.commands.console import conclude
from diffusion_align.files import write_whole
from diffusion_align.training.settings import known_recipes, recipe_path

from .helping_options import CopyRecipeOptions, ListRecipesOptions, ShowRecipeOptions


def list_recipes(options: ListRecipesOptions) -> int:
    """Name, method, model and first comment of each; returns the exit status."""
    found = {}
    for name, path in known_recipes().items():
        text = path.read_text()
        values = yaml.safe_load(text)
        told = text.splitlines()[0].removeprefix("# ") if text.startswith("# ") else ""
        found[name] = {"method": values["method"], "model": values.get("model", ""), "text": told}
    width = max(map(len, found)) + 2
    lines = [f"{name:<{width}}{facts['method']:<12}{facts['text']}" for name, facts in found.items()]
    conclude("\n".join(lines), found)
    return 0


def show(options: ShowRecipeOptions) -> int:
    """Print one; returns the exit status."""
    text = recipe_path(options.name).read_text()
    conclude(text.rstrip("\n"), {"recipe": text})
    return 0


def copy(options: CopyRecipeOptions) -> int:
    """Copy one and say what to do with it; returns the exit status.

    Raises:
        FileExistsError: the file is there.
    """
    source, out = recipe_path(options.name), Path(options.out or f"{options.name}.yaml")
    if out.exists():
        raise FileExistsError(f"--out {out} is already there: give another")
    write_whole(out, source.read_bytes())
    method = yaml.safe_load(source.read_bytes())["method"]
    conclude(f"{out}\nchange it, then: diffusion-align train {method} --config {out}", {"out": str(out)})
    return 0
