"""``diffusion-align cache``: a training set's images and captions, encoded once."""

from __future__ import annotations

from diffusion_align.training.pairs.config import DPOConfig

from .train import parse_config


def parse(arguments: list[str]) -> DPOConfig:
    """Settings of the runs that the cache is for.

    Raises:
        ValueError, FileNotFoundError: as ``parse_config``; no folder is given.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    config = parse_config(DPOConfig, arguments, "diffusion-align cache", "Encode a recipe's images and captions once.")
    if config.cache_dir is None:
        raise ValueError("cache needs --cache-dir, the folder for the encoded latents and captions")
    return config


def run(config: DPOConfig) -> int:
    """Make or finish the cache and say what is in it; returns the exit status."""
    from diffusion_align.training.pairs.job import cache_pairs

    print(cache_pairs(config))
    return 0
