"""Memory that is used up: one line with what helps most, and where the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.faults.kills import COMMANDS, files_of
from diffusion_align.devices import is_out_of_memory
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.policy.costs.memory import estimate_memory
from diffusion_align.training.policy.costs.relief import best_savings, with_advice
from diffusion_align.training.scorers.config import RewardConfig

from .harness import outcome

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8."),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


GO_ON = "go on with --resume-from-checkpoint latest"


@pytest.mark.faults
@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_is_one_line_and_the_last_checkpoint_stands(
    kind: str, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole("train dpo")
    command, original, steps = COMMANDS["train dpo"], PairMethod.loss, [0]

    def loss(self: PairMethod, batch: object) -> object:
        steps[0] += 1
        if steps[0] == 3:
            raise ERRORS[kind]
        return original(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(PairMethod, "loss", loss)
        failed = outcome(command.arguments(tmp_path), tmp_path)
    assert failed.status == 1
    assert failed.error.startswith("error: out of memory (")
    assert failed.error.count("; ") == 2  # three settings
    assert "gradient_checkpointing full" in failed.error
    assert "run/checkpoint-00000002 stands: go on with --resume-from-checkpoint latest" in failed.error
    assert outcome(command.arguments(tmp_path), tmp_path).status == 0
    assert files_of(tmp_path / "run") == files_of(whole("train dpo") / "run")


@pytest.mark.faults
def test_the_settings_that_are_named_save_what_the_estimate_says(tmp_path: Path) -> None:
    config = DPOConfig(per_device_train_batch_size=16, output_dir=str(tmp_path))
    named = best_savings(config)
    assert len(named) == 3
    before, after = (
        estimate_memory(DPOConfig(per_device_train_batch_size=16, gradient_checkpointing=kind))  # type: ignore[arg-type]
        for kind in ("none", "full")
    )
    assert before is not None
    assert after is not None
    assert named[0] == f"gradient_checkpointing full (about {(before.total - after.total) / 2**30:.2f} GiB less)"
    assert any(text.startswith("per_device_train_batch_size 8 with gradient_accumulation_steps 2") for text in named)


@pytest.mark.faults
def test_what_is_used_already_is_not_advised(tmp_path: Path) -> None:
    config = DPOConfig(gradient_checkpointing="full", mixed_precision="bf16", weight_dtype="bf16", vae_batch_size=1)
    texts = " ".join(best_savings(config))
    for name in ("gradient_checkpointing", "per_device", "mixed_precision", "weight_dtype", "vae_batch_size"):
        assert name not in texts


@pytest.mark.parametrize("kind", ERRORS)
def test_the_advice_takes_the_place_of_the_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000002").mkdir()
    config = RewardConfig(per_device_train_batch_size=8, output_dir=str(tmp_path))
    said = r"^out of memory \(.*\). What helps most: per_device.*; .*; .*"
    with pytest.raises(RuntimeError, match=said) as told, with_advice(config):
        raise ERRORS[kind]
    assert str(told.value).endswith(f"{tmp_path}/checkpoint-00000002 stands: {GO_ON}")
    assert "\n" not in str(told.value)


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000002").mkdir()
    for error in (RuntimeError("shapes cannot be multiplied"), FileNotFoundError("no data")):
        with pytest.raises(type(error)) as told, with_advice(RewardConfig(output_dir=str(tmp_path))):
            raise error
        assert told.value is error


def test_a_scorer_s_training_has_advice_without_an_estimate(tmp_path: Path) -> None:
    assert best_savings(RewardConfig(per_device_train_batch_size=8, output_dir=str(tmp_path))) == [
        "per_device_train_batch_size 4 with gradient_accumulation_steps 2", "mixed_precision bf16", "optim adamw_8bit"
    ]  # fmt: skip


@pytest.mark.faults
def test_once_there_is_a_checkpoint_what_needs_a_new_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001").mkdir()
    config = DPOConfig(per_device_train_batch_size=16, output_dir=str(tmp_path), lora_rank=64)
    texts = {text.split(" ")[0]: text for text in best_savings(config)}
    assert "new run" not in texts["gradient_checkpointing"]
    assert "new run" not in texts["per_device_train_batch_size"]
    assert all(
        "in a new run only" in text for name, text in texts.items() if name in ("weight_dtype", "mixed_precision")
    )


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_errors_of_memory_are_known(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
