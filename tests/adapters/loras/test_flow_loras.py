"""LoRAs of SD3, FLUX and AuraFlow: diffusers draws our pictures with them, other names lead to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.adapters.policy_files import write_lora
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.policy.costs.memory import estimate_memory
from diffusion_align.training.policy.costs.meta_model import build_meta_model, count_parameters
from diffusion_align.training.policy.costs.relief import check_room
from diffusion_align.training.policy.model import load_policy_model
from tests.adapters.families.tiny_flow import LENGTH
from tests.adapters.loras.policies import DIFFUSERS, KOHYA, stirred

FOLDERS = ["sd3_folder", "flux_folder", "auraflow_folder"]


def loaded(folder: Path) -> Adapter:
    return load_adapter(folder, max_sequence_length=LENGTH)


def drawn(adapter: Adapter) -> Tensor:
    options = SamplingOptions(height=32, width=32)
    return sample(
        adapter, ["a red star"], seeds=[1], num_inference_steps=2, guidance=3.0, options=options
    ).latents  # fmt: skip


def theirs(folder: Path, weights: Path) -> Tensor:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    found: Tensor = pipeline(
        "a red star", num_inference_steps=2, guidance_scale=3.0, height=32, width=32, output_type="latent",
        max_sequence_length=LENGTH, generator=[torch.Generator().manual_seed(1)],
    ).images  # fmt: skip
    return FluxPipeline._unpack_latents(found, 32, 32, 4) if found.ndim == 3 else found


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """What is added to each weight of the network."""
    whole = adapter.loras.whole()
    return {address.module: layer.up @ layer.down for address, layer in whole.items()}


@pytest.fixture(scope="module", params=FOLDERS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter, Path]:
    """The base's folder, a policy with alpha four times its rank, and the folder of its files."""
    folder, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("lora")
    adapter = stirred(loaded(folder).train_lora(rank=2, alpha=8.0))
    adapter.save(out)
    return folder, adapter, out


def test_diffusers_draws_our_pictures(written: tuple[Path, Adapter, Path]) -> None:
    folder, adapter, out = written
    expected = drawn(adapter)
    assert (expected - drawn(loaded(folder))).abs().max() > 1e-2
    torch.testing.assert_close(theirs(folder, out / DIFFUSERS), expected, rtol=0, atol=1e-5)


def test_names_are_those_of_diffusers_script(written: tuple[Path, Adapter, Path], tmp_path: Path) -> None:
    _, adapter, out = written
    kind: Any = type(adapter.pipeline)
    kind.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(adapter.network))
    assert load_file(out / DIFFUSERS).keys() == load_file(tmp_path / DIFFUSERS).keys()


def test_alpha_is_in_the_matrices(written: tuple[Path, Adapter, Path], tmp_path: Path) -> None:
    """ComfyUI reads no header: without it the weights are the same."""
    _, adapter, out = written
    state = load_file(out / DIFFUSERS)
    with safe_open(out / DIFFUSERS, "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
    expected = {name: p.detach() for name, p in adapter.trainable_parameters().items()}
    for key in (key for key in state if "lora_A" in key):
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        change = state[key.replace("lora_A", "lora_B")] @ state[key]
        down, up = (expected[f"{module}.lora_{side}.default.weight"] for side in "AB")
        torch.testing.assert_close(change, 4 * up @ down)


def test_kohyas_names_are_comfyuis_for_these_models(written: tuple[Path, Adapter, Path]) -> None:
    """``lora_transformer_`` and diffusers' name with underscores, each with its alpha."""
    _, adapter, out = written
    state, modules = load_file(out / KOHYA), {name for name, _ in adapter.network.named_modules()}
    known = {f"lora_transformer_{name.replace('.', '_')}" for name in modules}
    names = {key.split(".")[0] for key in state}
    assert names <= known
    assert all(f"{name}.alpha" in state for name in names)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "sd-scripts"])
def test_every_layout_is_read_back(layout: Any, written: tuple[Path, Adapter, Path], tmp_path: Path) -> None:
    folder, adapter, _ = written
    file = write_lora(adapter.loras, tmp_path / "lora.safetensors", layout)
    expected, found = changes(adapter), changes(loaded(folder).load_weights(file))
    assert expected.keys() <= found.keys()
    for name, change in found.items():
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), rtol=0, atol=1e-6)


def test_fused_names_of_flux_are_kohyas(flux_folder: Path, tmp_path: Path) -> None:
    """diffusers converts kohya's file to the same weights."""
    adapter = stirred(loaded(flux_folder).train_lora(rank=2, alpha=8.0))
    file = write_lora(adapter.loras, tmp_path / "lora.safetensors", "sd-scripts")
    written = load_file(file)
    keys = written.keys()
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in keys
    assert "lora_unet_single_blocks_0_linear1.lora_up.weight" in keys
    expected = changes(adapter)
    # diffusers cuts weights of single blocks by FLUX's own widths.
    state = FluxPipeline.lora_state_dict({key: value for key, value in written.items() if "single" not in key})
    for name, change in expected.items():
        if "single" in name:
            continue
        down, up = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up @ down, change, rtol=0, atol=1e-6)


