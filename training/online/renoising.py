"""Own pictures at random noise levels: what NFT and RAFT learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.devices import send
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, mix, normal
from diffusion_align.training.policy.flow_times import check_drawn_times, check_time_range, draw_flow_times

from .config import RenoisingConfig, RolloutConfig
from .rollout import MiniBatch


class RenoisedBatch:
    """A batch of own pictures at random noise levels.

    Attributes:
        x0, x_t, target: (B, C, h, w), the picture's latents, noisy ones, and what the raw output should be there.
        t: (B,).
        inpaint: (B, 1 + C, h, w) or None; mask: its first channel.
    """

    def __init__(self, adapter: Adapter, batch: MiniBatch, config: RenoisingConfig) -> None:
        rollout, device = batch.rollout, adapter.device
        # Pictures of one prompt meet the same noise at the same timesteps: what they share cancels in the comparison.
        draws = zip(rollout.group.tolist(), batch.column.tolist(), strict=True)
        seeds = torch.tensor([mix(seed, column, batch.number) for seed, column in draws])
        x0 = send(rollout.latents, device)
        path = adapter.path
        self.t = send(renoising_times(config, adapter, seeds, x0.shape[-2:], path.num_timesteps), device)
        eps = send(normal(seeds, NOISE, x0.shape[1:]), device)
        self.x0 = x0
        self.x_t, self.target = path.noise(x0, eps, self.t), path.target(x0, eps, self.t)
        self.inpaint = rollout.inpaint
        self.mask = None if self.inpaint is None else send(self.inpaint[:, :1], device)


def renoising_times(
    config: RenoisingConfig, adapter: Adapter, seeds: Tensor, sides: Sequence[int], max_timestep: int
) -> Tensor:
    """Times (B,) of the pictures with ``seeds`` (B,), on the CPU: uniform timesteps in [min_timestep, max_timestep), or
    those of a flow model.

    Args:
        sides: height and width of the latents.
    """
    drawing, path = generators(seeds, TIMESTEP), adapter.path
    if path.straight:
        return draw_flow_times(config, adapter, drawing, *sides)
    return path.draw_times(drawing, config.min_timestep, min(max_timestep, path.num_timesteps))


def check_timesteps(config: RolloutConfig, adapter: Adapter) -> None:
    """Raises ValueError where no time is left, or settings of times are for other models."""
    check_time_range(config, adapter)
    if config.min_timestep >= adapter.path.num_timesteps:
        raise ValueError(
            f"min_timestep = {config.min_timestep}: the model's schedule ends at {adapter.path.num_timesteps}"
        )


def check_denoising(config: RenoisingConfig, adapter: Adapter) -> None:
    """The same for methods that train on noisy pictures, which models that were distilled to a few steps unlearn."""
    check_drawn_times(config, adapter)
    check_timesteps(config, adapter)
