"""Several LoRAs, LoRAs of text encoders, and training on top of what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from diffusion_align.adapters import load_adapter
from diffusion_align.sampling.sampler import generate
from diffusion_align.shipped import shipped_path
from tests.adapters.loras.policies import DIFFUSERS, KOHYA, PROMPTS, SEEDS, distance, drawn, ours, stirred, trained


@pytest.mark.slow
def test_several_loras_add_up_with_their_weights(sdxl_folder: Path, tmp_path: Path) -> None:
    first, second = trained(sdxl_folder, 1), trained(sdxl_folder, 2, rank=2, targets=("to_q", "conv1"))
    files = [first.save(tmp_path / "a"), second.save(tmp_path / "b")]
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.8, -0.5])
    want = drawn(pipeline)
    at_once = load_adapter(sdxl_folder).load_weights(f"{tmp_path}/a:0.8", f"{files[1]}:-0.5")
    in_turn = load_adapter(sdxl_folder).load_weights(f"{tmp_path}/a:0.8").load_weights(f"{files[1]}:-0.5")
    assert distance(ours(at_once), want) < 1e-4
    assert distance(ours(in_turn), want) < 1e-4
    assert distance(ours(in_turn, 0.0), ours(load_adapter(sdxl_folder))) == 0
    at_once.save(tmp_path / "both")
    assert distance(ours(load_adapter(sdxl_folder).load_weights(tmp_path / "both")), want) < 1e-4


def with_text_encoders(folder: Path, file: Path) -> Path:
    """A LoRA of network and text encoders as kohya's scripts write it; alphas are not the rank."""
    adapter, generator = load_adapter(folder), torch.Generator().manual_seed(3)
    sd = len(adapter.text_encoders) == 1
    owners = {"lora_te" if sd else f"lora_te{i + 1}": encoder for i, encoder in enumerate(adapter.text_encoders)}
    state = {}
    for prefix, owner in {"lora_unet": adapter.unet, **owners}.items():
        for name, module in owner.named_modules():
            if name.endswith(("attn2.to_q", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")):
                name = name if prefix == "lora_unet" or name.startswith("text_model.") else f"text_model.{name}"
                key, (outputs, inputs) = f"{prefix}_{name.replace('.', '_')}", module.weight.shape
                state[f"{key}.lora_down.weight"] = torch.randn(3, inputs, generator=generator)
                state[f"{key}.lora_up.weight"] = 0.1 * torch.randn(outputs, 3, generator=generator)
                state[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(state, file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["sdxl_folder", "sd_folder"])
def test_text_encoders_change_with_the_policy_and_not_with_the_reference(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    file = with_text_encoders(source, tmp_path / "x.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(source)
    untouched = ours(load_adapter(source))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    want = drawn(pipeline)
    adapter = load_adapter(source).load_weights(file)
    network_only = load_adapter(source).load_weights(file)
    for encoder in network_only.text_encoders:
        encoder.disable_adapters()
    assert distance(ours(adapter), want) < 1e-4
    assert distance(ours(network_only), want) > 1e-3
    assert torch.equal(ours(adapter, 0.0), untouched)
    with adapter.reference():
        assert torch.equal(generate(adapter, PROMPTS, num_inference_steps=3, seeds=SEEDS), untouched)
    half = [ours(adapter, strength) for strength in (0.5, 1.0)]
    assert distance(half[1], want) < 1e-4
    assert 1e-3 < distance(half[0], untouched) < distance(want, untouched)
    adapter.save(tmp_path / "again")
    for name in (DIFFUSERS, KOHYA):
        pipeline = DiffusionPipeline.from_pretrained(source)
        pipeline.load_lora_weights(tmp_path / "again", weight_name=name)
        assert distance(drawn(pipeline), want) < 1e-4, name


# -- training on top -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_goes_on_top_of_what_is_loaded_and_the_file_holds_both(sdxl_folder: Path, tmp_path: Path) -> None:
    file = with_text_encoders(sdxl_folder, tmp_path / "x.safetensors")
    before = ours(load_adapter(sdxl_folder).load_weights(file))
    adapter = load_adapter(sdxl_folder).load_weights(file).train_lora(rank=2)
    assert distance(ours(adapter), before) < 1e-4
    stirred(adapter)
    assert distance(ours(adapter), before) > 1e-2
    assert distance(ours(adapter, 0.0), before) < 1e-4
    adapter.save(tmp_path / "run")
    assert distance(ours(load_adapter(sdxl_folder).load_weights(tmp_path / "run")), ours(adapter)) < 1e-4
    policy = ours(adapter)
    adapter.train_lora(rank=2, seed=1)
    assert distance(ours(adapter), policy) < 1e-4
    stirred(adapter, seed=1)
    assert distance(ours(adapter), policy) > 1e-2
    assert distance(ours(adapter, 0.0), policy) < 1e-4
    loaded = load_adapter(sdxl_folder).load_weights(file).fold_loras().load_weights(tmp_path / "run")
    assert distance(ours(loaded, 0.0), before) < 1e-4
    assert distance(ours(loaded), before) > 1e-2


@pytest.mark.slow
def test_all_weights_are_trained_on_top_of_a_lora_too(sdxl_folder: Path, tmp_path: Path) -> None:
    trained(sdxl_folder).save(tmp_path / "lora")
    adapter = load_adapter(sdxl_folder).load_weights(tmp_path / "lora")
    before = ours(adapter)
    adapter.train_full()
    assert adapter.trainable_parameters().keys() == dict(load_adapter(sdxl_folder).unet.named_parameters()).keys()
    adapter.save(tmp_path / "full")
    assert distance(ours(load_adapter(sdxl_folder).load_weights(tmp_path / "full")), before) < 1e-4
    stirred(adapter)
    assert distance(ours(adapter, 0.0), before) < 1e-4
    encoders = load_adapter(sdxl_folder).load_weights(with_text_encoders(sdxl_folder, tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="cannot be trained on top of a LoRA that changes text encoders"):
        encoders.train_full()


@pytest.mark.slow
def test_a_lora_on_top_of_other_weights_says_so(sdxl_folder: Path, tmp_path: Path) -> None:
    full = load_adapter(sdxl_folder).train_full()
    stirred(full).save(tmp_path / "full")
    adapter = stirred(load_adapter(sdxl_folder).load_weights(tmp_path / "full").train_lora(rank=2))
    file = adapter.save(tmp_path / "lora")
    both = load_adapter(sdxl_folder).load_weights(tmp_path / "full", file)
    assert distance(ours(both), ours(adapter)) < 1e-4
    with pytest.warns(UserWarning, match="was trained on other weights than the model's own"):
        load_adapter(sdxl_folder).load_weights(file)
    with pytest.raises(ValueError, match="a whole network must come before all LoRAs"):
        load_adapter(sdxl_folder).load_weights(file, tmp_path / "full")
    with pytest.raises(ValueError, match=r"full:0.5: only a LoRA has a weight"):
        load_adapter(sdxl_folder).load_weights(f"{tmp_path}/full:0.5")
    with pytest.raises(ValueError, match="load weights before train_lora"):
        adapter.load_weights(file)


def test_a_shipped_lora_is_loaded_by_its_name() -> None:
    by_name, halved = load_adapter("scenes-sdxl"), load_adapter("scenes-sdxl")
    base = ours(by_name)
    whole = ours(by_name.load_weights("scenes-aligned"))
    assert distance(whole, ours(load_adapter("scenes-sdxl").load_weights(shipped_path("scenes-aligned")))) == 0
    assert 0 < distance(ours(halved.load_weights("scenes-aligned:0.1")), base) < distance(whole, base)
