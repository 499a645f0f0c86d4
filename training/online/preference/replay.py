"""Human pairs that are mixed into the pairs of own pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data import PairBatch, PairDataset, PairLoader, PairTransform, PixelExamples, load_pairs
from diffusion_align.devices import send
from diffusion_align.training.engine.randomness import CHOSEN_POSTERIOR, REJECTED_POSTERIOR, mix, normal

from .config import OnlineDPOConfig


def replay_source(config: OnlineDPOConfig, adapter: Adapter, size: int, rank: int, world_size: int) -> PairLoader:
    """Endless batches of ``config.replayed`` pairs of ``config.replay_dataset`` for this process.

    Raises:
        ValueError: an inpainting model, for which pairs have no holes, or pairs that cannot be read.
    """
    if adapter.is_inpainting:
        raise ValueError(f"replay_share: pairs have no holes, which the inpainting model {config.model} repaints")
    pairs = load_pairs(config.replay_dataset, config.replay_split)
    assert isinstance(pairs, PairDataset)
    return PairLoader(
        PixelExamples(pairs, PairTransform(size)),
        config.replayed,
        seed=mix(config.seed, 1),
        rank=rank,
        world_size=world_size,
        max_corrupt=config.max_corrupt,
    )


def clean_latents(adapter: Adapter, batch: PairBatch) -> Tensor:
    """x0 (B, 2, C, h, w) float32 on the adapter's device, sampled from the VAE posterior, chosen first."""
    assert batch.pixels is not None
    mean, std = adapter.encode_posterior(batch.pixels.flatten(0, 1))
    draws = torch.cat(
        [normal(batch.seeds, stream, mean.shape[1:]) for stream in (CHOSEN_POSTERIOR, REJECTED_POSTERIOR)]
    )
    x0 = mean + std * send(draws, mean.device)
    return x0.unflatten(0, (2, len(batch))).transpose(0, 1)
