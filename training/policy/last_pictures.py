"""Pictures at the end of a run that had no validation: what it came to, beside the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusion_align.adapters import ENCODERS, Adapter
from diffusion_align.data.prompts import training_prompts
from diffusion_align.data.tables import local_files
from diffusion_align.training.engine.sharding import shards

from .config import TrainConfig
from .data_config import TrainingData
from .model import load_policy_model
from .validation import build_validator


def draw_last_pictures(config: TrainConfig, adapter: Adapter, device: object, step: int) -> str | None:
    """Draw ``config.final_pictures`` validation prompts with base and policy into ``samples/``; called by all processes
    together.

    Returns:
        Why there are no pictures; None if they are there.
    """
    if shards():
        return "the network is cut over processes"
    few = replace(
        config, num_validation_prompts=config.final_pictures, validation_seeds_per_prompt=1, validation_scorer=None,
        held_out_scorers=(), kl_prompts=0, kl_budget=None, stop_on=(), artefact_monitor=False,
    )  # fmt: skip
    try:
        if adapter.absent:
            lend_encoders(config, adapter)
        adapter.to(str(device))
        build_validator(few, adapter, Path(config.output_dir), prompts=training_captions(config))(step)
    except (OSError, ValueError) as error:  # the weights are there: they must not be lost for want of prompts
        return str(error)
    return None


def training_captions(config: TrainConfig) -> list[str] | None:
    """What was trained on, where there are neither validation prompts nor a validation split; None where there are."""
    dataset = config.validation_data().dataset
    if config.validation_prompts is not None or dataset is None or not isinstance(config, TrainingData):
        return None
    try:
        local_files(dataset, "validation")
    except FileNotFoundError:
        return training_prompts(dataset, config.dataset_split)
    return None


def lend_encoders(config: TrainConfig, adapter: Adapter) -> None:
    """Give a model that was trained from a cache its VAE and text encoders."""
    whole = load_policy_model(config, "cpu", ENCODERS)
    for name in ("vae", *adapter.family.text_encoder_names):
        setattr(adapter.pipeline, name, getattr(whole.pipeline, name))
    adapter.absent -= ENCODERS
