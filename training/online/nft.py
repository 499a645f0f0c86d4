"""DiffusionNFT (2509.16117): no likelihood; the policy moves away from bad pictures, to good ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import send
from diffusion_align.objectives.errors import mse_per_sample
from diffusion_align.objectives.nft_loss import nft_loss, optimality
from diffusion_align.rewards import RewardScorer
from diffusion_align.training.engine.protocols import Job
from diffusion_align.training.engine.sharding import shards
from diffusion_align.training.policy.guided import GuidedPolicy
from diffusion_align.training.policy.held_weights import HeldWeights

from .config import NFTConfig
from .job import rollout_job
from .renoising import RenoisedBatch, check_denoising
from .rollout import MiniBatch, Rollout, RolloutEngine, RolloutStream


class NFTMethod:
    """Pictures are drawn by an average of past policies; the trained one moves away from bad ones, to good ones."""

    def __init__(self, config: NFTConfig, adapter: Adapter, engine: RolloutEngine, accelerator: Accelerator) -> None:
        check_denoising(config, adapter)
        if shards():
            raise ValueError("nft keeps whole weights of its old policy, which FSDP cannot cut: launch it with DDP")
        self.config, self.adapter, self.engine, self.accelerator = config, adapter, engine, accelerator
        self.policy = GuidedPolicy(adapter, engine.tasks.size, config.guidance_scale)
        self.stream = RolloutStream(
            self.draw,
            config.updates_per_picture,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )
        self.old = HeldWeights(adapter)
        self.old_number = 0

    def batches(self) -> Iterator[MiniBatch]:
        return iter(self.stream)

    def draw(self, number: int) -> Rollout:
        """A rollout of the old policy, which first moves on towards the trained one."""
        if number > self.old_number:  # else it has moved already, and the scorer failed then
            self.old_number = number
            decay = min(self.config.old_decay, self.config.old_decay_growth * number)
            self.old.move(1 - decay)
        with self.old.in_place():
            rollout = self.engine.draw(number)
        return self.engine.teaching(rollout, self.config.num_generations * self.config.updates_per_picture)

    def loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """DiffusionNFT's loss (scalar) and its metrics."""
        config, rollout = self.config, batch.rollout
        noisy = RenoisedBatch(self.adapter, batch, config)
        conditions = self.policy.conditions(rollout.prompts, noisy.inpaint)
        # Two contexts: autocast keeps half-precision copies of weights until a context ends, and would show the trained
        # policy with the old one's.
        with self.accelerator.autocast(), self.old.in_place():
            old = self.policy.predict(noisy.x_t, noisy.t, conditions)
        with self.accelerator.autocast():
            found = self.policy.predict(noisy.x_t, noisy.t, conditions)
            optimal = optimality(send(rollout.advantage, found.output.device), config.advantage_clip)
            if config.space == "x0":  # views are affine, so that the implicit policies' x0 are mixtures of the x0
                loss, metrics = nft_loss(found.x0, old.x0, noisy.x0, optimal, config.nft_beta, noisy.mask)
                loss = loss * config.advantage_clip
            else:
                loss, metrics = nft_loss(found.output, old.output, noisy.target, optimal, config.nft_beta, noisy.mask)
            if config.kl_beta:
                with self.adapter.reference():
                    reference = self.policy.predict(noisy.x_t, noisy.t, conditions).output
                metrics["kl"] = mse_per_sample(found.output, reference).mean()
                loss = loss + config.kl_beta * metrics["kl"]
        metrics |= {name: send(v, found.output.device) for name, v in rollout.skipping().items()}
        metrics["reward"] = send(rollout.reward.mean(), found.output.device)
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}

    def state_dict(self) -> dict[str, Any]:
        position = {**self.stream.state_dict(self.accelerator), "old_number": self.old_number}
        return {**position, **self.engine.state_dict(), **self.old.state_dict("old")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state, self.accelerator)
        self.engine.load_state_dict(state)
        self.old_number = state.get("old_number", 0)
        self.old.load_state_dict(state, "old")


def nft_job(config: NFTConfig, accelerator: Accelerator, adapter: Adapter | None, scorer: RewardScorer | None) -> Job:
    """A run of ``NFTMethod``."""
    return rollout_job(config, accelerator, adapter, scorer, NFTMethod)
