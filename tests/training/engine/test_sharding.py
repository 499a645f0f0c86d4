"""All weights trained in two processes, whole in each (DDP) or cut (FSDP2): numbers, files and resumes are one's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train
from tests.processes import TwoProcesses, lines

FSDP2 = ("ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2")
LAUNCHES = {"ddp": (), "fsdp2": FSDP2}


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
    for file in files:
        ours, theirs = load_file(found / file), load_file(expected / file)
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
        if file.stem not in ("rng", "method"):
            for name, tensor in theirs.items():
                assert (ours[name].double() - tensor.double()).abs().mean() < 1e-7, (file, name)


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_train_all_weights_as_one(
    launch: str, config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    """Losses, gradients, validation, checkpoints and what is left behind."""
    folder = tmp_path / "two"
    check_equal_logs(two_processes.train(halved(config, folder), *LAUNCHES[launch]), lines(config.output_dir))
    check_equal_weights(folder, Path(config.output_dir))


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_checkpoint_of_one_process_is_resumed_by_two(
    launch: str, config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    folder, first = tmp_path / "two", Path(config.output_dir) / "checkpoint-00000001"
    resumed = halved(config, folder, resume_from_checkpoint=str(first), eval_steps=0)
    check_equal_logs(two_processes.train(resumed, *LAUNCHES[launch]), last_step(one))
    check_equal_weights(folder / "checkpoint-00000002", Path(config.output_dir) / "checkpoint-00000002")


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_resumed_by_one(
    config: DPOConfig, one: TrainResult, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    two_processes.train(halved(config, tmp_path / "two", max_steps=1, eval_steps=0), *FSDP2)
    again = replace(
        config, output_dir=str(tmp_path / "one"), resume_from_checkpoint=str(tmp_path / "two"), eval_steps=0
    )
    check_equal_logs(train(again).history, last_step(one))
    check_equal_weights(tmp_path / "one" / "checkpoint-00000002", Path(config.output_dir) / "checkpoint-00000002")
