"""A second set of weights takes the first one's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.training.policy.held_weights import HeldWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_predictions_are_those_of_the_weights_that_are_there(sd_folder: Path, dtype: torch.dtype) -> None:
    """Also within one autocast, which would go on with casts of the weights that were there first."""
    adapter = load_adapter(sd_folder)
    adapter.train_lora(4, targets=["to_q", "conv1"])
    held = HeldWeights(adapter)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    x, t, cond = torch.ones(1, 4, 16, 16), torch.tensor([500]), adapter.encode_prompts(["a red circle"])

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)

    def predict() -> torch.Tensor:
        return adapter.predict(x, t, cond).output.detach()

    with autocast(), adapter.reference():
        expected_old = predict()  # at the start a LoRA adds nothing
    with autocast():
        expected_new = predict()
    with autocast():
        with held.in_place():
            old = predict()
        new = predict()
    assert torch.allclose(old, expected_old, atol=1e-6)
    assert torch.equal(new, expected_new)
    assert (new - old).abs().max() > 1e-2


def test_moving_goes_a_share_of_the_way(sd_folder: Path) -> None:
    adapter = load_adapter(sd_folder)
    adapter.train_lora(2, targets=["to_q"])
    held = HeldWeights(adapter)
    before = {name: tensor.clone() for name, tensor in held.tensors.items()}
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter += 1.0
    held.move(0.25)
    assert all(torch.allclose(held.tensors[name], tensor + 0.25) for name, tensor in before.items())
    held.move(1.0)
    assert all(torch.equal(held.tensors[name], p) for name, p in adapter.trainable_parameters().items())
