"""Own pictures at random noise levels: what NFT and RAFT learn from."""

from __future__ import annotations

import torch

from diffusion_align.adapters import Adapter
from diffusion_align.devices import send
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, mix, normal

from .config import RolloutConfig
from .rollout import MiniBatch


class RenoisedBatch:
    """A batch of own pictures at random noise levels.

    Attributes:
        x0, x_t, target: (B, C, h, w), the picture's latents, noisy ones, and what the raw output should be there.
        t: (B,).
        inpaint: (B, 1 + C, h, w) or None; mask: its first channel.
    """

    def __init__(self, adapter: Adapter, batch: MiniBatch, min_timestep: int) -> None:
        rollout, device = batch.rollout, adapter.device
        # Pictures of one prompt meet the same noise at the same timesteps: what they share cancels in the comparison.
        draws = zip(rollout.group.tolist(), batch.column.tolist(), strict=True)
        seeds = torch.tensor([mix(seed, column, batch.number) for seed, column in draws])
        x0 = send(rollout.latents, device)
        path = adapter.path
        self.t = send(path.draw_times(generators(seeds, TIMESTEP), min_timestep, path.num_timesteps), device)
        eps = send(normal(seeds, NOISE, x0.shape[1:]), device)
        self.x0 = x0
        self.x_t, self.target = path.noise(x0, eps, self.t), path.target(x0, eps, self.t)
        self.inpaint = rollout.inpaint
        self.mask = None if self.inpaint is None else send(self.inpaint[:, :1], device)


def check_timesteps(config: RolloutConfig, adapter: Adapter) -> None:
    """Raises ValueError where no timestep is left, or there are none."""
    if adapter.path.straight:
        if config.min_timestep:
            raise ValueError(
                f"min_timestep = {config.min_timestep} is for models with timesteps, and {config.model} is of flow "
                "matching: set min_time instead"
            )
        return
    if config.min_timestep >= adapter.path.num_timesteps:
        raise ValueError(
            f"min_timestep = {config.min_timestep}: the model's schedule ends at {adapter.path.num_timesteps}"
        )
