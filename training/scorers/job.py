"""Scorers, from settings to something the loop can run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator

from diffusion_align.data import (
    ComparisonExamples,
    ExampleLoader,
    RatingExamples,
    Ratings,
    collate_comparisons,
    collate_ratings,
)
from diffusion_align.evaluation.judging import evaluate_scorer
from diffusion_align.rewards.published.clip import OpenClipScorer
from diffusion_align.rewards.trained.repainting import RepaintingScorer
from diffusion_align.training.engine.protocols import Job

from .building import build_scorer, open_judgements
from .config import RewardConfig
from .method import ContrastiveMethod, RewardMethod
from .rating_method import RatingMethod
from .trainable import TrainableScorer

METHODS: Mapping[str, type[RewardMethod]] = MappingProxyType({"clip": ContrastiveMethod})


def reward_job(config: Any, accelerator: Accelerator) -> Job:
    """Scorer, loss and validation of a ``RewardConfig``.

    Raises:
        ValueError: as ``build_scorer``; several processes to train a clip.
    """
    assert isinstance(config, RewardConfig)
    judgements = open_judgements(config, config.dataset_split, config.max_pairs)
    scorer = build_scorer(config, judgements).to(accelerator.device)
    trained = TrainableScorer(scorer)

    def loader(examples: Any, collate: Any) -> ExampleLoader[Any, Any]:
        return ExampleLoader(
            examples,
            config.per_device_train_batch_size,
            collate,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
            max_corrupt=config.max_corrupt,
            together=config.rows_together,
        )

    method: RewardMethod | RatingMethod
    if isinstance(judgements, Ratings):
        assert isinstance(scorer, RepaintingScorer)
        examples = RatingExamples(judgements, scorer.preprocessing.resize)
        method = RatingMethod(trained, judgements.criteria, loader(examples, collate_ratings), accelerator)
    else:
        pairs = loader(ComparisonExamples(judgements, scorer.preprocess), collate_comparisons)
        kind = "clip" if isinstance(scorer, OpenClipScorer) else config.scorer
        if kind == "clip" and accelerator.num_processes > 1:
            raise ValueError("scorer = clip: trained in one process, whose batch is what captions are told from")
        method = METHODS.get(kind, RewardMethod)(config, trained, judgements.aspects, pairs, accelerator)
    if config.validation_split is None or not config.eval_steps:
        return Job(trained, method, None)
    held_out = open_judgements(config, config.validation_split)

    def validate(step: int) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in evaluate_scorer(scorer, held_out).items()}

    return Job(trained, method, validate)
