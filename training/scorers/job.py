"""Scorers, from settings to something the loop can run."""

from __future__ import annotations

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


def reward_job(config: RewardConfig, accelerator: Accelerator, adapter: None = None, scorer: None = None) -> Job:
    """Scorer, loss and validation.

    Raises:
        ValueError: as ``build_scorer``; several processes to train a clip.
    """
    judgements = open_judgements(config, config.dataset_split, config.max_pairs)
    learner = build_scorer(config, judgements).to(accelerator.device)
    trained = TrainableScorer(learner)

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
        assert isinstance(learner, RepaintingScorer)
        examples = RatingExamples(judgements, learner.preprocessing.resize)
        method = RatingMethod(trained, judgements.criteria, loader(examples, collate_ratings), accelerator)
    else:
        pairs = loader(ComparisonExamples(judgements, learner.preprocess), collate_comparisons)
        contrastive = isinstance(learner, OpenClipScorer)
        if contrastive and accelerator.num_processes > 1:
            raise ValueError("scorer = clip: train it in one process, because captions are compared within a batch")
        loss = ContrastiveMethod if contrastive else RewardMethod
        method = loss(config, trained, judgements.aspects, pairs, accelerator)
    if config.validation_split is None or not config.eval_steps:
        return Job(trained, method)
    held_out = open_judgements(config, config.validation_split)

    def validate(step: int) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in evaluate_scorer(learner, held_out).items()}

    return Job(trained, method, validate)
