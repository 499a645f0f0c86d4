"""RAFT (2304.06767): the best of each prompt's own pictures are training data; CRAFT (2603.18991): those that all
scorers like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import send
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.process import average
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.accelerator import filled_steps
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.policy.guided import GuidedPolicy, own_scale

from .config import RAFTConfig
from .job import rollout_job
from .keeping.passing import passes
from .renoising import RenoisedBatch, check_denoising
from .rollout import EQUAL, MiniBatch, Rollout, RolloutEngine, RolloutStream

#: What is said of rollouts without a picture to train on.
NONE_PASS = "keep_by all: {} rollouts in a row, of which no picture is above the threshold of every scorer"


class RAFTMethod:
    """The best of each prompt's pictures are training data; when they are used up, the tuned model draws the next."""

    def __init__(self, config: RAFTConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        check_denoising(config, adapter)
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        # Denoising wants the model itself, not its guided combination.
        self.policy = GuidedPolicy(adapter, engine.tasks.size, own_scale(adapter, config.guidance_scale))
        self.stream = RolloutStream(
            self.draw,
            config.updates_per_picture,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            empty=NONE_PASS if config.keep_by == "all" else EQUAL,
        )

    def batches(self) -> Iterator[MiniBatch]:
        return iter(self.stream)

    def draw(self, number: int) -> Rollout:
        """What is kept of a rollout; ``trust`` is each picture's weight."""
        found = self.passing(number) if self.config.keep_by == "all" else self.best(number)
        if not self.config.advantage_weights:
            return found
        return replace(found, trust=found.trust * found.advantage.clamp(min=0))

    def passing(self, number: int) -> Rollout:
        """The pictures that pass every scorer's threshold, filled up with others, of weight 0, to a whole number of
        optimiser steps that is the same in all processes."""
        config = self.config
        rollout = self.engine.draw(number)
        passed = passes(rollout.by_scorer(config.num_generations), config.keep_quantile).flatten()
        rows = filled_steps(config, self.accelerator, passed, config.updates_per_picture)
        drawn = rollout.reward.view(-1, config.num_generations).mean(dim=1)
        drawn = drawn.repeat_interleave(config.num_generations)
        return replace(rollout, drawn=drawn, trust=passed.float()).rows(rows)

    def best(self, number: int) -> Rollout:
        """The best ``keep`` pictures of each prompt of a rollout (not of all: that would favour easy prompts)."""
        rollout = self.engine.teaching(self.engine.draw(number), self.config.keep * self.config.updates_per_picture)
        by_prompt = rollout.reward.view(-1, self.config.num_generations)
        best = by_prompt.topk(self.config.keep, dim=1).indices
        rows = (best + torch.arange(len(best))[:, None] * self.config.num_generations).flatten()
        drawn = by_prompt.mean(dim=1, keepdim=True).expand_as(by_prompt).flatten()
        return replace(rollout, drawn=drawn).rows(rows)

    def loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss on the kept pictures (scalar) and its metrics."""
        rollout = batch.rollout
        assert rollout.drawn is not None
        noisy = RenoisedBatch(self.adapter, batch, self.config)
        conditions = self.policy.conditions(rollout.prompts, noisy.inpaint)
        with self.accelerator.autocast():
            output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            errors = average((output - noisy.target) ** 2, noisy.mask)
            if self.config.advantage_weights or self.config.keep_by == "all":
                errors = errors * send(rollout.trust, errors.device)
            loss = errors.mean()
            metrics = {"kept_reward": rollout.reward.mean(), "reward": rollout.drawn.mean(), **rollout.skipping()}
            if self.config.keep_by == "all":
                metrics |= {"passed": (rollout.trust > 0).float().mean()}
            if self.config.kl_beta:
                with self.adapter.reference():
                    reference = self.policy.predict(noisy.x_t, noisy.t, conditions).output
                metrics["kl"] = mse_per_sample(output, reference).mean()
                loss = loss + self.config.kl_beta * metrics["kl"]
        return loss, {"loss": loss.detach(), **{name: send(v.detach(), loss.device) for name, v in metrics.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {**self.stream.state_dict(self.accelerator), **self.engine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state, self.accelerator)
        self.engine.load_state_dict(state)


def raft_job(config: RAFTConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None) -> Job:
    """A run of ``RAFTMethod``."""
    return rollout_job(config, accelerator, adapter, scorer, RAFTMethod)
