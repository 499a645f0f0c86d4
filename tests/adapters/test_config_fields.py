"""Config fields that change the mathematics are followed as diffusers' own pipelines do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from diffusion_align import ScheduleGuidance, generate, load_adapter, sample, train
from diffusion_align.adapters import Adapter
from diffusion_align.adapters.families.unet import guidance_embedding
from diffusion_align.data.cache import fingerprint
from diffusion_align.data.transforms import PairTransform
from diffusion_align.training import DPOConfig
from diffusion_align.training.policy.guided import GuidedPolicy

PROMPT = "a red star on a dark background"
MEAN, STD = [-1.6, 1.2, 0.5, -0.7], [0.8, 0.9, 1.1, 1.2]


def of_the_pipeline(adapter: Adapter, scale: float = 5.0, steps: int = 4, **options: Any) -> torch.Tensor:
    adapter.pipeline.set_progress_bar_config(disable=True)
    drawn = adapter.pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="pt",
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    return torch.as_tensor(drawn.images)


# -- statistics of the latents -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """SDXL whose VAE has statistics of its latents, as Playground 2.5's has."""
    adapter = load_adapter(sdxl_folder)
    adapter.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    folder = tmp_path_factory.mktemp("measured")
    adapter.pipeline.save_pretrained(folder)
    return load_adapter(folder)


def test_latents_with_statistics_are_decoded_as_the_pipeline_does(measured: Adapter) -> None:
    drawn = generate(measured, [PROMPT], seeds=[1], num_inference_steps=4)
    assert (drawn - of_the_pipeline(measured)).abs().max() < 1e-4


def test_pictures_are_encoded_as_the_picture_to_picture_pipeline_does(measured: Adapter) -> None:
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    parts = measured.pipeline.components
    theirs = StableDiffusionXLImg2ImgPipeline(**{n: parts[n] for n in parts if n != "watermark"}).prepare_latents(
        pixels, torch.tensor([0]), 2, 1, torch.float32, "cpu", torch.Generator().manual_seed(3), add_noise=False
    )
    mean, std = measured.encode_posterior(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert (mean + std * noise - theirs).abs().max() < 1e-5


def test_encoding_and_decoding_are_inverse_maps(measured: Adapter, sdxl_folder: Path) -> None:
    """Of the VAE's own latents, which are the plain model's without its scale."""
    plain, pixels = load_adapter(sdxl_folder), torch.rand(1, 3, 64, 64) * 2 - 1
    back = measured.decode(measured.encode_images(pixels))
    assert (back - plain.decode(plain.encode_images(pixels))).abs().max() < 1e-4


def test_caches_know_the_statistics(measured: Adapter, sdxl_folder: Path) -> None:
    transform = PairTransform(64)
    assert fingerprint(measured, transform) != fingerprint(load_adapter(sdxl_folder), transform)


def test_statistics_that_the_pipeline_would_not_apply_are_refused(
    sd_folder: Path, sdxl_folder: Path, inpaint_folder: Path
) -> None:
    pipeline = load_adapter(sd_folder).pipeline
    pipeline.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    with pytest.raises(ValueError, match=r"vae: latents_mean = .* is not understood \(AutoencoderKL\)"):
        Adapter(pipeline)
    pipeline = load_adapter(sdxl_folder).pipeline
    pipeline.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match=r"vae: latents_mean = .* is not understood in an inpainting model"):
        Adapter(pipeline)


# -- guidance as an input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd_folder", "sdxl_folder"])
def distilled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """A UNet that is given the guidance scale, and LCM's scheduler."""
    pipeline = load_adapter(request.getfixturevalue(request.param)).pipeline
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "time_cond_proj_dim": 16})
    unet.load_state_dict(pipeline.unet.state_dict(), strict=False)
    unet.time_embedding.cond_proj.weight.data.mul_(20)  # so that a scale that is lost shows
    pipeline.register_modules(unet=unet.eval())
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    folder = tmp_path_factory.mktemp("distilled")
    pipeline.save_pretrained(folder)
    return load_adapter(folder)


@pytest.mark.parametrize("scale", [1.0, 5.0, 8.0])
def test_distilled_models_draw_the_picture_of_the_pipeline(scale: float, distilled: Adapter) -> None:
    samples = sample(distilled, [PROMPT], seeds=[1], num_inference_steps=4, guidance=scale)
    assert (samples.images - of_the_pipeline(distilled, scale)).abs().max() < 1e-4
    assert samples.nfe == 4
    assert torch.equal(samples.scales, torch.full((4, 1), scale))


