"""Densities of timesteps, and weights by noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_align.process import Path
from diffusion_align.process.outputs import min_snr_weight

from .config import NoiseLevels


def drawn_times(
    settings: NoiseLevels, path: Path, generators: Sequence[torch.Generator], low: int, high: int
) -> Tensor:
    """Timesteps (B,) int64 in [low, high), one from each CPU generator, with the density that the settings name.

    late: density in proportion to t - low, the square root of a uniform number. logit-normal: sigmoid(mean + std z) of
    the range (2403.03206).
    """
    if settings.timestep_density == "uniform":
        return path.draw_times(generators, low, high)
    if settings.timestep_density == "late":
        share = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators]).sqrt()
    else:
        z = torch.cat([torch.randn(1, generator=each, dtype=torch.float64) for each in generators])
        share = torch.sigmoid(settings.timestep_logit_mean + settings.timestep_logit_std * z)
    return (low + (high - low) * share).long().clamp(max=high - 1)


def level_weight(settings: NoiseLevels, path: Path, t: Tensor) -> Tensor | None:
    """Factors (B,) of the losses of examples at timesteps ``t`` (B,), on their device; None is 1."""
    if settings.timestep_weight == "none":
        return None
    return min_snr_weight(path.output, path.at(t), settings.min_snr_gamma).flatten()
