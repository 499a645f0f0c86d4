"""scenes-flow, the shipped flow model: an ordinary pipeline of SD3's layout that draws what it is asked for."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusion_align import load_adapter, load_scorer
from diffusion_align.sampling.sampler import generate
from diffusion_align.scenes.held_out import held_out_prompts
from diffusion_align.shipped import shipped_path


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_plain_diffusers_draws_the_same_pictures() -> None:
    prompts = held_out_prompts(2)
    ours = generate(
        load_adapter("scenes-flow"), prompts, num_inference_steps=4, guidance_scale=5.5, seeds=[3, 4], batch_size=2
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        shipped_path("scenes-flow"), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=5.5,
        max_sequence_length=0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, drawn, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_it_follows_prompts_about_as_well_as_scenes_sdxl() -> None:
    prompts = held_out_prompts(32)
    images = generate(
        load_adapter("scenes-flow"), prompts, num_inference_steps=10, guidance_scale=5.5, seeds=range(32), batch_size=32
    )
    aspects = load_scorer("scenes-oracle").score(images, prompts).aspects
    assert float(aspects["prompt_following"].mean()) > 0.45  # 0.61 on 250 of them; standard error about 0.06
    assert float(aspects["fidelity"].mean()) > 0.8
