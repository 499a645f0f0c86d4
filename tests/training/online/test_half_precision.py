"""NFT under autocast: the old policy's weights, which take the trained one's place, leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion_align.training.online.config import NFTConfig

from .short_runs import build
from .test_online import prepared


@pytest.mark.slow
def test_nft_in_bf16_trains_the_policy_and_not_the_old_one(settings: dict[str, Any]) -> None:
    config = build("nft", settings, mixed_precision="bf16", lora_target_modules=("conv1",), kl_beta=0.0)
    assert isinstance(config, NFTConfig)
    adapter, method = prepared(config)
    batch = next(method.batches())
    with torch.no_grad():
        for index, parameter in enumerate(adapter.trainable_parameters().values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    method.loss(batch)[0].backward()
    without = [name for name, p in adapter.trainable_parameters().items() if p.grad is None or not p.grad.any()]
    assert not without
