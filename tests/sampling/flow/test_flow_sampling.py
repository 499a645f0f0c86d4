"""Pictures of flow models are those of diffusers' own pipelines, whatever the batch, guidance, shift and size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.process.flow_sampler import FlowSampler
from diffusion_align.sampling.control import SamplingOptions, SkippedLayers
from diffusion_align.sampling.named import named_scheduler
from diffusion_align.sampling.sampler import sample
from tests.adapters.families.tiny_flow import LENGTH, flow_scheduler, flux_transformer, louder
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings", "a cross"]
SEEDS = [5, 2**40, 7]
STEPS = 4
#: Pixels: not square.
HEIGHT, WIDTH = 32, 16
CLOSE = 1e-4


def loaded(folder: Path) -> Adapter:
    adapter = load_adapter(folder, max_sequence_length=LENGTH)
    adapter.pipeline.set_progress_bar_config(disable=True)
    return adapter


@pytest.fixture(scope="module")
def sd3(sd3_folder: Path) -> Adapter:
    return loaded(sd3_folder)


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> Adapter:
    return loaded(flux_folder)


@pytest.fixture(scope="module")
def auraflow(auraflow_folder: Path) -> Adapter:
    return loaded(auraflow_folder)


@pytest.fixture(scope="module")
def schnell(flux_folder: Path) -> Adapter:
    pipeline = loaded(flux_folder).pipeline
    torch.manual_seed(2)
    pipeline.transformer = flux_transformer(guidance_embeds=False)
    louder(pipeline.transformer)
    pipeline.scheduler = flow_scheduler(False, shift=1.0)
    return Adapter(pipeline, max_sequence_length=LENGTH)


@contextmanager
def scheduled(adapter: Adapter, scheduler: Any) -> Iterator[None]:
    own = adapter.pipeline.scheduler
    adapter.pipeline.scheduler = scheduler
    yield
    adapter.pipeline.scheduler = own


def theirs(adapter: Adapter, count: int, **options: Any) -> Tensor:
    """Latents of the pipeline."""
    size = {"height": HEIGHT, "width": WIDTH}
    found: Tensor = adapter.pipeline(
        PROMPTS[:count],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:count]],
        max_sequence_length=LENGTH,
        output_type="latent",
        **size | options,
    ).images
    return FluxPipeline._unpack_latents(found, HEIGHT, WIDTH, 4) if found.ndim == 3 else found


def ours(adapter: Adapter, count: int, guidance: Any, negative: bool = False, **options: Any) -> Tensor:
    return sample(
        adapter,
        PROMPTS[:count],
        seeds=SEEDS[:count],
        num_inference_steps=STEPS,
        guidance=guidance,
        negative_prompts=["blurry"] * count if negative else None,
        options=SamplingOptions(height=HEIGHT, width=WIDTH, **options),
    ).latents


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("count", "scale", "dynamic"), [(1, 4.5, False), (3, 4.5, True), (1, 1.0, False)])
def test_sd3_draws_the_pipelines_pictures(sd3: Adapter, count: int, scale: float, dynamic: bool) -> None:
    with scheduled(sd3, flow_scheduler(dynamic)):
        assert_same(ours(sd3, count, scale), theirs(sd3, count, guidance_scale=scale))


def test_sd3_takes_a_negative_prompt(sd3: Adapter) -> None:
    assert_same(ours(sd3, 1, 3.0, negative=True), theirs(sd3, 1, guidance_scale=3.0, negative_prompt=["blurry"]))


def test_sd3_is_guided_away_from_a_network_without_some_blocks(sd3: Adapter) -> None:
    skipped = SkippedLayers((1,), scale=2.0, start=0.1, stop=0.8)  # steps 1 to 3 of 4
    expected = theirs(
        sd3, 1, guidance_scale=3.0, skip_guidance_layers=[1], skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.8,
    )  # fmt: skip
    found = ours(sd3, 1, 3.0, skipped_layers=skipped)
    assert_same(found, expected)
    assert (found - ours(sd3, 1, 3.0)).abs().max() > 1e-3


def test_skipped_layers_that_would_do_nothing_are_refused(sd3: Adapter, flux: Adapter) -> None:
    for adapter, skipped, guidance, message in (
        (flux, SkippedLayers((0,), stop=1.0), 3.5, "is for SD3 and SD3.5, .* a flux model's network cannot"),
        (sd3, SkippedLayers((2,), stop=1.0), 3.0, r"skip_guidance_layers \[2\]: this network has blocks 0 to 1"),
        (sd3, SkippedLayers((1,)), 3.0, "would be used in none of the 4 steps: none lies between .* 0.01 and .* 0.2"),
        (sd3, SkippedLayers((1,), stop=1.0), 1.0, "needs guidance by two predictions, which step 1 has not: take"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(adapter, 1, guidance, skipped_layers=skipped)


#: A class, and what its config changes.
SOLVERS = {
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solvers_of_flow_are_the_pipelines(sd3: Adapter, name: str) -> None:
    kind, changes = SOLVERS[name]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    made = getattr(diffusers, kind)(shift=3.0) if name == "Heun" else getattr(diffusers, kind)(**flow, **changes)
    with scheduled(sd3, made):
        assert_same(ours(sd3, 1, 3.0), theirs(sd3, 1, guidance_scale=3.0))


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_flux_is_drawn_by_solvers_as_by_the_pipeline(flux: Adapter, name: str) -> None:
    """With FLUX's dynamic shift, which moves their sigmas."""
    with scheduled(flux, named_scheduler(flux, name)):
        assert_same(ours(flux, 1, 3.5), theirs(flux, 1, guidance_scale=3.5))


