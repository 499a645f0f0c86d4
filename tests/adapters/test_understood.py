"""Config fields that would change the mathematics are refused by name; what diffusers' samplers set is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter

#: The first needs torchsde, which is no dependency; the second is another process.
OTHERS = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
SAMPLERS = [s.name for s in KarrasDiffusionSchedulers if s.name not in OTHERS]


def with_scheduler(adapter: Adapter, name: str, **changes: Any) -> Adapter:
    pipeline = adapter.pipeline
    own = pipeline.scheduler
    try:
        pipeline.scheduler = getattr(diffusers, name).from_config(own.config, **changes)
        return Adapter(pipeline)
    finally:
        pipeline.scheduler = own


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return load_adapter("scenes-sdxl")


@pytest.mark.parametrize("name", [*SAMPLERS, "LCMScheduler", "TCDScheduler", "SASolverScheduler"])
def test_samplers_of_stable_diffusion_are_understood(name: str, adapter: Adapter) -> None:
    assert with_scheduler(adapter, name).path.num_timesteps == 1000


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler"])
def test_another_noising_process_is_refused(name: str, adapter: Adapter) -> None:
    with pytest.raises(ValueError, match=f"scheduler: {name} has .*its noising process is not Stable Diffusion's"):
        with_scheduler(adapter, name)


def test_a_switch_to_flow_is_refused(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="scheduler: use_flow_sigmas = True is not understood"):
        with_scheduler(adapter, "DPMSolverMultistepScheduler", use_flow_sigmas=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vae", "latents_mean", [-1.6, 1.2, 0.5, -0.7]),
        ("vae", "latents_std", [0.8, 0.9, 1.1, 1.2]),
        ("vae", "shift_factor", 0.1),
        ("unet", "in_channels", 8),
        ("unet", "out_channels", 8),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "encoder_hid_dim_type", "ip_image_proj"),
    ],
)
def test_fields_that_ask_for_more_are_refused(
    part: str, field: str, value: Any, sdxl_folder: Path, tmp_path: Path
) -> None:
    pipeline = load_adapter(sdxl_folder).pipeline
    getattr(pipeline, part).register_to_config(**{field: value})
    with pytest.raises(ValueError, match=f"{part}: {field} = .* is not understood"):
        Adapter(pipeline)


def test_the_refiner_is_refused(sdxl_folder: Path) -> None:
    pipeline = load_adapter(sdxl_folder).pipeline
    pipeline.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline is not supported"):
        Adapter(pipeline)


def test_fields_of_another_class_are_no_matter(sdxl_folder: Path, tmp_path: Path) -> None:
    """A scheduler's config keeps what an earlier one wrote; the class that is used does not read it."""
    adapter = load_adapter(sdxl_folder)
    adapter.pipeline.save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sigma_data": 0.5}))
    assert load_adapter(tmp_path).path.num_timesteps == adapter.path.num_timesteps
