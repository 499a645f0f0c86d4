"""SDXL and SD 1.5 at their true size, on the ``meta`` device: no weights, the real layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from benchmarks.sdxl import UNET as SDXL
from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.adapters.families import find_family

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("config", "count"), [(SDXL, 2_567_463_684), (SD15, 859_520_964)], ids=["sdxl", "sd15"])
def test_parameter_counts_are_the_published_ones(config: dict[str, Any], count: int) -> None:
    assert parameters(on_meta(config)) == count


@pytest.fixture
def adapter(sdxl_folder: Path) -> Adapter:
    """SDXL's UNet at its true size, without weights, in a pipeline whose other parts are small."""
    return Adapter(StableDiffusionXLPipeline.from_pretrained(sdxl_folder, unet=on_meta(SDXL)))


@pytest.mark.slow
def test_lora_reaches_every_attention_projection_of_sdxl(adapter: Adapter) -> None:
    attentions = [name for name, _ in adapter.unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    with torch.device("meta"):
        adapter.train_lora(rank=8)
    names = list(adapter.trainable_parameters())
    assert len(attentions) == 140
    assert len(names) == len(attentions) * len(adapter.family.lora_targets) * 2
    # rank 8 on q, k, v, out of 70 blocks: what diffusers' own script trains
    assert sum(p.numel() for p in adapter.trainable_parameters().values()) == 11_612_160


@pytest.mark.slow
def test_the_fused_pair_runs_through_sdxl_with_its_size_ids(adapter: Adapter) -> None:
    adapter.unet.to(torch.bfloat16)
    adapter.to("meta")
    with torch.device("meta"):
        latents, t = torch.empty(4, 4, 128, 128), torch.empty(4, dtype=torch.long)
        cond = Conditioning(torch.empty(4, 77, 2048), torch.empty(4, 1280), torch.empty(4, 6))
        prediction = adapter.predict(latents, t, cond)
        assert prediction.x0.shape == prediction.eps.shape == latents.shape
        with pytest.raises((RuntimeError, ValueError)):  # SD's embeddings are no SDXL's
            adapter.predict(latents, t, Conditioning(torch.empty(4, 77, 768), torch.empty(4, 1280), torch.empty(4, 6)))


def test_keys_are_those_of_the_published_checkpoint() -> None:
    keys = set(on_meta(SDXL).state_dict())
    assert len(keys) == 1680
    assert "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0.weight" in keys
    assert "add_embedding.linear_1.weight" in keys


def test_an_unsupported_pipeline_is_named() -> None:
    class FluxPipeline:
        pass

    with pytest.raises(ValueError, match="FluxPipeline is not supported"):
        find_family(FluxPipeline())
