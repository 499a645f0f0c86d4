"""SDXL and SD 1.5 at their true size, on the ``meta`` device: no weights, the real layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.sdxl import UNET as SDXL
from diffusion_align.adapters.base import DEFAULT_LORA_TARGETS, Adapter
from diffusion_align.adapters.families import find_family
from diffusion_align.scenes.pretrain.denoiser import build_scheduler

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("config", "count"), [(SDXL, 2_567_463_684), (SD15, 859_520_964)], ids=["sdxl", "sd15"])
def test_parameter_counts_are_the_published_ones(config: dict[str, Any], count: int) -> None:
    assert parameters(on_meta(config)) == count


def test_lora_reaches_every_attention_projection_of_sdxl() -> None:
    unet = on_meta(SDXL)
    attentions = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    adapter = bare_adapter(unet)
    with torch.device("meta"):
        adapter.train_lora(rank=8)
    names = list(adapter.trainable_parameters())
    assert len(attentions) == 140
    assert len(names) == len(attentions) * len(DEFAULT_LORA_TARGETS) * 2
    # rank 8 on q, k, v, out of 70 blocks: what diffusers' own script trains
    assert sum(p.numel() for p in adapter.trainable_parameters().values()) == 11_612_160


def bare_adapter(unet: UNet2DConditionModel) -> Adapter:
    """An adapter of a UNet alone."""
    adapter = object.__new__(Adapter)
    adapter.pipeline = SimpleNamespace(unet=unet, scheduler=build_scheduler())
    adapter._lora_targets, adapter._reference_unet = None, None
    unet.requires_grad_(False)
    return adapter


def test_the_fused_pair_runs_through_sdxl_with_its_size_ids() -> None:
    unet, pairs = on_meta(SDXL).to(torch.bfloat16), 2
    arguments = {
        "encoder_hidden_states": torch.empty(2 * pairs, 77, 2048, dtype=torch.bfloat16, device="meta"),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(2 * pairs, 1280, dtype=torch.bfloat16, device="meta"),
            "time_ids": torch.empty(2 * pairs, 6, device="meta"),
        },
    }
    latents = torch.empty(2 * pairs, 4, 128, 128, dtype=torch.bfloat16, device="meta")
    output = unet(latents, torch.empty(2 * pairs, dtype=torch.long, device="meta"), **arguments).sample
    assert output.shape == latents.shape


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
