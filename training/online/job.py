"""Online methods, from settings to something the loop can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_align.adapters import Adapter
from diffusion_align.evaluation.report import Report
from diffusion_align.rewards import RewardScorer
from diffusion_align.rewards.watched import load_reward
from diffusion_align.training.engine.protocols import Job, Method
from diffusion_align.training.policy.model import load_policy_model, prepare_policy
from diffusion_align.training.policy.validation import build_validator
from diffusion_align.training.policy.watching.watch_building import ValidationRules, build_watchdog
from diffusion_align.training.policy.watching.watch_report import add_watching

from .config import OnlineConfig, RolloutConfig
from .reward_curves import add_rewards
from .rollout import RolloutEngine


def online_job(
    config: OnlineConfig,
    accelerator: Accelerator,
    adapter: Adapter | None,
    scorer: RewardScorer | None,
    build: Callable[[Adapter, RewardScorer], Method],
) -> Job:
    """A run that learns from its own pictures, with a report at its end.

    Args:
        adapter: the model, already loaded; None loads ``config.model``.
        scorer: the reward, already loaded; None loads ``config.scorers``.
        build: the method, from the prepared policy and the reward.

    Raises:
        ValueError: settings that do not fit the model or the scorer.
    """
    if adapter is None:
        adapter = load_policy_model(config, accelerator.device)
    prepare_policy(config, adapter)
    if scorer is None:
        scorer = load_reward(config.scorers, config.ensemble, accelerator.device)
    method = build(adapter, scorer)
    rules, folder = ValidationRules.of(config), Path(config.output_dir)
    validate = build_validator(config, adapter, folder, rules, scorer) if config.eval_steps else None

    def add_to(report: Report, lines: Sequence[Mapping[str, Any]]) -> None:
        add_watching(report, lines)
        add_rewards(config, report, lines)

    return Job(adapter, method, validate, add_to, build_watchdog(config, rules))


def rollout_job(
    config: RolloutConfig,
    accelerator: Accelerator,
    adapter: Adapter | None,
    scorer: RewardScorer | None,
    method: Callable[[Any, Adapter, RolloutEngine, Accelerator], Method],
) -> Job:
    """As ``online_job``, for a ``method`` that learns from rollouts: (config, adapter, engine, accelerator)."""

    def build(policy: Adapter, reward: RewardScorer) -> Method:
        return method(config, policy, RolloutEngine(config, policy, accelerator, reward), accelerator)

    return online_job(config, accelerator, adapter, scorer, build)
