"""``diffusion-align cache``: a training set's images and captions, encoded once."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.training.methods import config_class
from diffusion_align.training.pairs.config import DenoisingConfig, DPOConfig

from .train import config_argument, parse_config


def parse(arguments: list[str]) -> DenoisingConfig:
    """Settings of the runs that the cache is for, of the method that their recipe names.

    Raises:
        ValueError, FileNotFoundError: as ``parse_config``; no folder is given, or the method reads no cache.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    config = parse_config(
        recipe_class(config_argument(arguments)),
        arguments,
        "diffusion-align cache",
        "Encode a recipe's images and captions once.",
    )
    if config.cache_dir is None:
        raise ValueError("cache needs --cache-dir, the folder for the encoded latents and captions")
    return config


def recipe_class(path: str | None) -> type[DenoisingConfig]:
    """The settings of a recipe's method; without a recipe, DPO's."""
    if path is None:
        return DPOConfig
    from diffusion_align.training.settings import recipe_method

    found = config_class(recipe_method(path) or DPOConfig.method)
    if not issubclass(found, DenoisingConfig):
        raise ValueError(f"--config {path}: method {found.method} draws its own pictures or trains a scorer: no cache")
    return found


def run(config: DenoisingConfig) -> int:
    """Make or finish the cache and say what is in it; returns the exit status."""
    from diffusion_align.files import check_writable
    from diffusion_align.training.pairs.job import cache_pairs

    check_writable(Path(config.cache_dir or ""))
    print(cache_pairs(config))
    return 0