@pytest.mark.slow
def test_the_scale_of_a_distilled_model_may_differ_by_step_and_picture(distilled: Adapter) -> None:
    low, high = (sample(distilled, [PROMPT], seeds=[1], num_inference_steps=4, guidance=w).images for w in (2.0, 8.0))
    both = sample(distilled, [PROMPT] * 2, seeds=[1, 1], num_inference_steps=4, guidance=[2.0, 8.0])
    assert (both.images - torch.cat([low, high])).abs().max() < 1e-5
    assert (low - high).abs().max() > 1e-3
    rising = sample(distilled, [PROMPT], seeds=[1], num_inference_steps=4, guidance=ScheduleGuidance(5.0, "linear"))
    assert len(set(rising.scales.flatten().tolist())) == 4
    assert rising.records[0]["branches"] == [1] * 4


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance(guidance_scale=5.0)])
def test_guiders_that_combine_predictions_cannot_steer_a_distilled_model(guider: Any, distilled: Adapter) -> None:
    with pytest.raises(ValueError, match=r"combines predictions .* this model was distilled"):
        sample(distilled, [PROMPT], seeds=[1], num_inference_steps=2, guidance=guider)
    with pytest.raises(ValueError, match="negative_prompts steer away from a second prediction"):
        sample(distilled, [PROMPT], seeds=[1], num_inference_steps=2, negative_prompts=["dark"])


def test_a_prediction_without_the_scale_is_refused(distilled: Adapter, sdxl_folder: Path) -> None:
    x_t, t, cond = torch.randn(1, 4, 32, 32), torch.tensor([500]), distilled.encode_prompts([PROMPT])
    with pytest.raises(ValueError, match=r"takes the guidance scale as an input \(cond.guidance"):
        distilled.predict(x_t, t, cond)
    plain = load_adapter(sdxl_folder)
    with pytest.raises(ValueError, match=r"cond.guidance was given, but the network does not take it"):
        plain.predict(x_t, t, replace(plain.encode_prompts([PROMPT]), guidance=torch.ones(1)))


def test_online_methods_predict_with_the_scale_that_they_draw_with(distilled: Adapter) -> None:
    policy = GuidedPolicy(distilled, 64, 5.0)
    x_t, t = torch.randn(1, 4, 32, 32), torch.tensor([500])
    conditions = policy.conditions([PROMPT], None)
    assert len(conditions) == 1
    pipeline = distilled.pipeline
    embedded = pipeline.get_guidance_scale_embedding(torch.tensor([4.0]), 16)
    arguments = distilled.family.arguments(conditions)
    theirs = distilled.unet(x_t, t, timestep_cond=embedded, **arguments).sample
    assert (policy.predict(x_t, t, conditions).output - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("width", [16, 17, 256])
def test_the_embedding_is_diffusers_own(width: int, distilled: Adapter) -> None:
    scale = torch.tensor([1.0, 2.5, 7.5])
    theirs = distilled.pipeline.get_guidance_scale_embedding(scale - 1, width)
    assert torch.equal(guidance_embedding(scale, width), theirs)


@pytest.mark.slow
def test_pairs_do_not_train_a_distilled_model(distilled: Adapter, pairs_folder: Path, tmp_path: Path) -> None:
    distilled.pipeline.save_pretrained(tmp_path / "model")
    config = DPOConfig(
        model=str(tmp_path / "model"), dataset=str(pairs_folder), output_dir=str(tmp_path), report_to="none"
    )
    with pytest.raises(ValueError, match=r"model was distilled \(unet: time_cond_proj_dim\): dpo takes errors"):
        train(config)


# -- other networks ----------------------------------------------------------------------------------------------------


def test_a_controlnet_is_refused_by_name(sd_folder: Path) -> None:
    parts = load_adapter(sd_folder).pipeline.components
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 32))
    pipeline = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"controlnet \(ControlNetModel\) of StableDiffusionControlNetPipeline is not"):
        Adapter(pipeline)


def test_a_vae_of_another_kind_is_refused_by_name(sd_folder: Path) -> None:
    from diffusers import AutoencoderTiny

    pipeline = load_adapter(sd_folder).pipeline
    pipeline.register_modules(vae=AutoencoderTiny())
    with pytest.raises(ValueError, match="vae: AutoencoderTiny is not understood: expected AutoencoderKL"):
        Adapter(pipeline)