def test_xlabs_names_are_read_as_diffusers_reads_them(flux_folder: Path, tmp_path: Path) -> None:
    adapter = loaded(flux_folder)
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "double_blocks.0.processor.qkv_lora1": (16, 48), "double_blocks.0.processor.qkv_lora2": (16, 48),
        "double_blocks.0.processor.proj_lora1": (16, 16), "double_blocks.0.processor.proj_lora2": (16, 16),
        "single_blocks.0.processor.qkv_lora": (16, 48), "single_blocks.0.processor.proj_lora": (80, 16),
    }  # fmt: skip
    state = {}
    for name, (inputs, outputs) in sizes.items():
        state[f"{name}.down.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"{name}.up.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(state, tmp_path / "xlabs.safetensors")
    found = changes(adapter.load_weights(tmp_path / "xlabs.safetensors"))
    expected = FluxPipeline.lora_state_dict(dict(state))
    modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in expected}
    assert modules == found.keys()
    for name, change in found.items():
        down, up = (expected[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(change, up @ down)


def test_fal_s_names_are_read_and_control_s_weights_refused(flux_folder: Path, tmp_path: Path) -> None:
    """fal's trainer wraps the names of Black Forest Labs, whose Control LoRAs also change norms."""
    sizes = {
        "double_blocks.0.img_attn.qkv": (16, 48), "single_blocks.0.linear1": (16, 48 + 64), "img_in": (16, 16),
        "final_layer.linear": (16, 16), "time_in.in_layer": (256, 16), "guidance_in.out_layer": (16, 16),
    }  # fmt: skip
    state = {}
    for name, (inputs, outputs) in sizes.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, inputs)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.arange(outputs * 2).float().view(outputs, 2)
    save_file(state, tmp_path / "fal.safetensors")
    found = changes(loaded(flux_folder).load_weights(tmp_path / "fal.safetensors"))
    qkv = state["base_model.model.double_blocks.0.img_attn.qkv.lora_B.weight"] @ torch.ones(2, 16)
    for part, side in zip(qkv.split(16), "qkv", strict=True):
        assert torch.equal(found[f"transformer_blocks.0.attn.to_{side}"], part)
    linear = state["base_model.model.single_blocks.0.linear1.lora_B.weight"][48:]
    assert torch.equal(found["single_transformer_blocks.0.proj_mlp"], linear @ torch.ones(2, 16))
    assert {"x_embedder", "proj_out", "time_text_embed.timestep_embedder.linear_1"} <= found.keys()
    control = state | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8)}
    save_file(control, tmp_path / "control.safetensors")
    with pytest.raises(ValueError, match=r"holds FLUX Control \(Depth, Canny\) weights .*: only LoRA is supported"):
        loaded(flux_folder).load_weights(tmp_path / "control.safetensors")


def test_a_fused_weight_of_another_size_is_refused(sd3_folder: Path, tmp_path: Path) -> None:
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.zeros(2, 16), f"{name}.lora_up.weight": torch.zeros(50, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"attn_to_q .* has 50 rows, expected 48: is it a LoRA of another model"):
        loaded(sd3_folder).load_weights(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_weights_come_back(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(folder)
    adapter = stirred(loaded(base).train_full())
    assert adapter.save(tmp_path) == tmp_path / "transformer"
    again = loaded(base).load_weights(tmp_path)
    assert torch.equal(drawn(again), drawn(adapter))
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["_class_name"].endswith("2DModel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parameters", "lora", "tensors"),
    [("sd35-medium", 2_243_171_520, 9_388_032, 382), ("flux-dev", 11_901_408_320, 44_826_624, 684)],
)
def test_layouts_have_the_published_sizes(model: str, parameters: int, lora: int, tensors: int) -> None:
    config = DPOConfig(
        model=model, weight_dtype="bf16", mixed_precision="bf16", gradient_checkpointing="full", cache_dir="cache",
        lora_rank=16, resolution=512, per_device_train_batch_size=1,
    )  # fmt: skip
    found = build_meta_model(config)
    assert found.base == parameters
    assert (sum(shape.numel() for shape in found.trained_shapes), len(found.trained_shapes)) == (lora, tensors)
    assert count_parameters(found.vae) == 83_819_683
    if model == "sd35-medium":  # one of them, for time
        memory = estimate_memory(config, 1, found)
        assert memory.frozen_weights == 2 * 2_469_663_936  # with the table of places, as published weights have it
        assert memory.activations / 2**30 == pytest.approx(0.4, rel=0.05)


def test_a_run_that_does_not_fit_is_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FLUX dev in bf16 on 24 GB, before anything is loaded; its size is that of the plan (docs/flow.md)."""
    config = DPOConfig(
        model="flux-dev", weight_dtype="bf16", mixed_precision="bf16", gradient_checkpointing="full", lora_rank=16,
        cache_dir=str(tmp_path), resolution=512, per_device_train_batch_size=1,
    )  # fmt: skip
    monkeypatch.setattr(DPOConfig, "memory_bytes", lambda _: round(24.2 * 2**30))
    message = r"flux-dev is estimated to need 24.2 GiB, .* has 23.6: .* lora_rank 8, .*nf4\) are not supported"
    with pytest.raises(ValueError, match=message):
        check_room(config, round(23.6 * 2**30))
    check_room(config, 80 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 2**30))
    with pytest.raises(ValueError, match="it does not fit"):
        load_policy_model(config, torch.device("cuda", 0))
