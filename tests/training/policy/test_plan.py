"""What a plan says about operations, disk and hours, beside independent counts and a real run's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_align.adapters import load_adapter
from diffusion_align.adapters.families.sdxl import StableDiffusionXL
from diffusion_align.cli import main
from diffusion_align.data import CachedPairs
from diffusion_align.hardware import CARDS, find_card
from diffusion_align.shipped import LAYOUT_FOLDER, PUBLISHED_LAYOUTS, layout_path
from diffusion_align.training.online.config import GRPOConfig, NFTConfig, RAFTConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.online.preference.config import OnlineDPOConfig
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig, SFTConfig
from diffusion_align.training.plan import make_plan
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.policy.costs.compute import Compute, Operations, count_operations, estimate_compute
from diffusion_align.training.policy.costs.disk import cached_bytes, checkpoint_bytes
from diffusion_align.training.policy.costs.live_bytes import RememberedShapes
from diffusion_align.training.policy.costs.memory import estimate_memory
from diffusion_align.training.policy.costs.meta_model import MetaModel, build_meta_model, count_parameters
from diffusion_align.training.run import train

TERA = 10**12
#: The run of shared arithmetic: LoRA, recomputation everywhere, 1024 px.
SDXL: dict[str, Any] = {
    "model": "sdxl", "gradient_checkpointing": "full", "weight_dtype": "bf16", "mixed_precision": "bf16",
    "max_steps": 2000, "gradient_accumulation_steps": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan here may ask the hub for anything."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)


@pytest.fixture(scope="module")
def sdxl() -> MetaModel:
    return build_meta_model(DPOConfig(**SDXL))


def compute(config: TrainConfig, unit: Operations, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Compute:
    """Of a run whose kinds of work are counted already."""
    monkeypatch.setattr("diffusion_align.training.policy.costs.compute.count_operations", lambda *_: unit)
    model: Any = SimpleNamespace(guidance=given.get("guidance", "cfg"), family=StableDiffusionXL())
    return estimate_compute(config, model, given.get("world_size", 1), given.get("examples"))


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_sdxls_layout_has_the_published_numbers_of_parameters(sdxl: MetaModel) -> None:
    assert (sdxl.base, count_parameters(sdxl.vae)) == (2_567_463_684, 83_653_863)
    assert (sdxl.side, sdxl.tokens) == (1024, 77)
    projection = 1280 * 1280  # of the second encoder's pooled output
    assert sum(map(count_parameters, sdxl.texts)) == 123_060_480 + 694_659_840 - projection


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parameters"), [("sd15", 859_520_964), ("sd15-inpaint", 859_535_364), ("sdxl-inpaint", 2_567_478_084)]
)
def test_other_layouts_have_the_published_numbers_of_parameters(model: str, parameters: int) -> None:
    assert build_meta_model(DPOConfig(model=model)).base == parameters


def test_published_names_take_the_same_files() -> None:
    assert layout_path("stabilityai/stable-diffusion-xl-base-1.0") == layout_path("sdxl") == LAYOUT_FOLDER / "sdxl"
    assert all((LAYOUT_FOLDER / layout).is_dir() for layout in PUBLISHED_LAYOUTS.values())
    assert layout_path("stabilityai/sdxl-turbo") is None


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_without_weights_a_layout_says_what_to_give(model: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{model}' names a layout.*--dry-run. Give .*'sta.*'"):
        load_adapter(model)


def test_training_a_layout_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dpo", "--model", "sdxl", "--output-dir", str(tmp_path / "run")]) == 2
    assert "names a layout" in capsys.readouterr().err


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sdxl_takes_the_operations_of_the_arithmetic(sdxl: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because the count takes seconds."""
    unit = count_operations(sdxl, "full")
    assert unit.forward / TERA == pytest.approx(6.76, rel=0.05)
    assert unit.vae["encode"] / TERA == pytest.approx(4.88, rel=0.05)
    dpo, inpo = (compute(config(**SDXL), unit, monkeypatch) for config in (DPOConfig, InPOConfig))
    assert dpo.each / TERA == pytest.approx(64, rel=0.05)
    assert inpo.each / TERA == pytest.approx(199, rel=0.05)
    assert dpo.examples == 128_000
    assert dpo.seconds(find_card("tflops:80"), "bf16") / 3600 == pytest.approx(28, rel=0.05)


