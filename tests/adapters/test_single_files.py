"""Single checkpoint files: recognised by their tensors, loaded as the folder that they were made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.adapters.single_file import CONFIGS, FIRST, LAST, SPREAD_OF, recognise
from diffusion_align.sampling.sampler import generate
from tests.original_layout import original_tensors, write_single_file

PROMPTS = ["a large red star on a dark background", ""]


def drawn(adapter: Adapter) -> torch.Tensor:
    return generate(adapter, PROMPTS, num_inference_steps=2, seeds=[1, 2])


def same_weights(loaded: Adapter, original: Adapter) -> bool:
    pairs = zip(
        (loaded.network, loaded.vae, *loaded.text_encoders),
        (original.network, original.vae, *original.text_encoders),
        strict=True,
    )
    return all(torch.equal(a, b.state_dict()[name]) for one, b in pairs for name, a in one.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "second", "family"),
    [("sd_folder", False, "sd"), ("sd_folder", True, "sd"), ("sdxl_folder", False, "sdxl")],
    ids=["sd1", "sd2", "sdxl"],
)
def test_a_single_file_is_the_pipeline_that_it_was_made_of(
    folder: str, second: bool, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    adapter = load_adapter(source)
    file = write_single_file(tmp_path / "model.safetensors", adapter.pipeline, second)
    loaded = load_adapter(file, config=str(source))
    assert loaded.family.name == family
    assert same_weights(loaded, adapter)
    assert (drawn(loaded) - drawn(adapter)).abs().max() < 1e-5
    assert loaded.prediction_type == adapter.prediction_type


@pytest.mark.slow
def test_an_inpainting_file_is_told_by_its_channels(inpaint_folder: Path, sd_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(inpaint_folder)
    file = write_single_file(tmp_path / "model.safetensors", adapter.pipeline)
    loaded = load_adapter(file, config=str(inpaint_folder))
    assert loaded.is_inpainting
    assert same_weights(loaded, adapter)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: its UNet takes 9 channels, the one of .* 4"):
        load_adapter(file, config=str(sd_folder))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["sd_folder", "sdxl_folder"])
def test_the_markers_of_v_prediction_and_zero_snr_are_heard(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The schedule of 2305.08891, computed here as its algorithm 1 says."""
    source = request.getfixturevalue(folder)
    adapter = load_adapter(source)
    file = write_single_file(tmp_path / "model.safetensors", adapter.pipeline, markers=["v_pred", "ztsnr"])
    loaded = load_adapter(file, config=str(source))
    roots = adapter.path.alpha_bar.double() ** 0.5
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    assert loaded.prediction_type == "v_prediction"
    assert (loaded.path.alpha_bar - rescaled).abs().max() < 1e-6
    assert loaded.path.alpha_bar[-1] < 1e-7
    assert (loaded.pipeline.scheduler.alphas_cumprod - rescaled).abs().max() < 1e-6
    loaded.pipeline.scheduler.set_timesteps(3)
    assert int(loaded.pipeline.scheduler.timesteps[0]) == 999  # where there is nothing but noise
    assert drawn(loaded).isfinite().all()
    assert load_adapter(file, config=str(source), prediction_type="epsilon").prediction_type == "epsilon"


def test_a_scheduler_that_cannot_be_rescaled_gives_way(sd_folder: Path, tmp_path: Path) -> None:
    from diffusers import PNDMScheduler

    pipeline = load_adapter(sd_folder).pipeline
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "configs")
    file = write_single_file(tmp_path / "model.safetensors", pipeline, markers=["v_pred", "ztsnr"])
    loaded = load_adapter(file, config=str(tmp_path / "configs"))
    assert isinstance(loaded.pipeline.scheduler, EulerDiscreteScheduler)
    assert loaded.path.alpha_bar[-1] < 1e-7


