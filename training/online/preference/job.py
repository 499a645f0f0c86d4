"""Online preference learning, from settings to something the loop can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.evaluation.report import Report
from diffusion_align.rewards import RewardScorer
from diffusion_align.rewards.watched import load_reward
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.online.job import rollout_job
from diffusion_align.training.policy.validation import Validator

from .config import OnlineDPOConfig
from .method import OnlineDPOMethod
from .round_log import RoundMonitor, add_rounds, scorers_by_name


def online_dpo_job(
    config: OnlineDPOConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None
) -> Job:
    """A run of ``OnlineDPOMethod``, with its rounds in the report."""
    if scorer is None:
        scorer = load_reward(config.scorers, config.ensemble, accelerator.device, config.standardise)
    job = rollout_job(config, accelerator, adapter, scorer, OnlineDPOMethod)
    method, validator, before = job.method, job.validate, job.report
    assert isinstance(method, OnlineDPOMethod)

    def add(report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
        if before is not None:
            before(report, lines)
        add_rounds(Path(config.output_dir), report)

    if not config.eval_rounds:
        return replace(job, report=add)
    assert isinstance(validator, Validator)  # OnlineDPOConfig.check
    method.log.monitor = RoundMonitor(validator, {**scorers_by_name(scorer), **validator.held_out})

    def validate(step: int) -> dict[str, float]:
        metrics = validator(step)
        if step == config.max_steps:
            method.log.finished(step)
        return metrics

    return replace(job, validate=validate, report=add)
