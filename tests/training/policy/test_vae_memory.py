"""How many bytes are alive while the VAE works, at its true size, and the memory estimate that rests on it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from benchmarks.sdxl import VAE
from diffusion_align.adapters import load_adapter
from diffusion_align.adapters.autoencoder import ChunkedVAE, chunk_size
from diffusion_align.training.engine.optimizer import build_optimizer
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.costs.live_bytes import AutocastShapes, LiveBytes, flash_attention_shapes
from diffusion_align.training.policy.costs.memory import MemoryEstimate, estimate_memory, optimizer_bytes, vae_bytes

GIB = 2**30
MIB = 2**20
Job = Literal["encode", "decode", "decode_with_graph"]


# -- the counter -------------------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_alive_at_once() -> None:
    with LiveBytes() as live:
        first = torch.zeros(MIB, dtype=torch.uint8)
        second = torch.zeros(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.zeros(MIB, dtype=torch.uint8)
        view = third[1:]
        del third
        assert live.now == 3 * MIB  # a view keeps its whole storage
        del view
        assert live.now == 2 * MIB
    assert live.peak == 3 * MIB
    assert len(second) == 2 * MIB


def test_what_was_there_before_is_not_counted() -> None:
    older = torch.zeros(MIB, dtype=torch.uint8)
    with LiveBytes() as live:
        older[5:].add_(1)
    assert live.peak == 0


def test_the_backward_pass_is_counted() -> None:
    x = torch.zeros(MIB, device="meta", requires_grad=True)
    with LiveBytes() as live:
        y = x.exp()
        forward = live.peak
        y.sum().backward()
    assert forward == 4 * MIB
    assert live.peak >= 8 * MIB  # the result, kept for its own gradient, and the gradient


def test_a_convolution_copies_what_goes_in_and_comes_out() -> None:
    x, weight = torch.zeros(1, 4, 256, 256, device="meta"), torch.zeros(8, 4, 3, 3, device="meta")
    with LiveBytes() as live:
        y = nn.functional.conv2d(x, weight, padding=1)
    assert live.now == y.nbytes
    assert live.peak == 2 * y.nbytes + x.nbytes + weight.nbytes


# -- the VAE at its true size ------------------------------------------------------------------------------------------


@cache
def vae(dtype: torch.dtype = torch.bfloat16) -> AutoencoderKL:
    with torch.device("meta"):
        model = AutoencoderKL(**VAE)
    nn.Module.to(model, dtype)
    return model.requires_grad_(False).eval()


def counted(job: Job, pictures: int, side: int, batch_size: int | None = None) -> int:
    """Peak of one call on as many pictures, nothing left out."""
    coder = ChunkedVAE(vae(), batch_size)
    with_graph = job == "decode_with_graph"
    with flash_attention_shapes(), torch.set_grad_enabled(with_graph), LiveBytes() as live:
        pixels = torch.empty(pictures, 3, side, side, device="meta")
        if job == "encode":
            coder.encode(pixels)
        else:
            latents = torch.empty(pictures, 4, side // 8, side // 8, device="meta", requires_grad=with_graph)
            decoded = coder.decode(latents)
            if with_graph:
                decoded.backward(pixels)
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("job", ["encode", "decode", "decode_with_graph"])
def test_beyond_a_chunk_the_peak_grows_by_pixels_and_latents_only(job: Job, side: int) -> None:
    chunk = chunk_size(side, side, job == "decode_with_graph")
    one, two = counted(job, chunk, side), counted(job, 2 * chunk, side)
    pictures = 4 * chunk * (3 * side * side + 2 * 4 * (side // 8) ** 2)
    assert one <= two <= one + 2 * pictures
    assert two < 1.1 * one


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("job", ["encode", "decode", "decode_with_graph"])
def test_the_estimate_of_many_pictures_is_what_is_counted(job: Job, side: int) -> None:
    chunk = chunk_size(side, side, job == "decode_with_graph")
    estimate, real = vae_bytes(vae(), job, 2 * chunk, side), counted(job, 2 * chunk, side)
    assert real <= estimate < 1.05 * real


@pytest.mark.parametrize(("job", "pictures", "gib"), [("encode", 1, 1.5), ("encode", 2, 3.0), ("decode", 1, 2.42)])
def test_pictures_of_1024_pixels_cost_in_bf16_what_a_gpu_took(job: Job, pictures: int, gib: float) -> None:
    """docs/performance.md measured it on an H200."""
    assert vae_bytes(vae(), job, pictures, 1024) / GIB == pytest.approx(gib, rel=0.05)


def test_a_decoding_with_a_graph_keeps_seven_times_as_much() -> None:
    assert 11 < vae_bytes(vae(), "decode_with_graph", 1, 1024) / GIB < 13


@pytest.mark.slow
def test_under_autocast_it_is_computed_again_as_it_was() -> None:
    """A VAE in float32, as of SDXL, SD3 and FLUX, decodes with a graph in a run in bf16."""
    with torch.device("meta"):
        model = AutoencoderKL(**VAE).requires_grad_(False).eval()
    half = vae_bytes(model, "decode_with_graph", 1, 256, autocast=torch.bfloat16)
    assert half < vae_bytes(model, "decode_with_graph", 1, 256)


def test_all_at_once_is_what_chunks_avoid() -> None:
    assert counted("decode", 8, 1024, batch_size=8) > 3.5 * counted("decode", 8, 1024)


@pytest.mark.slow
def test_tiles_need_less_than_the_whole_picture() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(**VAE | {"sample_size": 512})
    nn.Module.to(model, torch.bfloat16)
    model.requires_grad_(False).eval()
    whole = vae_bytes(model, "decode", 1, 1024)
    model.enable_tiling()
    assert vae_bytes(model, "decode", 1, 1024) < 0.5 * whole


# -- optimisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "adafactor_scaled"])
def test_the_optimiser_s_state_is_counted_to_the_byte(optim: str, sdxl_folder: Path) -> None:
    parameters = list(load_adapter(sdxl_folder).train_full().trainable_parameters().values())
    optimizer = build_optimizer(DPOConfig(optim=optim), parameters)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    entries = [item for entry in optimizer.state.values() for item in entry.items()]
    state = [value for name, value in entries if name not in ("step", "RMS")]  # one number each
    assert optimizer_bytes(optim, [p.shape for p in parameters]) == sum(value.nbytes for value in state)


def test_adafactor_keeps_2_13_bytes_of_each_of_sd15_s_parameters() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    shapes = [p.shape for p in unet.parameters()]
    assert optimizer_bytes("adafactor", shapes) / sum(s.numel() for s in shapes) == pytest.approx(2.13, abs=0.005)


# -- the estimate ------------------------------------------------------------------------------------------------------


def estimate(folder: Path, **settings: Any) -> MemoryEstimate:
    found = estimate_memory(DPOConfig(model=str(folder), per_device_train_batch_size=4, **settings))
    assert found is not None
    return found


@pytest.mark.slow
def test_an_uncached_run_needs_the_encoder_and_a_cached_one_does_not(sdxl_folder: Path) -> None:
    assert estimate(sdxl_folder).vae > 0
    assert estimate(sdxl_folder, cache_dir="cache").vae == 0


@pytest.mark.slow
def test_validation_needs_the_decoder_and_the_encoders_of_a_cached_run(sdxl_folder: Path) -> None:
    validated = estimate(sdxl_folder, cache_dir="cache", eval_steps=10)
    assert validated.vae > 0
    assert validated.frozen_weights == estimate(sdxl_folder).frozen_weights


@pytest.mark.slow
def test_encoding_ends_before_activations_are_kept(sdxl_folder: Path) -> None:
    plain, cached = estimate(sdxl_folder, resolution=256), estimate(sdxl_folder, resolution=256, cache_dir="cache")
    encoders = plain.frozen_weights - cached.frozen_weights
    assert plain.total - cached.total == encoders + max(0, plain.vae - plain.activations)


def test_reward_gradients_decode_while_activations_are_kept(sdxl_folder: Path) -> None:
    found = estimate_memory(DRaFTConfig(model=str(sdxl_folder), scorers=("scenes-vp",)))
    assert found is not None
    lasting = found.frozen_weights + found.trained_weights + found.gradients + found.optimizer
    assert found.total == lasting + found.activations + found.vae


@pytest.mark.slow
def test_several_processes_hold_gradients_twice(sdxl_folder: Path) -> None:
    alone, two = (estimate_memory(DPOConfig(model=str(sdxl_folder)), count) for count in (1, 2))
    assert alone is not None
    assert two is not None
    assert two.total - alone.total == alone.gradients


@pytest.mark.slow
@pytest.mark.parametrize(("force_upcast", "size"), [(True, 4), (False, 2)])
def test_weights_are_counted_in_the_dtype_they_are_stored_in(
    force_upcast: bool, size: int, sdxl_folder: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(sdxl_folder)
    other = tmp_path / "vae"
    other.mkdir()
    config = dict(adapter.vae.config) | {"force_upcast": force_upcast, "_class_name": "AutoencoderKL"}
    (other / "config.json").write_text(json.dumps(config, default=list))
    half = {"weight_dtype": "bf16", "mixed_precision": "bf16", "vae": str(other)}
    found = estimate(sdxl_folder, **half)
    others = found.frozen_weights - estimate(sdxl_folder, **half, cache_dir="cache").frozen_weights
    texts = sum(p.numel() for encoder in adapter.text_encoders for p in encoder.parameters())
    vae_count = sum(p.numel() for p in adapter.vae.parameters())
    projection = 128 * 128  # of the second encoder's pooled output: the estimate leaves it out
    assert others == pytest.approx(2 * texts + size * vae_count, abs=2 * projection)


# -- autocast ----------------------------------------------------------------------------------------------------------


def test_shapes_under_autocast_are_those_of_cuda() -> None:
    x = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(8, 8, 1, 1, device="meta")
    with AutocastShapes(torch.float16):
        assert nn.functional.conv2d(x, weight).dtype == torch.float16
        assert nn.functional.group_norm(x, 2).dtype == torch.float32
        assert nn.functional.silu(x).dtype == torch.bfloat16
    with AutocastShapes(None):
        assert nn.functional.group_norm(x, 2).dtype == torch.bfloat16


def test_norms_in_float32_are_in_the_estimate(sdxl_folder: Path) -> None:
    settings = {"weight_dtype": "bf16", "resolution": 256, "cache_dir": "cache", "full_finetuning": True}
    half, full = (estimate(sdxl_folder, mixed_precision=how, **settings) for how in ("bf16", "no"))
    assert 0.5 * full.activations < half.activations < 0.8 * full.activations
