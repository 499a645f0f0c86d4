"""What a run does not need is not loaded: encoders where all is cached, the denoiser where only encodings are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align import load_adapter, train
from diffusion_align.adapters import ENCODERS, PARTS, Adapter
from diffusion_align.cli import main
from diffusion_align.training import DPOConfig, InPOConfig
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.policy import model
from diffusion_align.training.policy.model import load_policy_model


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which parts each model was loaded with."""
    found: list[Any] = []
    whole = model.load_adapter

    def noted(name: str, **options: Any) -> Adapter:
        found.append(frozenset(options["parts"]))
        return whole(name, **options)

    monkeypatch.setattr(model, "load_adapter", noted)
    return found


@pytest.fixture
def settings(sdxl_folder: Path, pairs_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(sdxl_folder), "dataset": str(pairs_folder), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "report_to": "none", "progress": False, "logging_steps": 1, "overwrite_output_dir": True,
    }  # fmt: skip


NETWORK = PARTS - ENCODERS


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DPOConfig, InPOConfig])
def test_a_cached_run_loads_the_denoiser_alone(
    kind: Any, settings: dict[str, Any], loaded: list[Any], tmp_path: Path
) -> None:
    """The first run makes the cache and frees the encoders; the second only compares their weights. Both learn what a
    run learns that has everything loaded."""
    cached = settings | {"cache_dir": str(tmp_path / "cache")}
    first = train(kind(**cached))
    assert loaded == [ENCODERS, NETWORK]
    second = train(kind(**cached))
    assert loaded == [ENCODERS, NETWORK] * 2
    whole = train(kind(**cached), load_adapter(settings["model"]))
    losses = [[row["loss"] for row in run.history] for run in (first, second, whole)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_runs_that_encode_or_validate_load_everything(
    settings: dict[str, Any], loaded: list[Any], tmp_path: Path
) -> None:
    train(DPOConfig(**settings))
    train(DPOConfig(**settings, cache_dir=str(tmp_path / "cache"), eval_steps=2, num_validation_prompts=1,
                    validation_inference_steps=1))  # fmt: skip
    assert loaded == [PARTS, PARTS]


@pytest.mark.slow
def test_a_cache_of_another_model_is_still_refused(settings: dict[str, Any], sd_folder: Path, tmp_path: Path) -> None:
    cached = settings | {"cache_dir": str(tmp_path / "cache")}
    train(DPOConfig(**cached))
    with pytest.raises(ValueError, match="was made with another model"):
        train(DPOConfig(**cached | {"model": str(sd_folder)}))


@pytest.mark.slow
def test_the_cache_command_loads_no_denoiser(settings: dict[str, Any], loaded: list[Any], tmp_path: Path) -> None:
    flags = ["--model", settings["model"], "--dataset", settings["dataset"], "--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", *flags]) == 0
    assert loaded == [ENCODERS]


@pytest.mark.slow
def test_evaluators_are_trained_without_the_denoiser(settings: dict[str, Any], loaded: list[Any]) -> None:
    given = {name: settings[name] for name in settings if name != "logging_steps"}
    train(EvaluatorConfig(**given, kinds=("preference",), width=8, features=8, per_device_train_batch_size=2))
    assert loaded == [ENCODERS]


@pytest.mark.slow
def test_init_weights_may_belong_to_any_part(sdxl_folder: Path, loaded: list[Any], tmp_path: Path) -> None:
    load_adapter(sdxl_folder).train_lora(rank=2).save(tmp_path)
    load_policy_model(DPOConfig(model=str(sdxl_folder), init_weights=str(tmp_path)), "cpu", NETWORK)
    assert loaded == [PARTS]


@pytest.mark.slow
def test_full_runs_start_from_what_the_files_hold(sdxl_folder: Path) -> None:
    """And their reference is stored in ``weight_dtype``."""
    exact = load_adapter(sdxl_folder).unet.conv_in.weight
    config = DPOConfig(model=str(sdxl_folder), full_finetuning=True, weight_dtype="bf16", mixed_precision="bf16")
    adapter = load_policy_model(config, "cpu")
    model.prepare_policy(config, adapter)
    assert torch.equal(adapter.unet.conv_in.weight, exact)
    assert torch.equal(adapter.reference_state()["conv_in.weight"], exact.bfloat16())
    rounded = load_policy_model(DPOConfig(model=str(sdxl_folder), weight_dtype="bf16"), "cpu")
    assert rounded.dtype == torch.bfloat16
