"""Randomness that belongs to a sample: the same sample meets the same noise whatever its batch, process or resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Streams of one sample's seed, so that its draws are independent of each other.
TIMESTEP, NOISE, CHOSEN_POSTERIOR, REJECTED_POSTERIOR, INVERSION = range(5)
OFFSET, PERTURBATION, MARGIN, SECOND_SAMPLE, LABEL = range(10, 15)
#: Of a list's pictures from the third on, one after the other.
LIST_POSTERIORS = 1000
#: Streams of a run's seed.
TASKS, MASKS, PICTURES, STEPS, ITEMS = range(5, 10)

_ODD = 0x9E3779B97F4A7C15


def mix(seed: int, *numbers: int) -> int:
    """A seed in [0, 2^63) for each combination of ``seed`` and ``numbers``, all its bits well mixed."""
    mixed = seed % 2**64
    for number in numbers:
        mixed = (mixed ^ (number + 1) * _ODD) % 2**64
        mixed = (mixed ^ (mixed >> 32)) * _ODD % 2**64  # torch seeds its CPU engine with the low 32 bits only
        mixed ^= mixed >> 32
    return mixed % 2**63


def generator(seed: int, stream: int) -> torch.Generator:
    """CPU generator of one stream of a sample's 64-bit seed."""
    return torch.Generator().manual_seed(mix(seed, stream))


def posterior_streams(count: int) -> list[int]:
    """Streams of the posterior samples of an example's ``count`` images, of two the chosen one's first."""
    return [CHOSEN_POSTERIOR, REJECTED_POSTERIOR, *range(LIST_POSTERIORS, LIST_POSTERIORS + count)][:count]


def normal(seeds: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) float32, row i from ``seeds[i]`` (B,) int64."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(s, stream)) for s in seeds.tolist()])


def generators(seeds: Tensor, stream: int) -> list[torch.Generator]:
    """CPU generators of one stream of every sample's seed (B,)."""
    return [generator(seed, stream) for seed in seeds.tolist()]
