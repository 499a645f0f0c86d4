"""LoRA files: every reader applies ours with the same effect; those of others are read, or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.sdxl import UNET as SDXL
from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.lora_files import kohya_state, write_safetensors
from diffusion_align.adapters.policy_files import write_lora
from tests.adapters.loras.policies import DIFFUSERS, KOHYA, as_comfyui_applies, distance, drawn, ours, trained

CONVOLUTIONS = {"alpha": 16.0, "targets": ("to_q", "to_out.0", "conv1", "time_emb_proj", "ff.net.0.proj")}
State = dict[str, Tensor]

#: Where the original layout has the transformers of SDXL's and SD 1.5's UNet.
ORIGINAL_PLACES = {
    "sdxl": {
        "down_blocks.1.attentions.0": "input_blocks.4.1", "down_blocks.1.attentions.1": "input_blocks.5.1",
        "down_blocks.2.attentions.0": "input_blocks.7.1", "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.attentions.2": "output_blocks.2.1", "up_blocks.1.attentions.0": "output_blocks.3.1",
        "up_blocks.1.attentions.1": "output_blocks.4.1", "up_blocks.1.attentions.2": "output_blocks.5.1",
    },
    "sd": {
        "down_blocks.0.attentions.0": "input_blocks.1.1", "down_blocks.0.attentions.1": "input_blocks.2.1",
        "down_blocks.1.attentions.0": "input_blocks.4.1", "down_blocks.1.attentions.1": "input_blocks.5.1",
        "down_blocks.2.attentions.0": "input_blocks.7.1", "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.1.attentions.0": "output_blocks.3.1", "up_blocks.1.attentions.1": "output_blocks.4.1",
        "up_blocks.1.attentions.2": "output_blocks.5.1", "up_blocks.2.attentions.0": "output_blocks.6.1",
        "up_blocks.2.attentions.1": "output_blocks.7.1", "up_blocks.2.attentions.2": "output_blocks.8.1",
        "up_blocks.3.attentions.0": "output_blocks.9.1", "up_blocks.3.attentions.1": "output_blocks.10.1",
        "up_blocks.3.attentions.2": "output_blocks.11.1",
    },
}  # fmt: skip


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, CONVOLUTIONS], ids=["attention", "alpha and convolutions"])
@pytest.mark.parametrize("folder", ["sdxl_folder", "sd_folder"])
def test_every_reader_draws_our_images(
    folder: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    adapter = trained(source, **options)
    assert adapter.save(tmp_path) == tmp_path / DIFFUSERS
    want = ours(adapter)
    for name in (DIFFUSERS, KOHYA):
        pipeline = DiffusionPipeline.from_pretrained(source)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        assert distance(drawn(pipeline), want) < 1e-4, name
    pipeline = DiffusionPipeline.from_pretrained(source)
    assert distance(drawn(pipeline), want) > 1e-2
    assert distance(drawn(as_comfyui_applies(pipeline, tmp_path / KOHYA)), want) < 1e-4


@pytest.mark.slow
def test_the_second_file_is_what_diffusers_own_converter_makes_of_the_first(sdxl_folder: Path, tmp_path: Path) -> None:
    expected = convert_state_dict_to_kohya(load_file(trained(sdxl_folder, **CONVOLUTIONS).save(tmp_path)))
    found = load_file(tmp_path / KOHYA)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor.to(found[key])) for key, tensor in expected.items())


def on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config", "layers"),
    [("sdxl", SDXL, 560), ("sd", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 128)],
)
def test_names_at_true_size_are_those_of_comfyui_and_of_kohyas_scripts(
    family: str, config: dict[str, Any], layers: int, request: pytest.FixtureRequest
) -> None:
    cls = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}[family]
    unet = on_meta(config)
    weights = {name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")}
    adapter = Adapter(cls.from_pretrained(request.getfixturevalue(f"{family}_folder"), unet=unet))
    with torch.device("meta"):
        adapter.train_lora(rank=8)
    names, lora = adapter.loras.names(), adapter.loras.attached()
    assert len(lora) == layers
    assert {names.kohya[address] for address in lora} <= {f"lora_unet_{name.replace('.', '_')}" for name in weights}
    originals = {
        f"lora_unet_{name.replace(place, original).replace('.', '_')}"
        for name in weights
        for place, original in ORIGINAL_PLACES[family].items()
        if name.startswith(f"{place}.")
    }
    assert {names.original[address] for address in lora} <= originals
    assert len({names.original[address] for address in lora}) == layers


def test_headers_name_the_base_model_and_bytes_do_not_depend_on_the_run(sdxl_folder: Path, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        for name in ("a", "b"):
            trained(sdxl_folder).save(tmp_path / name)
    finally:
        os.umask(old)
    for name in (DIFFUSERS, KOHYA):
        first, second = (tmp_path / folder / name for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_mode & 0o777 == 0o644
        content = first.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        assert list(header) == sorted(header)
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert header["ss_base_model_version"] == "sdxl_base_v1-0"
        assert str(tmp_path) not in str(header)
    assert (header["ss_network_module"], header["ss_network_dim"], header["ss_network_alpha"]) == (
        "networks.lora", "4", "4",
    )  # fmt: skip


# -- what is read ----------------------------------------------------------------------------------------------------


def unprefixed(state: State) -> State:
    return {key.removeprefix("unet."): tensor for key, tensor in state.items()}


def of_peft(state: State) -> State:
    return {key.replace("unet.", "base_model.model."): tensor for key, tensor in state.items()}


def of_peft_with_the_adapters_name(state: State) -> State:
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in of_peft(state).items()}


def of_older_diffusers(state: State) -> State:
    spelt = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {key.replace(letter, word): t for key, t in state.items() for letter, word in spelt.items() if letter in key}


def of_early_diffusers(state: State) -> State:
    renamed = {}
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 2)[:2]
        owner, name = module.removesuffix(".0").rsplit(".", 1)
        renamed[f"{owner}.processor.{name}_lora.{ {'lora_A': 'down', 'lora_B': 'up'}[kind] }.weight"] = tensor
    return renamed


def of_kohya_in_half_precision(state: State) -> State:
    """Another alpha than the rank, so that it matters."""
    renamed = {}
    for key, tensor in convert_state_dict_to_kohya(state).items():
        renamed[key] = tensor * 4.0 if "lora_up" in key else tensor
        renamed[key] = torch.tensor(1.0) if key.endswith("alpha") else renamed[key]
    return {key: tensor.half() for key, tensor in renamed.items()}


LAYOUTS: list[Callable[[State], State]] = [
    unprefixed, of_peft, of_peft_with_the_adapters_name, of_older_diffusers, of_early_diffusers,
    of_kohya_in_half_precision,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_read(layout: Callable[[State], State], sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = trained(sdxl_folder)
    state = layout(load_file(adapter.save(tmp_path)))
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "other.safetensors")
    loaded = load_adapter(sdxl_folder).load_weights(tmp_path / "other.safetensors")
    assert distance(ours(loaded), ours(adapter)) < (5e-3 if layout is of_kohya_in_half_precision else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["sdxl_folder", "sd_folder"])
def test_the_original_blocks_of_kohyas_scripts_are_read(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    adapter = trained(source, **CONVOLUTIONS)
    state = kohya_state(adapter.loras.whole(), adapter.loras.names().original)
    file = write_safetensors(tmp_path / "original.safetensors", state, {})
    assert any("input_blocks_" in key for key in state)
    # kohya's scripts train SDXL in the original layout, SD 1.x and 2.x in diffusers'.
    scripts = write_lora(adapter.loras, tmp_path / "scripts.safetensors", "sd-scripts", "mine")
    with safe_open(scripts, "pt") as content:
        expected = state if folder == "sdxl_folder" else load_file(adapter.save(tmp_path).with_name(KOHYA))
        assert set(content.keys()) == expected.keys()
        assert content.metadata()["ss_output_name"] == "mine"
    assert distance(ours(load_adapter(source).load_weights(file)), ours(adapter)) < 1e-4


@pytest.mark.slow
def test_alphas_are_read_from_the_header_of_diffusers_and_the_config_of_peft(sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = trained(sdxl_folder, alpha=16.0)
    unet = adapter.unet
    unet.save_lora_adapter(tmp_path / "network")
    state, config = load_file(tmp_path / "network" / DIFFUSERS), unet.peft_config["default"]
    told = {**config.to_dict(), "target_modules": ["to_q"]}
    adapter.pipeline.save_lora_weights(tmp_path / "pipeline", unet_lora_layers=state, unet_lora_adapter_metadata=told)
    config.save_pretrained(tmp_path / "peft")
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    save_file(wrapped, tmp_path / "peft" / "adapter_model.safetensors")
    for name in ("network", "pipeline", "peft"):
        assert distance(ours(load_adapter(sdxl_folder).load_weights(tmp_path / name)), ours(adapter)) < 1e-4, name


@pytest.mark.slow
def test_a_convolution_in_three_factors_is_read(sdxl_folder: Path, tmp_path: Path) -> None:
    """lora_mid: out x r, r x r x 3 x 3, r x in."""
    generator = torch.Generator().manual_seed(0)
    plain = load_adapter(sdxl_folder)
    weight = plain.unet.mid_block.resnets[0].conv1.weight
    outputs, inputs = weight.shape[:2]
    up, mid, down = (torch.randn(shape, generator=generator) for shape in ((outputs, 2), (2, 2, 3, 3), (2, inputs)))
    name = "lora_unet_mid_block_resnets_0_conv1"
    state = {f"{name}.lora_up.weight": up[..., None, None], f"{name}.lora_mid.weight": mid,
             f"{name}.lora_down.weight": down[..., None, None], f"{name}.alpha": torch.tensor(0.02)}  # fmt: skip
    save_file(state, tmp_path / "x.safetensors")
    loaded = load_adapter(sdxl_folder).load_weights(tmp_path / "x.safetensors")
    weight.data += 0.01 * torch.einsum("or,rshw,si->oihw", up, mid, down)
    assert distance(ours(loaded), ours(plain)) < 1e-4


def of_another_model(state: State) -> State:
    return {key.replace("unet.", "transformer."): tensor for key, tensor in state.items()}


def partly_another_ones(state: State) -> State:
    return {key.replace("mid_block", "middle"): tensor for key, tensor in state.items()}


def without_a_partner(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if key != max(state)}


def of_a_wider_model(state: State) -> State:
    return {key: torch.cat([tensor, tensor], dim=1 if "lora_A" in key else 0) for key, tensor in state.items()}


def loha(state: State) -> State:
    return {key.replace("lora_A.weight", "hada_w1_a"): tensor for key, tensor in state.items()}


def lokr(state: State) -> State:
    return {key.replace("lora_A.weight", "lokr_w1"): tensor for key, tensor in state.items()}


def dora(state: State) -> State:
    return state | {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(4)}


def twice(state: State) -> State:
    return state | unprefixed(state)


REFUSED: list[tuple[Callable[[State], State], str]] = [
    (of_another_model, r"of \d+ keys match no LoRA layer of this model \('transformer\."),
    (partly_another_ones, r"of \d+ keys match no LoRA layer of this model \('unet\.middle"),
    (without_a_partner, "has no 'up' matrix"), (of_a_wider_model, "do not fit this model's weight of"),
    (loha, "holds LoHa weights"), (lokr, "holds LoKr weights"), (dora, "holds DoRA weights"),
    (twice, r"two tensors are the 'down' matrix of (lora_unet_|unet\.)"), (lambda state: {}, "it has none"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_applied_whole_is_refused_with_its_keys(
    change: Callable[[State], State], message: str, sdxl_folder: Path, tmp_path: Path
) -> None:
    state = change(load_file(trained(sdxl_folder).save(tmp_path)))
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "other.safetensors")
    adapter = load_adapter(sdxl_folder)
    with pytest.raises(ValueError, match=f"other.safetensors.*{message}"):
        adapter.load_weights(tmp_path, tmp_path / "other.safetensors")
    assert not adapter.has_lora


@pytest.mark.slow
def test_files_that_hold_no_tensors_and_adapters_of_other_kinds_are_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"torn.safetensors: not a safetensors file"):
        load_adapter(sdxl_folder).load_weights(tmp_path / "torn.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    state = of_peft(load_file(trained(sdxl_folder).save(tmp_path / "run")))
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(ValueError, match=r"adapter_config.json is of a LOHA adapter"):
        load_adapter(sdxl_folder).load_weights(tmp_path)