def test_solvers_without_flux_s_shift_and_grid_are_refused_by_name(flux: Adapter) -> None:
    with pytest.raises(ValueError, match="scheduler heun has no dynamic shift, which this model needs: take euler or"):
        named_scheduler(flux, "heun")
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler takes no grid"):
        sample(flux, PROMPTS[:1], seeds=[0], scheduler=diffusers.FlowMatchHeunDiscreteScheduler())


@pytest.mark.parametrize("count", [1, 3])
def test_flux_draws_the_pipelines_pictures(flux: Adapter, count: int) -> None:
    assert_same(ours(flux, count, 3.5), theirs(flux, count, guidance_scale=3.5))
    assert (ours(flux, 1, 3.5) - ours(flux, 1, 1.0)).abs().max() > 1e-3  # the scale is looked at


def test_flux_is_guided_by_two_predictions_where_asked(flux: Adapter) -> None:
    expected = theirs(flux, 1, guidance_scale=3.5, negative_prompt=["blurry"], true_cfg_scale=2.5)
    assert_same(ours(flux, 1, 2.5, negative=True, embedded_guidance=3.5), expected)


def test_schnell_takes_no_guidance(schnell: Adapter) -> None:
    assert_same(ours(schnell, 1, 1.0), theirs(schnell, 1, guidance_scale=0.0))
    with pytest.raises(ValueError, match="set the guidance scale to 1"):
        ours(schnell, 1, 3.5)


@pytest.mark.parametrize(("count", "scale"), [(1, 3.5), (3, 3.5), (3, 1.0)])
def test_auraflow_draws_the_pipelines_pictures(auraflow: Adapter, count: int, scale: float) -> None:
    expected = ours(auraflow, count, scale)
    assert_same(expected, theirs(auraflow, count, guidance_scale=scale))
    assert (expected - ours(auraflow, count, 7.0)).abs().max() > 1e-3  # prompts are looked at


def test_auraflow_takes_a_negative_prompt(auraflow: Adapter) -> None:
    expected = theirs(auraflow, 1, guidance_scale=3.0, negative_prompt=["blurry"])
    assert_same(ours(auraflow, 1, 3.0, negative=True), expected)


def test_auraflow_has_places_for_pictures_of_a_size(auraflow: Adapter) -> None:
    with pytest.raises(ValueError, match=r"latents of 10 x 8 are too large .* sides of at most 8"):
        sample(auraflow, PROMPTS[:1], seeds=[0], options=SamplingOptions(height=40, width=32))


def test_a_flow_sampler_without_noise_is_eulers(sd3: Adapter) -> None:
    quiet = sample(
        sd3,
        PROMPTS[:1],
        seeds=SEEDS[:1],
        num_inference_steps=STEPS,
        guidance=3.0,
        scheduler=FlowSampler(sd3.pipeline.scheduler, sd3.path),
        options=SamplingOptions(height=HEIGHT, width=WIDTH),
    ).latents
    torch.testing.assert_close(quiet, ours(sd3, 1, 3.0), rtol=0, atol=1e-5)


def test_dynamic_guidance_searches_on_flow_models(sd3: Adapter, flux: Adapter) -> None:
    for adapter, options in ((sd3, {}), (flux, {"embedded_guidance": 3.5})):
        guider = DynamicGuidance(None, candidates=(1.5, 4.0), pixel_scorers=("brightness",))
        guider.use(scorers=[Brightness()])
        drawn = sample(
            adapter,
            PROMPTS[:2],
            seeds=SEEDS[:2],
            num_inference_steps=2,
            guidance=guider,
            options=SamplingOptions(height=32, width=32, **options),
        )
        assert set(drawn.scales.flatten().tolist()) <= {1.5, 4.0}
        assert drawn.nfe == 4  # two branches a step, whatever the candidates


def test_sides_must_fit_the_patches(sd3: Adapter) -> None:
    with pytest.raises(ValueError, match="images of 36x32 pixels cannot be made: both sides must be divisible by 8"):
        sample(sd3, PROMPTS[:1], seeds=[0], options=SamplingOptions(height=36, width=32))


def test_another_noising_process_is_refused(sd3: Adapter) -> None:
    with pytest.raises(ValueError, match="DDIMScheduler is not of flow matching, which this model needs: take"):
        sample(sd3, PROMPTS[:1], seeds=[0], scheduler=diffusers.DDIMScheduler())
