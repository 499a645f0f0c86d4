"""Our sampler against diffusers' own pipelines: the same images from the same seeds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

from diffusion_align.adapters import load_adapter
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import generate, sample, to_uint8

PROMPTS = ["a large red star on a dark background", "two small blue rings", "a green square left of a white moon"]
SEEDS = [5, 6, 2**40]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def theirs(pipeline: Any, guidance_scale: float, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        options.pop("prompts", PROMPTS),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=generators(),
        output_type="pt",
        **options,
    ).images


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("family", ["sdxl_folder", "sd_folder", "sd_v_folder"])
def test_images_are_those_of_the_pipeline(scheduler: Any, family: str, request: pytest.FixtureRequest) -> None:
    adapter = load_adapter(request.getfixturevalue(family))
    adapter.pipeline.scheduler = scheduler.from_config(adapter.pipeline.scheduler.config)
    ours = generate(adapter, PROMPTS, num_inference_steps=4, guidance_scale=3.0, seeds=SEEDS, batch_size=2)
    assert (ours - theirs(adapter.pipeline, 3.0)).abs().max() < 1e-4
    assert ours.std() > 0.01


@pytest.mark.slow
def test_guidance_of_one_predicts_with_the_prompt_only(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    ours = generate(adapter, PROMPTS, num_inference_steps=4, guidance_scale=1.0, seeds=SEEDS)
    assert (ours - theirs(adapter.pipeline, 1.0)).abs().max() < 1e-4


@pytest.mark.slow
def test_negative_prompts_and_sizes_are_those_of_the_pipeline(sdxl_folder: Path) -> None:
    adapter, negative = load_adapter(sdxl_folder), ["a blue ring", "a star", "two moons"]
    options: dict[str, Any] = {"height": 48, "width": 80}
    ours = generate(
        adapter, PROMPTS, num_inference_steps=4, guidance_scale=3.0, seeds=SEEDS, negative_prompts=negative, **options
    )
    assert ours.shape == (3, 3, 48, 80)
    assert (ours - theirs(adapter.pipeline, 3.0, negative_prompt=negative, **options)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl_folder", "sd_folder"])
@pytest.mark.parametrize("negative", [None, ["", "a star", ""]], ids=["null", "empty negative"])
def test_empty_prompts_are_encoded_as_by_the_pipeline(
    negative: list[str] | None, family: str, request: pytest.FixtureRequest
) -> None:
    adapter, prompts = load_adapter(request.getfixturevalue(family)), ["", PROMPTS[1], ""]
    ours = generate(adapter, prompts, num_inference_steps=4, guidance_scale=3.0, seeds=SEEDS, negative_prompts=negative)
    assert (ours - theirs(adapter.pipeline, 3.0, prompts=prompts, negative_prompt=negative)).abs().max() < 1e-4


@pytest.mark.slow
def test_fresh_ddim_noise_is_that_of_the_pipeline(sd_folder: Path) -> None:
    adapter = load_adapter(sd_folder)
    ours = sample(adapter, PROMPTS, num_inference_steps=4, guidance=3.0, seeds=SEEDS, eta=0.7)
    assert (ours.images - theirs(adapter.pipeline, 3.0, eta=0.7)).abs().max() < 1e-4


@pytest.mark.slow
def test_inpainting_is_that_of_the_pipeline(inpaint_folder: Path) -> None:
    adapter = load_adapter(inpaint_folder)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    expected = theirs(
        adapter.pipeline, 3.0, image=[image] * 3, mask_image=[Image.fromarray(mask)] * 3, height=64, width=64
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 127.5 - 1
    hole = torch.from_numpy(mask)[None, None].float() / 255
    rows = []
    for generator in generators():
        torch.randn((1, 4, 16, 16), generator=generator)  # the pipeline draws the initial latents first
        posterior = adapter.vae.encode(pixels * (hole < 0.5)).latent_dist
        latents = posterior.sample(generator=generator) * adapter.vae.config.scaling_factor
        rows.append(torch.cat([torch.nn.functional.interpolate(hole, size=(16, 16)), latents], dim=1))
    ours = generate(
        adapter, PROMPTS, num_inference_steps=4, guidance_scale=3.0, seeds=SEEDS, inpaint=torch.cat(rows).detach()
    )
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    together = generate(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS)
    alone = generate(adapter, PROMPTS[1:2], num_inference_steps=3, seeds=SEEDS[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_inside_reference_the_base_is_sampled(sdxl_folder: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "seeds": SEEDS}
    base = generate(load_adapter(sdxl_folder), PROMPTS, **options)
    adapter = load_adapter(sdxl_folder).train_lora(rank=4)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.05
    policy = generate(adapter, PROMPTS, **options)
    with adapter.reference():
        reference = generate(adapter, PROMPTS, **options)
    assert torch.equal(reference, base)
    assert (policy - base).abs().max() > 0.01


def test_the_pipelines_scheduler_is_left_as_it_was(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    before = adapter.pipeline.scheduler.timesteps.clone()
    generate(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS)
    assert torch.equal(adapter.pipeline.scheduler.timesteps, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds: expected one for each of the 3 prompts, found 1"),
        ({"seeds": SEEDS, "negative_prompts": ["a"]}, "negative_prompts: expected one for each of the 3 prompts"),
        ({"seeds": SEEDS, "height": 66}, "66x64 pixels cannot be made: both sides must be divisible by 4"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, sdxl_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(load_adapter(sdxl_folder), PROMPTS, **options)


def test_pixels_are_rounded_not_cut() -> None:
    images = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(images)[0, :, :, 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.slow
def test_noise_and_eta_can_be_given(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 1.0}
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    plain = sample(adapter, ["a", "b"], seeds=[5, 6], **options)
    given = sample(adapter, ["a", "b"], seeds=[7, 8], options=SamplingOptions(latents=noise), **options)
    assert torch.equal(plain.images, given.images)
    assert plain.latents.shape == (2, 4, 16, 16)
    # Fresh noise in the last step only: before it the trajectory is the deterministic one.
    kept = SamplingOptions(keep_trajectory=True)
    late = sample(adapter, ["a", "b"], seeds=[5, 6], eta=[0.0, 0.0, 1.0], options=kept, **options)
    still = sample(adapter, ["a", "b"], seeds=[5, 6], options=kept, **options)
    assert late.trajectory is not None
    assert still.trajectory is not None
    assert torch.equal(late.trajectory[:3], still.trajectory[:3])
    assert not torch.equal(late.trajectory[3], still.trajectory[3])
    with pytest.raises(ValueError, match="eta: expected one number or 3"):
        sample(adapter, ["a"], seeds=[1], eta=[0.0], **options)
    with pytest.raises(ValueError, match="latents: expected one for each of the 2"):
        sample(adapter, ["a", "b"], seeds=[1, 2], options=SamplingOptions(latents=noise[:1]), **options)


@pytest.mark.parametrize("function", [sample, generate])
def test_the_sampler_has_at_most_ten_parameters(function: Callable[..., Any]) -> None:
    assert len(inspect.signature(function).parameters) <= 10
