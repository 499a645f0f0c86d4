"""All weights trained in two processes, whole in each (DDP) or cut (FSDP2): numbers, files and resumes are one's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from diffusion_align.training.engine import sharding
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.engine.sharding import check_launch
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train
from tests.processes import TwoProcesses, lines

FSDP2 = ("ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2")
FIRST, LAST = "checkpoint-00000001", "checkpoint-00000002"
LAUNCH = Path(sharding.__file__).parent / "launch"


@pytest.fixture(scope="module")
def config(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOConfig:
    return DPOConfig(
        model="scenes-sdxl",
        dataset=str(pairs_folder),
        output_dir=str(tmp_path_factory.mktemp("one") / "run"),
        full_finetuning=True,
        max_steps=2,
        save_steps=1,
        save_total_limit=9,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        beta=500.0,
        use_ema=True,
        ema_decay=0.5,
        eval_steps=2,
        num_validation_prompts=3,
        validation_scorer="scenes-clip",
        validation_inference_steps=1,
        logging_steps=1,
        report_to="none",
        progress=False,
    )


@pytest.fixture(scope="module")
def one(config: DPOConfig) -> TrainResult:
    return train(config)


def last_step(result: TrainResult) -> list[dict[str, float]]:
    return [line for line in result.history if line["step"] == 2 and "loss" in line]


def halved(config: DPOConfig, folder: Path, **changes: Any) -> DPOConfig:
    """The run of a process beside another one."""
    return replace(config, output_dir=str(folder), per_device_train_batch_size=1, **changes)


def check_equal_logs(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        # Pictures are drawn in bf16 where the processor computes it, which makes much of differences in the last bit.
        apart = {"samples_per_second", *(name for name in theirs if name.startswith("eval/") and theirs["step"])}
        names = theirs.keys() - apart
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=2e-3, abs=2e-4)
        if "eval/reward" in theirs:
            assert ours["eval/reward"] == pytest.approx(theirs["eval/reward"], abs=0.05)


def check_equal_weights(found: Path, expected: Path) -> None:
    """Same files, names and shapes; values but for rounding, which Adam's first steps can turn into a whole step."""
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(found) for path in found.rglob("*.safetensors"))
    for file in (file for file in files if file.parts[0] != "best"):  # whose step hangs on the pictures
        ours, theirs = load_file(found / file), load_file(expected / file)
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
        if file.stem not in ("rng", "method"):
            for name, tensor in theirs.items():
                assert (ours[name].double() - tensor.double()).abs().mean() < 1e-7, (file, name)


@pytest.fixture(scope="module")
def cut(
    config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path_factory: pytest.TempPathFactory
) -> DPOConfig:
    """A finished run, each of whose processes held a part of the network."""
    config = halved(config, tmp_path_factory.mktemp("cut") / "run")
    two_processes.train(config, *FSDP2)
    return config


@pytest.mark.slow
def test_a_network_cut_over_two_processes_trains_as_a_whole_one(
    cut: DPOConfig, one: TrainResult, two_processes: TwoProcesses
) -> None:
    """Losses, gradients, validation, checkpoints and what is left behind."""
    counts = re.findall(r"holds ([\d,]+) of ([\d,]+)", two_processes.log())[-1]
    here, whole = (int(count.replace(",", "")) for count in counts)
    assert whole / 2 <= here < 0.51 * whole
    check_equal_logs(lines(cut.output_dir), one.history)
    check_equal_weights(Path(cut.output_dir), one.output_dir)


@pytest.mark.slow
def test_two_processes_with_all_weights_each_train_as_one(
    config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    resumed = halved(config, tmp_path, resume_from_checkpoint=str(one.output_dir / FIRST), eval_steps=0)
    check_equal_logs(two_processes.train(resumed), last_step(one))
    check_equal_weights(tmp_path / LAST, one.output_dir / LAST)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_cut_and_resumed(
    config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    resumed = halved(config, tmp_path, resume_from_checkpoint=str(one.output_dir / FIRST), eval_steps=0)
    check_equal_logs(two_processes.train(resumed, *FSDP2), last_step(one))
    check_equal_weights(tmp_path / LAST, one.output_dir / LAST)


@pytest.mark.slow
def test_a_checkpoint_of_parts_is_resumed_by_one_process(
    config: DPOConfig, one: TrainResult, cut: DPOConfig, tmp_path: Path
) -> None:
    first = Path(cut.output_dir) / FIRST
    resumed = replace(config, output_dir=str(tmp_path), resume_from_checkpoint=str(first), eval_steps=0)
    check_equal_logs(train(resumed).history, last_step(one))
    check_equal_weights(tmp_path / LAST, one.output_dir / LAST)


@pytest.mark.parametrize(
    ("launched", "changes", "expected"),
    [
        ({"FSDP_VERSION": "1"}, {}, r"fsdp_version: 1 \(set it to 2\)"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "set the run's gradient_checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "TRANSFORMER_BASED_WRAP"),
        ({}, {"optim": "adafactor"}, "optim: adafactor, .*set it to adamw"),
        ({}, {"mixed_precision": "fp16"}, "set it to bf16 or no"),
    ],
)
def test_what_fsdp_does_not_do_here_is_refused(
    launched: dict[str, str], changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **launched}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=expected):
        check_launch(DPOConfig(**changes))


def test_deepspeed_is_refused_with_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"launch/zero2\.yaml"):
        check_launch(DPOConfig())


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_the_shipped_launches_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())["fsdp_config"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in settings.items():  # as accelerate's launcher passes them on
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    check_launch(DPOConfig())