def test_cards_share_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compute(DPOConfig(), UNIT, monkeypatch)
    assert found.seconds(find_card("2xtflops:80"), "bf16") == found.seconds(find_card("tflops:160"), "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "full"), [("none", False), ("attention", True), ("full", False)])
def test_the_count_is_that_of_torchs_counter(checkpointing: str, full: bool, sdxl_folder: Path) -> None:
    """On real tensors, in one forward and backward pass of the loaded model."""
    config = DPOConfig(model=str(sdxl_folder), full_finetuning=full)
    found = count_operations(build_meta_model(config), checkpointing)
    adapter = load_adapter(sdxl_folder)
    adapter.train_full() if full else adapter.train_lora(config.lora_rank, None, config.lora_target_modules)
    network, family = adapter.network, adapter.family
    if checkpointing != "none":
        family.recompute(network, attention_only=checkpointing == "attention")
    network.train()
    inputs = family.memory_inputs(network, 1, network.config.sample_size)
    x_t, t = torch.zeros(inputs.x_t.shape), torch.zeros(1, dtype=torch.long)
    cond = inputs.cond.map(lambda part: torch.zeros(part.shape))
    with FlopCounterMode(display=False) as counter:
        family.call(network, type(inputs)(x_t, t, cond)).sum().backward()
    assert found.trained == pytest.approx(counter.get_total_flops(), rel=0.03)  # kernels of attention differ


def shapes(*tensors: torch.Tensor) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def test_remembered_shapes_are_those_of_real_tensors() -> None:
    def work(device: str) -> list[Any]:
        whole, x = torch.ones(2, 3, dtype=torch.long, device=device), torch.ones(2, 3, device=device)
        summed = torch.zeros(2, 3, device=device)
        assert summed.add_(x) is summed
        normed = torch.native_layer_norm(x.t().contiguous().t(), [3], None, None, 1e-5)
        x.t_()
        return shapes(whole * 1, whole * 1.0, whole * True, x.half(), x.float(), *normed, *x.max(0), x, x[0], x.sum())

    expected = work("cpu")
    with RememberedShapes():
        assert [work("meta") for _ in range(2)] == [expected] * 2


UNIT = Operations(forward=1, trained=3, vae={"encode": 10, "decode": 20, "decode_with_graph": 70}, prompt=0)


@pytest.mark.parametrize(
    ("config", "each"),
    [
        (DPOConfig(), 2 * 3 + 2 + 20),
        (DPOConfig(cache_dir="cache"), 2 * 3 + 2),
        (InPOConfig(inversion_steps=5, renoise_iterations=1), 2 * 3 + 2 + 2 * 5 * 2 + 20),
        (SFTConfig(), 3 + 10),
        # 32 pictures of 20 guided steps for 128 items, each guided, forward and backward
        (GRPOConfig(), 2 * 3 + 32 / 128 * (20 * 2 + 20)),
        (GRPOConfig(kl_beta=1.0, num_iterations=2), 2 * 3 + 2 + 32 / 256 * (20 * 2 + 20)),
        (GRPOConfig(fused_rollouts=True, per_device_train_batch_size=128), 2 * 3 + 32 / 128 * (16 * 2 + 20)),
        (GRPOConfig(guidance_scale=1.0), 3 + 32 / 128 * (20 + 20)),
        (NFTConfig(), 2 * 3 + 2 + 32 / 64 * (20 * 2 + 20)),
        (RAFTConfig(), 3 + 32 / 16 * (20 * 2 + 20)),
        (DRaFTConfig(), 2 * 3 + 19 * 2 + 70),
        (DRaFTConfig(lv_repeats=2, kl_beta=1.0), 2 * 2 * 3 + 20 * 2 + 2 * 2 + 2 * 70),
        (DRaFTConfig(direct_align=True), 2 * 3 + 20 * 2 + 70),
        (DRaFTConfig(direct_align=True, guidance_scale=1.0, align_guidance=3.5), 2 * 3 + 20 + 70),
        (
            DRaFTConfig(direct_align=True, positive_words=("a",), negative_words=("b",), kl_beta=1.0),
            2 * 2 * 3 + 20 * 2 + 2 * 2 + 2 * 70,
        ),
    ],
)
def test_work_is_that_of_the_method(config: TrainConfig, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute(config, UNIT, monkeypatch).each == pytest.approx(each)


def test_a_model_that_is_told_the_scale_predicts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, options in ((GRPOConfig, {}), (NFTConfig, {}), (OnlineDPOConfig, {"train_guided": True})):
        guided, plain = (cls(guidance_scale=scale, eval_steps=50, **options) for scale in (3.5, 1.0))
        found = compute(guided, UNIT, monkeypatch, guidance="embedded")
        expected = compute(plain.guided_by("none"), UNIT, monkeypatch)
        assert (found.each, found.validation) == (expected.each, expected.validation)
        assert found.each < compute(guided, UNIT, monkeypatch).each
        assert "UNet forward" in found.rows("picture")
        counted = guided.guided_by("embedded")
        assert counted.memory_needs().rows == plain.memory_needs().rows


def test_settings_are_counted_as_their_model_is_guided(flux_folder: Path, sd3_folder: Path) -> None:
    told, two, nowhere = (
        GRPOConfig(model=str(model), guidance_scale=3.5) for model in (flux_folder, sd3_folder, "./nothing")
    )
    assert told.counted().work() == replace(told, guidance_scale=1.0).work()
    assert two.counted().work() == two.work()
    assert nowhere.counted() is nowhere
    assert (unguided := replace(told, guidance_scale=1.0)).counted() is unguided


def test_text_encoders_read_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Operations(forward=0, trained=0, vae={"encode": 0}, prompt=1)
    for batch, prompts in ((1, 8), (8, 1), (9, 16 / 9)):
        assert compute(DPOConfig(per_device_train_batch_size=batch), unit, monkeypatch).each == pytest.approx(prompts)


def test_a_cache_that_is_not_there_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DPOConfig(cache_dir=str(tmp_path))
    assert compute(config, UNIT, monkeypatch, examples=7).once == {"filling the cache": 7 * 2 * 2 * 10}
    (tmp_path / "manifest.json").write_text("{}")
    assert not compute(config, UNIT, monkeypatch, examples=7).once


def test_validation_draws_the_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DPOConfig(max_steps=100, eval_steps=50, num_validation_prompts=4)
    assert compute(config, UNIT, monkeypatch).validation == (1 + 2) * 4 * (20 * 2 + 20)


# -- disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_checkpoint_and_cache_take_what_was_forecast(full: bool, sdxl_folder: Path, tmp_path: Path) -> None:
    config = DPOConfig(
        model=str(sdxl_folder), output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), max_pairs=4,
        max_steps=1, save_steps=1, full_finetuning=full, use_ema=True, lora_rank=64, report_to="none", progress=False,
    )  # fmt: skip
    model = build_meta_model(config)
    memory = estimate_memory(config, model=model)
    train(config)
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert checkpoint_bytes(config, memory) == pytest.approx(written, rel=0.1)
    pairs = CachedPairs(tmp_path / "cache")
    example = pairs.example(0, 0, False)
    assert example.posterior is not None
    assert example.cond is not None
    parts = [*example.posterior, example.cond.embeds, example.cond.pooled]
    latents, prompt = 2 * sum(p.nbytes for p in parts[:2]), sum(p.nbytes for p in parts[2:] if p is not None)
    assert cached_bytes(config, model) == latents + prompt  # also mirrored


# -- cards and the whole plan ------------------------------------------------------------------------------------------


def test_cards_have_names_and_numbers() -> None:
    assert find_card("8xH100").count == 8
    assert find_card("tflops:62.5").rate("fp32") == 62.5
    assert all(0 < card.single < card.half for card in CARDS.values())
    assert find_card("h200").rate("bf16") == pytest.approx(330, rel=0.01)  # as measured on one


@pytest.mark.parametrize("card", ["5000", "tflops:", "tflops:0", "0xh100", "h100x8", ""])
def test_an_unknown_card_is_an_error(card: str) -> None:
    with pytest.raises(ValueError, match="expected one of 4090, a100"):
        find_card(card)


def test_a_card_is_for_plans_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dpo", "--card", "h100"]) == 2
    assert "dry_run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_has_hours_and_says_that_they_are_an_estimate(sdxl_folder: Path) -> None:
    settings: dict[str, Any] = {"model": str(sdxl_folder), "max_pairs": 8, "dry_run": True}
    plan = make_plan(DPOConfig(**settings, card="2xa100"))
    for text in ("2 x a100", "an estimate", "assumed: 33% of 19.5 published (fp32)", "x 2 devices", "latent cache"):
        assert text in plan


@pytest.mark.slow
def test_data_of_the_hub_that_cannot_be_reached_leave_a_plan(
    sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no hub")

    monkeypatch.setattr("diffusion_align.training.pairs.loading.load_training_pairs", unreachable)
    plan = make_plan(DPOConfig(model=str(sdxl_folder), dataset="a/b", max_pairs=64, dry_run=True))
    assert "not read, training could not start here: no hub" in plan
    assert "epochs" in plan


def test_missing_files_are_still_an_error(sdxl_folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_plan(DPOConfig(model=str(sdxl_folder), dataset="./nothing", dry_run=True))
