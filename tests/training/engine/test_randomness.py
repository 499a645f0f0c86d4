"""A sample's randomness depends on its seed alone."""

from __future__ import annotations

import torch

from diffusion_align.process import OUTPUTS, VariancePreserving
from diffusion_align.training.engine.randomness import NOISE, TIMESTEP, generators, normal

SEEDS = torch.tensor([3, -(2**62), 2**62 + 1, 7], dtype=torch.int64)


def test_a_row_does_not_depend_on_its_batch() -> None:
    together = normal(SEEDS, NOISE, (4, 2))
    assert torch.equal(together[2:3], normal(SEEDS[2:3], NOISE, (4, 2)))


def test_streams_and_seeds_differ() -> None:
    draws = [normal(SEEDS, stream, (64,)) for stream in (TIMESTEP, NOISE)]
    rows = torch.cat(draws)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.6


def test_neighbouring_seeds_give_uniform_timesteps() -> None:
    path = VariancePreserving(torch.linspace(1, 0, 1000), OUTPUTS["epsilon"])
    t = path.draw_times(generators(torch.arange(4000), TIMESTEP), 100, 1000).float()
    assert t.min() >= 100
    assert t.max() < 1000
    assert abs(t.mean().item() - 549.5) < 4 * 260 / 4000**0.5


def test_neighbouring_seeds_give_independent_normals() -> None:
    values = normal(torch.arange(20_000), NOISE, (2,))
    assert abs(values.mean().item()) < 4 / 40_000**0.5
    assert abs(values.var().item() - 1) < 0.04
    assert abs((values[1:, 0] * values[:-1, 0]).mean().item()) < 4 / 20_000**0.5
