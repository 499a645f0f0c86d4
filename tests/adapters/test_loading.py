"""Which files and parts are read, and in which precision."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusion_align import load_adapter
from diffusion_align.adapters import ENCODERS, PARTS, Adapter, loading
from diffusion_align.sampling.sampler import generate
from tests.original_layout import write_single_file

PROMPT = ["a large red star on a dark background"]
Saved = Callable[..., Path]


def drawn(adapter: Adapter) -> torch.Tensor:
    return generate(adapter, PROMPT, num_inference_steps=2, seeds=[1])


@pytest.fixture
def saved(sdxl_folder: Path, tmp_path: Path) -> Saved:
    """Writes SDXL's folder again, with the weights of some parts as variants only."""

    def save(**variants: str) -> Path:
        pipeline = load_adapter(sdxl_folder).pipeline
        pipeline.save_pretrained(tmp_path / "model")
        for part, variant in variants.items():
            for file in (tmp_path / "model" / part).glob("*.safetensors"):
                file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
        return tmp_path / "model"

    return save


ALL = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_folder_of_one_variant_just_loads(variant: str, saved: Saved, sdxl_folder: Path) -> None:
    folder = saved(**dict.fromkeys(ALL, variant))
    assert torch.equal(drawn(load_adapter(folder)), drawn(load_adapter(sdxl_folder)))
    assert torch.equal(drawn(load_adapter(folder, variant=variant)), drawn(load_adapter(sdxl_folder)))


@pytest.mark.slow
def test_parts_that_have_a_variant_only_are_read_beside_others(saved: Saved, sdxl_folder: Path) -> None:
    folder = saved(text_encoder_2="fp16", vae="bf16")
    assert torch.equal(drawn(load_adapter(folder)), drawn(load_adapter(sdxl_folder)))


@pytest.mark.slow
def test_files_without_a_name_come_before_a_variant(saved: Saved, sdxl_folder: Path) -> None:
    """They are float32 where a variant is fp16; a variant that is asked for is taken."""
    folder = saved()
    half = load_adapter(folder).unet.half()
    half.save_pretrained(folder / "unet", variant="fp16")
    original = load_adapter(sdxl_folder).unet.conv_in.weight
    assert torch.equal(load_adapter(folder).unet.conv_in.weight, original)
    assert torch.equal(load_adapter(folder, variant="fp16").unet.conv_in.weight, original.half().float())


@pytest.mark.slow
@pytest.mark.parametrize("held", [{}, {"unet": "bf16"}], ids=["without a name", "of two kinds"])
def test_a_variant_that_a_folder_has_not_gives_way_with_a_warning(
    held: dict[str, str], saved: Saved, sdxl_folder: Path
) -> None:
    """Recipes ask for fp16, as the hub has it; one's own folder seldom has."""
    folder = saved(**held)
    with pytest.warns(UserWarning, match=r"model: no fp16 weights of .*unet.*: the only ones are read"):
        adapter = load_adapter(folder, variant="fp16")
    assert torch.equal(drawn(adapter), drawn(load_adapter(sdxl_folder)))


def test_a_variant_that_a_hub_model_has_not_is_named_with_what_to_do(
    sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any, variant: str, **__: Any) -> None:
        raise ValueError(f"no files of the `variant={variant}` are available.")

    monkeypatch.setattr(loading, "find_variants", lambda folder, names, wanted: dict.fromkeys(names, wanted))
    monkeypatch.setattr(loading.DiffusionPipeline, "from_pretrained", lacking)
    with pytest.raises(ValueError, match=r"fp16.* --variant None reads those without a name"):
        load_adapter(sdxl_folder, variant="fp16")


@pytest.mark.slow
def test_sharded_variants_are_found(saved: Saved, sdxl_folder: Path) -> None:
    folder = saved(vae="fp16", text_encoder="fp16", text_encoder_2="fp16")
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    load_adapter(sdxl_folder).unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*fp16-*.safetensors"))) > 1
    assert torch.equal(drawn(load_adapter(folder)), drawn(load_adapter(sdxl_folder)))


@pytest.mark.slow
def test_which_of_several_variants_must_be_said(saved: Saved) -> None:
    folder = saved(vae="fp16")
    load_adapter(folder).vae.save_pretrained(folder / "vae", variant="bf16")
    with pytest.raises(ValueError, match=r"model/vae holds the variants bf16, fp16: say which with --variant"):
        load_adapter(folder)
    assert load_adapter(folder, variant="bf16").vae_scale_factor


def test_weights_that_are_not_there_are_an_error_that_helps(saved: Saved) -> None:
    folder = saved()
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match=r"model: .*weights are read from \.safetensors files; --variant names another"):
        load_adapter(folder)


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_another_vae_of_one_variant_just_loads(single: bool, saved: Saved, sdxl_folder: Path, tmp_path: Path) -> None:
    vae = load_adapter(sdxl_folder).vae
    with torch.no_grad():
        next(vae.parameters()).mul_(1.5)
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    model, options = sdxl_folder, {}
    if single:
        model = write_single_file(tmp_path / "model.safetensors", load_adapter(sdxl_folder).pipeline)
        options = {"config": str(sdxl_folder)}
    loaded = load_adapter(model, vae=str(tmp_path / "vae"), **options).vae
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# -- parts that are not needed -----------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Classes whose weights are read, as they are."""
    read: list[str] = []
    for kind in (UNet2DConditionModel, AutoencoderKL):
        for door in ("from_pretrained", "from_single_file"):
            whole = getattr(kind, door).__func__

            def noted(cls: Any, *given: Any, _whole: Any = whole, **options: Any) -> Any:
                read.append(cls.__name__)
                return _whole(cls, *given, **options)

            monkeypatch.setattr(kind, door, classmethod(noted))
    return read


