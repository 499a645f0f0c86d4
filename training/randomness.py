"""Randomness that belongs to a sample: the same sample meets the same noise whatever its batch, process or resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Streams of one sample's seed, so that its draws are independent of each other.
TIMESTEP, NOISE, CHOSEN_POSTERIOR, REJECTED_POSTERIOR, INVERSION = range(5)

_ODD = 0x9E3779B97F4A7C15


def generator(seed: int, stream: int) -> torch.Generator:
    """CPU generator of one stream of a sample's 64-bit seed."""
    mixed = (seed ^ (stream + 1) * _ODD) % 2**64
    mixed = (mixed ^ (mixed >> 32)) * _ODD % 2**64  # torch seeds its CPU engine with the low 32 bits only
    return torch.Generator().manual_seed((mixed ^ (mixed >> 32)) % 2**63)


def normal(seeds: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) float32, row i from ``seeds[i]`` (B,) int64."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(s, stream)) for s in seeds.tolist()])


def timesteps(seeds: Tensor, low: int, high: int) -> Tensor:
    """Uniform integers (B,) in [low, high), row i from ``seeds[i]``."""
    draws = [torch.randint(low, high, (1,), generator=generator(s, TIMESTEP)) for s in seeds.tolist()]
    return torch.cat(draws)
