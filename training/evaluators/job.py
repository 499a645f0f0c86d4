"""Latent evaluators, from settings to something the loop can run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from diffusion_align.adapters import ENCODERS, Adapter
from diffusion_align.data import Comparisons, ExampleLoader
from diffusion_align.devices import DTYPES
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator, load_evaluator
from diffusion_align.guidance.judges.evaluator_kinds import KINDS
from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.policy.data_config import selection_seed
from diffusion_align.training.policy.model import load_model

from .config import EvaluatorConfig
from .method import EvaluatorMethod, TrainableEvaluator, calibrate, evaluate
from .noisy_pairs import EncodedPairs, collate_noisy


def take_towers(evaluator: LatentEvaluator, other: LatentEvaluator, name: str) -> None:
    """Copy the towers of ``other``, called ``name``, and freeze them.

    Raises:
        ValueError: they are of other shapes, or were trained on the latents of another autoencoder.
    """
    plain: dict[str, Any] = {"kinds": KINDS, "preference_loss": "bradley_terry", "latents": None}
    shapes = [replace(each.settings, **plain) for each in (evaluator, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"towers = {name!r}: is of {shapes[1]}, expected {shapes[0]}")
    if evaluator.latents is not None and other.latents is not None:
        difference = other.latents.difference(evaluator.latents)
        if difference is not None:
            raise ValueError(f"towers = {name!r}: was trained on the latents of another autoencoder ({difference})")
    evaluator.picture.load_state_dict(other.picture.state_dict())
    evaluator.prompt.load_state_dict(other.prompt.state_dict())
    evaluator.picture.requires_grad_(False)
    evaluator.prompt.requires_grad_(False)


def evaluator_job(
    config: EvaluatorConfig,
    accelerator: Accelerator,
    adapter: Adapter | None = None,
    scorer: RewardScorer | None = None,
) -> Job:
    """Evaluator, losses and validation.

    Args:
        scorer: the teacher of the kind task; None loads ``config.teacher``.

    Raises:
        ValueError: a kind lacks what it is trained on (task: a teacher, value: guidance scales).
    """
    if ("task" in config.kinds) != (config.teacher is not None or scorer is not None):
        raise ValueError("the kind task predicts the reward of a scorer: give both kinds task and teacher, or neither")
    if adapter is None:
        adapter = load_model(config, DTYPES[config.weight_dtype], accelerator.device, ENCODERS)
    adapter.code_in_chunks(config.vae_batch_size, config.vae_tiling)
    teacher = load_scorer(config.teacher) if scorer is None and config.teacher is not None else scorer
    if teacher is not None:
        teacher = teacher.to(accelerator.device)
    show = config.progress and accelerator.is_main_process
    seed = selection_seed(config.pair_selection, config.seed)
    train_set, held_out = (
        EncodedPairs(adapter, Comparisons(config.dataset, split, config.max_pairs, seed=seed), teacher, show)
        for split in (config.dataset_split, config.validation_split)
    )

    def loader(examples: EncodedPairs, seed: int) -> Any:
        return ExampleLoader(
            examples,
            config.per_device_train_batch_size,
            lambda found, seeds: collate_noisy(adapter.path, found, seeds),
            seed=seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=1,
            max_corrupt=config.max_corrupt,
        )

    if "value" in config.kinds and not {"scale_0", "scale_1"} <= set(train_set.comparisons.source.columns):
        raise ValueError(
            f"{train_set.comparisons.source.name}: columns scale_0 and scale_1 are missing: the kind value learns "
            "which guidance scale suits a prompt"
        )
    real = None
    if config.real_dataset is not None:
        pairs = Comparisons(config.real_dataset, config.dataset_split, config.max_pairs, seed=seed)
        if pairs.aspects != train_set.comparisons.aspects:
            raise ValueError(
                f"real_dataset judges {pairs.aspects}, dataset {train_set.comparisons.aspects}: must agree"
            )
        real = loader(EncodedPairs(adapter, pairs, None, show), config.seed + 1)
    null = adapter.null_conditioning(1)
    settings = EvaluatorSettings(
        adapter.latent_channels,
        adapter.family.default_side(adapter.network.config),
        null.embeds.shape[-1],
        0 if null.pooled is None else null.pooled.shape[-1],
        tuple(config.kinds),
        config.width,
        config.features,
        config.loss_type,
        adapter.latent_space(),
    )
    torch.manual_seed(config.seed)
    evaluator = LatentEvaluator(settings).to(accelerator.device)
    if config.towers is not None:
        take_towers(evaluator, load_evaluator(config.towers), config.towers)
    trained = TrainableEvaluator(evaluator, lambda module: calibrate(module, adapter, held_out))
    method = EvaluatorMethod(config, adapter, trained, loader(train_set, config.seed), real, accelerator)
    if not config.eval_steps:
        return Job(trained, method)

    def validate(step: int) -> dict[str, float]:
        return {f"eval/{n}": v for n, v in evaluate(evaluator, method, held_out, config.alignment_aspect).items()}

    return Job(trained, method, validate)
