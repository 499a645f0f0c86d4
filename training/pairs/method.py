"""The preference-pair step shared by DPO and InPO, which differ in where the noise comes from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning, PromptEncoder
from diffusion_align.data.types import PairBatch
from diffusion_align.devices import send
from diffusion_align.objectives.pair_stats import PairStats
from diffusion_align.objectives.preference import PREFERENCE_LOSSES, mean_reward, preference_loss
from diffusion_align.training.engine.randomness import (
    CHOSEN_POSTERIOR,
    REJECTED_POSTERIOR,
    TIMESTEP,
    generators,
    normal,
)
from diffusion_align.training.engine.sourced_method import BatchSource, SourcedMethod

from .config import DPOConfig
from .noising import Noising
from .reference import NoisyPairs, Reference, WholeBatch
from .reward_shift import RewardShift


def shown_sizes(size_ids: Tensor, which: str) -> Tensor:
    """What the model is told of sizes and crops, (2, B, 6), of the images' own (2, B, 6).

    Own ones ("own") tell the chosen image from the rejected one wherever size goes with quality: the loss could then be
    lowered by the condition alone. "pair" gives both the chosen image's. "resolution" says for all: the target's size,
    nothing cut off.
    """
    if which == "pair":
        return size_ids[:1].expand_as(size_ids)
    if which == "resolution":
        target = size_ids[..., 4:]
        return torch.cat([target, torch.zeros_like(target), target], dim=-1)
    return size_ids


class PairMethod(SourcedMethod[PairBatch]):
    """One fused policy forward for chosen and rejected, one reference forward, one preference loss.

    Args:
        source: the pairs.
        noising: Gaussian noise (DPO) or DDIM inversion (InPO).
        autocast: context of the forward passes.
        reference: where the reference's errors come from; None computes them batch by batch.
    """

    def __init__(
        self,
        config: DPOConfig,
        adapter: Adapter,
        source: BatchSource[PairBatch],
        noising: Noising,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
    ) -> None:
        self.reference = reference or WholeBatch(adapter)
        self.config, self.adapter, self.source, self.noising, self.autocast = config, adapter, source, noising, autocast
        self.encode_prompts = PromptEncoder(adapter)
        self.shift = RewardShift(adapter.device) if PREFERENCE_LOSSES[config.loss_type].shift else None

    def clean_latents(self, batch: PairBatch, seeds: Tensor) -> Tensor:
        """x0 (2B, C, h, w) float32, sampled from the VAE posterior: chosen first."""
        if batch.posterior is not None:
            mean, std = (part.flatten(0, 1).float() for part in batch.posterior)
        else:
            assert batch.pixels is not None
            mean, std = self.adapter.encode_posterior(batch.pixels.flatten(0, 1))
        draws = [normal(seeds, stream, mean.shape[1:]) for stream in (CHOSEN_POSTERIOR, REJECTED_POSTERIOR)]
        return mean + std * send(torch.cat(draws), mean.device)

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """Conditioning of chosen and rejected (2B rows), with the size ids that the settings ask for."""
        cond = self.encode_prompts(batch.captions) if batch.cond is None else batch.cond
        cond = Conditioning(cond.embeds, cond.pooled).repeat(2)
        sizes = self.adapter.family.size_ids(shown_sizes(batch.size_ids, self.config.size_ids).flatten(0, 1))
        return replace(cond, time_ids=None if sizes is None else sizes.to(cond.embeds.device))

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean preference loss of the batch (scalar) and its metrics (scalar tensors on the device)."""
        config, device = self.config, self.adapter.device
        seeds = batch.seeds  # read on the host, before the move: asking a device for them would stall it
        soft_labels = send(batch.preference, device) if bool((batch.preference != 1).any()) else None
        batch = batch.to(device)
        x0, cond = self.clean_latents(batch, seeds), self.conditioning(batch)
        path = self.adapter.path
        high = min(config.max_timestep, path.num_timesteps)
        t = send(path.draw_times(generators(seeds, TIMESTEP), config.min_timestep, high).repeat(2), device)
        with self.autocast():
            x_t, eps = self.noising(x0, t, cond, seeds)
            noisy = NoisyPairs(x_t, path.target(x0, eps, t), t, cond)
            chosen, rejected = noisy.errors(self.adapter).chunk(2)
            stats = PairStats(chosen, rejected)
            found: dict[str, Tensor] = {}
            if config.loss_type != "mapo":  # reference-free
                errors, found = self.reference.errors(noisy, batch.keys, seeds)
                stats = PairStats(chosen, rejected, *errors.chunk(2))
        result = preference_loss(
            config.loss_type,
            stats,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            soft_labels=soft_labels,
            sample_weight=batch.weight,
            shift=None if self.shift is None else self.shift.update(mean_reward(stats, config.beta)),
        )
        loss = result.loss
        if config.sft_weight:
            loss = loss + config.sft_weight * chosen.mean()
        return loss, {"loss": loss.detach(), **result.metrics, **found}

    def state_dict(self) -> dict[str, Any]:
        self.reference.checkpoint()
        return super().state_dict() | ({} if self.shift is None else self.shift.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.shift is not None:
            self.shift.load_state_dict(state)