@pytest.mark.parametrize(("said", "meant"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_the_metadata_may_say_what_is_predicted(
    said: str, meant: str, sdxl_folder: Path, sd_v_folder: Path, tmp_path: Path
) -> None:
    source = sdxl_folder if meant == "v_prediction" else sd_v_folder  # whose configs say the opposite
    pipeline = load_adapter(source).pipeline
    file = write_single_file(
        tmp_path / "model.safetensors", pipeline, metadata={"modelspec.prediction_type": said, "format": "pt"}
    )
    assert load_adapter(file, config=str(source)).prediction_type == meant


def test_without_markers_the_configs_decide(sd_v_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", load_adapter(sd_v_folder).pipeline)
    assert load_adapter(file, config=str(sd_v_folder)).prediction_type == "v_prediction"


# -- by header alone ---------------------------------------------------------------------------------------------------


def header(*names: str, channels: int = 4, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of a UNet in the original layout, with tensors ``names`` beside it."""
    unet = {FIRST: (320, channels, 3, 3), LAST: (4, 320, 3, 3)}
    return unet | dict.fromkeys(names, (1,)) | shapes


def spread(by: float) -> Any:
    return lambda name: torch.tensor([by, -by])


SD1, SD2 = "cond_stage_model.transformer.text_model.x", "cond_stage_model.model.x"
SDXL, REFINER = "conditioner.embedders.1.model.x", "conditioner.embedders.0.model.x"
LABELS = "model.diffusion_model.label_emb.0.0.weight"
READS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("shapes", "family", "configs"),
    [
        (header(SD1), "sd", "sd"),
        (header(SD1, channels=9), "sd-inpaint", "sd-inpaint"),
        (header(SD2), "sd", "sd2"),
        (header(SD2, channels=9), "sd-inpaint", "sd2-inpaint"),
        (header(SD2, "v_pred"), "sd", "sd2-v"),
        (header(SDXL, LABELS), "sdxl", "sdxl"),
        (header(SDXL, LABELS, channels=9), "sdxl-inpaint", "sdxl-inpaint"),
        (header(), "sd", "sd"),
        (header(**{READS: (320, 1024)}), "sd", "sd2"),
        (header(LABELS), "sdxl", "sdxl"),
    ],
)
def test_every_kind_is_recognised(shapes: dict[str, tuple[int, ...]], family: str, configs: str) -> None:
    """A file without text encoders (the last three) is told by its UNet."""
    held = recognise("file", shapes, {}, spread(0))
    assert (held.family, held.configs) == (family, CONFIGS[configs])


@pytest.mark.parametrize(("by", "configs"), [(0.05, "sd2"), (0.2, "sd2-v")])
def test_base_and_768_v_of_sd_2_are_told_apart_by_a_weight(by: float, configs: str) -> None:
    assert recognise("file", header(SD2, SPREAD_OF), {}, spread(by)).configs == CONFIGS[configs]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (header(REFINER, LABELS), "file is SDXL's refiner"),
        (header(SDXL, LABELS, "edm_mean", "edm_std"), "holds edm_mean: it was trained on EDM's noising process"),
        (header(SDXL, LABELS, "edm_vpred.sigma_max"), "holds edm_vpred.sigma_max: it was trained on EDM's"),
        (header(SD1, channels=8), "its UNet takes 8 channels; expected 4, or 9 of an inpainting model"),
        (header(SD2, channels=5), "its UNet takes 5 channels"),
        (header(SD2, LABELS), "label_emb.* is not understood beside Stable Diffusion's text encoder"),
        (header(SD1, "control_model.input_blocks.0.0.weight"), "holds a ControlNet"),
        (header("conditioner.embedders.0.open_clip.model.x"), "its conditioner is not understood"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "holds a FLUX model"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "holds a Stable Diffusion 3 model"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (1,)}, "holds a LoRA: give it as --lora"),
        ({"encoder.conv_in.weight": (1,)}, "holds an autoencoder: give it as --vae"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "holds a UNet in diffusers' layout"),
        ({"weight": (1,)}, r"is no Stable Diffusion checkpoint: .* is missing \(it holds weight"),
        ({}, r"is no Stable Diffusion checkpoint: .* is missing \(it holds nothing"),
    ],
)
def test_other_files_are_refused_by_what_they_hold(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recognise("file", shapes, {}, spread(0))


# -- errors and overrides ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_whole_is_named(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = load_adapter(sd_folder).pipeline
    file = write_single_file(tmp_path / "model.safetensors", pipeline)
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"torn\.safetensors is no whole \.safetensors file"):
        load_adapter(tmp_path / "torn.safetensors", config=str(sd_folder))
    tensors = {name: t.detach().contiguous().clone() for name, t in original_tensors(pipeline).items()}
    lost = next(name for name in tensors if name.endswith("layers.0.mlp.fc1.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less\.safetensors: text_encoder is not whole: 1 weights are missing"):
        load_adapter(tmp_path / "less.safetensors", config=str(sd_folder))


def test_configs_of_another_family_are_refused(sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", load_adapter(sd_folder).pipeline)
    with pytest.raises(ValueError, match=r"model\.safetensors is of family 'sd', but .* is of 'sdxl'"):
        load_adapter(file, config=str(sdxl_folder))


def test_the_family_can_be_given(sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "model.safetensors", load_adapter(sd_folder).pipeline)
    assert load_adapter(file, config=str(sd_folder), family="sd").family.name == "sd"
    with pytest.raises(ValueError, match=r"is of family 'sdxl', but .* is of 'sd'"):
        load_adapter(file, config=str(sd_folder), family="sdxl")
    with pytest.raises(ValueError, match="is of family 'sdxl', but family 'sd' was given"):
        load_adapter(sdxl_folder, family="sd")
    with pytest.raises(ValueError, match=r"unknown family 'sd4' for .*: expected one of flux, sd, sd-inpaint, sd3"):
        load_adapter(sdxl_folder, family="sd4")


def test_offline_the_error_says_which_configs_are_wanted(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("cannot be reached")

    file = write_single_file(tmp_path / "model.safetensors", load_adapter(sdxl_folder).pipeline)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", unreachable)
    with pytest.raises(OSError, match=r"stable-diffusion-xl-base-1\.0: offline, give --model-config"):
        load_adapter(file)


def test_another_vae_may_be_a_single_file(sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(sd_folder)
    with torch.no_grad():
        next(adapter.vae.parameters()).mul_(1.5)
    named = original_tensors(adapter.pipeline)
    whole = {name.removeprefix("first_stage_model."): t.contiguous().clone() for name, t in named.items()
             if name.startswith("first_stage_model.")}  # fmt: skip
    save_file(whole, tmp_path / "vae.safetensors")
    loaded = load_adapter(sdxl_folder, vae=str(tmp_path / "vae.safetensors"))
    assert all(torch.equal(t, adapter.vae.state_dict()[name]) for name, t in loaded.vae.state_dict().items())


def test_plain_diffusers_reads_the_file_that_these_tests_write(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = load_adapter(sd_folder).pipeline
    file = write_single_file(tmp_path / "model.safetensors", pipeline)
    read = StableDiffusionPipeline.from_single_file(str(file), config=str(sd_folder), local_files_only=True)
    assert torch.equal(read.unet.conv_in.weight, pipeline.unet.conv_in.weight)
