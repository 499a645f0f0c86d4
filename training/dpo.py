"""Diffusion-DPO (2311.12908): one timestep and one noise per pair, shared by chosen and rejected."""

from __future__ import annotations

from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.precision import send

from .randomness import NOISE, normal


class GaussianNoising:
    """The forward process q(x_t | x0) with the pair's own noise."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, x0: Tensor, t: Tensor, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        eps = send(normal(seeds, NOISE, x0.shape[1:]), x0.device).repeat(2, 1, 1, 1)
        return self.adapter.add_noise(x0, eps, t), eps
