"""What we save, plain diffusers loads; what others save, we load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.sampling.sampler import generate

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
SEEDS = [1, 2]


def trained(folder: Path, full: bool = False, **options: Any) -> Adapter:
    adapter = load_adapter(folder)
    adapter.train_full() if full else adapter.train_lora(rank=4, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter


def drawn(pipeline: Any) -> torch.Tensor:
    """Two images by the pipeline itself."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(PROMPTS, num_inference_steps=3, guidance_scale=5.0, generator=generators, output_type="pt").images


def ours(adapter: Adapter) -> torch.Tensor:
    return generate(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"alpha": 16.0, "targets": ("to_q", "conv1", "ff.net.0.proj")}])
@pytest.mark.parametrize("folder", ["sdxl_folder", "sd_folder"])
def test_a_saved_lora_gives_our_images_in_plain_diffusers(
    folder: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    adapter = trained(source, **options)
    adapter.save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(source)
    before = drawn(pipeline)
    pipeline.load_lora_weights(tmp_path)
    assert (drawn(pipeline) - ours(adapter)).abs().max() < 1e-4
    assert (drawn(pipeline) - before).abs().max() > 1e-2


@pytest.mark.slow
def test_a_saved_unet_gives_our_images_in_plain_diffusers(sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = trained(sdxl_folder, full=True)
    adapter.save(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder, unet=unet)
    assert (drawn(pipeline) - ours(adapter)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "unet"])
def test_saved_weights_load_back(full: bool, sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = trained(sdxl_folder, full)
    adapter.save(tmp_path)
    loaded = load_adapter(sdxl_folder).load_weights(tmp_path)
    assert (ours(loaded) - ours(adapter)).abs().max() < 1e-4


def test_weights_of_another_architecture_are_refused(sdxl_folder: Path, sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(sdxl_folder).load_weights(sd_folder / "unet")


def test_a_folder_without_weights_is_named(sdxl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights: expected pytorch_lora_weights"):
        load_adapter(sdxl_folder).load_weights(tmp_path)


# -- single files ------------------------------------------------------------------------------------------------------

#: (diffusers, original) in the layout of CompVis and Stability, of a UNet with two levels of one layer each.
UNET_PARTS = [
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("down_blocks.0.resnets.0.", "input_blocks.1.0."),
    ("down_blocks.0.downsamplers.0.conv.", "input_blocks.2.0.op."),
    ("down_blocks.1.resnets.0.", "input_blocks.3.0."),
    ("down_blocks.1.attentions.0.", "input_blocks.3.1."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
    ("up_blocks.0.resnets.0.", "output_blocks.0.0."),
    ("up_blocks.0.attentions.0.", "output_blocks.0.1."),
    ("up_blocks.0.resnets.1.", "output_blocks.1.0."),
    ("up_blocks.0.attentions.1.", "output_blocks.1.1."),
    ("up_blocks.0.upsamplers.0.conv.", "output_blocks.1.2.conv."),
    ("up_blocks.1.resnets.0.", "output_blocks.2.0."),
    ("up_blocks.1.resnets.1.", "output_blocks.3.0."),
]
RESNET_PARTS = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]


def original_unet_name(name: str) -> str:
    for ours_, theirs in UNET_PARTS:
        if name.startswith(ours_):
            rest = name.removeprefix(ours_)
            if ".resnets." in ours_ or ours_.startswith("mid_block.resnets"):
                for a, b in RESNET_PARTS:
                    if rest.startswith(a):
                        rest = b + rest.removeprefix(a)
                        break
            return f"model.diffusion_model.{theirs}{rest}"
    raise AssertionError(name)


def test_a_single_file_checkpoint_gives_the_unet_of_the_folder(sdxl_folder: Path, tmp_path: Path) -> None:
    """The UNet travels through the original layout; VAE and text encoders come from ``config``'s folder."""
    adapter = load_adapter(sdxl_folder)
    state = {original_unet_name(name): tensor for name, tensor in adapter.unet.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    loaded = UNet2DConditionModel.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(sdxl_folder), subfolder="unet", local_files_only=True
    )
    for name, tensor in adapter.unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("model.ckpt", None, "only .safetensors checkpoints are read"),
        ("model.safetensors", "pixart", "unknown family 'pixart'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(name: str, family: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / name, family=family)
