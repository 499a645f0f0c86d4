"""Where a pair's noise comes from: drawn (Diffusion-DPO, 2311.12908) or found by DDIM inversion (InPO, 2503.18454)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.devices import send
from diffusion_align.process import Path, invert
from diffusion_align.training.engine.randomness import INVERSION, NOISE, OFFSET, PERTURBATION, normal

from .config import InPOConfig
from .reference import pair_rows


class GaussianNoising:
    """The forward process q(x_t | x0) with the pair's own noise, which its pictures share.

    Args:
        noise_offset: eps = z + noise_offset c, with one c ~ N(0, 1) for each channel.
        input_perturbation: x_t is made with eps + input_perturbation z', and eps is to be found in it (2301.11706).
        path: what x_t follows; None is the model's own.
    """

    def __init__(
        self,
        adapter: Adapter,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        path: Path | None = None,
    ) -> None:
        self.noise_offset, self.input_perturbation, self.path = noise_offset, input_perturbation, path or adapter.path

    def __call__(self, x0: Tensor, t: Tensor, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        eps = normal(seeds, NOISE, x0.shape[1:])
        if self.noise_offset:
            eps = eps + self.noise_offset * normal(seeds, OFFSET, (x0.shape[1], 1, 1))
        shown = eps
        if self.input_perturbation:
            shown = eps + self.input_perturbation * normal(seeds, PERTURBATION, x0.shape[1:])
        eps, shown = (send(noise, x0.device).repeat(len(x0) // len(seeds), 1, 1, 1) for noise in (eps, shown))
        return self.path.noise(x0, shown, t), eps


class Noising(Protocol):
    """Turns clean latents into what the denoiser sees and the noise it should find in it."""

    def __call__(self, x0: Tensor, t: Tensor, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its noise, both like ``x0`` (K B, C, h, w), of pairs (K = 2) chosen first; ``t`` (K B,); ``seeds`` of
        the examples, (B,)."""


class InvertedNoising:
    """x_t by inversion with policy or reference, and tau = (x_t - alpha x0) / sigma, which differs within a pair."""

    def __init__(self, adapter: Adapter, config: InPOConfig) -> None:
        self.adapter, self.config = adapter, config

    def __call__(self, x0: Tensor, t: Tensor, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.noise_draws is None or self.config.inversion_model == "policy":
            return self._invert(x0, t, cond, seeds)
        # The reference finds the same noise whenever a draw comes again: to the bit, where it sees the pair alone.
        alone = [partial(pair_rows, index=i, count=len(seeds)) for i in range(len(seeds))]
        pairs = [self._invert(rows(x0), rows(t), cond.map(rows), seeds[i : i + 1]) for i, rows in enumerate(alone)]
        x_t, eps = (torch.stack([pair[k] for pair in pairs], dim=1).flatten(0, 1) for k in range(2))
        return x_t, eps

    @torch.no_grad()
    def _invert(self, x0: Tensor, t: Tensor, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        config, path = self.config, self.adapter.path
        noise = None
        if config.inversion_eta:
            pictures = len(x0) // len(seeds)
            drawn = 1 if config.shared_noise else pictures
            draws = normal(seeds, INVERSION, (config.inversion_steps, drawn, *x0.shape[1:]))
            draws = draws.expand(-1, -1, pictures, -1, -1, -1)
            noise = send(draws.permute(1, 2, 0, 3, 4, 5).flatten(1, 2), x0.device)
        with self.adapter.reference() if config.inversion_model == "reference" else nullcontext():
            x_t = invert(
                path,
                lambda x, steps: path.moving(self.adapter.predict(x, steps, cond)),
                x0,
                t,
                num_steps=config.inversion_steps,
                renoise_iterations=config.renoise_iterations,
                eta=config.inversion_eta,
                noise=noise,
            )
        return x_t, path.at(t).eps(x_t, x0)
