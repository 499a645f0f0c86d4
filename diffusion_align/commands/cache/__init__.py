"""``diffusion-align cache``: a training set's images and captions, encoded once; ``cache verify`` and ``cache gc``."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.commands.console import conclude
from diffusion_align.commands.parsing import parse_options
from diffusion_align.commands.train import config_argument, parse_config
from diffusion_align.training.methods import config_class
from diffusion_align.training.pairs.config import DenoisingConfig, DPOConfig

from .folder_options import CollectCacheOptions, VerifyCacheOptions


def parse(arguments: list[str]) -> DenoisingConfig | VerifyCacheOptions | CollectCacheOptions:
    """Options of ``verify`` and ``gc``; else settings of the runs that the cache is for, of their recipe's method.

    Raises:
        ValueError, FileNotFoundError: as ``parse_config``; no folder is given, or the method reads no cache.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if arguments[:1] == ["verify"]:
        return parse_options(VerifyCacheOptions, "cache verify", arguments[1:], bare="--folder")
    if arguments[:1] == ["gc"]:
        return parse_options(CollectCacheOptions, "cache gc", arguments[1:], bare="--folder")
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"cache {arguments[0]}: expected 'cache' with settings, 'cache verify DIR' or 'cache gc DIR'")
    config = parse_config(
        recipe_class(config_argument(arguments)),
        arguments,
        "diffusion-align cache",
        "Encode a recipe's images and captions once. 'cache verify DIR' checks a cache, 'cache gc DIR' removes what it "
        "does not need.",
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


def run(options: DenoisingConfig | VerifyCacheOptions | CollectCacheOptions) -> int:
    """Make or finish the cache and say what is in it, or check or tidy it; returns the exit status."""
    if isinstance(options, VerifyCacheOptions | CollectCacheOptions):
        from .tending import collect, verify

        return verify(options) if isinstance(options, VerifyCacheOptions) else collect(options)
    from diffusion_align.files import check_writable
    from diffusion_align.training.engine.accelerator import leave_processes
    from diffusion_align.training.pairs.job import cache_pairs

    check_writable(Path(options.cache_dir or ""))
    said = cache_pairs(options)
    if said is not None:  # only the first of several processes tells it
        conclude(said, {"cache": said.splitlines()})
    leave_processes()
    return 0