@pytest.fixture(params=[(folder, single) for folder in ("sd_folder", "sdxl_folder") for single in (False, True)])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Adapter, dict[str, Any]]:
    """A whole model, and what opens it again: its folder, or a single file."""
    folder, single = request.param
    source = request.getfixturevalue(folder)
    whole = load_adapter(source)
    if not single:
        return whole, {"model": source}
    return whole, {"model": write_single_file(tmp_path / "m.safetensors", whole.pipeline), "config": str(source)}


def test_without_a_denoiser_encodings_are_the_same(
    stored: tuple[Adapter, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, source = stored
    read = watched(monkeypatch)
    adapter = load_adapter(**source, parts=ENCODERS)
    assert "UNet2DConditionModel" not in read
    assert all(weight.is_meta for weight in adapter.network.parameters())
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(adapter.encode_images(pixels), whole.encode_images(pixels))
    assert torch.equal(adapter.encode_prompts(PROMPT).embeds, whole.encode_prompts(PROMPT).embeds)
    assert (adapter.default_resolution, adapter.latent_channels) == (whole.default_resolution, whole.latent_channels)
    assert adapter.device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="this model was loaded without its network"):
        drawn(adapter)


def test_without_encoders_predictions_are_the_same(
    stored: tuple[Adapter, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, source = stored
    read = watched(monkeypatch)
    adapter = load_adapter(**source, parts=PARTS - ENCODERS)
    assert "AutoencoderKL" not in read
    assert all(weight.is_meta for module in (adapter.vae, *adapter.text_encoders) for weight in module.parameters())
    cond = whole.encode_prompts(PROMPT)
    x_t, t = torch.randn(1, 4, 32, 32), torch.tensor([500])
    gap = adapter.predict(x_t, t, cond).output - whole.predict(x_t, t, cond).output
    assert gap.abs().max() < 1e-5  # weights that lie elsewhere in memory are summed in another order
    assert adapter.vae_scale_factor == whole.vae_scale_factor
    for call in (
        lambda: adapter.encode_images(torch.zeros(1, 3, 64, 64)),
        lambda: adapter.decode(x_t),
        lambda: adapter.encode_prompts(PROMPT),
        lambda: adapter.null_conditioning(1),
    ):
        with pytest.raises(RuntimeError, match=r"this model was loaded without its (vae|text encoders)"):
            call()


@pytest.mark.slow
def test_an_adapter_that_is_let_go_is_freed(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder, parts=ENCODERS)
    gone = weakref.ref(adapter.vae)
    del adapter
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_a_safety_checker_is_never_loaded(sd_folder: Path, tmp_path: Path) -> None:
    """The folder says that there is one; its weights are not even there."""
    load_adapter(sd_folder).pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    adapter = load_adapter(tmp_path)
    assert adapter.pipeline.safety_checker is None
    assert torch.equal(drawn(adapter), drawn(load_adapter(sd_folder)))
    file = write_single_file(tmp_path / "model.safetensors", adapter.pipeline)
    assert load_adapter(file, config=str(tmp_path)).pipeline.safety_checker is None


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(("folder", "vae"), [("sd_folder", torch.bfloat16), ("sdxl_folder", torch.bfloat16)])
def test_parts_are_read_in_their_precision(
    single: bool, folder: str, vae: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A denoiser that stays float32 is not rounded on its way; SD's VAE takes the model's precision."""
    source = request.getfixturevalue(folder)
    whole = load_adapter(source)
    options: dict[str, Any] = {}
    model = source
    if single:
        model, options = write_single_file(tmp_path / "m.safetensors", whole.pipeline), {"config": str(source)}
    adapter = load_adapter(model, dtype=torch.bfloat16, network_dtype=torch.float32, **options)
    assert torch.equal(adapter.unet.conv_in.weight, whole.unet.conv_in.weight)
    assert adapter.dtype == torch.float32
    assert adapter.vae.dtype == vae
    assert {encoder.dtype for encoder in adapter.text_encoders} == {torch.bfloat16}  # type: ignore[misc]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_sdxl_s_own_vae_stays_as_it_is_stored(single: bool, sdxl_folder: Path, tmp_path: Path) -> None:
    whole = load_adapter(sdxl_folder)
    whole.vae.register_to_config(force_upcast=True)
    whole.pipeline.save_pretrained(tmp_path)
    options: dict[str, Any] = {}
    model = tmp_path
    if single:
        model, options = write_single_file(tmp_path / "m.safetensors", whole.pipeline), {"config": str(tmp_path)}
    adapter = load_adapter(model, dtype=torch.float16, **options)
    assert torch.equal(adapter.vae.encoder.conv_in.weight, whole.vae.encoder.conv_in.weight)


def test_the_reference_of_a_full_run_is_rounded_and_starts_equal_under_autocast(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder, dtype=torch.bfloat16, network_dtype=torch.float32)
    before = {name: weight.clone() for name, weight in adapter.network.state_dict().items()}
    adapter.train_full(torch.bfloat16)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.network.state_dict().items())
    kinds = {weight.dtype for weight in adapter.reference_state().values() if weight.ndim > 1}
    assert kinds == {torch.bfloat16}
    cond = adapter.encode_prompts(PROMPT)
    x_t, t = torch.randn(1, 4, 32, 32), torch.tensor([500])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        policy = adapter.predict(x_t, t, cond).output
        with adapter.reference():
            assert torch.equal(adapter.predict(x_t, t, cond).output, policy)
