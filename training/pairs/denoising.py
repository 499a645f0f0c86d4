"""From a batch of pictures to the errors of a denoiser on them: what DPO, InPO and supervised fine-tuning share."""

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
from diffusion_align.process import Path
from diffusion_align.training.engine.randomness import TIMESTEP, generators, normal, posterior_streams
from diffusion_align.training.engine.sourced_method import BatchSource, SourcedMethod
from diffusion_align.training.policy.flow_times import draw_flow_times

from .config import DenoisingConfig
from .noising import Noising
from .reference import NoisyPairs
from .switches.timesteps import drawn_times


def shown_sizes(size_ids: Tensor, which: str) -> Tensor:
    """What the model is told of sizes and crops, (K, B, 6), of the images' own (K, B, 6), chosen ones first.

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


def training_path(config: DenoisingConfig, path: Path) -> Path:
    """The model's path as ``timesteps`` asks for it.

    Raises:
        ValueError: one of them is not in the model's schedule.
    """
    if path.straight:
        return path
    last = max(config.timestep_set, default=0)
    if last >= path.num_timesteps:
        raise ValueError(f"timesteps has {last}: the schedule of {config.model} ends at {path.num_timesteps - 1}")
    return path.with_zero_terminal_snr() if config.zero_terminal_snr else path


def draw_timesteps(config: DenoisingConfig, path: Path, seeds: Tensor) -> Tensor:
    """Timesteps (B,) of the samples with ``seeds`` (B,), on the CPU: of a set, or between smallest and largest,
    with the density that the settings name; of models that have timesteps."""
    drawing, few = generators(seeds, TIMESTEP), config.timestep_set
    if few:
        return torch.tensor(few)[path.draw_times(drawing, 0, len(few))]
    return drawn_times(config, path, drawing, config.min_timestep, min(config.max_timestep, path.num_timesteps))


class DenoisingMethod(SourcedMethod[PairBatch]):
    """A batch of B examples of K pictures each (pairs: chosen and rejected) becomes K B rows for the denoiser.

    Args:
        source: the examples.
        noising: Gaussian noise, or DDIM inversion (InPO).
        autocast: context of the forward passes.

    Attributes:
        path: what noisy latents and targets follow.
    """

    def __init__(
        self,
        config: DenoisingConfig,
        adapter: Adapter,
        source: BatchSource[PairBatch],
        noising: Noising,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config, self.adapter, self.source, self.noising, self.autocast = config, adapter, source, noising, autocast
        self.path = training_path(config, adapter.path)
        self.encode_prompts = PromptEncoder(adapter)

    def clean_latents(self, batch: PairBatch, seeds: Tensor) -> Tensor:
        """x0 (K B, C, h, w) float32, sampled from the VAE posterior: chosen first."""
        if batch.posterior is not None:
            mean, std = (part.flatten(0, 1).float() for part in batch.posterior)
        else:
            assert batch.pixels is not None
            mean, std = self.adapter.encode_posterior(batch.pixels.flatten(0, 1))
        streams = posterior_streams(len(mean) // len(seeds))
        draws = [normal(seeds, stream, mean.shape[1:]) for stream in streams]
        return mean + std * send(torch.cat(draws), mean.device)

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """Conditioning of all pictures (K B rows), with the size ids that the settings ask for."""
        cond = self.encode_prompts(batch.captions) if batch.cond is None else batch.cond
        cond = Conditioning(cond.embeds, cond.pooled).repeat(len(batch.size_ids))
        if self.adapter.embeds_guidance:
            told = cond.embeds.new_full((len(cond),), self.config.train_guidance, dtype=torch.float32)
            cond = replace(cond, guidance=told)
        sizes = self.adapter.family.size_ids(shown_sizes(batch.size_ids, self.config.size_ids).flatten(0, 1))
        return replace(cond, time_ids=None if sizes is None else sizes.to(cond.embeds.device))

    def times(self, seeds: Tensor, height: int, width: int) -> Tensor:
        """Times (B,) of the samples with ``seeds`` (B,), on the CPU, for latents of this size."""
        if self.path.straight:
            return draw_flow_times(self.config, self.adapter, generators(seeds, TIMESTEP), height, width)
        return draw_timesteps(self.config, self.path, seeds)

    def noisy(self, batch: PairBatch, seeds: Tensor) -> NoisyPairs:
        """The batch, which is on the device, at noise levels that follow from ``seeds`` (B,), which are not.

        Call it under autocast: an inversion runs the denoiser.
        """
        x0, cond = self.clean_latents(batch, seeds), self.conditioning(batch)
        times = self.times(seeds, x0.shape[-2], x0.shape[-1])
        t = send(times.repeat(len(batch.size_ids)), self.adapter.device)
        with self.autocast():
            x_t, eps = self.noising(x0, t, cond, seeds)
            return NoisyPairs(x_t, self.path.target(x0, eps, t), t, cond)
