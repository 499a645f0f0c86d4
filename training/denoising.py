"""Methods that need no likelihood: they denoise their own pictures again, weighed by reward (NFT, RAFT)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.objectives.nft import nft_loss, optimality
from diffusion_align.objectives.policy_gradient import average
from diffusion_align.precision import send

from .online_config import NFTConfig, RAFTConfig
from .policy import GuidedPolicy
from .randomness import NOISE, mix, normal, timesteps
from .rollout import MiniBatch, Rollout, RolloutEngine, RolloutStream


class RenoisedBatch:
    """A batch of own pictures at random noise levels.

    Attributes:
        x_t, target: (B, C, h, w), the noisy latents and what the denoiser's raw output should be there.
        t: (B,).
        inpaint: (B, 1 + C, h, w) or None; mask: its first channel.
    """

    def __init__(self, adapter: Adapter, batch: MiniBatch, min_timestep: int) -> None:
        rollout, device = batch.rollout, adapter.device
        # Pictures of one prompt meet the same noise at the same timesteps: what they share cancels in the comparison.
        draws = zip(rollout.group.tolist(), batch.column.tolist(), strict=True)
        seeds = torch.tensor([mix(seed, column, batch.number) for seed, column in draws])
        x0 = send(rollout.latents, device)
        self.t = send(timesteps(seeds, min_timestep, adapter.schedule.num_timesteps), device)
        eps = send(normal(seeds, NOISE, x0.shape[1:]), device)
        self.x_t, self.target = adapter.add_noise(x0, eps, self.t), adapter.training_target(x0, eps, self.t)
        self.inpaint = rollout.tensors.get("inpaint")
        self.mask = None if self.inpaint is None else send(self.inpaint[:, :1], device)


def check_timesteps(config: NFTConfig | RAFTConfig, adapter: Adapter) -> None:
    """Raises ValueError where no timestep is left."""
    if config.min_timestep >= adapter.schedule.num_timesteps:
        raise ValueError(
            f"min_timestep = {config.min_timestep}: the model's schedule ends at {adapter.schedule.num_timesteps}"
        )


class NFTMethod:
    """Pictures are drawn by an average of past policies; the trained one moves away from bad ones, to good ones."""

    def __init__(self, config: NFTConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        check_timesteps(config, adapter)
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        self.policy = GuidedPolicy(adapter, engine.tasks.size, config.guidance_scale)
        self.stream = RolloutStream(
            self.draw,
            config.updates_per_picture,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )
        self.old = {name: p.detach().clone() for name, p in adapter.trainable_parameters().items()}

    def batches(self) -> Iterator[MiniBatch]:
        return iter(self.stream)

    def draw(self, number: int) -> Rollout:
        """A rollout of the old policy, which first moves on towards the trained one."""
        if number:
            decay = min(self.config.old_decay, self.config.old_decay_growth * number)
            with torch.no_grad():
                for name, parameter in self.adapter.trainable_parameters().items():
                    self.old[name].lerp_(parameter, 1 - decay)
        with self.old_policy():
            return self.engine.draw(number)

    @contextmanager
    def old_policy(self) -> Iterator[None]:
        """Inside, the adapter has the weights of the policy that draws the pictures, and builds no graph."""
        own = self.adapter.trainable_parameters()
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in own.items()}
            for name, parameter in own.items():
                parameter.copy_(self.old[name])
            try:
                yield
            finally:
                for name, parameter in own.items():
                    parameter.copy_(kept[name])

    def loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """DiffusionNFT's loss (scalar) and its metrics."""
        config, rollout = self.config, batch.rollout
        noisy = RenoisedBatch(self.adapter, batch, config.min_timestep)
        conditions = self.policy.conditions(rollout.prompts, noisy.inpaint)
        with self.accelerator.autocast():
            with self.old_policy():
                old = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            optimal = optimality(send(rollout.advantage, output.device), config.advantage_clip)
            loss, metrics = nft_loss(output, old, noisy.target, optimal, config.nft_beta, noisy.mask)
            if config.kl_beta:
                with self.adapter.reference():
                    reference = self.policy.predict(noisy.x_t, noisy.t, conditions).output
                metrics["kl"] = mse_per_sample(output, reference).mean()
                loss = loss + config.kl_beta * metrics["kl"]
        metrics["reward"] = send(rollout.reward.mean(), output.device)
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}

    def state_dict(self) -> dict[str, Any]:
        old = {f"old.{name}": tensor for name, tensor in self.old.items()}
        return {**self.stream.state_dict(self.accelerator), **self.engine.state_dict(), **old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state, self.accelerator)
        self.engine.load_state_dict(state)
        for name, tensor in self.old.items():
            tensor.copy_(state[f"old.{name}"])


class RAFTMethod:
    """The best of each prompt's pictures are training data; when they are used up, the tuned model draws the next."""

    def __init__(self, config: RAFTConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        check_timesteps(config, adapter)
        if config.keep > config.num_generations:
            raise ValueError(f"keep = {config.keep}: only {config.num_generations} pictures of a prompt are drawn")
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        # Denoising wants the model itself, not its guided combination.
        self.policy = GuidedPolicy(adapter, engine.tasks.size, scale=1.0)
        self.stream = RolloutStream(
            self.draw,
            config.updates_per_picture,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )

    def batches(self) -> Iterator[MiniBatch]:
        return iter(self.stream)

    def draw(self, number: int) -> Rollout:
        """The best ``keep`` pictures of each prompt of a rollout (not of all: that would favour easy prompts)."""
        rollout = self.engine.draw(number)
        by_prompt = rollout.reward.view(-1, self.config.num_generations)
        best = by_prompt.topk(self.config.keep, dim=1).indices
        rows = (best + torch.arange(len(best))[:, None] * self.config.num_generations).flatten()
        rollout.tensors["drawn"] = by_prompt.mean(dim=1, keepdim=True).expand_as(by_prompt).flatten()
        return rollout.rows(rows)

    def loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss on the kept pictures (scalar) and its metrics."""
        rollout = batch.rollout
        noisy = RenoisedBatch(self.adapter, batch, self.config.min_timestep)
        conditions = self.policy.conditions(rollout.prompts, noisy.inpaint)
        with self.accelerator.autocast():
            output = self.policy.predict(noisy.x_t, noisy.t, conditions).output
            loss = average((output - noisy.target) ** 2, noisy.mask).mean()
            metrics = {"kept_reward": rollout.reward.mean(), "reward": rollout.drawn.mean()}
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
