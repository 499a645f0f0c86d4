"""Reward gradients: back through the scorer, the VAE and the last sampling steps (DRaFT, AlignProp, ReFL)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.data.holes import Holes
from diffusion_align.devices import send
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.engine.randomness import NOISE, PICTURES, STEPS, mix, normal
from diffusion_align.training.policy.guided import GuidedPolicy
from diffusion_align.training.policy.run_reward import RunReward

from ..drawing_tasks import Tasks
from .config import DRaFTConfig

#: Smallest time of the step that a flow model's picture is predicted in, unless ``last_time`` says otherwise.
LAST_TIME = 0.1


@dataclass(frozen=True)
class TaskBatch:
    """What one micro-step draws pictures for.

    Attributes:
        prompts: B.
        seeds: (B,) int64 of their noise.
        holes: of inpainting models.
    """

    prompts: list[str]
    seeds: Tensor
    holes: Holes | None


class DRaFTMethod:
    """Draws without a graph until the last ``gradient_steps`` steps, then maximises the reward through them."""

    def __init__(self, config: DRaFTConfig, adapter: Adapter, accelerator: Accelerator, scorer: RewardScorer) -> None:
        self.config, self.adapter, self.accelerator = config, adapter, accelerator
        self.tasks = Tasks(config, adapter)
        self.policy = GuidedPolicy(adapter, self.tasks.size, config.guidance_scale)
        if not scorer.differentiable:
            raise ValueError(f"draft needs a differentiable scorer, {scorer.name} is not: use grpo, nft or raft")
        scorer.gradient_checkpointing = True
        self.score = RunReward(scorer, config.scorer_timeout, Path(config.output_dir))
        scheduler = adapter.path.sampler(adapter.pipeline.scheduler)
        adapter.set_steps(scheduler, config.num_inference_steps, self.tasks.size, self.tasks.size)
        times = adapter.path.times(scheduler)
        self.times, self.last = times.to(adapter.device), last_step(config, adapter, times)
        self.levels = adapter.path.levels(scheduler).to(adapter.device)
        self.number = 0
        self.before_step: dict[str, Any] = {}

    def batches(self) -> Iterator[TaskBatch]:
        while True:
            if not self.before_step or self.number % self.config.gradient_accumulation_steps == 0:
                self.before_step = self.state_dict()
            rank, world, size = self._layout()
            first = (self.number * world + rank) * size
            prompts, holes = self.tasks.take(range(first, first + size))
            seeds = torch.tensor([mix(self.config.seed, PICTURES, position) for position in range(first, first + size)])
            self.number += 1
            yield TaskBatch(prompts, seeds, holes)

    def _layout(self) -> tuple[int, int, int]:
        accelerator = self.accelerator
        return accelerator.process_index, accelerator.num_processes, self.config.per_device_train_batch_size

    def loss(self, batch: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the mean reward (or its hinge) of pictures with a graph, and metrics.

        Raises:
            RunInterrupted: the scorer failed.
        """
        config, adapter, device = self.config, self.adapter, self.adapter.device
        with self.accelerator.autocast():
            inpaint = None if batch.holes is None else batch.holes.encode(adapter)
            conditions = self.policy.conditions(batch.prompts, inpaint)
            x0, distance = self.draw(batch, conditions)
            images = self.decoded(x0)
        holes, prompts = batch.holes, batch.prompts * (len(x0) // len(batch.prompts))
        if holes is not None:
            holes = Holes(
                prompts,
                send(holes.pictures, device).repeat(len(x0) // len(holes), 1, 1, 1),
                send(holes.masks, device).repeat(len(x0) // len(holes), 1, 1, 1),
            )
            images = holes.composite(images)
        reward = self.rewards(images, prompts, holes)
        loss = self.missing(reward).mean()
        metrics = {"reward": reward.detach().mean()}
        if config.kl_beta:
            loss = loss + config.kl_beta * distance
            metrics["kl"] = distance.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def decoded(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of latents, with their graph."""
        images = self.adapter.decode(x0) / 2 + 0.5
        # Outside [0, 1] the gradient continues: after clamping, overshooting pixels would have no way back.
        return images + (images.clamp(0, 1) - images).detach()

    def rewards(self, images: Tensor, prompts: Sequence[str], holes: Holes | None = None) -> Tensor:
        """Rewards (B,) of pictures, with their graph.

        Raises:
            RunInterrupted: the scorer failed.
        """
        try:
            return self.score(images, prompts, holes, with_graph=True).reward.to(self.adapter.device)
        except RunInterrupted:
            self.load_state_dict(self.before_step)
            raise

    def missing(self, reward: Tensor) -> Tensor:
        """What becomes less as the reward (B,) grows: minus it, or its hinge."""
        config = self.config
        return -reward if config.reward_loss == "linear" else (config.reward_margin - reward).clamp(min=0)

    def noise(self, batch: TaskBatch) -> Tensor:
        """What the pictures are drawn from, (B, C, h, w)."""
        adapter, side = self.adapter, self.tasks.size // self.adapter.vae_scale_factor
        return send(normal(batch.seeds, NOISE, (adapter.latent_channels, side, side)), adapter.device)

    def draw(self, batch: TaskBatch, conditions: Conditioning) -> tuple[Tensor, Tensor]:
        """Clean latents (B * lv_repeats, C, h, w) with a graph, and the policy's distance to the reference."""
        config, adapter = self.config, self.adapter
        x = self.noise(batch)
        last = self.last
        if config.random_last_step:  # the same for the whole batch: which one is the first picture's draw
            third = (last + 1) // 3
            last -= mix(int(batch.seeds[0]), STEPS) % max(third, 1)
        first_with_graph = last + 1 - config.gradient_steps
        distance = torch.zeros((), device=adapter.device)
        for step in range(last + 1):
            with_graph = step >= first_with_graph
            with torch.set_grad_enabled(with_graph):
                if step == last and config.lv_repeats > 1:
                    return self.renoised(batch, x, step, conditions)
                x0 = self.predict_x0(x, step, conditions)
                if with_graph and config.kl_beta:
                    with adapter.reference():
                        reference = self.predict_x0(x, step, conditions)
                    distance = distance + mse_per_sample(x0, reference).mean() / config.gradient_steps
                if step == last:
                    return x0, distance
                x = self.stepped(x, x0, step)
        raise AssertionError("the last step returns")

    def stepped(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """The latents (B, C, h, w) after a deterministic step with predicted clean latents."""
        now, after = (self.levels[at].expand(len(x)) for at in (step, step + 1))
        return self.adapter.path.gaussian(x, x0, now, after, eta=0.0).mean

    def predict_x0(self, x: Tensor, step: int, conditions: Conditioning) -> Tensor:
        t = self.times[step].expand(len(x))
        return self.policy.predict(x, t, conditions).x0

    def renoised(self, batch: TaskBatch, x: Tensor, step: int, conditions: Conditioning) -> tuple[Tensor, Tensor]:
        """DRaFT-LV: the finished latents, noised again ``lv_repeats`` times to the last step's level, and denoised."""
        config = self.config
        with torch.no_grad():
            x0 = self.predict_x0(x, step, conditions)
        level, parts = self.levels[step], []
        distance = torch.zeros((), device=x.device)
        for repeat in range(config.lv_repeats):
            seeds = torch.tensor([mix(seed, NOISE, repeat) for seed in batch.seeds.tolist()])
            eps = send(normal(seeds, NOISE, x.shape[1:]), x.device)
            noisy = level.noise(x0, eps)
            parts.append(self.predict_x0(noisy, step, conditions))
            if config.kl_beta:
                with self.adapter.reference():
                    reference = self.predict_x0(noisy, step, conditions)
                distance = distance + mse_per_sample(parts[-1], reference).mean() / config.lv_repeats
        return torch.cat(parts), distance

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, **self.score.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self.score.load_state_dict(state)


def last_step(config: DRaFTConfig, adapter: Adapter, times: Tensor) -> int:
    """The step that the picture is predicted in, where steps have ``times`` (N,).

    Raises:
        ValueError: ``last_time`` is set for a model with timesteps, or leaves fewer steps than ``gradient_steps``.
    """
    if not adapter.path.straight:
        if config.last_time is not None:
            raise ValueError(
                f"last_time = {config.last_time:g} is for flow models (SD3, FLUX), and {config.model} has timesteps: "
                "leave it unset"
            )
        return len(times) - 1
    least = LAST_TIME if config.last_time is None else config.last_time
    count = int((times >= least).sum())
    if count < config.gradient_steps:
        raise ValueError(
            f"gradient_steps = {config.gradient_steps}: {count} of the sampling steps have a time of at least "
            f"{least:g}: set last_time lower, or take more num_inference_steps"
        )
    return count - 1
