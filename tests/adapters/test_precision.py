"""In which precision the denoiser computes: its weights' own where they are in the run's half precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from diffusion_align.adapters import Adapter, load_adapter


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def seen_autocast(adapter: Adapter, context: Any) -> tuple[bool, torch.dtype]:
    """Whether autocast was on inside the denoiser's first norm, and the dtype that came out of ``predict``."""
    seen: list[bool] = []
    hook = (
        adapter.unet.down_blocks[0]
        .resnets[0]
        .norm1.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    )
    cond = adapter.encode_prompts(["a red star"])
    latents = torch.randn(1, adapter.latent_channels, 8, 8)
    with hook, context, torch.no_grad():
        eps = adapter.predict(latents, torch.tensor([500]), cond).eps
    return seen[0], eps.dtype


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, False), (torch.float32, True)])
def test_weights_in_the_runs_precision_are_left_alone_by_autocast(
    dtype: torch.dtype, expected: bool, sdxl_folder: Path, accelerator: Accelerator
) -> None:
    adapter = load_adapter(sdxl_folder, dtype=dtype).train_lora(rank=2)
    assert seen_autocast(adapter, accelerator.autocast()) == (expected, torch.float32)
    adapter.wrap(accelerator.prepare)  # accelerate puts an autocast of its own around forward
    assert seen_autocast(adapter, accelerator.autocast()) == (expected, torch.float32)
    adapter.wrap(lambda module: accelerator.unwrap_model(module, keep_fp32_wrapper=False))
    assert adapter.denoiser is adapter.unet


@pytest.mark.slow
def test_device_and_dtype_are_the_first_weights(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder, dtype=torch.bfloat16).train_lora(rank=2)
    assert (adapter.device, adapter.dtype) == (adapter.unet.device, torch.bfloat16)


def test_outside_of_autocast_weights_decide(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder, dtype=torch.bfloat16).train_lora(rank=2)
    assert seen_autocast(adapter, torch.autocast("cpu", enabled=False)) == (False, torch.float32)
